"""What surrounds a run: the ranks meet, data and model are made ready, and everything is taken down again."""

from __future__ import annotations

import math
import os
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from trainer.callbacks.selection import ordered
from trainer.compiling import Compiling
from trainer.data import DataModule
from trainer.errors import ConfigError, DistributedError, ModuleError
from trainer.feeding import RunData
from trainer.forms import check_module
from trainer.hooks import overridden
from trainer.loop import Stopping
from trainer.metrics import Metrics
from trainer.module import DataHooks, Module
from trainer.parallel import make_parallel
from trainer.precision import make_precision
from trainer.progress import ProgressPage
from trainer.ranks import rank_zero_info, rank_zero_warn
from trainer.signals import StopSignals
from trainer.state import RunningStage, TrainerFn, TrainerState, TrainerStatus
from trainer.virtual import Replicas, one_thread

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trainer.trainer import Trainer

EX_TEMPFAIL = 75
_STAGES = {
    TrainerFn.FITTING: RunningStage.TRAINING,
    TrainerFn.VALIDATING: RunningStage.VALIDATING,
    TrainerFn.TESTING: RunningStage.TESTING,
    TrainerFn.PREDICTING: RunningStage.PREDICTING,
}


@contextmanager
def session(
    trainer: Trainer, fn: TrainerFn, model: Module | None, datamodule: DataModule | None, loaders: dict[str, Any]
) -> Iterator[Module]:
    """Everything that surrounds a run: the ranks meet, hooks, signals, and a way out for every exception."""
    module = _attach(trainer, fn, model, datamodule, loaders)
    trainer.should_stop = False
    trainer.state = TrainerState(fn=fn, stage=_STAGES[fn], status=TrainerStatus.RUNNING)
    trainer.page = ProgressPage.open(trainer.ranks.progress_page)
    try:
        trainer.compiling = Compiling(trainer.config.compile) if isinstance(trainer.config.compile, dict) else None
        with (
            StopSignals() as trainer.signals,
            one_thread(trainer.config.virtual_ranks is not None),
            trainer.compiling or nullcontext(),
        ):
            _set_up(trainer, fn, module)
            yield module
            _take_down(trainer, module)
            _call_teardown(trainer, fn, module)
            for logger in trainer.loggers:
                logger.finalize("success")
        trainer.state.status = TrainerStatus.FINISHED
    except Stopping:
        _stopped(trainer, fn, module)
    except BaseException as exception:
        trainer.state.status = TrainerStatus.INTERRUPTED
        _broken(trainer, module, exception)
        raise
    finally:
        trainer.state.stage = None
        module.__dict__["_metrics"] = None
        trainer.data.close()
        trainer.saves.close()
        trainer.signals = trainer.hooks = trainer.fit_run = None
        if trainer.page is not None:
            trainer.page.close()
            trainer.page = None
        for callback in trainer.callbacks:
            callback.__dict__.pop("_module", None)
        trainer.profiler.describe()


def _attach(trainer: Trainer, fn: TrainerFn, model: Any, datamodule: Any, loaders: dict[str, Any]) -> Module:
    """Check and remember the model and where the data comes from."""
    module = getattr(model, "_orig_mod", model)  # torch.compile(model) hides it there
    if module is not model and not trainer.config.compile:
        rank_zero_warn(f"{fn}() was given torch.compile(model) and runs it uncompiled: Trainer(compile=True) compiles.")
    if module is None:
        module = trainer.lightning_module
        if module is None:
            raise ModuleError(f"{fn}() without a model needs an earlier fit(model) on this Trainer.")
    if not isinstance(module, Module):
        raise ModuleError(
            f"{fn}() was given a {type(module).__module__}.{type(module).__qualname__}; it needs a trainer.Module "
            "(LightningModule). A model written against another package must import its base class from here."
        )
    if "_modules" not in module.__dict__:
        raise ModuleError(
            f"{type(module).__name__}.__init__ does not call super().__init__(): add it as its first line."
        )
    for key, given in list(loaders.items()):
        if isinstance(given, DataModule):
            datamodule, loaders[key] = given, None
    if datamodule is not None and any(given is not None for given in loaders.values()):
        raise ConfigError(f"{fn}() was given loaders and a datamodule; pass one of them.")
    trainer.lightning_module = module
    trainer.datamodule = datamodule
    trainer.data = RunData(trainer, loaders)
    module.trainer = trainer
    if datamodule is not None:
        datamodule.trainer = trainer
    check_module(module, fn)
    return module


def _set_up(trainer: Trainer, fn: TrainerFn, module: Module) -> None:
    """Meet the other ranks, prepare the data, and put the model where it runs."""
    config = trainer.config
    world = trainer.connect()
    _set_backends(trainer)
    trainer.precision_object = make_precision(config.precision or "32-true", trainer.device)
    trainer.parallel = make_parallel(config.strategy, world, trainer.precision_object)
    virtual = config.virtual_ranks is not None and fn is TrainerFn.FITTING
    if virtual:
        trainer.parallel = Replicas(world, trainer.precision_object)
    trainer.profiler.setup(stage=str(fn), local_rank=trainer.local_rank if world.size > 1 else None,
                           log_dir=trainer.log_dir)  # fmt: skip
    _add_model_callbacks(trainer, module)
    for callback in trainer.callbacks:
        callback.__dict__["_module"] = module
    _prepare_data(trainer, module)
    trainer.metrics = Metrics(world, module, exact=virtual)
    for child in module.modules():
        if isinstance(child, Module):
            child.__dict__["_metrics"] = None if trainer.barebones else trainer.metrics
    for logger in trainer.loggers:
        logger.agree(world)
        _ = getattr(logger, "experiment", None)  # made now, so that setup() may use it
    world.barrier("before setup()")
    if trainer.datamodule is not None:
        trainer.datamodule.setup(stage=str(fn))
    for callback in trainer.callbacks:
        callback.setup(trainer, module, stage=str(fn))
    module.setup(stage=str(fn))
    world.barrier("after setup()")
    if overridden(module, "configure_model", Module):
        with trainer.device if trainer.device.type != "mps" else nullcontext():
            module.configure_model()
    trainer.precision_object.convert_module(module)
    if config.sync_batchnorm and world.size > 1 and fn is TrainerFn.FITTING:
        for name, child in list(module.named_children()):
            converted = nn.SyncBatchNorm.convert_sync_batchnorm(child)  # type: ignore[no-untyped-call]
            setattr(module, name, converted)
    if trainer.compiling is not None:
        trainer.compiling.begin(module, trainer.device)
    trainer.parallel.compiling = trainer.compiling  # also None: a strategy object may have had another run
    trainer.parallel.place(module)


def _set_backends(trainer: Trainer) -> None:
    config = trainer.config
    if config.deterministic is not None:
        warn = config.deterministic == "warn"
        torch.use_deterministic_algorithms(bool(config.deterministic), warn_only=warn)
        if config.deterministic and trainer.device.type == "cuda":
            # cuBLAS is deterministic only with a fixed workspace, which it reads when it is first used.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if config.benchmark is not None:
        torch.backends.cudnn.benchmark = config.benchmark
    elif config.deterministic:
        torch.backends.cudnn.benchmark = False


def _add_model_callbacks(trainer: Trainer, module: Module) -> None:
    """Take in what configure_callbacks() returns; it replaces callbacks of the same type."""
    returned = module.configure_callbacks()
    added = list(returned) if isinstance(returned, (list, tuple)) else [returned]
    added = [c for c in added if c is not None and c not in trainer.callbacks]
    if added:
        types = {type(c) for c in added}
        replaced = [c for c in trainer.callbacks if type(c) in types]
        if replaced:
            rank_zero_info(f"configure_callbacks() replaces {sorted(type(c).__name__ for c in replaced)}.")
        trainer.callbacks = ordered([c for c in trainer.callbacks if c not in replaced] + added)


def _prepare_data(trainer: Trainer, module: Module) -> None:
    """prepare_data on one rank per node (or one in all) while the others wait; its failure is everyone's."""
    world = trainer.world
    for owner in (trainer.datamodule, module):
        if owner is None or not overridden(owner, "prepare_data", DataHooks):
            continue
        failure: Exception | None = None
        if world.is_local_zero if owner.prepare_data_per_node else world.is_global_zero:
            try:
                owner.prepare_data()
            except Exception as error:  # raised again below, after the others know
                failure = error
        if world.size == 1:
            if failure is not None:
                raise failure
            continue
        # Downloads take their time: the wait has no deadline of its own.
        world.barrier(f"{type(owner).__name__}.prepare_data()", timeout_s=math.inf)
        failed = world.any(failure is not None)
        if failure is not None:
            raise failure
        if failed:
            raise DistributedError(
                f"{type(owner).__name__}.prepare_data() failed on another rank; its log has the error."
            )


def _take_down(trainer: Trainer, module: Module) -> None:
    if trainer.fit_run is not None and trainer.fit_run.hooks.on_fit_end is not None:
        trainer.fit_run.hooks.on_fit_end()
    if trainer.device.type != "cpu" and not trainer.parallel.sharded:
        module.cpu()  # frees the device's memory for what comes next, as users of Lightning expect


def _call_teardown(trainer: Trainer, fn: TrainerFn, module: Module) -> None:
    trainer.world.barrier(f"the end of {fn}()")
    if trainer.datamodule is not None:
        trainer.datamodule.teardown(stage=str(fn))
    for callback in trainer.callbacks:
        callback.teardown(trainer, module, stage=str(fn))
    module.teardown(stage=str(fn))


def _broken(trainer: Trainer, module: Module, exception: BaseException) -> None:
    """Tell callbacks, the DataModule and the loggers that the run ends by an exception."""
    if trainer.fit_run is not None and trainer.fit_run.guard is not None:
        trainer.fit_run.guard.leave()
    for callback in trainer.callbacks:
        callback.on_exception(trainer, module, exception)
    if trainer.datamodule is not None:
        trainer.datamodule.on_exception(exception)
    for logger in trainer.loggers:
        logger.finalize("failed")


def _stopped(trainer: Trainer, fn: TrainerFn, module: Module) -> None:
    """All ranks are at the same place and shall leave: save, take down, exit."""
    assert trainer.signals is not None
    signum = trainer.signals.signum
    where = trainer.saves.at_stop() if fn is TrainerFn.FITTING else None
    trainer.state.status = TrainerStatus.INTERRUPTED
    _call_teardown(trainer, fn, module)
    for logger in trainer.loggers:
        logger.finalize("interrupted")
    if where is not None:
        how = "started again" if trainer.run_dir else f"resumed with ckpt_path={where!r}"
        rank_zero_info(
            f"fit was stopped by a signal after step {trainer.global_step}; it goes on from there when it is {how}."
        )
    launched = trainer.run_dir is not None or trainer.ranks.started_by == "launch"
    raise SystemExit(EX_TEMPFAIL if launched else 128 + (signum or 15))
