"""`Timer`: measures the stages of a run, and ends training after a given time."""

from __future__ import annotations

import re
import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from trainer.callbacks.callback import Callback
from trainer.callbacks.interval import AgreedInterval
from trainer.errors import ConfigError
from trainer.ranks import rank_zero_info

if TYPE_CHECKING:
    from collections.abc import Mapping

    from trainer.module import Module
    from trainer.trainer import Trainer

_STAGES = ("train", "sanity_check", "validate", "test", "predict")


class Timer(Callback):
    """Ends training once it has taken `duration`, counted over all restarts of the run.

    Rank 0's clock decides, and all ranks stop after the same batch or epoch. `min_epochs` and `min_steps` of the
    Trainer are still met.

    Args:
        duration: "DD:HH:MM:SS", a timedelta, or a dict of timedelta's arguments; None only measures.
        interval: look after every "step" or "epoch".
        verbose: say so when the time is over.

    Raises:
        ConfigError: the duration or interval is not one of these forms.
    """

    monitors_epoch_end = True

    def __init__(
        self,
        duration: str | timedelta | Mapping[str, float] | None = None,
        interval: str = "step",
        verbose: bool = True,
    ) -> None:
        if interval not in ("step", "epoch"):
            raise ConfigError(f"Timer(interval={interval!r}). Allowed: 'step', 'epoch'.")
        self._duration = None if duration is None else seconds_of(duration)
        self._interval = interval
        self._verbose = verbose
        self._begun: dict[str, float] = {}
        self._ended: dict[str, float] = {}
        self._before = 0.0
        self._clock = None if self._duration is None else AgreedInterval(self._duration)

    def start_time(self, stage: str = "train") -> float | None:
        """When the stage began, on the monotonic clock."""
        return self._begun.get(_stage(stage))

    def end_time(self, stage: str = "train") -> float | None:
        """When the stage ended, on the monotonic clock."""
        return self._ended.get(_stage(stage))

    def time_elapsed(self, stage: str = "train") -> float:
        """Seconds that the stage has taken; for training, with the earlier attempts of a resumed run."""
        stage = _stage(stage)
        before = self._before if stage == "train" else 0.0
        begun = self._begun.get(stage)
        if begun is None:
            return before
        return before + self._ended.get(stage, time.monotonic()) - begun

    def time_remaining(self, stage: str = "train") -> float | None:
        """Seconds until `duration` is over, or None without one."""
        return None if self._duration is None else self._duration - self.time_elapsed(stage)

    def _begin(self, stage: str) -> None:
        self._ended.pop(stage, None)
        self._begun[stage] = time.monotonic()

    def _end(self, stage: str) -> None:
        self._ended[stage] = time.monotonic()

    def on_train_start(self, trainer: Trainer, pl_module: Module) -> None:
        self._begin("train")
        if self._clock is not None:
            self._clock.begin(elapsed=self._before)
            self._stop_if_over(trainer, self._clock.passed_already(trainer))

    def on_train_end(self, trainer: Trainer, pl_module: Module) -> None:
        self._end("train")

    def on_validation_start(self, trainer: Trainer, pl_module: Module) -> None:
        self._begin("validate")

    def on_validation_end(self, trainer: Trainer, pl_module: Module) -> None:
        self._end("validate")

    def on_test_start(self, trainer: Trainer, pl_module: Module) -> None:
        self._begin("test")

    def on_test_end(self, trainer: Trainer, pl_module: Module) -> None:
        self._end("test")

    def on_predict_start(self, trainer: Trainer, pl_module: Module) -> None:
        self._begin("predict")

    def on_predict_end(self, trainer: Trainer, pl_module: Module) -> None:
        self._end("predict")

    def on_train_batch_end(self, trainer: Trainer, pl_module: Module, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._clock is not None and self._interval == "step" and not trainer.should_stop:
            self._stop_if_over(trainer, self._clock.passed(trainer))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Module) -> None:
        if self._clock is not None and self._interval == "epoch":
            self._stop_if_over(trainer, self._clock.passed_already(trainer))

    def _stop_if_over(self, trainer: Trainer, over: bool) -> None:
        if not over or trainer.should_stop:
            return
        trainer.should_stop = True
        if self._verbose:
            rank_zero_info(f"Training ends: the time limit of {self._duration:g} s is reached.")

    def state_dict(self) -> dict[str, Any]:
        return {"time_elapsed": {stage: self.time_elapsed(stage) for stage in _STAGES}}

    def snapshot_state(self) -> dict[str, Any]:
        return {}  # time that a step took is spent, also if it is undone

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._before = float(state_dict.get("time_elapsed", {}).get("train", 0.0))


def _stage(stage: str) -> str:
    name = str(getattr(stage, "value", stage))
    if name not in _STAGES:
        raise ConfigError(f"Timer knows no stage {name!r}; there are {', '.join(_STAGES)}.")
    return name


def seconds_of(duration: str | timedelta | Mapping[str, float]) -> float:
    """A duration in seconds, from "DD:HH:MM:SS", a timedelta or a dict of its arguments.

    Raises:
        ConfigError: it is none of these.
    """
    if isinstance(duration, timedelta):
        return duration.total_seconds()
    if isinstance(duration, str):
        match = re.fullmatch(r"(\d+):(\d\d):(\d\d):(\d\d)", duration.strip())
        if match is None:
            raise ConfigError(f"The duration {duration!r} cannot be read; write DD:HH:MM:SS, such as '00:12:00:00'.")
        days, hours, minutes, seconds = map(int, match.groups())
        return timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds).total_seconds()
    try:
        return timedelta(**duration).total_seconds()
    except TypeError as error:
        raise ConfigError(
            f"The duration {duration!r} cannot be read; give 'DD:HH:MM:SS', a timedelta, or a dict such as "
            "{'hours': 12}."
        ) from error
