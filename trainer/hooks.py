"""Hooks that somebody overrides, bound once; a hook that nobody overrides is None and is never called."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trainer.profilers import PassThroughProfiler

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from trainer.metrics import Metrics
    from trainer.module import Module
    from trainer.profilers import Profiler

# Called on the callbacks first, then on the module. A module's `on_exception` and the sanity check's do not exist.
SHARED = (
    "on_fit_start", "on_fit_end", "on_train_start", "on_train_end", "on_train_epoch_start", "on_train_epoch_end",
    "on_train_batch_start", "on_train_batch_end", "on_before_zero_grad", "on_before_backward", "on_after_backward",
    "on_before_optimizer_step",
    "on_validation_start", "on_validation_end", "on_validation_epoch_start", "on_validation_epoch_end",
    "on_validation_batch_start", "on_validation_batch_end",
    "on_test_start", "on_test_end", "on_test_epoch_start", "on_test_epoch_end", "on_test_batch_start",
    "on_test_batch_end",
    "on_predict_start", "on_predict_end", "on_predict_epoch_start", "on_predict_epoch_end", "on_predict_batch_start",
    "on_predict_batch_end",
)  # fmt: skip
CALLBACK_ONLY = ("on_sanity_check_start", "on_sanity_check_end")
# Bound only if the module overrides them; the loop holds the default behaviour itself.
MODULE_ONLY = (
    "backward", "optimizer_step", "optimizer_zero_grad", "configure_gradient_clipping", "lr_scheduler_step",
    "on_validation_model_zero_grad", "on_validation_model_eval", "on_validation_model_train",
    "on_test_model_eval", "on_test_model_train", "on_predict_model_eval",
)  # fmt: skip
TRANSFER = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


def overridden(obj: Any, name: str, base: type[Any]) -> bool:
    """Whether `obj` has its own `name`, by its class or set on the object itself."""
    if name in getattr(obj, "__dict__", {}):
        return True
    return getattr(type(obj), name, None) is not getattr(base, name, None)


class Hooks:
    """For every hook a callable, or None.

    Calling one tells `metrics` its name, so that `self.log` inside knows where it is. With a profiler every call is
    timed under "[Callback]..." or "[Module]...".
    """

    def __init__(
        self,
        *,
        trainer: Any,
        module: Module,
        callbacks: Sequence[Any],
        metrics: Metrics,
        datamodule: Any = None,
        profiler: Profiler,
    ) -> None:
        from trainer.callbacks.callback import Callback
        from trainer.module import DataHooks
        from trainer.module import Module as Base

        def of_callbacks(name: str, chosen: Sequence[Any]) -> list[Callable[..., Any]]:
            found = []
            for callback in chosen:
                if overridden(callback, name, Callback):
                    function = getattr(callback, name)
                    found.append(timed(function, f"[Callback]{type(callback).__name__}.{name}", profiler))
            return found

        def of_module(name: str) -> Callable[..., Any] | None:
            if not overridden(module, name, Base):
                return None
            return timed(getattr(module, name), f"[Module]{type(module).__name__}.{name}", profiler)

        def bind(name: str, chosen: Sequence[Any], own: Callable[..., Any] | None) -> Callable[..., Any] | None:
            return _bind(name, of_callbacks(name, chosen), own, trainer, module, metrics)

        monitoring = [c for c in callbacks if getattr(c, "monitors_epoch_end", False)]
        others = [c for c in callbacks if c not in monitoring]
        for name in SHARED:
            chosen = others if name == "on_train_epoch_end" else callbacks
            setattr(self, name, bind(name, chosen, of_module(name)))
        # Callbacks that look at a value wait until the module has logged it in its own on_train_epoch_end.
        self.on_train_epoch_end_monitoring = bind("on_train_epoch_end", monitoring, None)
        for name in CALLBACK_ONLY:
            setattr(self, name, bind(name, callbacks, None))
        for name in MODULE_ONLY:
            own = of_module(name)
            setattr(self, name, None if own is None else _bind(name, [], own, trainer, module, metrics))
        for name in TRANSFER:
            owner = next((o for o in (datamodule, module) if o is not None and overridden(o, name, DataHooks)), None)
            function = None if owner is None else getattr(owner, name)
            setattr(self, name, None if function is None else _bind(name, [], function, trainer, module, metrics))

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"there is no hook {name!r}")


def timed(function: Callable[..., Any], action: str, profiler: Profiler) -> Callable[..., Any]:
    """The function with its calls timed under `action`; itself if nothing is measured."""
    if isinstance(profiler, PassThroughProfiler):
        return function

    def with_profiler(*args: Any, **kwargs: Any) -> Any:
        with profiler.profile(action):
            return function(*args, **kwargs)

    return with_profiler


def _bind(
    name: str,
    calls: list[Callable[..., Any]],
    own: Callable[..., Any] | None,
    trainer: Any,
    module: Module,
    metrics: Metrics,
) -> Callable[..., Any] | None:
    if not calls and own is None:
        return None

    def hook(*args: Any) -> Any:
        before = metrics.hook
        metrics.hook = name
        for call in calls:
            call(trainer, module, *args)
        result = own(*args) if own is not None else None
        metrics.hook = before
        return result

    return hook
