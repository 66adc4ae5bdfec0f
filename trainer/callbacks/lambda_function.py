"""`LambdaCallback`: hooks given as functions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trainer.callbacks.callback import Callback
from trainer.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable


class LambdaCallback(Callback):
    """`LambdaCallback(on_train_end=lambda trainer, pl_module: ...)`, with the arguments that the hook has.

    Raises:
        ConfigError: there is no such hook.
    """

    def __init__(self, **hooks: Callable[..., Any] | None) -> None:
        for name, function in hooks.items():
            if not (name.startswith("on_") or name in ("setup", "teardown")) or not hasattr(Callback, name):
                known = [n for n in dir(Callback) if n.startswith("on_") or n in ("setup", "teardown")]
                raise ConfigError(f"LambdaCallback({name}=...): there is no such hook; there are {', '.join(known)}.")
            if function is not None:
                setattr(self, name, function)
