"""`GradientAccumulationScheduler`: accumulate over more or fewer batches as training goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainer.callbacks.callback import Callback
from trainer.errors import ConfigError

if TYPE_CHECKING:
    from trainer.module import Module
    from trainer.trainer import Trainer


class GradientAccumulationScheduler(Callback):
    """Sets `accumulate_grad_batches` at the start of given epochs: `{0: 8, 4: 4}` is 8, and 4 from epoch 4 on.

    Raises:
        ConfigError: an epoch is below 0 or a number of batches below 1, or (during `fit`) the Trainer has
            `accumulate_grad_batches` of its own.
    """

    def __init__(self, scheduling: dict[int, int]) -> None:
        bad = {k: v for k, v in scheduling.items() if type(k) is not int or type(v) is not int or k < 0 or v < 1}
        if not scheduling or bad:
            raise ConfigError(
                f"GradientAccumulationScheduler({scheduling!r}): give {{epoch from 0: number of batches from 1}}."
            )
        self.scheduling = {0: 1} | scheduling

    def going_to_accumulate_grad_batches(self) -> bool:
        """Whether more than one batch is accumulated at any time."""
        return any(batches > 1 for batches in self.scheduling.values())

    def get_accumulate_grad_batches(self, epoch: int) -> int:
        """The number of batches in this epoch."""
        return self.scheduling[max(start for start in self.scheduling if start <= epoch)]

    def on_train_start(self, trainer: Trainer, pl_module: Module) -> None:
        if not pl_module.automatic_optimization:
            raise ConfigError("GradientAccumulationScheduler needs automatic optimization.")
        if trainer.config.accumulate_grad_batches != 1:
            raise ConfigError(
                "Trainer(accumulate_grad_batches=...) and GradientAccumulationScheduler contradict each other; put the "
                "number into the scheduling, as epoch 0."
            )

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Module) -> None:
        trainer.accumulate_grad_batches = self.get_accumulate_grad_batches(trainer.current_epoch)
