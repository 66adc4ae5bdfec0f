"""`BasePredictionWriter`: each rank writes its predictions, with the samples they belong to."""

from __future__ import annotations

from abc import ABC
from enum import Enum
from typing import TYPE_CHECKING, Any

from trainer.callbacks.callback import Callback
from trainer.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trainer.module import Module
    from trainer.trainer import Trainer


class WriteInterval(str, Enum):
    """When predictions are written."""

    BATCH = "batch"
    EPOCH = "epoch"
    BATCH_AND_EPOCH = "batch_and_epoch"

    def __str__(self) -> str:
        return self.value

    @property
    def on_batch(self) -> bool:
        """Whether after each batch."""
        return self is not WriteInterval.EPOCH

    @property
    def on_epoch(self) -> bool:
        """Whether at the end."""
        return self is not WriteInterval.BATCH


class BasePredictionWriter(Callback, ABC):
    """Base of callbacks that write predictions; override one or both of its methods.

    With several ranks each one writes its own part, so a file's name should hold `trainer.global_rank`. The batch's
    sample indices in the dataset come along; they are None where the loader has a sampler of the user's own.

    Args:
        write_interval: "batch", "epoch" or "batch_and_epoch".

    Raises:
        ConfigError: another interval.
    """

    def __init__(self, write_interval: str = "batch") -> None:
        try:
            self.interval = WriteInterval(write_interval)
        except ValueError:
            raise ConfigError(
                f"{type(self).__name__}(write_interval={write_interval!r}). Allowed: batch, epoch, batch_and_epoch."
            ) from None

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: Module,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write one batch's predictions."""
        raise NotImplementedError(f"{type(self).__name__}.write_on_batch_end is not written")

    def write_on_epoch_end(
        self, trainer: Trainer, pl_module: Module, predictions: Sequence[Any], batch_indices: Sequence[Any]
    ) -> None:
        """Write all of this rank's predictions."""
        raise NotImplementedError(f"{type(self).__name__}.write_on_epoch_end is not written")

    def setup(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        writes = {"write_on_batch_end": self.interval.on_batch, "write_on_epoch_end": self.interval.on_epoch}
        for name, needed in writes.items():
            if needed and getattr(type(self), name) is getattr(BasePredictionWriter, name):
                raise ConfigError(f'{type(self).__name__}(write_interval="{self.interval}") has no {name}().')

    @property
    def needs_predictions(self) -> bool:
        """Whether the Trainer must keep the predictions until the end."""
        return self.interval.on_epoch

    def on_predict_start(self, trainer: Trainer, pl_module: Module) -> None:
        self._indices: list[list[Sequence[int] | None]] = [[] for _ in trainer.num_predict_batches]

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: Module, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        indices = trainer.predict_indices
        if indices == []:  # a copy that keeps this rank in step with the others
            return
        self._indices[dataloader_idx].append(indices)
        if self.interval.on_batch:
            self.write_on_batch_end(trainer, pl_module, outputs, indices, batch, batch_idx, dataloader_idx)

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: Module) -> None:
        if self.needs_predictions:
            several = len(trainer.predictions) > 1
            predictions = trainer.predictions if several else trainer.predictions[0]
            self.write_on_epoch_end(trainer, pl_module, predictions, self._indices)
