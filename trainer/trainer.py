"""`Trainer`: what is set up before the loops and taken down after them."""

from __future__ import annotations

import atexit
import inspect
import math
import os
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn
from torch.utils._pytree import tree_map

from trainer import resume
from trainer.config import check
from trainer.data import DataModule
from trainer.distributed import connect
from trainer.errors import CheckpointError, ConfigError, DistributedError, ModuleError
from trainer.hooks import Hooks, overridden
from trainer.loading import to_device
from trainer.loop import Evaluation, Fit, Stopping, clip, evaluate, fit, predict
from trainer.metrics import Metrics
from trainer.module import DataHooks, Module
from trainer.optimizers import WrappedOptimizer, needs_closure, read_optimizers
from trainer.parallel import make_parallel
from trainer.precision import make_precision
from trainer.progress import DONE, PREDICT, SAVE, TEST, TRAIN, VALIDATE, ProgressPage
from trainer.ranks import rank_zero_info, rank_zero_warn, read_ranks
from trainer.seed import chosen_seed, isolate_rng, rng_state, set_rng_state
from trainer.signals import StopSignals
from trainer.sources import Loaders, Source
from trainer.state import (
    RunningStage,
    TrainerFn,
    TrainerState,
    TrainerStatus,
    TrainState,
    capture,
    load_metric_states,
    metric_states,
    restore_model,
    restore_training,
)
from trainer.stop import StopAgreement
from trainer.strategy import Strategy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from trainer.distributed import World
    from trainer.parallel import Parallel
    from trainer.precision import Precision

EX_TEMPFAIL = 75


class Trainer:
    """Runs a Module: fit, validate, test, predict, on one process or on all ranks that were started.

    Under `launch`, torchrun, srun or plain python the script is the same: who the ranks are is read from the
    environment. All arguments are keywords, with Lightning 2.6's names and meaning; a wrong or contradictory one
    raises ConfigError here, before anything starts. What it differs in:

    * Epoch values of `self.log` are reduced over the ranks unless `sync_dist=False`.
    * Where `LAUNCH_RUN_DIR` names a run folder (under `launch`), logs and checkpoints go there, and `fit` goes on
      from the newest whole checkpoint in it by itself; a run that has finished returns at once.
    * SIGTERM (and SIGUSR1, SIGUSR2) save a checkpoint after the batch on which all ranks agree, and end the process
      with exit code 75 under the launcher ("run me again"), else with 128 + the signal's number.
    """

    def __init__(
        self,
        *,
        accelerator: str = "auto",
        strategy: str | Parallel = "auto",
        devices: int | str | list[int] = "auto",
        num_nodes: int = 1,
        precision: str | int | None = None,
        logger: Any = None,
        callbacks: Any = None,
        fast_dev_run: int | bool = False,
        max_epochs: int | None = None,
        min_epochs: int | None = None,
        max_steps: int = -1,
        min_steps: int | None = None,
        max_time: Any = None,
        limit_train_batches: float | None = None,
        limit_val_batches: float | None = None,
        limit_test_batches: float | None = None,
        limit_predict_batches: float | None = None,
        overfit_batches: float = 0.0,
        val_check_interval: Any = None,
        check_val_every_n_epoch: int | None = 1,
        num_sanity_val_steps: int | None = None,
        log_every_n_steps: int | None = None,
        enable_checkpointing: bool | None = None,
        enable_progress_bar: bool | None = None,
        enable_model_summary: bool | None = None,
        accumulate_grad_batches: int = 1,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
        deterministic: bool | str | None = None,
        benchmark: bool | None = None,
        inference_mode: bool = True,
        use_distributed_sampler: bool = True,
        profiler: Any = None,
        detect_anomaly: bool = False,
        barebones: bool = False,
        sync_batchnorm: bool = False,
        reload_dataloaders_every_n_epochs: int = 0,
        default_root_dir: str | Path | None = None,
        enable_autolog_hparams: bool = True,
        **removed: Any,
    ) -> None:
        given = {k: v for k, v in locals().items() if k not in ("self", "removed", "__class__")}
        self.config = config = check(**given, **removed)
        self.ranks = read_ranks()
        self._world: World | None = None
        self.strategy = Strategy(self)

        # What users and callbacks may change while it runs; everything else is read from the config.
        self.max_epochs = config.max_epochs
        self.min_epochs = config.min_epochs
        self.max_steps = config.max_steps
        self.min_steps = config.min_steps
        self.limit_train_batches = config.limit_train_batches
        self.limit_val_batches = config.limit_val_batches
        self.limit_test_batches = config.limit_test_batches
        self.limit_predict_batches = config.limit_predict_batches
        self.overfit_batches = config.overfit_batches
        self.val_check_interval = config.val_check_interval
        self.check_val_every_n_epoch = config.check_val_every_n_epoch
        self.num_sanity_val_steps = config.num_sanity_val_steps
        self.log_every_n_steps = config.log_every_n_steps
        self.accumulate_grad_batches = config.accumulate_grad_batches
        self.gradient_clip_val = config.gradient_clip_val
        self.gradient_clip_algorithm = config.gradient_clip_algorithm
        self.reload_dataloaders_every_n_epochs = config.reload_dataloaders_every_n_epochs
        self.fast_dev_run = config.fast_dev_run
        self.barebones = config.barebones
        self.ckpt_path: str | None = None

        run_dir = None if config.fast_dev_run else self.ranks.run_dir
        self.run_dir = run_dir
        self.default_root_dir = config.default_root_dir or run_dir or str(Path.cwd())
        self.state = TrainerState()
        self.train_state = TrainState()
        self.lightning_module: Module | None = None
        self.datamodule: DataModule | None = None
        self.parallel: Parallel = None  # type: ignore[assignment] # set when a run begins, never read before
        self.precision_object: Precision = None  # type: ignore[assignment] # likewise
        self.optimizers: list[Any] = []
        self.wrapped_optimizers: list[WrappedOptimizer] = []
        self.lr_scheduler_configs: list[Any] = []
        self.predictions: list[Any] = []
        self.predict_indices: Any = None
        self.profiler = _make_profiler(config.profiler)
        self._metrics: Metrics | None = None
        self._signals: StopSignals | None = None
        self._page: ProgressPage | None = None
        self._hooks: Hooks | None = None
        self._fit: Fit | None = None
        self._given: dict[str, Any] = {}
        self._loaders: dict[str, Loaders] = {}
        self._train_loaded_in = self._val_loaded_in = 0
        self._validate_every: float = 0
        self._resumed_rank_state: dict[str, Any] | None = None
        self._last_saved_batches = -1
        self._rows: list[tuple[int, dict[str, float]]] = []
        self._own_checkpoints: list[str] = []

        from trainer import callbacks as callback_module

        self.loggers = _make_loggers(config, self.default_root_dir)
        self.callbacks = callback_module.arrange(config, self)

    # ---------------------------------------------------------------------------------- the four methods

    def fit(
        self,
        model: Module,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: DataModule | None = None,
        ckpt_path: str | Path | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Train the model.

        The loaders come from the arguments (a DataModule may stand in the place of `train_dataloaders`), else from
        the model's own hooks. ckpt_path: a checkpoint to go on from, "last", "best", or None. In a run folder the
        newest whole checkpoint there wins over it, so that a restarted job goes on where it was.

        Raises:
            ModuleError, DataError, ConfigError: something is missing or contradictory, found before the first step.
            CheckpointError: the checkpoint cannot be resumed.
            SystemExit: a stop signal came; the checkpoint is written. Code 75 under the launcher.
        """
        with self._running(TrainerFn.FITTING, model, datamodule, train=train_dataloaders, val=val_dataloaders):
            run = self._prepare_fit(ckpt_path, weights_only)
            if run is not None:
                with self._agreeing(run), torch.autograd.set_detect_anomaly(self.config.detect_anomaly):
                    self._begin(run)
                    fit(run)
                self._finish_fit()

    def validate(
        self,
        model: Module | None = None,
        dataloaders: Any = None,
        ckpt_path: str | Path | None = None,
        verbose: bool = True,
        datamodule: DataModule | None = None,
        weights_only: bool | None = None,
    ) -> list[dict[str, float]]:
        """One pass over the validation data; returns what was logged, one dict per loader.

        Without a model, that of the last `fit` is used, with its best checkpoint if there is one.
        """
        return self._evaluate(TrainerFn.VALIDATING, model, dataloaders, ckpt_path, verbose, datamodule, weights_only)

    def test(
        self,
        model: Module | None = None,
        dataloaders: Any = None,
        ckpt_path: str | Path | None = None,
        verbose: bool = True,
        datamodule: DataModule | None = None,
        weights_only: bool | None = None,
    ) -> list[dict[str, float]]:
        """One pass over the test data; returns what was logged, one dict per loader.

        Without a model, that of the last `fit` is used, with its best checkpoint if there is one.
        """
        return self._evaluate(TrainerFn.TESTING, model, dataloaders, ckpt_path, verbose, datamodule, weights_only)

    def predict(
        self,
        model: Module | None = None,
        dataloaders: Any = None,
        datamodule: DataModule | None = None,
        return_predictions: bool | None = None,
        ckpt_path: str | Path | None = None,
        weights_only: bool | None = None,
    ) -> list[Any] | None:
        """Run `predict_step` over the data: this rank's predictions, one list, or one per loader if there are several.

        With return_predictions=False nothing is kept; a BasePredictionWriter callback writes them instead.
        """
        given = model is not None
        with self._running(TrainerFn.PREDICTING, model, datamodule, predict=dataloaders):
            run = self._prepare_evaluation(TrainerFn.PREDICTING, ckpt_path, weights_only, model_given=given)
            with self._agreeing(run):
                wanted = any(getattr(c, "needs_predictions", False) for c in self.callbacks)
                found = predict(run, keep=return_predictions is not False or wanted)
        self.predictions = []
        return None if return_predictions is False else found

    def _evaluate(
        self,
        fn: TrainerFn,
        model: Module | None,
        dataloaders: Any,
        ckpt_path: str | Path | None,
        verbose: bool,
        datamodule: DataModule | None,
        weights_only: bool | None,
    ) -> list[dict[str, float]]:
        key = "val" if fn is TrainerFn.VALIDATING else "test"
        with self._running(fn, model, datamodule, **{key: dataloaders}):
            run = self._prepare_evaluation(fn, ckpt_path, weights_only, model_given=model is not None)
            with self._agreeing(run):
                results = evaluate(run)
        if verbose and self.is_global_zero:
            from trainer.loggers.table import print_results

            print_results(results, str(fn))
        return results

    # --------------------------------------------------------------------------------- around every method

    @contextmanager
    def _running(
        self, fn: TrainerFn, model: Module | None, datamodule: DataModule | None, **loaders: Any
    ) -> Iterator[None]:
        """Everything that surrounds a run: the ranks meet, hooks, signals, and a way out for every exception."""
        module = self._attach(fn, model, datamodule, loaders)
        self.should_stop = False
        self.state = TrainerState(fn=fn, stage=_STAGES[fn], status=TrainerStatus.RUNNING)
        self._page = ProgressPage.open(self.ranks.progress_page)
        try:
            with StopSignals() as self._signals:
                self._set_up(fn, module)
                yield
                self._take_down(module)
                self._call_teardown(fn, module)
                for logger in self.loggers:
                    logger.finalize("success")
            self.state.status = TrainerStatus.FINISHED
        except Stopping:
            self._stopped(fn, module)
        except BaseException as exception:
            self.state.status = TrainerStatus.INTERRUPTED
            self._broken(module, exception)
            raise
        finally:
            self.state.stage = None
            module.__dict__["_metrics"] = None
            for kind in self._loaders.values():
                for feed in kind.feeds:
                    feed.close()  # loader workers that persist
            self._signals = self._hooks = self._fit = None
            if self._page is not None:
                self._page.close()
                self._page = None
            if self.profiler is not None:
                self.profiler.describe()

    def _attach(self, fn: TrainerFn, model: Module | None, datamodule: Any, loaders: dict[str, Any]) -> Module:
        """Check and remember the model and where the data comes from."""
        module = getattr(model, "_orig_mod", model)  # torch.compile(model) hides it there
        if module is None:
            module = self.lightning_module
            if module is None:
                raise ModuleError(f"{fn}() without a model needs an earlier fit(model) on this Trainer.")
        if not isinstance(module, Module):
            raise ModuleError(
                f"{fn}() was given a {type(module).__module__}.{type(module).__qualname__}; it needs a trainer.Module "
                "(LightningModule). A model written against another package must import its base class from here."
            )
        for key, given in list(loaders.items()):
            if isinstance(given, DataModule):
                datamodule, loaders[key] = given, None
        if datamodule is not None and any(given is not None for given in loaders.values()):
            raise ConfigError(f"{fn}() was given loaders and a datamodule; pass one of them.")
        self.lightning_module = module
        self.datamodule = datamodule
        self._given = loaders
        self._loaders = {}
        module.trainer = self
        if datamodule is not None:
            datamodule.trainer = self
        _check_module(module, fn)
        return module

    def _set_up(self, fn: TrainerFn, module: Module) -> None:
        """Meet the other ranks, prepare the data, and put the model where it runs."""
        config = self.config
        if self._world is None:
            self._world = connect(accelerator=config.accelerator, devices=config.devices, num_nodes=config.num_nodes)
            # The group lives as long as the process: fit and test in one script meet once, also when each has a
            # Trainer of its own.
            atexit.register(self._world.close)
        self._set_backends()
        self.precision_object = make_precision(config.precision, self.device)
        self.parallel = make_parallel(config.strategy, self.world, self.precision_object)
        if self.profiler is not None:
            self.profiler.setup(stage=str(fn), local_rank=self.local_rank if self.world_size > 1 else None,
                                log_dir=self.log_dir)  # fmt: skip
        self._add_model_callbacks(module)
        self._prepare_data(module)
        self._metrics = Metrics(self.world, module)
        module.__dict__["_metrics"] = None if self.barebones else self._metrics
        for child in module.modules():
            if isinstance(child, Module) and child is not module:
                child.__dict__["_metrics"] = module.__dict__["_metrics"]
        for logger in self.loggers:
            logger.agree(self.world)
            _ = getattr(logger, "experiment", None)  # made now, so that setup() may use it
        self.world.barrier("before setup()")
        if self.datamodule is not None:
            self.datamodule.setup(stage=str(fn))
        for callback in self.callbacks:
            callback.setup(self, module, stage=str(fn))
        module.setup(stage=str(fn))
        self.world.barrier("after setup()")
        if overridden(module, "configure_model", Module):
            with self.device if self.device.type != "mps" else nullcontext():
                module.configure_model()
        self.precision_object.convert_module(module)
        if config.sync_batchnorm and self.world_size > 1 and fn is TrainerFn.FITTING:
            for name, child in list(module.named_children()):
                converted = nn.SyncBatchNorm.convert_sync_batchnorm(child)  # type: ignore[no-untyped-call]
                setattr(module, name, converted)
        self.parallel.place(module)

    def _set_backends(self) -> None:
        config = self.config
        if config.deterministic is not None:
            warn = config.deterministic == "warn"
            torch.use_deterministic_algorithms(bool(config.deterministic), warn_only=warn)
            if config.deterministic and self.device.type == "cuda":
                # cuBLAS is deterministic only with a fixed workspace, which it reads when it is first used.
                os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        if config.benchmark is not None:
            torch.backends.cudnn.benchmark = config.benchmark
        elif config.deterministic:
            torch.backends.cudnn.benchmark = False

    def _add_model_callbacks(self, module: Module) -> None:
        """Take in what configure_callbacks() returns; it replaces callbacks of the same type."""
        returned = module.configure_callbacks()
        added = list(returned) if isinstance(returned, (list, tuple)) else [returned]
        added = [c for c in added if c is not None and c not in self.callbacks]
        if added:
            from trainer import callbacks as callback_module

            types = {type(c) for c in added}
            replaced = [c for c in self.callbacks if type(c) in types]
            if replaced:
                rank_zero_info(f"configure_callbacks() replaces {sorted(type(c).__name__ for c in replaced)}.")
            self.callbacks = callback_module.ordered([c for c in self.callbacks if c not in replaced] + added)

    def _prepare_data(self, module: Module) -> None:
        """prepare_data on one rank per node (or one in all) while the others wait; its failure is everyone's."""
        for owner in (self.datamodule, module):
            if owner is None or not overridden(owner, "prepare_data", DataHooks):
                continue
            chosen = self.world.is_local_zero if owner.prepare_data_per_node else self.is_global_zero
            failure: Exception | None = None
            if chosen:
                try:
                    owner.prepare_data()
                except Exception as error:  # raised again below, after the others know
                    failure = error
            if self.world_size == 1:
                if failure is not None:
                    raise failure
                continue
            # Downloads take their time: the wait has no deadline of its own.
            self.world.barrier(f"{type(owner).__name__}.prepare_data()", timeout_s=math.inf)
            failed = self.world.any(failure is not None)
            if failure is not None:
                raise failure
            if failed:
                raise DistributedError(
                    f"{type(owner).__name__}.prepare_data() failed on another rank; its log has the error."
                )

    def _take_down(self, module: Module) -> None:
        if self._fit is not None and self._hooks is not None and self._hooks.on_fit_end is not None:
            self._hooks.on_fit_end()
        if self.device.type != "cpu" and not self.parallel.sharded:
            module.cpu()  # frees the device's memory for what comes next, as users of Lightning expect

    def _call_teardown(self, fn: TrainerFn, module: Module) -> None:
        self.world.barrier(f"the end of {fn}()")
        if self.datamodule is not None:
            self.datamodule.teardown(stage=str(fn))
        for callback in self.callbacks:
            callback.teardown(self, module, stage=str(fn))
        module.teardown(stage=str(fn))

    def _broken(self, module: Module, exception: BaseException) -> None:
        """Tell callbacks, the DataModule and the loggers that the run ends by an exception."""
        for callback in self.callbacks:
            callback.on_exception(self, module, exception)
        if self.datamodule is not None:
            self.datamodule.on_exception(exception)
        for logger in self.loggers:
            logger.finalize("failed")

    def _stopped(self, fn: TrainerFn, module: Module) -> None:
        """All ranks are at the same place and shall leave: save, take down, exit."""
        assert self._signals is not None
        signum = self._signals.signum
        where = None
        if fn is TrainerFn.FITTING:
            where = self._save_for_resume("stopped")
        self.state.status = TrainerStatus.INTERRUPTED
        self._call_teardown(fn, module)
        for logger in self.loggers:
            logger.finalize("interrupted")
        if where is not None:
            how = "started again" if self.run_dir else f"resumed with ckpt_path={where!r}"
            rank_zero_info(
                f"fit was stopped by a signal after step {self.global_step}; it goes on from there when it is {how}."
            )
        launched = self.run_dir is not None or self.ranks.started_by == "launch"
        raise SystemExit(EX_TEMPFAIL if launched else 128 + (signum or 15))

    # ------------------------------------------------------------------------------------ preparing a run

    def _prepare_fit(self, ckpt_path: str | Path | None, weights_only: bool | None) -> Fit | None:
        """Load what is to be resumed, make the optimizers, bind the loop. None if this run is finished already."""
        module = self.lightning_module
        assert module is not None
        self.train_state = TrainState(accumulate=self.accumulate_grad_batches, seed=self._shared_seed())
        self.parallel.wrap(module)
        found = self._find_checkpoint(ckpt_path, weights_only, fitting=True)
        if found is not None:
            self.train_state.seed = (found.state.get("progress") or {}).get("seed", self.train_state.seed)
            restore_model(self, found.state)
            if found.finished and self.run_dir is not None:
                self.train_state.epoch = int(found.state["epoch"])
                self.train_state.global_step = int(found.state["global_step"])
                rank_zero_info(f"fit: this run finished at step {self.global_step}; nothing is left to do.")
                return None
        self._hooks = hooks = self._bind(module)
        self.optimizers, self.lr_scheduler_configs = read_optimizers(module)
        if not module.automatic_optimization:
            _check_manual(self)
        self._wrap_optimizers(module, hooks)
        if hooks.on_fit_start is not None:
            hooks.on_fit_start()
        if self.config.enable_autolog_hparams:
            self._log_hyperparameters(module)
        if found is not None:
            restore_training(self, found.state)
            self._resume_loggers(found.state)
            if self.max_epochs is not None and 0 <= self.max_epochs < self.current_epoch:
                raise ConfigError(
                    f"The checkpoint has finished {self.current_epoch} epochs, but max_epochs={self.max_epochs}."
                )
            rank_zero_info(f"fit goes on from {found.name}: epoch {self.current_epoch}, step {self.global_step}.")
        self._fit = run = self._make_fit(module, hooks)
        self._load_train(run)
        position: Any = self.train_state.position
        if found is not None and isinstance(position, int):
            # Counted anew: another number of ranks takes another number of batches to the same place.
            self.train_state.batch = run.feed.batches_done(position)
        self._load_validation(run)
        self._resumed_rank_state = None if found is None else found.rank_state
        self._stop_before_start()
        module.zero_grad()
        return run

    def _begin(self, run: Fit) -> None:
        """The last things before the first batch: the sanity check, or the state that belongs to this rank."""
        if self._resumed_rank_state is None:
            self._sanity_check(run)
        else:
            self._load_rank_state(run, self._resumed_rank_state)
            self._resumed_rank_state = None
        self.state.stage = RunningStage.TRAINING
        if self._page is not None:
            self._page.phase(TRAIN)

    def _make_fit(self, module: Module, hooks: Hooks) -> Fit:
        """Decide everything about the steps that can be decided before the first one."""
        assert self._metrics is not None
        assert self._signals is not None
        optimizer = self.optimizers[0] if self.optimizers and module.automatic_optimization else None
        run = Fit(
            trainer=self,
            state=self.train_state,
            module=module,
            hooks=hooks,
            metrics=self._metrics,
            world=self.world,
            parallel=self.parallel,
            precision=self.precision_object,
            signals=self._signals,
            agreement=StopAgreement(self.world, self._signals, self.train_state),
            page=self._page,
            step=self._timed(_step_of(module, "training_step", self.parallel.step), "training_step"),
            move=self._mover(hooks),
            optimizer=optimizer,
            wrapped=self.wrapped_optimizers[0] if optimizer is not None else None,
            by_closure=optimizer is not None and (needs_closure(optimizer) or hooks.optimizer_step is not None),
            schedulers=self.lr_scheduler_configs,
            gradient_clip_val=self.gradient_clip_val,
            gradient_clip_algorithm=self.gradient_clip_algorithm or "norm",
            validate_seconds=self.config.val_check_seconds,
        )
        clips = self.gradient_clip_val is not None or hooks.configure_gradient_clipping is not None
        if clips or hooks.on_before_optimizer_step is not None:

            def before_step(stepped: Any) -> None:
                if hooks.on_before_optimizer_step is not None:
                    hooks.on_before_optimizer_step(stepped)
                if clips:
                    clip(run, stepped)

            run.before_step = before_step
            if module.automatic_optimization:
                for wrapped in self.wrapped_optimizers:
                    wrapped._before_step = before_step
        return run

    def _wrap_optimizers(self, module: Module, hooks: Hooks) -> None:
        """What `self.optimizers()` gives; in manual optimization their steps count."""

        def count() -> None:
            self.train_state.global_step += 1

        def nothing() -> None:
            """The loop counts itself."""

        self.wrapped_optimizers = [
            WrappedOptimizer(
                optimizer,
                module=module,
                precision=self.precision_object,
                parallel=self.parallel,
                before_step=hooks.on_before_optimizer_step,
                stepped=nothing if module.automatic_optimization else count,
            )
            for optimizer in self.optimizers
        ]

    def _bind(self, module: Module) -> Hooks:
        assert self._metrics is not None
        return Hooks(
            trainer=self, module=module, callbacks=self.callbacks, metrics=self._metrics, datamodule=self.datamodule,
            profiler=self.profiler,
        )  # fmt: skip

    def _timed(self, function: Callable[..., Any], action: str) -> Callable[..., Any]:
        if self.profiler is None:
            return function
        profiler = self.profiler

        def timed(*args: Any) -> Any:
            with profiler.profile(action):
                return function(*args)

        return timed

    def _mover(self, hooks: Hooks) -> Callable[[Any, int], Any] | None:
        """How a batch gets to the device, or None if it is there as it comes."""
        device, convert = self.device, self.precision_object.convert_batch
        before, transfer, after = (
            hooks.on_before_batch_transfer, hooks.transfer_batch_to_device, hooks.on_after_batch_transfer,
        )  # fmt: skip
        plain = before is None and transfer is None and after is None
        converts = not self.precision_object.keeps_batches
        if plain and not converts and device.type == "cpu":
            return None

        def move(batch: Any, number: int) -> Any:
            if converts:
                batch = convert(batch)
            if before is not None:
                batch = before(batch, number)
            batch = to_device(batch, device) if transfer is None else transfer(batch, device, number)
            return batch if after is None else after(batch, number)

        return move

    def _load_train(self, run: Fit) -> None:
        """Ask for the training loader and see how long an epoch is."""
        loaders = self._train_loaders()
        run.feed = loaders.training_feed()
        run.batches_per_epoch = loaders.batches
        if self.loggers and run.batches_per_epoch < self.log_every_n_steps:
            rank_zero_info(
                f"An epoch has {run.batches_per_epoch} batches, fewer than log_every_n_steps={self.log_every_n_steps}: "
                "values logged per step are reported less than once per epoch."
            )
        interval = self.val_check_interval
        if isinstance(interval, int):
            if interval > run.batches_per_epoch and self.check_val_every_n_epoch is not None and self._validates():
                raise ConfigError(
                    f"val_check_interval={interval} is more than the {run.batches_per_epoch} batches of an epoch. Use "
                    "at most that, or count across epochs with check_val_every_n_epoch=None."
                )
            run.validate_every = interval
        elif run.batches_per_epoch == math.inf:
            if interval != 1.0 and self.config.val_check_seconds is None:
                raise ConfigError(
                    f"val_check_interval={interval} is a part of a training loader that has no length; pass a number "
                    "of batches or a duration."
                )
            run.validate_every = math.inf
        else:
            run.validate_every = max(1, int(run.batches_per_epoch * interval))
        self._validate_every = run.validate_every

    def _train_loaders(self) -> Loaders:
        if "train" not in self._loaders:
            source = self._source("train")
            self._loaders["train"] = Loaders(source.loaders(), "train", self)
            self._train_loaded_in = self.train_state.epoch
        return self._loaders["train"]

    def _source(self, kind: str) -> Source:
        assert self.lightning_module is not None
        return Source(kind, self._given.get(kind), self.lightning_module, self.datamodule)

    def _validates(self) -> bool:
        """Whether fit has anything to validate with."""
        assert self.lightning_module is not None
        has_step = overridden(self.lightning_module, "validation_step", Module)
        return has_step and self._source("val").defined and self.limit_val_batches > 0

    def _load_validation(self, run: Fit) -> None:
        module = run.module
        if not self._validates():
            has_step, has_loader = overridden(module, "validation_step", Module), self._source("val").defined
            if has_loader and not has_step and self.limit_val_batches > 0:
                rank_zero_warn("There is a validation loader but no validation_step, so nothing is validated.")
            elif has_step and not has_loader and self.limit_val_batches > 0:
                rank_zero_info("There is a validation_step but no validation loader, so nothing is validated.")
            return
        loaders = Loaders(self._source("val").loaders(), "val", self)
        self._loaders["val"] = loaders
        self._val_loaded_in = self.train_state.epoch
        run.validation = self._make_evaluation("validation", loaders, inference_mode=False)

    def _make_evaluation(self, name: str, loaders: Loaders, *, inference_mode: bool) -> Evaluation:
        assert self._metrics is not None
        assert self._signals is not None
        assert self._hooks is not None
        module = self.lightning_module
        assert module is not None
        together = loaders.together()
        several = together is None and len(loaders.feeds) > 1
        step_name = f"{name}_step"
        if several:
            _require_dataloader_idx(module, step_name)
        return Evaluation(
            trainer=self,
            module=module,
            hooks=self._hooks,
            metrics=self._metrics,
            world=self.world,
            precision=self.precision_object,
            signals=self._signals,
            agreement=(
                self._fit.agreement
                if self._fit is not None
                else StopAgreement(self.world, self._signals, self.train_state)
            ),
            page=self._page,
            name=name,
            step=self._timed(_step_of(module, step_name, getattr(module, step_name)), step_name),
            move=self._mover(self._hooks),
            feeds=loaders.feeds,
            limits=loaders.limits,
            together=together,
            inference_mode=inference_mode,
        )

    def _prepare_evaluation(
        self, fn: TrainerFn, ckpt_path: str | Path | None, weights_only: bool | None, *, model_given: bool
    ) -> Evaluation:
        module = self.lightning_module
        assert module is not None
        kind, name, phase = _EVALUATIONS[fn]
        if self.train_state.seed is None:
            self.train_state.seed = self._shared_seed()
        self.parallel.wrap(module, training=False)
        if not model_given and ckpt_path is None and getattr(self.checkpoint_callback, "best_model_path", None):
            ckpt_path = "best"
        found = self._find_checkpoint(ckpt_path, weights_only, fitting=False)
        if found is not None:
            restore_model(self, found.state)
            rank_zero_info(f"{fn} uses the weights of {found.name}.")
        self._hooks = self._bind(module)
        loaders = Loaders(self._source(kind).loaders(), kind, self)
        self._loaders[kind] = loaders
        if self.config.enable_autolog_hparams:
            self._log_hyperparameters(module)
        if self._page is not None:
            self._page.phase(phase)
        return self._make_evaluation(name, loaders, inference_mode=self.config.inference_mode)

    def _shared_seed(self) -> int:
        """The seed of the sample order: that of seed_everything, or one drawn now; the same on all ranks."""
        seed = chosen_seed()
        if seed is None:
            seed = int.from_bytes(os.urandom(4), "little")
        return int(self.world.broadcast(seed))

    def _stop_before_start(self) -> None:
        """A signal during the set-up: nothing was trained, so there is nothing to save."""
        assert self._signals is not None
        if self.world.any(self._signals.requested):
            raise Stopping

    @contextmanager
    def _agreeing(self, run: Fit | Evaluation) -> Iterator[None]:
        """The ranks watch for a stop inside."""
        with run.agreement:
            yield

    def _sanity_check(self, run: Fit) -> None:
        """A few batches of validation before training, so that a bug in it shows now and not after an epoch."""
        if run.validation is None or not self.num_sanity_val_steps:
            return
        self.state.stage = RunningStage.SANITY_CHECKING
        with isolate_rng():
            if run.hooks.on_sanity_check_start is not None:
                run.hooks.on_sanity_check_start()
            evaluate(run.validation)
            if run.hooks.on_sanity_check_end is not None:
                run.hooks.on_sanity_check_end()
        run.metrics.enter("train")
        run.metrics.forget()

    def _log_hyperparameters(self, module: Module) -> None:
        """Give the loggers what save_hyperparameters kept."""
        if not self.loggers:
            return
        owners = [o for o in (module, self.datamodule) if o is not None and o._log_hyperparams]
        values: dict[str, Any] = {}
        for owner in owners:
            initial = owner.hparams_initial
            clashes = [k for k in initial if k in values and values[k] != initial[k]]
            if clashes:
                raise ConfigError(
                    f"The Module and the DataModule have different values for the hyperparameters {clashes}. Rename "
                    "them, or leave them out of one: save_hyperparameters(ignore=[...]) or (logger=False)."
                )
            values.update(initial)
        for logger in self.loggers:
            if owners:
                logger.log_hyperparams(values)
            logger.log_graph(module)
            logger.save()

    # ---------------------------------------------------------------------------- what the loop calls back

    def prepare_epoch(self, run: Fit) -> None:
        """Before an epoch: new loaders if they are due, and whether this epoch validates."""
        every = self.reload_dataloaders_every_n_epochs
        if every and run.state.batch == 0 and not run.state.resume_at:
            if run.state.epoch - self._train_loaded_in >= every:
                del self._loaders["train"]
                self._load_train(run)
            if run.validation is not None and run.state.epoch - self._val_loaded_in >= every:
                self._load_validation(run)
        n = self.check_val_every_n_epoch
        due = run.validation is not None and (n is None or (run.state.epoch + 1) % n == 0)
        run.validate_every = self._validate_every if due else 0

    def after_epoch(self, run: Fit) -> None:
        """In a run folder every epoch leaves a checkpoint, whatever the user's own checkpoints keep."""
        if (
            self.run_dir is not None
            and self.config.enable_checkpointing
            and self._last_saved_batches != run.state.batches
        ):
            self._save_for_resume("epoch")

    def report_step(self) -> None:
        """Give the loggers what was logged per step."""
        assert self._metrics is not None
        self.log_to_loggers(self._metrics.step_report(), None)

    def report_epoch(self) -> None:
        """Give the loggers what was logged per epoch, at the step of the epoch's last batch."""
        assert self._metrics is not None
        values = self._metrics.epoch_values()
        if values:
            self.log_to_loggers(values, None if "step" in values else max(0, self.train_state.logger_step - 1))

    def report_evaluation(self, values: dict[str, Any]) -> None:
        """Give the loggers the results of a validation or test."""
        self.log_to_loggers({k: v.item() for k, v in values.items()}, None)

    def report_evaluation_step(self, index: int) -> None:
        """Give the loggers what an evaluation step logged with on_step=True."""
        assert self._metrics is not None
        if self._metrics.logs_evaluation_steps and (values := self._metrics.evaluation_step_report()):
            self.log_to_loggers(values, index)

    def log_to_loggers(self, values: dict[str, float], step: int | None, *, epoch: bool = True) -> None:
        """Write values to every logger. step: None is the current one, or `values["step"]` if it was logged.

        Rows of the current step are kept until the next one: a checkpoint holds them, because on resume the loggers
        forget that step, whose later rows will be written again.
        """
        if not self.loggers or not values:
            return
        if step is None:
            step = int(values.pop("step")) if "step" in values else self.train_state.logger_step
        if epoch:
            values.setdefault("epoch", self.current_epoch)
        if self._rows and self._rows[0][0] != step:
            self._rows.clear()
        self._rows.append((step, dict(values)))
        for logger in self.loggers:
            logger.log_metrics(values, step=step)
            logger.save()

    def rows_of_step(self) -> list[list[Any]]:
        """What the loggers were given for the current step so far."""
        return [[step, values] for step, values in self._rows if step == self.train_state.logger_step]

    def _resume_loggers(self, checkpoint: dict[str, Any]) -> None:
        """Let the loggers forget what an earlier attempt logged after the checkpoint."""
        for logger in self.loggers:
            logger.resume(self.train_state.logger_step)
        for step, values in checkpoint.get("rows", []):
            self.log_to_loggers(values, step, epoch=False)

    # ---------------------------------------------------------------------------------------- checkpoints

    def save_checkpoint(
        self, filepath: str | Path, weights_only: bool | None = None, storage_options: Any = None
    ) -> None:
        """Write a checkpoint to a path or fsspec URL. Every rank must call it.

        One process writes a torch file (`torch.load(path, weights_only=True)` opens it; its "state_dict" is plain);
        several ranks write a folder of shards. weights_only leaves out all that only resuming needs.

        Raises:
            CheckpointError: nothing was trained or loaded yet, or the state holds objects that are not plain values.
        """
        if storage_options is not None:
            raise ConfigError("save_checkpoint(storage_options=...) is not supported; put options into the fsspec URL.")
        if self.lightning_module is None or self.parallel is None:
            raise CheckpointError("save_checkpoint() before fit, validate, test or predict: there is nothing to save.")
        began = time.monotonic()
        if self._page is not None:
            self._page.phase(SAVE)
        if self._fit is not None:
            self.train_state.elapsed = time.monotonic() - self._fit.last_validation
        state, rank_state = capture(self, weights_only=bool(weights_only))
        path = str(filepath)
        resume.write(path, state, rank_state, self.world, step=self.train_state.global_step)
        if not weights_only:
            self._last_saved_batches = self.train_state.batches
            if self.run_dir is not None and self.is_global_zero:
                whole = path if "://" in path else str(Path(path).resolve())
                entry = resume.Entry(whole, self.train_state.batches, self.train_state.finished)
                resume.SavedList(self.run_dir).add(entry)
        if self._page is not None:
            self._page.saved(self.train_state.global_step, time.monotonic() - began)
            self._page.phase(TRAIN if self.state.stage is RunningStage.TRAINING else VALIDATE)
        self.world.barrier("save_checkpoint()")

    def _save_for_resume(self, why: str) -> str | None:
        """A checkpoint of our own making, for going on; those before it that we made are removed."""
        if not self.config.enable_checkpointing or self.config.fast_dev_run or self._fit is None:
            return None
        # A string: the root may be a URL.
        root = (self.run_dir or self.default_root_dir).rstrip("/")
        path = f"{root}/checkpoints/resume-step={self.global_step}-{why}.ckpt"
        self.save_checkpoint(path)
        if self.is_global_zero:
            for older in self._own_checkpoints[:-1]:
                resume.remove(older)
        self._own_checkpoints = [*self._own_checkpoints[-1:], path]
        return path

    def _finish_fit(self) -> None:
        """In a run folder the last checkpoint says that the run is over, so that a restart does nothing."""
        self.train_state.finished = True
        if self.run_dir is not None:
            self._save_for_resume("finished")
            if self._page is not None:
                self._page.phase(DONE)

    def rank_state(self) -> dict[str, Any]:
        """What this rank has for itself: random state, the epoch's half-reduced values, its loaders' state."""
        run = self._fit
        if run is None or self._metrics is None:
            return {}
        broken_off = run.state.resume_at == "validation" and run.validation_rng is not None
        state: dict[str, Any] = {
            "rng": run.validation_rng if broken_off else rng_state(),
            "metrics": self._metrics.state_dict(),
            "torchmetrics": metric_states(run.module),
            "feed": run.feed.state_dict(),
        }
        if run.module.automatic_optimization and run.state.batch % run.state.accumulate:
            # In the middle of an accumulation window the gradients so far are state; DDP has not exchanged them yet.
            state["gradients"] = {n: p.grad for n, p in run.module.named_parameters() if p.grad is not None}
        return state

    def _load_rank_state(self, run: Fit, state: dict[str, Any]) -> None:
        if "metrics" in state:
            run.metrics.load_state_dict(state["metrics"])
            load_metric_states(run.module, state.get("torchmetrics", {}))
        if state.get("feed"):
            run.feed.load_state_dict(state["feed"])
        for name, gradient in state.get("gradients", {}).items():
            run.module.get_parameter(name).grad = gradient.to(self.device)
        if state.get("rng") is not None:
            set_rng_state(state["rng"])

    def _find_checkpoint(
        self, ckpt_path: str | Path | None, weights_only: bool | None, *, fitting: bool
    ) -> resume.Found | None:
        """What to load, by the run folder, the argument, or `trainer.ckpt_path`; None to load nothing."""
        like = None
        if self.world_size > 1 and self.parallel.sharded:
            like = {"state_dict": self.parallel.module_state()}
        if fitting and self.run_dir is not None and (found := resume.newest_in(self.run_dir, self.world, like)):
            self.ckpt_path = found.name
            return found
        path = None if ckpt_path is None and self.ckpt_path is None else str(ckpt_path or self.ckpt_path)
        if path in ("best", "last"):
            path = self._named_checkpoint(path)
        if not path:
            return None
        self.ckpt_path = path
        return resume.read(path, self.world, like=like, weights_only=weights_only is not False)

    def _named_checkpoint(self, which: str) -> str | None:
        callback = self.checkpoint_callback
        if callback is None:
            raise ConfigError(f"ckpt_path={which!r} needs a ModelCheckpoint callback; pass a path instead.")
        if which == "best":
            path = callback.best_model_path
            if not path:
                raise CheckpointError("ckpt_path='best': no checkpoint has been written by ModelCheckpoint yet.")
            return str(path)
        last = self.world.broadcast(resume.newest_of(self.checkpoint_callbacks) if self.is_global_zero else None)
        if last is None:
            rank_zero_warn("ckpt_path='last': there is no last checkpoint yet; starting from the beginning.")
        return None if last is None else str(last)

    # ------------------------------------------------------------------------------------ small services

    def backward(self, loss: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        """`manual_backward` of a module: scaling, hooks, and the backward itself."""
        hooks = self._hooks
        assert hooks is not None
        if hooks.on_before_backward is not None:
            hooks.on_before_backward(loss)
        if self.precision_object.scaler is not None:
            loss = self.precision_object.scaler.scale(loss)
        self.parallel.prepare_backward(loss)
        if hooks.backward is None:
            loss.backward(*args, **kwargs)  # type: ignore[no-untyped-call]
        else:
            hooks.backward(loss, *args, **kwargs)
        if hooks.on_after_backward is not None:
            hooks.on_after_backward()

    def all_gather(self, data: Any, group: Any = None, sync_grads: bool = False) -> Any:
        """See `Module.all_gather`."""
        if self.world_size == 1:
            return data
        if sync_grads:
            from torch.distributed.nn.functional import all_gather

            gather: Callable[..., Any] = all_gather
            return tree_map(lambda v: torch.stack(gather(v, group)) if isinstance(v, torch.Tensor) else v, data)

        def gather_one(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                if not isinstance(value, (int, float)):
                    return value
                value = torch.tensor(value, device=self.device)
            parts = [torch.empty_like(value) for _ in range(self.world_size)]
            torch.distributed.all_gather(parts, value.contiguous(), group=group)
            return torch.stack(parts)

        return tree_map(gather_one, data)

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print on the first rank of each node."""
        if self.local_rank == 0:
            print(*args, **kwargs)  # noqa: T201

    def rng_state(self) -> Any:
        """The random state of this rank."""
        return rng_state()

    @property
    def estimated_stepping_batches(self) -> float:
        """How many optimizer steps fit will take, e.g. for a scheduler's total_steps; inf if there is no limit."""
        if self.max_epochs == -1:
            return math.inf if self.max_steps == -1 else self.max_steps
        batches = self._train_loaders().batches
        if batches == math.inf:
            return self.max_steps
        steps = math.ceil(batches / self.accumulate_grad_batches) * max(self.max_epochs or 0, 1)
        return steps if self.max_steps == -1 else min(steps, self.max_steps)

    # ------------------------------------------------------------------------------------------ where, who

    @property
    def world(self) -> World:
        """The ranks of this run, met when the first run begins."""
        if self._world is None:
            raise DistributedError("The ranks have not met yet: trainer.world exists once fit (or another run) begins.")
        return self._world

    @property
    def device(self) -> torch.device:
        """The device of this rank; the CPU before a run."""
        return self._world.device if self._world is not None else torch.device("cpu")

    @property
    def running(self) -> bool:
        """Whether fit, validate, test or predict is at work."""
        return self.state.status is TrainerStatus.RUNNING and self._world is not None

    @property
    def global_rank(self) -> int:
        """Rank among all processes."""
        return self.ranks.rank

    @property
    def local_rank(self) -> int:
        """Rank among the processes of this node."""
        return self.ranks.local_rank

    @property
    def node_rank(self) -> int:
        """Number of this node."""
        return self.ranks.node_rank

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.ranks.world_size

    @property
    def num_nodes(self) -> int:
        """Number of nodes."""
        return self.ranks.num_nodes

    @property
    def num_devices(self) -> int:
        """Devices per node, one per rank."""
        return self.ranks.local_world_size

    @property
    def device_ids(self) -> list[int]:
        """Numbers of this node's devices."""
        return list(range(self.num_devices))

    @property
    def is_global_zero(self) -> bool:
        """Whether this is rank 0."""
        return self.ranks.rank == 0

    @property
    def precision(self) -> str:
        """The precision by its name."""
        return self.precision_object.name if self.precision_object is not None else str(self.config.precision)

    @property
    def precision_plugin(self) -> Precision:
        """The precision as an object."""
        return self.precision_object

    @property
    def model(self) -> Any:
        """The module as it is trained."""
        return self.lightning_module

    # ------------------------------------------------------------------------------------- how far, what now

    @property
    def current_epoch(self) -> int:
        """Epochs that are over."""
        return self.train_state.epoch

    @property
    def should_stop(self) -> bool:
        """Set it to end fit after this batch (once min_epochs and min_steps are met)."""
        return self.train_state.should_stop

    @should_stop.setter
    def should_stop(self, value: bool) -> None:
        self.train_state.should_stop = value

    @property
    def global_step(self) -> int:
        """Optimizer steps taken, of all optimizers."""
        return self.train_state.global_step

    @property
    def is_last_batch(self) -> bool:
        """Whether the batch in progress is the epoch's last."""
        return self._fit is not None and self.train_state.batch + 1 >= self._fit.batches_per_epoch

    @property
    def interrupted(self) -> bool:
        """Whether the last run ended by an exception or a stop."""
        return self.state.status is TrainerStatus.INTERRUPTED

    @property
    def received_sigterm(self) -> bool:
        """Whether a stop signal has come to this rank."""
        return self._signals is not None and self._signals.requested

    @property
    def training(self) -> bool:
        """Whether a training batch or its surroundings are at work."""
        return self.state.stage is RunningStage.TRAINING

    @property
    def validating(self) -> bool:
        """Whether validation is at work."""
        return self.state.stage is RunningStage.VALIDATING

    @property
    def testing(self) -> bool:
        """Whether test is at work."""
        return self.state.stage is RunningStage.TESTING

    @property
    def predicting(self) -> bool:
        """Whether predict is at work."""
        return self.state.stage is RunningStage.PREDICTING

    @property
    def sanity_checking(self) -> bool:
        """Whether the short validation before training is at work."""
        return self.state.stage is RunningStage.SANITY_CHECKING

    @property
    def evaluating(self) -> bool:
        """Whether validation or test is at work."""
        return self.state.stage is not None and self.state.stage.evaluating

    # -------------------------------------------------------------------------------------------- the data

    @property
    def train_dataloader(self) -> Any:
        """The training loader(s), or None before they were asked for."""
        return self._raw("train")

    @property
    def val_dataloaders(self) -> Any:
        """The validation loader(s), or None."""
        return self._raw("val")

    @property
    def test_dataloaders(self) -> Any:
        """The test loader(s), or None."""
        return self._raw("test")

    @property
    def predict_dataloaders(self) -> Any:
        """The loader(s) of predict, or None."""
        return self._raw("predict")

    def _raw(self, kind: str) -> Any:
        return self._loaders[kind].raw if kind in self._loaders else None

    @property
    def num_training_batches(self) -> float:
        """Batches of a training epoch on this rank; inf if unknown."""
        return self._loaders["train"].batches if "train" in self._loaders else math.inf

    @property
    def num_val_batches(self) -> list[float]:
        """Batches of each validation loader."""
        return self._limits("val")

    @property
    def num_sanity_val_batches(self) -> list[float]:
        """Batches of each validation loader in the sanity check."""
        return [min(self.num_sanity_val_steps, n) for n in self._limits("val")]

    @property
    def num_test_batches(self) -> list[float]:
        """Batches of each test loader."""
        return self._limits("test")

    @property
    def num_predict_batches(self) -> list[float]:
        """Batches of each loader of predict."""
        return self._limits("predict")

    def _limits(self, kind: str) -> list[float]:
        return self._loaders[kind].limits if kind in self._loaders else []

    @property
    def enable_validation(self) -> bool:
        """Whether fit validates."""
        return self.lightning_module is not None and self._validates()

    # ----------------------------------------------------------------------------------- values and callbacks

    @property
    def callback_metrics(self) -> dict[str, torch.Tensor]:
        """The newest value of every logged name, as tensors."""
        return self._metrics.callback_metrics if self._metrics is not None else {}

    @property
    def logged_metrics(self) -> dict[str, torch.Tensor]:
        """The newest value of every name that loggers get."""
        return self._metrics.logged_metrics if self._metrics is not None else {}

    @property
    def progress_bar_metrics(self) -> dict[str, float]:
        """The newest value of every name logged with prog_bar=True."""
        return self._metrics.progress_bar_metrics if self._metrics is not None else {}

    @property
    def logger(self) -> Any | None:
        """The first logger, or None."""
        return self.loggers[0] if self.loggers else None

    @logger.setter
    def logger(self, logger: Any | None) -> None:
        self.loggers = [] if not logger else [logger]

    @property
    def log_dir(self) -> str | None:
        """The first logger's folder, else default_root_dir; the same on all ranks once a run has begun."""
        folder = self.default_root_dir if self.logger is None else (self.logger.log_dir or self.logger.save_dir)
        return str(self._world.broadcast(folder)) if self._world is not None and folder is not None else folder

    @property
    def checkpoint_callbacks(self) -> list[Any]:
        """The callbacks that write checkpoints."""
        from trainer.callbacks import Checkpoint

        return [c for c in self.callbacks if isinstance(c, Checkpoint)]

    @property
    def checkpoint_callback(self) -> Any | None:
        """The first of them."""
        return next(iter(self.checkpoint_callbacks), None)

    @property
    def early_stopping_callbacks(self) -> list[Any]:
        """The EarlyStopping callbacks."""
        from trainer.callbacks import EarlyStopping

        return [c for c in self.callbacks if isinstance(c, EarlyStopping)]

    @property
    def early_stopping_callback(self) -> Any | None:
        """The first of them."""
        return next(iter(self.early_stopping_callbacks), None)

    @property
    def progress_bar_callback(self) -> Any | None:
        """The progress bar, or None."""
        from trainer.callbacks import ProgressBar

        return next((c for c in self.callbacks if isinstance(c, ProgressBar)), None)


# The loaders' kind, the word in the hooks' names, and the phase on the progress page.
_EVALUATIONS = {
    TrainerFn.VALIDATING: ("val", "validation", VALIDATE),
    TrainerFn.TESTING: ("test", "test", TEST),
    TrainerFn.PREDICTING: ("predict", "predict", PREDICT),
}
_STAGES = {
    TrainerFn.FITTING: RunningStage.TRAINING,
    TrainerFn.VALIDATING: RunningStage.VALIDATING,
    TrainerFn.TESTING: RunningStage.TESTING,
    TrainerFn.PREDICTING: RunningStage.PREDICTING,
}


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


def _require_dataloader_idx(module: Module, name: str) -> None:
    parameters = inspect.signature(getattr(module, name)).parameters
    if "dataloader_idx" not in parameters and not any(p.kind is p.VAR_POSITIONAL for p in parameters.values()):
        raise ModuleError(
            f"There are several loaders, so {name} must take their number: {name}(self, batch, batch_idx, "
            "dataloader_idx=0)."
        )


def _check_module(module: Module, fn: TrainerFn) -> None:
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


def _check_manual(trainer: Trainer) -> None:
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


def _make_profiler(profiler: Any) -> Any:
    """The profiler by name, the given object, or None."""
    if profiler is None or not isinstance(profiler, str):
        return profiler
    from trainer import profilers

    known = {
        "simple": profilers.SimpleProfiler,
        "advanced": profilers.AdvancedProfiler,
        "pytorch": profilers.PyTorchProfiler,
    }
    if profiler.lower() not in known:
        raise ConfigError(f"profiler={profiler!r}. Allowed: {', '.join(known)}, or a Profiler object.")
    return known[profiler.lower()]()


def _make_loggers(config: Any, root_dir: str) -> list[Any]:
    """The loggers that were given, or the default: TensorBoard's."""
    if config.logger is False or not config.logger or config.fast_dev_run:
        return []
    if config.logger is True:
        from trainer.loggers import TensorBoardLogger

        return [TensorBoardLogger(save_dir=root_dir)]
    return list(config.logger) if isinstance(config.logger, (list, tuple)) else [config.logger]
