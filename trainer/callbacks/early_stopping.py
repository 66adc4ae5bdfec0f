"""`EarlyStopping`: end training when a logged value stops getting better."""

from __future__ import annotations

import math
from enum import Enum
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trainer.callbacks.callback import Callback
from trainer.errors import ConfigError
from trainer.ranks import rank_zero_info, rank_zero_warn

if TYPE_CHECKING:
    from collections.abc import Callable

    from trainer.module import Module
    from trainer.trainer import Trainer


class EarlyStoppingReason(Enum):
    """Why training was ended."""

    NOT_STOPPED = 0
    STOPPING_THRESHOLD = 1
    DIVERGENCE_THRESHOLD = 2
    PATIENCE_EXHAUSTED = 3
    NON_FINITE_METRIC = 4


class EarlyStopping(Callback):
    """Ends training once `monitor` has not improved in `patience` checks. All ranks stop if one of them would.

    Args:
        monitor: logged name to watch.
        min_delta: an improvement must be larger than this.
        patience: checks without improvement that are allowed. A check is made at the end of every training epoch,
            or after every validation if those do not come once per epoch.
        verbose: say so when the value improves.
        mode: "min" or "max": which values are better.
        strict: it is an error if nothing is logged under `monitor`; else there is a warning.
        check_finite: end training when the value is NaN or infinite.
        stopping_threshold: end training at once when the value is better than this.
        divergence_threshold: end training at once when the value is worse than this.
        check_on_train_epoch_end: True checks at the end of training epochs, False after validations.
        log_rank_zero_only: say why training ended on rank 0 only, else on each rank that decided so.

    Attributes:
        stopped_epoch, stopping_reason, stopping_reason_message: when and why training was ended.
        best_score, wait_count: the best value so far and the number of checks since then.

    Raises:
        ConfigError: an argument is not allowed or (during `fit`) `monitor` was not logged.
    """

    monitors_epoch_end = True
    mode_dict: dict[str, Callable[..., Tensor]] = {"min": torch.lt, "max": torch.gt}  # noqa: RUF012 - Lightning's name

    def __init__(
        self,
        monitor: str,
        min_delta: float = 0.0,
        patience: int = 3,
        verbose: bool = False,
        mode: str = "min",
        strict: bool = True,
        check_finite: bool = True,
        stopping_threshold: float | None = None,
        divergence_threshold: float | None = None,
        check_on_train_epoch_end: bool | None = None,
        log_rank_zero_only: bool = False,
    ) -> None:
        if mode not in self.mode_dict:
            raise ConfigError(f"EarlyStopping(mode={mode!r}). Allowed: 'min', 'max'.")
        self.monitor = monitor
        self.patience = patience
        self.verbose = verbose
        self.mode = mode
        self.strict = strict
        self.check_finite = check_finite
        self.stopping_threshold = stopping_threshold
        self.divergence_threshold = divergence_threshold
        self.log_rank_zero_only = log_rank_zero_only
        self.min_delta = abs(min_delta) if mode == "max" else -abs(min_delta)
        self.best_score = torch.tensor(math.inf if mode == "min" else -math.inf)
        self.wait_count = 0
        self.stopped_epoch = 0
        self.stopping_reason = EarlyStoppingReason.NOT_STOPPED
        self.stopping_reason_message: str | None = None
        self._check_on_train_epoch_end = check_on_train_epoch_end

    @property
    def state_key(self) -> str:
        return self._generate_state_key(monitor=self.monitor, mode=self.mode)

    @property
    def monitor_op(self) -> Callable[..., Tensor]:
        """`monitor_op(a, b)`: whether a is better than b."""
        return self.mode_dict[self.mode]

    def setup(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        if self._check_on_train_epoch_end is None:
            self._check_on_train_epoch_end = trainer.val_check_interval == 1.0 and trainer.check_val_every_n_epoch == 1

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Module) -> None:
        if self._check_on_train_epoch_end and not self._should_skip_check(trainer):
            self._run_early_stopping_check(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: Module) -> None:
        if not self._check_on_train_epoch_end and not self._should_skip_check(trainer):
            self._run_early_stopping_check(trainer)

    def _should_skip_check(self, trainer: Trainer) -> bool:
        return trainer.state.fn != "fit" or trainer.sanity_checking or bool(trainer.fast_dev_run)

    def _run_early_stopping_check(self, trainer: Trainer) -> None:
        current = trainer.callback_metrics.get(self.monitor)
        if current is None:
            message = (
                f"EarlyStopping(monitor={self.monitor!r}): nothing was logged under that name; there are "
                f"{sorted(trainer.callback_metrics)}."
            )
            if self.strict:
                raise ConfigError(message)
            rank_zero_warn(message)
            return
        stop, reason = self._evaluate_stopping_criteria(current.detach().squeeze().cpu())
        stop_any = trainer.strategy.reduce_boolean_decision(stop, all=False)
        if stop_any:
            trainer.should_stop = True
            self.stopped_epoch = trainer.current_epoch
            self.stopping_reason_message = reason
        if reason and (stop or self.verbose):
            if trainer.world_size > 1 and stop and not self.log_rank_zero_only and not trainer.is_global_zero:
                print(f"[rank {trainer.global_rank}] {reason}", flush=True)  # noqa: T201 - only this rank knows
            else:
                rank_zero_info(reason)

    def _evaluate_stopping_criteria(self, current: Tensor) -> tuple[bool, str | None]:
        """Whether to stop, and a sentence about this check."""
        better, named = self.monitor_op, f"{self.monitor} = {current.item():.5g}"
        if self.check_finite and not torch.isfinite(current):
            self.stopping_reason = EarlyStoppingReason.NON_FINITE_METRIC
            return True, f"Training ends early: {named} is not finite (the best was {self.best_score.item():.5g})."
        if self.stopping_threshold is not None and better(current, self.stopping_threshold):
            self.stopping_reason = EarlyStoppingReason.STOPPING_THRESHOLD
            return True, f"Training ends early: {named} has reached the threshold {self.stopping_threshold}."
        if self.divergence_threshold is not None and better(-current, -self.divergence_threshold):
            self.stopping_reason = EarlyStoppingReason.DIVERGENCE_THRESHOLD
            return True, f"Training ends early: {named} is worse than the threshold {self.divergence_threshold}."
        if better(current - self.min_delta, self.best_score.to(current.dtype)):
            before, self.best_score, self.wait_count = self.best_score, current, 0
            by = f" by {abs(before.item() - current.item()):.3g}" if torch.isfinite(before) else ""
            return False, f"{named} improved{by}."
        self.wait_count += 1
        if self.wait_count >= self.patience:
            self.stopping_reason = EarlyStoppingReason.PATIENCE_EXHAUSTED
            return True, (
                f"Training ends early: {self.monitor} did not improve on {self.best_score.item():.5g} in the last "
                f"{self.wait_count} checks."
            )
        return False, None

    def state_dict(self) -> dict[str, Any]:
        return {
            "wait_count": self.wait_count,
            "stopped_epoch": self.stopped_epoch,
            "best_score": self.best_score,
            "patience": self.patience,
            "stopping_reason": self.stopping_reason.value,
            "stopping_reason_message": self.stopping_reason_message,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.wait_count = state_dict["wait_count"]
        self.stopped_epoch = state_dict["stopped_epoch"]
        self.best_score = torch.as_tensor(state_dict["best_score"])
        self.patience = state_dict["patience"]
        self.stopping_reason = EarlyStoppingReason(state_dict.get("stopping_reason", 0))
        self.stopping_reason_message = state_dict.get("stopping_reason_message")
