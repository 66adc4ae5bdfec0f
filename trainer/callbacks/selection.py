"""Which callbacks a Trainer has, and in which order they are called."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trainer.callbacks.callback import Callback
from trainer.callbacks.checkpoint import Checkpoint, ModelCheckpoint
from trainer.callbacks.periodic import PeriodicCheckpoint
from trainer.callbacks.progress import ProgressBar, RichProgressBar
from trainer.callbacks.summary import ModelSummary
from trainer.callbacks.timer import Timer
from trainer.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trainer.config import Config


def arrange(config: Config) -> list[Any]:
    """The user's callbacks and those that every Trainer has unless told otherwise.

    Raises:
        ConfigError: a flag forbids a callback that was given, or two were given where one is possible.
    """
    given = config.callbacks
    chosen = [] if given is None else [given] if isinstance(given, Callback) else list(given)
    for callback in chosen:
        if not isinstance(callback, Callback):
            raise ConfigError(
                f"callbacks={callback!r}: a {type(callback).__module__}.{type(callback).__qualname__} is not a "
                "trainer.Callback. A callback written against another package must import its base class from here."
            )
    _add(chosen, Checkpoint, ModelCheckpoint, config.enable_checkpointing, "enable_checkpointing")
    _add(chosen, ProgressBar, RichProgressBar, config.enable_progress_bar, "enable_progress_bar")
    _add(chosen, ModelSummary, ModelSummary, config.enable_model_summary, "enable_model_summary")
    if sum(isinstance(c, ProgressBar) for c in chosen) > 1:
        raise ConfigError("callbacks holds more than one progress bar; give one.")
    if config.max_time is not None:
        if any(isinstance(c, Timer) for c in chosen):
            raise ConfigError("max_time and a Timer in callbacks contradict each other; give one of them.")
        chosen.append(Timer(config.max_time))
    if config.save_every is not None:
        periodic = PeriodicCheckpoint(config.save_every)
        if not config.enable_checkpointing:
            raise ConfigError(f"save_every={config.save_every!r} and enable_checkpointing=False contradict each other.")
        chosen.append(periodic)
    return ordered(chosen)


def _add(chosen: list[Any], kind: type[Callback], default: type[Callback], enabled: bool | None, flag: str) -> None:
    given = [c for c in chosen if isinstance(c, kind)]
    if given and not enabled:
        raise ConfigError(f"{flag}=False, but callbacks holds a {type(given[0]).__name__}; drop one of the two.")
    if not given and enabled:
        chosen.append(default())


def ordered(callbacks: Sequence[Any]) -> list[Any]:
    """The same, checkpoints last, so that what other callbacks do at a hook is in the checkpoint."""
    return sorted(callbacks, key=lambda c: isinstance(c, Checkpoint))
