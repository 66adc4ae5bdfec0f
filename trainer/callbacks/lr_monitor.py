"""`LearningRateMonitor`: the learning rates of all parameter groups, in the loggers."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import torch

from trainer.callbacks.callback import Callback
from trainer.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trainer.module import Module
    from trainer.trainer import Trainer


class LearningRateMonitor(Callback):
    """Logs each learning rate as `lr-<optimizer>` (or the scheduler's name), `/pg1`, ... for several groups.

    A parameter group may have a "name" of its own; optimizers of one type are numbered.

    Args:
        logging_interval: "step" logs with the steps that loggers get (`log_every_n_steps`), "epoch" at the start of
            epochs; None takes each scheduler's own interval, and both where an optimizer has no scheduler.
        log_momentum, log_weight_decay: log these too.

    Attributes:
        lrs: all values logged so far, by name.

    Raises:
        ConfigError: the interval is not allowed, or (during `fit`) the trainer has no logger.
    """

    def __init__(
        self, logging_interval: str | None = None, log_momentum: bool = False, log_weight_decay: bool = False
    ) -> None:
        if logging_interval not in (None, "step", "epoch"):
            raise ConfigError(f"LearningRateMonitor(logging_interval={logging_interval!r}). Allowed: step, epoch.")
        self.logging_interval = logging_interval
        self.log_momentum = log_momentum
        self.log_weight_decay = log_weight_decay
        self.lrs: dict[str, list[float]] = {}
        self._logged_step = -1

    def on_train_start(self, trainer: Trainer, pl_module: Module) -> None:
        if not trainer.loggers:
            raise ConfigError("LearningRateMonitor needs a logger: Trainer(logger=...) is switched off.")
        self.lrs = {name: [] for name, _, _ in self._groups(trainer)}

    def on_train_batch_start(self, trainer: Trainer, pl_module: Module, batch: Any, batch_idx: int) -> None:
        step, every = trainer.train_state.logger_step, trainer.log_every_n_steps
        # While gradients accumulate several batches belong to one step.
        if self.logging_interval == "epoch" or not every or (step + 1) % every or step == self._logged_step:
            return
        self._logged_step = step
        self._log(trainer, "step")

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Module) -> None:
        if self.logging_interval != "step":
            self._log(trainer, "epoch")

    def _log(self, trainer: Trainer, interval: str) -> None:
        values: dict[str, float] = {}
        for name, group, scheduled in self._groups(trainer):
            if self.logging_interval is None and scheduled not in (interval, None):
                continue
            values[name] = float(group["lr"])
            self.lrs.setdefault(name, []).append(values[name])
            if self.log_momentum:
                values[f"{name}-momentum"] = group["betas"][0] if "betas" in group else group.get("momentum", 0)
            if self.log_weight_decay:
                values[f"{name}-weight_decay"] = group.get("weight_decay", 0)
        if not values:
            return
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in values.items()})
        trainer.reports.log(values, None, epoch=False)

    @staticmethod
    def _groups(trainer: Trainer) -> Iterator[tuple[str, dict[str, Any], str | None]]:
        """Name, parameter group, and the interval of its scheduler (None without one)."""
        scheduled = {id(c.scheduler.optimizer): c for c in trainer.lr_scheduler_configs}
        seen: Counter[str] = Counter()
        for optimizer in trainer.optimizers:
            config = scheduled.get(id(optimizer))
            name = (config.name if config is not None else None) or f"lr-{type(optimizer).__name__}"
            seen[name] += 1
            if seen[name] > 1:
                name = f"{name}-{seen[name] - 1}"
            groups = optimizer.param_groups
            for number, group in enumerate(groups, start=1):
                label = group.get("name", f"pg{number}" if len(groups) > 1 else None)
                yield f"{name}/{label}" if label else name, group, None if config is None else config.interval
