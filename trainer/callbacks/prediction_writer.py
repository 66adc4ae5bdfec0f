"""`BasePredictionWriter`: each rank writes its predictions, with the samples they belong to."""

from __future__ import annotations

from abc import ABC
from typing import TYPE_CHECKING, Any

from trainer.callbacks.callback import Callback
from trainer.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trainer.module import Module
    from trainer.trainer import Trainer


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
        if write_interval not in ("batch", "epoch", "batch_and_epoch"):
            raise ConfigError(
                f"{type(self).__name__}(write_interval={write_interval!r}). Allowed: batch, epoch, batch_and_epoch."
            )
        self.interval = write_interval

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
        for interval, name in (("batch", "write_on_batch_end"), ("epoch", "write_on_epoch_end")):
            if interval in self.interval and getattr(type(self), name) is getattr(BasePredictionWriter, name):
                raise ConfigError(f"{type(self).__name__}(write_interval={self.interval!r}) has no {name}().")

    @property
    def needs_predictions(self) -> bool:
        """Whether the Trainer must keep the predictions until the end."""
        return "epoch" in self.interval

    def on_predict_start(self, trainer: Trainer, pl_module: Module) -> None:
        self._indices: list[list[Sequence[int] | None]] = [[] for _ in trainer.num_predict_batches]

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: Module, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        indices = trainer.predict_indices
        if indices == []:  # a copy that keeps this rank in step with the others
            return
        self._indices[dataloader_idx].append(indices)
        if "batch" in self.interval:
            self.write_on_batch_end(trainer, pl_module, outputs, indices, batch, batch_idx, dataloader_idx)

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: Module) -> None:
        if self.needs_predictions:
            several = len(trainer.predictions) > 1
            predictions = trainer.predictions if several else trainer.predictions[0]
            self.write_on_epoch_end(trainer, pl_module, predictions, self._indices)
