"""What `configure_optimizers` may return, read into one form, and the wrapper that a manual step uses.

The accepted forms are those that the Lightning documentation lists: an optimizer; a list or tuple of them;
two lists (optimizers, schedulers); a dict with `optimizer` and `lr_scheduler`; a list or tuple of such dicts; None.
"""

from __future__ import annotations

import inspect
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR, ReduceLROnPlateau

from trainer.errors import ConfigError, ModuleError
from trainer.ranks import rank_zero_warn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch

    from trainer.module import Module
    from trainer.parallel import Parallel
    from trainer.precision import Precision


@dataclass
class SchedulerConfig:
    """One learning-rate scheduler and when it is stepped.

    interval: "epoch" or "step" (an optimizer step). frequency: every how many of them. monitor: name of the logged
    value that a ReduceLROnPlateau looks at. strict: a missing monitor is an error (else a warning). name: how
    LearningRateMonitor calls it.
    """

    scheduler: Any
    name: str | None = None
    interval: str = "epoch"
    frequency: int = 1
    reduce_on_plateau: bool = False
    monitor: str | None = None
    strict: bool = True


_SCHEDULER_KEYS = {f.name for f in fields(SchedulerConfig)}


def read_optimizers(module: Module) -> tuple[list[Optimizer], list[SchedulerConfig]]:
    """Call `module.configure_optimizers()` and check what it returned.

    Raises:
        ModuleError: the returned form is unknown, or several optimizers are used with automatic optimization, or a
            scheduler belongs to an optimizer that was not returned.
    """
    returned = module.configure_optimizers()
    if returned is None:
        rank_zero_warn("configure_optimizers() returned None: this fit runs without an optimizer.")
        return [], []
    optimizers, schedulers, monitor = _unpack(returned)
    if module.automatic_optimization and len(optimizers) > 1:
        raise ModuleError(
            f"configure_optimizers() returned {len(optimizers)} optimizers; with automatic optimization there can be "
            "only one. Set self.automatic_optimization = False in __init__ and step them yourself in training_step: "
            "opt1, opt2 = self.optimizers()."
        )
    configs = [_scheduler_config(s, monitor, automatic=module.automatic_optimization) for s in schedulers]
    for config in configs:
        owner = getattr(config.scheduler, "optimizer", None)
        if owner is not None and not any(owner is o for o in optimizers):
            raise ModuleError(
                f"The scheduler {type(config.scheduler).__name__} belongs to an optimizer that configure_optimizers() "
                "did not return. Return that optimizer too."
            )
        if not (hasattr(config.scheduler, "state_dict") and hasattr(config.scheduler, "load_state_dict")):
            raise ModuleError(
                f"The scheduler {type(config.scheduler).__name__} has no state_dict()/load_state_dict(), so it could "
                "not be resumed. Add both."
            )
        known = isinstance(config.scheduler, (LRScheduler, ReduceLROnPlateau))
        overridden = type(module).lr_scheduler_step is not _default_scheduler_step()
        if module.automatic_optimization and not known and not overridden:
            raise ModuleError(
                f"{type(config.scheduler).__name__} is not a torch LRScheduler. Say how it is stepped by overriding "
                "lr_scheduler_step(self, scheduler, metric) in your module."
            )
    return optimizers, configs


def _default_scheduler_step() -> Any:
    from trainer.module import Module

    return Module.lr_scheduler_step


def _unpack(returned: Any) -> tuple[list[Optimizer], list[Any], str | None]:
    """The optimizers, the schedulers (bare or dict), and the monitor of the single-dict form."""
    if _is_optimizer(returned):
        return [returned], [], None
    if isinstance(returned, dict):
        return [_from_dict(returned)], _schedulers_of(returned), returned.get("monitor")
    if isinstance(returned, (list, tuple)):
        items = list(returned)
        if len(items) == 2 and isinstance(items[0], (list, tuple)) and all(_is_optimizer(o) for o in items[0]):
            return list(items[0]), list(items[1]) if isinstance(items[1], (list, tuple)) else [items[1]], None
        if items and all(isinstance(item, dict) for item in items):
            schedulers = []
            for item in items:
                for scheduler in _schedulers_of(item):
                    config = dict(scheduler) if isinstance(scheduler, dict) else {"scheduler": scheduler}
                    if item.get("monitor") is not None:
                        config.setdefault("monitor", item["monitor"])
                    schedulers.append(config)
            return [_from_dict(item) for item in items], schedulers, None
        if all(_is_optimizer(item) for item in items):
            return items, [], None
    raise ModuleError(
        f"configure_optimizers() returned {type(returned).__name__}: {returned!r:.200}. Allowed: an Optimizer; a list "
        "or tuple of them; ([optimizers], [schedulers]); a dict {'optimizer': ..., 'lr_scheduler': ...}; a list or "
        "tuple of such dicts; None."
    )


def _is_optimizer(value: Any) -> bool:
    """Whether it behaves like a torch optimizer (wrappers of other libraries need not inherit from it)."""
    return isinstance(value, Optimizer) or (
        hasattr(value, "step") and hasattr(value, "param_groups") and hasattr(value, "state_dict")
    )


def _from_dict(returned: dict[str, Any]) -> Optimizer:
    unknown = returned.keys() - {"optimizer", "lr_scheduler", "monitor"}
    if unknown:
        raise ModuleError(
            f"configure_optimizers() returned a dict with the unknown keys {sorted(unknown)}. Allowed: 'optimizer', "
            "'lr_scheduler', 'monitor'."
        )
    if not _is_optimizer(returned.get("optimizer")):
        raise ModuleError("configure_optimizers() returned a dict without an optimizer under the key 'optimizer'.")
    return returned["optimizer"]  # type: ignore[no-any-return]


def _schedulers_of(returned: dict[str, Any]) -> list[Any]:
    scheduler = returned.get("lr_scheduler")
    return [] if scheduler is None else [scheduler]


def _scheduler_config(scheduler: Any, monitor: str | None, *, automatic: bool) -> SchedulerConfig:
    values = dict(scheduler) if isinstance(scheduler, dict) else {"scheduler": scheduler, "monitor": monitor}
    unknown = values.keys() - _SCHEDULER_KEYS
    if unknown:
        raise ModuleError(
            f"The lr_scheduler dict has the unknown keys {sorted(unknown)}. Allowed: {sorted(_SCHEDULER_KEYS)}."
        )
    if values.get("scheduler") is None:
        raise ModuleError("The lr_scheduler dict has no scheduler under the key 'scheduler'.")
    if values.get("monitor") is None:
        values["monitor"] = monitor
    values.setdefault("reduce_on_plateau", isinstance(values["scheduler"], ReduceLROnPlateau))
    config = SchedulerConfig(**values)
    if config.interval not in ("epoch", "step"):
        raise ModuleError(f"The lr_scheduler dict has interval={config.interval!r}. Allowed: 'epoch', 'step'.")
    if not isinstance(config.frequency, int) or config.frequency < 1:
        raise ModuleError(f"The lr_scheduler dict has frequency={config.frequency!r}. It must be an int >= 1.")
    if automatic and config.reduce_on_plateau and config.monitor is None:
        raise ModuleError(
            "A ReduceLROnPlateau scheduler needs the name of the value it looks at: return {'optimizer': ..., "
            "'lr_scheduler': {'scheduler': ..., 'monitor': 'val_loss'}}."
        )
    if automatic and isinstance(config.scheduler, OneCycleLR) and config.interval == "epoch":
        rank_zero_warn("OneCycleLR is stepped once per epoch; did you mean {'interval': 'step'}?")
    return config


def needs_closure(optimizer: Any) -> bool:
    """Whether the optimizer's `step` cannot be called without a closure (LBFGS and the like)."""
    try:
        parameter = inspect.signature(optimizer.step).parameters.get("closure")
    except (TypeError, ValueError):
        return False
    return parameter is not None and parameter.default is inspect.Parameter.empty


class WrappedOptimizer:
    """The optimizer that a module sees while it is trained: `step` counts, and goes through the loss scaler.

    Everything else is the wrapped optimizer's own; `.optimizer` is that one. `isinstance` checks against its class
    hold.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        module: Module,
        precision: Precision,
        parallel: Parallel,
        before_step: Callable[[Optimizer], Any] | None,
        stepped: Callable[[], None],
    ) -> None:
        # An instance's own class makes isinstance(opt, Adam) true without copying the optimizer's state.
        made = type(optimizer)
        # Where it stands tells that nobody can import it: who looks for an optimizer by its name, as command lines do,
        # must not find two.
        place = f"{WrappedOptimizer.__init__.__qualname__}.<locals>.{made.__name__}"
        self.__class__ = type(made.__name__, (WrappedOptimizer, made), {"__qualname__": place})
        self._optimizer = optimizer
        self._module = module
        self._precision = precision
        self._parallel = parallel
        self._before_step = before_step
        self._stepped = stepped

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer that `configure_optimizers` returned."""
        return self._optimizer

    def step(self, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        """One optimizer step. With mixed fp16 the gradients are unscaled first and skipped if they overflowed."""
        scaler = self._precision.scaler
        if scaler is None:
            if closure is not None and self._before_step is not None:
                closure = self._with_hook(closure)
            elif self._before_step is not None:
                self._before_step(self._optimizer)
            result = self._optimizer.step(**kwargs) if closure is None else self._optimizer.step(closure, **kwargs)
        else:
            if needs_closure(self._optimizer):
                raise ConfigError(
                    f"precision='16-mixed' and {type(self._optimizer).__name__} do not work together: the scaler "
                    "cannot run a closure several times. Use precision='bf16-mixed' or '32'."
                )
            result = closure() if closure is not None else None
            # The gradients must be unscaled before the hook and the step look at them.
            scaler.unscale_(self._optimizer)
            if self._before_step is not None:
                self._before_step(self._optimizer)
            scaler.step(self._optimizer, **kwargs)
            scaler.update()
        self._stepped()
        return result

    def _with_hook(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        def closed() -> Any:
            result = closure()
            assert self._before_step is not None
            self._before_step(self._optimizer)
            return result

        return closed

    @contextmanager
    def toggle_model(self, sync_grad: bool = True) -> Iterator[None]:
        """Only this optimizer's parameters require gradients inside; `sync_grad=False` also skips their exchange."""
        self._module.toggle_optimizer(self)
        try:
            if sync_grad:
                yield
            else:
                with self._parallel.no_sync():
                    yield
        finally:
            self._module.untoggle_optimizer(self)

    # The wrapped class's own methods would look for state on this object: send them to the real one.
    def zero_grad(self, *args: Any, **kwargs: Any) -> None:
        self._optimizer.zero_grad(*args, **kwargs)

    def state_dict(self) -> dict[str, Any]:
        return self._optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._optimizer.load_state_dict(state_dict)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self._optimizer.add_param_group(param_group)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)

    def __repr__(self) -> str:
        return repr(self._optimizer)

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("A wrapped optimizer is not pickled; use its .optimizer.")


def unwrap(optimizer: Any) -> Any:
    """The optimizer that the user made."""
    return optimizer.optimizer if isinstance(optimizer, WrappedOptimizer) else optimizer


def parameters_of(optimizer: Optimizer) -> list[torch.Tensor]:
    """All parameters that the optimizer updates."""
    return [p for group in optimizer.param_groups for p in group["params"]]
