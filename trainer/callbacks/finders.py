"""`LearningRateFinder` and `BatchSizeFinder`: a run begins with trying what suits it (see `trainer.tuning`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trainer.callbacks.callback import Callback
from trainer.errors import ConfigError

if TYPE_CHECKING:
    from trainer.module import Module
    from trainer.trainer import Trainer
    from trainer.tuning import LearningRates


class Finder(Callback):
    """A callback that looks for something before the optimizers and loaders are made.

    What was found is in the checkpoint: a run that is resumed takes it from there.
    """

    def find(self, trainer: Trainer, pl_module: Module) -> None:
        """Look for it, and set it. Called on every rank before each fit, validate, test and predict."""
        raise NotImplementedError


class LearningRateFinder(Finder):
    """Finds a learning rate before training, as `Tuner.lr_find` does, and sets it.

    Args:
        min_lr, max_lr: between which rates to look. num_training_steps: how many to try.
        mode: "exponential" or "linear". early_stop_threshold: stop when the loss is this many times the best.
        update_attr, attr_name: set `lr` or `learning_rate` (or this attribute) of the model or its hparams.

    Attributes:
        optimal_lr: what was seen, with `.suggestion()` and `.plot()`; None before.
    """

    def __init__(
        self,
        min_lr: float = 1e-8,
        max_lr: float = 1,
        num_training_steps: int = 100,
        mode: str = "exponential",
        early_stop_threshold: float | None = 4.0,
        update_attr: bool = True,
        attr_name: str = "",
    ) -> None:
        self._options: dict[str, Any] = {
            "min_lr": min_lr, "max_lr": max_lr, "num_training": num_training_steps, "mode": mode,
            "early_stop_threshold": early_stop_threshold, "update_attr": update_attr, "attr_name": attr_name,
        }  # fmt: skip
        self.optimal_lr: LearningRates | None = None

    def lr_find(self, trainer: Trainer, pl_module: Module) -> None:
        """Look for the learning rate now; to be called from `on_fit_start` and the like of a subclass too."""
        from trainer.tuning import find_lr

        data = trainer.data.arguments()
        self.optimal_lr = find_lr(trainer, pl_module, data, **self._options)

    def find(self, trainer: Trainer, pl_module: Module) -> None:
        if trainer.state.fn == "fit" and not trainer.fast_dev_run:
            self.lr_find(trainer, pl_module)


class BatchSizeFinder(Finder):
    """Finds the largest batch size that fits into memory before a run, as `Tuner.scale_batch_size` does, and sets it.

    Args: those of `Tuner.scale_batch_size`.

    Attributes:
        optimal_batch_size: what was found; None before.
    """

    def __init__(
        self,
        mode: str = "power",
        steps_per_trial: int = 3,
        init_val: int = 2,
        max_trials: int = 25,
        batch_arg_name: str = "batch_size",
        margin: float = 0.05,
        max_val: int = 8192,
    ) -> None:
        self._options: dict[str, Any] = {
            "mode": mode, "steps_per_trial": steps_per_trial, "init_val": init_val, "max_trials": max_trials,
            "batch_arg_name": batch_arg_name, "margin": margin, "max_val": max_val,
        }  # fmt: skip
        self.optimal_batch_size: int | None = None

    def scale_batch_size(self, trainer: Trainer, pl_module: Module) -> None:
        """Look for the batch size now."""
        from trainer.tuning import find_batch_size

        if any(given is not None for given in trainer.data.given.values()):
            raise ConfigError(
                "BatchSizeFinder cannot change the batch size of loaders that were passed in. Define the loader in "
                f"the model or a DataModule, with batch_size=self.{self._options['batch_arg_name']}."
            )
        method = str(trainer.state.fn)
        self.optimal_batch_size = find_batch_size(
            trainer, pl_module, trainer.datamodule, method=method, **self._options
        )

    def find(self, trainer: Trainer, pl_module: Module) -> None:
        if not trainer.fast_dev_run:
            self.scale_batch_size(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        return {"optimal_batch_size": self.optimal_batch_size}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: Module, checkpoint: dict[str, Any]) -> None:
        from trainer.tuning import set_attribute

        saved = checkpoint.get("callbacks", {}).get(self.state_key, {}).get("optimal_batch_size")
        if saved is not None and trainer.state.fn == "fit":
            self.optimal_batch_size = saved
            set_attribute(self._options["batch_arg_name"], saved, trainer.datamodule, pl_module)
