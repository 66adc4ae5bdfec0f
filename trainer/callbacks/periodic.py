"""`Trainer(save_every=...)`: checkpoints to go on from, by steps, by time, or as often as pays."""

from __future__ import annotations

import math
import re
import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from trainer.callbacks.checkpoint import Checkpoint
from trainer.callbacks.interval import AgreedInterval
from trainer.errors import ConfigError
from trainer.ranks import rank_zero_info

if TYPE_CHECKING:
    from trainer.module import Module
    from trainer.saves import Cost
    from trainer.trainer import Trainer

# One failure per so many seconds of one rank, as long as nothing else is known: 419 interruptions in 54 days of 16,384
# GPUs ("The Llama 3 Herd of Models", section 3.3.4).
_PRIOR_S = 54 * 86400 * 16384 / 419
# Until a save was measured.
_FIRST_S = 60.0
# A save may not be awaited by the next one; and what is cheaper than anything need not be done all the time.
_DURABLE_SHARE, _LEAST_S = 0.8, 10.0
_UNITS = {"s": 1, "sec": 1, "min": 60, "h": 3600}


def parse_save_every(value: int | str | timedelta) -> int | float | str:
    """Steps (an int), seconds (a float), or "auto".

    Raises:
        ConfigError: it is none of the forms.
    """
    if value == "auto":
        return "auto"
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    seconds = 0.0
    if isinstance(value, timedelta):
        seconds = value.total_seconds()
    elif isinstance(value, str) and (match := re.fullmatch(r"([0-9.]+) ?(s|sec|min|h)", value.strip())):
        seconds = float(match[1]) * _UNITS[match[2]]
    if seconds <= 0:
        raise ConfigError(
            f"save_every={value!r}. Allowed: a number of optimizer steps, a time such as '30s', '10min', '2h' or a "
            "timedelta, or 'auto'."
        )
    return seconds


def best_interval(stall_s: float, durable_s: float, between_failures_s: float) -> float:
    """Seconds between saves at which training loses least, to saves that stall it and to work that failures undo.

    Daly's estimate (Future Generation Computer Systems 22, 2006), which is Young's sqrt(2 stall x time between
    failures) with two more terms; but never so often that a save waits for that before it.
    """
    ratio = stall_s / (2 * between_failures_s)
    if ratio < 1:
        root = math.sqrt(2 * stall_s * between_failures_s)
        interval = root * (1 + math.sqrt(ratio) / 3 + ratio / 9) - stall_s
    else:
        interval = between_failures_s
    return max(interval, durable_s / _DURABLE_SHARE, _LEAST_S)


class PeriodicCheckpoint(Checkpoint):
    """Saves what a run can go on from every so many optimizer steps, so much time of rank 0's clock, or "auto".

    Each replaces that before the last. Where a ModelCheckpoint has just saved, nothing is done.

    "auto" measures how long a save stalls training and takes until it is durable, and how often the run failed; a
    stop that was announced is no failure. It logs what it chose.
    """

    def __init__(self, every: int | str | timedelta) -> None:
        self.every = parse_save_every(every)
        by_time = isinstance(self.every, float) or self.every == "auto"
        self._interval = AgreedInterval(self.every if isinstance(self.every, float) else _FIRST_S) if by_time else None
        self._cost: Cost | None = None
        self._saved_step = -1
        # Over all attempts of the run.
        self._seconds_before = 0.0
        self._stops = 0
        self._began = time.monotonic()

    @property
    def state_key(self) -> str:
        return "PeriodicCheckpoint"

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self._seconds(), "stops": self._stops} if self.every == "auto" else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._seconds_before, self._stops = state_dict["seconds"], state_dict["stops"]

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Module, checkpoint: dict[str, Any]) -> None:
        if self.every == "auto" and trainer.saves.stopping:
            checkpoint["callbacks"][self.state_key]["stops"] = self._stops + 1

    def on_train_start(self, trainer: Trainer, pl_module: Module) -> None:
        self._began = time.monotonic()
        if self._interval is not None:
            self._interval.begin()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Module, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._interval is not None:
            if self.every == "auto" and trainer.is_global_zero and trainer.saves.cost is not self._cost:
                self._choose(trainer)
            if not self._interval.passed(trainer):
                return
            self._interval.begin()
        elif trainer.global_step % int(self.every) or trainer.global_step == self._saved_step:
            return
        self._saved_step = trainer.global_step
        if not trainer.saves.up_to_date:
            trainer.saves.for_resume("every")

    def _seconds(self) -> float:
        return self._seconds_before + time.monotonic() - self._began

    def _choose(self, trainer: Trainer) -> None:
        """On rank 0, whose clock decides: the interval that what is known by now makes the best."""
        self._cost = cost = trainer.saves.cost
        assert cost is not None
        assert self._interval is not None
        failures = max(0, trainer.ranks.attempt - self._stops)
        expected_s = _PRIOR_S / trainer.world_size
        between_s = min(expected_s, self._seconds() / failures) if failures else max(expected_s, self._seconds())
        chosen = best_interval(cost.stall_s, cost.durable_s, between_s)
        if not 0.8 < chosen / self._interval.seconds < 1.25:
            rank_zero_info(
                f"save_every='auto': every {chosen:.0f} s from now on. A save stalls training for {cost.stall_s:.3f} s "
                f"and is durable after {cost.durable_s:.2f} s; {failures} failures so far, one in "
                f"{between_s / 3600:.2g} h is expected."
            )
            self._interval.seconds = chosen
