"""`Trainer`: the four runs that a user asks for, and the few services that a Module uses meanwhile."""

from __future__ import annotations

import atexit
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_map

from trainer.callbacks.selection import arrange
from trainer.config import Config, configured
from trainer.distributed import choose_device, connect
from trainer.errors import ConfigError
from trainer.feeding import RunData
from trainer.hooks import Hooks
from trainer.loop import evaluate, fit, predict
from trainer.materialize import NoInit
from trainer.precision import make_precision
from trainer.preparation import begin, prepare_evaluation, prepare_fit
from trainer.profilers import make_profiler
from trainer.ranks import read_ranks
from trainer.reports import Reports, make_loggers
from trainer.saves import Saves
from trainer.session import session
from trainer.state import TrainerFn, TrainerState, TrainState
from trainer.status import Status
from trainer.strategy import Strategy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from trainer.compiling import Compiling
    from trainer.data import DataModule
    from trainer.distributed import World
    from trainer.loop import Evaluation
    from trainer.module import Module
    from trainer.optimizers import WrappedOptimizer
    from trainer.parallel import Parallel
    from trainer.precision import Precision
    from trainer.progress import ProgressPage


class Trainer(Status):
    """Runs a Module: fit, validate, test, predict, on one process or on all ranks that were started.

    Under `launch`, torchrun, srun or plain python the script is the same: who the ranks are is read from the
    environment. All arguments are keywords, with Lightning 2.6's names and meaning; `trainer.config.Config` tells of
    each. A wrong or contradictory one raises ConfigError here, before anything starts; one that is not given is taken
    from PL_TRAINER_<NAME> in the environment, if that is there. What it differs in:

    * Epoch values of `self.log` are reduced over the ranks unless `sync_dist=False`.
    * Where `LAUNCH_RUN_DIR` names a run folder (under `launch`), logs and checkpoints go there, and `fit` goes on
      from the newest whole checkpoint in it by itself; a run that has finished returns at once.
    * SIGTERM (and SIGUSR1, SIGUSR2) save a checkpoint after the batch on which all ranks agree, and end the process
      with exit code 75 under the launcher ("run me again"), else with 128 + the signal's number.
    """

    @configured(Config)
    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.config = config
        self.ranks = read_ranks()
        self.strategy = Strategy(self)
        self.run_dir = None if config.fast_dev_run else self.ranks.run_dir
        self.default_root_dir = str(config.default_root_dir or self.run_dir or Path.cwd())
        self.ckpt_path: str | None = None
        self.state = TrainerState()
        self.train_state = TrainState()
        self.lightning_module = None
        self.datamodule = None
        self.data = RunData(self, {})
        self.saves = Saves(self)
        self.reports = Reports(self)
        self.parallel: Parallel = None  # type: ignore[assignment] # set when a run begins, never read before
        self.precision_object: Precision = None  # type: ignore[assignment] # likewise
        self.compiling: Compiling | None = None
        self.optimizers: list[Any] = []
        self.wrapped_optimizers: list[WrappedOptimizer] = []
        self.lr_scheduler_configs: list[Any] = []
        self.predictions: list[Any] = []
        self.predict_indices: Any = None
        # These two are there while a run lasts.
        self.page: ProgressPage | None = None
        self.hooks: Hooks | None = None
        self.profiler = make_profiler(config.profiler)
        self.loggers = make_loggers(config, self.default_root_dir)
        self.callbacks = arrange(config)

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
        loaders = {"train": train_dataloaders, "val": val_dataloaders}
        with session(self, TrainerFn.FITTING, model, datamodule, loaders) as module:
            run = prepare_fit(self, module, ckpt_path, weights_only)
            if run is not None:
                with run.agreement, torch.autograd.set_detect_anomaly(self.config.detect_anomaly):
                    begin(run)
                    fit(run)
                self.saves.after_fit()

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
        fn = TrainerFn.VALIDATING
        results = self._pass(fn, model, {"val": dataloaders}, datamodule, ckpt_path, weights_only, evaluate)
        return self._shown(results, fn, verbose=verbose)

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
        fn = TrainerFn.TESTING
        results = self._pass(fn, model, {"test": dataloaders}, datamodule, ckpt_path, weights_only, evaluate)
        return self._shown(results, fn, verbose=verbose)

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
        wanted = return_predictions is not False

        def keeping(run: Evaluation) -> list[Any]:
            return predict(run, keep=wanted or any(getattr(c, "needs_predictions", False) for c in self.callbacks))

        loaders = {"predict": dataloaders}
        found = self._pass(TrainerFn.PREDICTING, model, loaders, datamodule, ckpt_path, weights_only, keeping)
        self.predictions = []
        return found if wanted else None

    def _pass(
        self,
        fn: TrainerFn,
        model: Module | None,
        loaders: dict[str, Any],
        datamodule: DataModule | None,
        ckpt_path: str | Path | None,
        weights_only: bool | None,
        act: Callable[[Evaluation], list[Any]],
    ) -> list[Any]:
        """One pass over data without training."""
        given = model is not None
        with session(self, fn, model, datamodule, loaders) as module:
            run = prepare_evaluation(self, fn, module, ckpt_path, weights_only, model_given=given)
            with run.agreement:
                return act(run)

    def _shown(self, results: list[dict[str, float]], fn: TrainerFn, *, verbose: bool) -> list[dict[str, float]]:
        if verbose and self.is_global_zero:
            from trainer.loggers.table import print_results

            print_results(results, str(fn))
        return results

    def save_checkpoint(
        self,
        filepath: str | Path,
        weights_only: bool | None = None,
        storage_options: Any = None,
        *,
        wait: bool = True,
    ) -> None:
        """Write a checkpoint to a path or fsspec URL. Every rank must call it.

        One process writes a torch file (`torch.load(path, weights_only=True)` opens it; its "state_dict" is plain);
        several ranks write a folder of shards. weights_only leaves out all that only resuming needs. wait: return when
        it is durable; else when the state is copied: it is written beside the training, and is durable when the next
        one is saved, or fit ends.

        Raises:
            CheckpointError: nothing was trained or loaded yet, or the state holds objects that are not plain values.
            CheckpointWriteError: the store failed in this save, or in that before it. With wait=False a later step
                raises it, on all ranks.
        """
        if storage_options is not None:
            raise ConfigError("save_checkpoint(storage_options=...) is not supported; put options into the fsspec URL.")
        self.saves.save(filepath, weights_only=bool(weights_only), wait=wait)

    # ------------------------------------------------------------------------------------ small services

    def connect(self) -> World:
        """Meet the other ranks, once.

        The group lives as long as the process: fit and test in one script meet once, also when each has a Trainer of
        its own.
        """
        if self._world is None:
            c = self.config
            self._world = connect(accelerator=c.accelerator, devices=c.devices, num_nodes=c.num_nodes)
            atexit.register(self._world.close)
        return self._world

    @contextmanager
    def init_module(self, empty_init: bool | None = None) -> Iterator[None]:
        """Modules made inside are made on the run's device and in its true precision, if it has one.

        empty_init: leave weights that are about to be loaded without values.
        """
        device = choose_device(self.config.accelerator, self.config.devices, self.ranks)
        precision = make_precision(self.config.precision or "32-true", device)
        with device, precision.weights(), NoInit() if empty_init else nullcontext():
            yield

    def bind_hooks(self) -> Hooks:
        """Find out which hooks somebody overrides, for this run."""
        assert self.lightning_module is not None
        assert self.metrics is not None
        self.hooks = Hooks(
            trainer=self, module=self.lightning_module, callbacks=self.callbacks, metrics=self.metrics,
            datamodule=self.datamodule, profiler=self.profiler,
        )  # fmt: skip
        return self.hooks

    def backward(self, loss: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        """`manual_backward` of a module: scaling, hooks, and the backward itself."""
        hooks = self.hooks
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
