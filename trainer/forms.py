"""The forms that a user's Module may take for a run, checked before it begins."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from trainer.errors import ConfigError, ModuleError
from trainer.hooks import overridden, timed
from trainer.module import Module
from trainer.state import TrainerFn

if TYPE_CHECKING:
    from collections.abc import Callable

    from trainer.config import Adjustable
    from trainer.trainer import Trainer


def _step_of(module: Module, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The step as the loop calls it, `(batch, batch_idx, ...)`, for a step that may take the batch alone."""
    parameters = [
        p for p in inspect.signature(getattr(module, name)).parameters.values()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.VAR_POSITIONAL)
    ]  # fmt: skip
    names = [p.name for p in parameters]
    if "optimizer_idx" in names:
        raise ModuleError(
            f"{name}(..., optimizer_idx) does not exist any more. For several optimizers set "
            "self.automatic_optimization = False and use opt1, opt2 = self.optimizers()."
        )
    if "dataloader_iter" in names:
        raise ModuleError(f"{name}(dataloader_iter) is not supported; write {name}(batch, batch_idx).")
    if any(p.kind is p.VAR_POSITIONAL for p in parameters) or "batch_idx" in names or len(names) >= 2:
        return function
    if len(names) == 1:

        def batch_alone(batch: Any, _index: int, *_: int) -> Any:
            return function(batch)

        return batch_alone
    raise ModuleError(f"{type(module).__name__}.{name}() takes no batch; write {name}(self, batch, batch_idx).")


def bound_step(trainer: Trainer, module: Module, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The step as the loop calls it, timed if there is a profiler."""
    return timed(_step_of(module, name, function), name, trainer.profiler)


def require_dataloader_idx(module: Module, name: str) -> None:
    parameters = inspect.signature(getattr(module, name)).parameters
    if "dataloader_idx" not in parameters and not any(p.kind is p.VAR_POSITIONAL for p in parameters.values()):
        raise ModuleError(
            f"There are several loaders, so {name} must take their number: {name}(self, batch, batch_idx, "
            "dataloader_idx=0)."
        )


def check_module(module: Module, fn: TrainerFn) -> None:
    """What a run needs, and what Lightning once had."""
    needed = {
        TrainerFn.FITTING: ("training_step", "configure_optimizers"),
        TrainerFn.VALIDATING: ("validation_step",),
        TrainerFn.TESTING: ("test_step",),
        TrainerFn.PREDICTING: (),
    }[fn]
    name = type(module).__name__
    for step in needed:
        if not overridden(module, step, Module):
            raise ModuleError(f"{fn}() needs {name}.{step}(); it is not defined.")
    if fn is TrainerFn.PREDICTING and not any(overridden(module, n, Module) for n in ("predict_step", "forward")):
        raise ModuleError(f"predict() needs {name}.forward() or {name}.predict_step(); neither is defined.")
    for old, new in (
        ("training_epoch_end", "on_train_epoch_end"),
        ("validation_epoch_end", "on_validation_epoch_end"),
        ("test_epoch_end", "on_test_epoch_end"),
        ("training_step_end", "on_train_batch_end"),
        ("validation_step_end", "on_validation_batch_end"),
        ("test_step_end", "on_test_batch_end"),
        ("optimizer_idx", "several optimizers in manual optimization"),
        ("tbptt_split_batch", "a loop of your own in training_step, with automatic_optimization = False"),
        ("configure_apex", "Trainer(precision='16-mixed')"),
        ("configure_ddp", "Trainer(strategy='ddp')"),
        ("init_ddp_connection", "the launcher, which sets the environment"),
        ("get_progress_bar_dict", "get_metrics() of a progress bar callback"),
        ("tng_dataloader", "train_dataloader"),
    ):
        if callable(getattr(module, old, None)):
            raise ModuleError(f"{name}.{old}() is never called any more. Today: {new}.")


def check_manual(trainer: Adjustable) -> None:
    if trainer.gradient_clip_val is not None:
        raise ConfigError(
            f"gradient_clip_val={trainer.gradient_clip_val} works with automatic optimization; in manual optimization "
            "call self.clip_gradients(optimizer, value) before optimizer.step()."
        )
    if trainer.accumulate_grad_batches != 1:
        raise ConfigError(
            f"accumulate_grad_batches={trainer.accumulate_grad_batches} works with automatic optimization; in manual "
            "optimization step the optimizer only every so many batches."
        )
