"""`DataModule`: everything about the data of a task, reusable with any model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from trainer.errors import ModuleError
from trainer.hparams import HyperParameters, build_from_hparams
from trainer.module import DataHooks

if TYPE_CHECKING:
    from pathlib import Path

    from typing_extensions import Self

    from trainer.trainer import Trainer


class DataModule(HyperParameters, DataHooks):
    """prepare_data, setup, loaders and transforms of one task.

    `prepare_data` runs once per node, `setup(stage)` on every rank, then the loaders are asked for. What
    `state_dict` returns is in every checkpoint.
    """

    CHECKPOINT_HYPER_PARAMS_KEY = "datamodule_hyper_parameters"
    CHECKPOINT_HYPER_PARAMS_NAME = "datamodule_hparams_name"

    trainer: Trainer | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if args or kwargs:
            raise ModuleError(
                f"{type(self).__name__}(...) was given {len(args) + len(kwargs)} arguments and takes none. To make one "
                "from datasets: DataModule.from_datasets(train_dataset, val_dataset, test_dataset, batch_size=..., "
                "num_workers=...)."
            )
        super().__init__()

    @classmethod
    def from_datasets(
        cls,
        train_dataset: Any | None = None,
        val_dataset: Any | None = None,
        test_dataset: Any | None = None,
        predict_dataset: Any | None = None,
        batch_size: int = 1,
        num_workers: int = 0,
        **datamodule_kwargs: Any,
    ) -> DataModule:
        """A DataModule over datasets (or lists or dicts of them); the training set is shuffled if it has a length."""

        def loader(dataset: Any, shuffle: bool) -> Any:
            if isinstance(dataset, Mapping):
                return {name: loader(d, shuffle) for name, d in dataset.items()}
            if isinstance(dataset, Sequence):
                return [loader(d, shuffle) for d in dataset]
            shuffled = shuffle and not isinstance(dataset, IterableDataset)
            return DataLoader(
                dataset,
                batch_size=batch_size,
                shuffle=shuffled,
                num_workers=num_workers,
                pin_memory=torch.cuda.is_available(),
            )

        datamodule = cls(**datamodule_kwargs)
        for name, dataset in (
            ("train_dataloader", train_dataset),
            ("val_dataloader", val_dataset),
            ("test_dataloader", test_dataset),
            ("predict_dataloader", predict_dataset),
        ):
            if dataset is not None:
                shuffle = name == "train_dataloader"
                setattr(datamodule, name, lambda dataset=dataset, shuffle=shuffle: loader(dataset, shuffle))
        return datamodule

    def state_dict(self) -> dict[str, Any]:
        """What must survive a restart."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""

    def on_exception(self, exception: BaseException) -> None:
        """Called when the run fails or is interrupted."""

    @classmethod
    def load_from_checkpoint(
        cls,
        checkpoint_path: str | Path,
        map_location: Any = None,
        hparams_file: str | Path | None = None,
        weights_only: bool | None = None,
        **kwargs: Any,
    ) -> Self:
        """Build the DataModule from a checkpoint's hyperparameters (`kwargs` win) and load its state."""
        from trainer.checkpoint import load_checkpoint

        checkpoint = load_checkpoint(checkpoint_path, map_location=map_location, weights_only=weights_only is not False)
        if hparams_file is not None:
            import yaml  # type: ignore[import-untyped]

            with open(hparams_file) as file:
                checkpoint[cls.CHECKPOINT_HYPER_PARAMS_KEY] = yaml.safe_load(file)
        renamed = {
            HyperParameters.CHECKPOINT_HYPER_PARAMS_KEY: checkpoint.get(cls.CHECKPOINT_HYPER_PARAMS_KEY),
            HyperParameters.CHECKPOINT_HYPER_PARAMS_NAME: checkpoint.get(cls.CHECKPOINT_HYPER_PARAMS_NAME),
        }
        datamodule: Self = build_from_hparams(cls, renamed, kwargs)
        if cls.__qualname__ in checkpoint:
            datamodule.load_state_dict(checkpoint[cls.__qualname__])
        return datamodule
