"""What a Trainer tells about itself: who and where it is, how far, with which data and values."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from trainer.config import Adjustable
from trainer.errors import DistributedError
from trainer.state import RunningStage, TrainerStatus

if TYPE_CHECKING:
    from trainer.config import Config
    from trainer.data import DataModule
    from trainer.distributed import World
    from trainer.feeding import RunData
    from trainer.loop import Fit
    from trainer.metrics import Metrics
    from trainer.module import Module
    from trainer.precision import Precision
    from trainer.ranks import Ranks
    from trainer.signals import StopSignals
    from trainer.state import TrainerState, TrainState


class Status(Adjustable):
    """The properties of a Trainer, by Lightning's names. They can be read before, during and after a run."""

    config: Config
    ranks: Ranks
    state: TrainerState
    train_state: TrainState
    data: RunData
    lightning_module: Module | None
    datamodule: DataModule | None
    loggers: list[Any]
    callbacks: list[Any]
    default_root_dir: str
    # Each is there from the first run on, the last two only while it lasts.
    _world: World | None = None
    precision_object: Precision
    metrics: Metrics | None = None
    signals: StopSignals | None = None
    fit_run: Fit | None = None

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
    def estimated_stepping_batches(self) -> float:
        """How many optimizer steps fit will take, e.g. for a scheduler's total_steps; inf if there is no limit."""
        if self.max_epochs == -1:
            return math.inf if self.max_steps == -1 else self.max_steps
        batches = self.data.train().batches
        if batches == math.inf:
            return self.max_steps
        steps = math.ceil(batches / self.accumulate_grad_batches) * max(self.max_epochs or 0, 1)
        return steps if self.max_steps == -1 else min(steps, self.max_steps)

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
        return self.fit_run is not None and self.train_state.batch + 1 >= self.fit_run.batches_per_epoch

    @property
    def interrupted(self) -> bool:
        """Whether the last run ended by an exception or a stop."""
        return self.state.status is TrainerStatus.INTERRUPTED

    @property
    def received_sigterm(self) -> bool:
        """Whether a stop signal has come to this rank."""
        return self.signals is not None and self.signals.requested

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
        return self.data.raw("train")

    @property
    def val_dataloaders(self) -> Any:
        """The validation loader(s), or None."""
        return self.data.raw("val")

    @property
    def test_dataloaders(self) -> Any:
        """The test loader(s), or None."""
        return self.data.raw("test")

    @property
    def predict_dataloaders(self) -> Any:
        """The loader(s) of predict, or None."""
        return self.data.raw("predict")

    @property
    def num_training_batches(self) -> float:
        """Batches of a training epoch on this rank; inf if unknown."""
        return self.data.loaders["train"].batches if "train" in self.data.loaders else math.inf

    @property
    def num_val_batches(self) -> list[float]:
        """Batches of each validation loader."""
        return self.data.limits("val")

    @property
    def num_sanity_val_batches(self) -> list[float]:
        """Batches of each validation loader in the sanity check."""
        return [min(self.num_sanity_val_steps, n) for n in self.data.limits("val")]

    @property
    def num_test_batches(self) -> list[float]:
        """Batches of each test loader."""
        return self.data.limits("test")

    @property
    def num_predict_batches(self) -> list[float]:
        """Batches of each loader of predict."""
        return self.data.limits("predict")

    @property
    def enable_validation(self) -> bool:
        """Whether fit validates."""
        return self.lightning_module is not None and self.data.validates()

    # ----------------------------------------------------------------------------------- values and callbacks

    @property
    def callback_metrics(self) -> dict[str, torch.Tensor]:
        """The newest value of every logged name, as tensors."""
        return self.metrics.callback_metrics if self.metrics is not None else {}

    @property
    def logged_metrics(self) -> dict[str, torch.Tensor]:
        """The newest value of every name that loggers get."""
        return self.metrics.logged_metrics if self.metrics is not None else {}

    @property
    def progress_bar_metrics(self) -> dict[str, float]:
        """The newest value of every name logged with prog_bar=True."""
        return self.metrics.progress_bar_metrics if self.metrics is not None else {}

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
