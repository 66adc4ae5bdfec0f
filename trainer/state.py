"""Everything that must survive a restart, in one place.

`TrainState` holds the loop's own counters; `capture` collects the whole state of a run as nested dicts of tensors and
plain values, split into what all ranks share and what each rank has for itself; `restore_*` puts it back.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from enum import Enum
from typing import TYPE_CHECKING, Any

import torch

from trainer.errors import CheckpointError, ConfigError
from trainer.hparams import storable
from trainer.rank_state import rank_state
from trainer.ranks import rank_zero_warn

if TYPE_CHECKING:
    from trainer.trainer import Trainer

FORMAT = 1


class TrainerFn(str, Enum):
    """Which of the Trainer's methods runs."""

    FITTING = "fit"
    VALIDATING = "validate"
    TESTING = "test"
    PREDICTING = "predict"

    def __str__(self) -> str:
        return self.value


class RunningStage(str, Enum):
    """What the Trainer does at the moment."""

    TRAINING = "train"
    SANITY_CHECKING = "sanity_check"
    VALIDATING = "validate"
    TESTING = "test"
    PREDICTING = "predict"

    def __str__(self) -> str:
        return self.value

    @property
    def evaluating(self) -> bool:
        """Whether this is validation or test."""
        return self in (RunningStage.VALIDATING, RunningStage.TESTING, RunningStage.SANITY_CHECKING)


class TrainerStatus(str, Enum):
    """How the newest call went."""

    INITIALIZING = "initializing"
    RUNNING = "running"
    FINISHED = "finished"
    INTERRUPTED = "interrupted"

    def __str__(self) -> str:
        return self.value


@dataclass
class TrainerState:
    """What runs, where it is, and how it went."""

    fn: TrainerFn | None = None
    stage: RunningStage | None = None
    status: TrainerStatus = TrainerStatus.INITIALIZING

    @property
    def finished(self) -> bool:
        """Whether the newest call came to its end."""
        return self.status is TrainerStatus.FINISHED

    @property
    def stopped(self) -> bool:
        """Whether nothing runs."""
        return self.status in (TrainerStatus.FINISHED, TrainerStatus.INTERRUPTED)


@dataclass(slots=True)
class TrainState:
    """Where training is. All counters are of things that are done.

    epoch: epochs. batch: training batches of this epoch. batches: training batches in all. global_step: optimizer
    steps. logger_step: batches after which an optimizer stepped (the x axis of loggers). position: what the training
    loader(s) have given, in their own terms (None: nothing yet). resume_at: where in the tail of a batch or epoch the
    state was taken (see `trainer.loop`), empty between two batches. accumulate: micro-batches per step, which
    callbacks may change. windows_from: the batch at which the epoch's first window of so many begins; not 0 where a
    run went on in mid-epoch on another number of ranks. elapsed: seconds since the last validation, for one by time.
    finished: fit is over. seed: of the sample order. should_stop: a callback or the user asked to end.
    """

    epoch: int = 0
    batch: int = 0
    batches: int = 0
    global_step: int = 0
    logger_step: int = 0
    position: Any = None
    resume_at: str = ""
    accumulate: int = 1
    windows_from: int = 0
    elapsed: float = 0.0
    finished: bool = False
    seed: int | None = None
    should_stop: bool = False


def capture(trainer: Trainer, *, weights_only: bool = False) -> tuple[dict[str, Any], dict[str, Any]]:
    """The state that all ranks share, and this rank's own. Every rank must call it: sharded state is gathered.

    Keys that Lightning's checkpoints have too mean the same: `epoch`, `global_step`, `state_dict`,
    `optimizer_states`, `lr_schedulers`, `callbacks`, `hyper_parameters`, and a DataModule's state under its class.
    """
    module, datamodule, state = trainer.lightning_module, trainer.datamodule, trainer.train_state
    assert module is not None
    shared: dict[str, Any] = {
        "muster_format": FORMAT,
        "epoch": state.epoch,
        "global_step": state.global_step,
        "state_dict": trainer.parallel.module_state(),
    }
    own: dict[str, Any] = {}
    for owner in (module, datamodule):
        if owner is not None and owner.hparams:
            shared[owner.CHECKPOINT_HYPER_PARAMS_NAME] = owner._hparams_name
            shared[owner.CHECKPOINT_HYPER_PARAMS_KEY] = storable(owner.hparams)[0]
    if datamodule is not None and (data_state := datamodule.state_dict()):
        shared[type(datamodule).__qualname__] = data_state
    if not weights_only:
        shared["progress"] = asdict(state)
        shared["optimizer_states"] = [trainer.parallel.optimizer_state(o) for o in trainer.optimizers]
        shared["lr_schedulers"] = [c.scheduler.state_dict() for c in trainer.lr_scheduler_configs]
        shared["precision"] = trainer.precision_object.state_dict()
        shared["callbacks"] = callback_states(trainer)
        shared["rows"] = trainer.reports.rows_of_step()
        shared["threads"] = torch.get_num_threads()
        if (run := trainer.fit_run) is not None:
            own = rank_state(run)
            if run.guard is not None:
                shared["guard"] = run.guard.state_dict()
            if run.virtual is not None:  # the same on all ranks, and wanted by those that come later
                shared["virtual"] = {k: own.pop(k) for k in ("rng", "gradients") if k in own}
                shared["virtual"]["count"] = run.virtual.count
        for callback in trainer.callbacks:
            callback.on_save_checkpoint(trainer, module, shared)
    module.on_save_checkpoint(shared)
    return shared, own


def callback_states(trainer: Trainer) -> dict[str, Any]:
    """The callbacks' states by their keys.

    Raises:
        ConfigError: two callbacks with state have the same key.
    """
    states: dict[str, Any] = {}
    for callback in trainer.callbacks:
        if state := callback.state_dict():
            if callback.state_key in states:
                raise ConfigError(
                    f"Two callbacks have the state_key {callback.state_key!r}, so only one could be resumed. Give "
                    "them different arguments, or override state_key."
                )
            states[callback.state_key] = state
    return states


def restore_model(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Weights, DataModule and callbacks: what `fit` needs before the optimizers are made, and all that `test` needs."""
    module, datamodule = trainer.lightning_module, trainer.datamodule
    assert module is not None
    module.on_load_checkpoint(checkpoint)
    trainer.parallel.load_module_state(checkpoint["state_dict"], strict=module.strict_loading)
    if datamodule is not None and type(datamodule).__qualname__ in checkpoint:
        datamodule.load_state_dict(checkpoint[type(datamodule).__qualname__])
    states = checkpoint.get("callbacks")
    if states is None:
        return
    unknown = set(map(str, states)) - {c.state_key for c in trainer.callbacks}
    if unknown and trainer.state.fn is TrainerFn.FITTING:
        rank_zero_warn(
            f"The checkpoint holds the state of callbacks that this Trainer does not have: {sorted(unknown)}. "
            "Pass the same callbacks to resume them."
        )
    for callback in trainer.callbacks:
        callback.on_load_checkpoint(trainer, module, checkpoint)
        if (saved := states.get(callback.state_key)) is not None:
            callback.load_state_dict(saved)


def restore_training(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Optimizers, schedulers, scaler and counters.

    Raises:
        CheckpointError: the checkpoint holds weights only, or another number of optimizers or schedulers.
    """
    if "optimizer_states" not in checkpoint:
        raise CheckpointError(
            "The checkpoint holds weights only, so training cannot go on from it. To start from its weights: "
            "model = Model.load_from_checkpoint(path), then fit without ckpt_path."
        )
    saved = checkpoint["optimizer_states"]
    if len(saved) != len(trainer.optimizers):
        raise CheckpointError(
            f"The checkpoint holds {len(saved)} optimizers, configure_optimizers() returned {len(trainer.optimizers)}."
        )
    for optimizer, optimizer_state in zip(trainer.optimizers, saved, strict=True):
        trainer.parallel.load_optimizer_state(optimizer, optimizer_state)
    schedulers = checkpoint.get("lr_schedulers", [])
    if len(schedulers) != len(trainer.lr_scheduler_configs):
        raise CheckpointError(
            f"The checkpoint holds {len(schedulers)} schedulers, configure_optimizers() returned "
            f"{len(trainer.lr_scheduler_configs)}."
        )
    for config, scheduler_state in zip(trainer.lr_scheduler_configs, schedulers, strict=True):
        config.scheduler.load_state_dict(scheduler_state)
    scaler = checkpoint.get("precision") or checkpoint.get("MixedPrecision")
    if scaler:
        trainer.precision_object.load_state_dict(scaler)
    now, threads = torch.get_num_threads(), checkpoint.get("threads")
    if threads not in (None, now):
        rank_zero_warn(
            f"The checkpoint was made with {threads} intra-op threads and now there are {now}: sums on the CPU may "
            f"differ in their last bits. For an exact resume set OMP_NUM_THREADS={threads}."
        )
    progress = checkpoint.get("progress")
    counters = progress if progress is not None else _lightning_progress(checkpoint)
    known = {f.name for f in fields(TrainState)}
    seed = trainer.train_state.seed
    trainer.train_state = TrainState(**{"seed": seed} | {k: v for k, v in counters.items() if k in known})


def _lightning_progress(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The counters of a checkpoint that Lightning wrote; it holds no data position, so an epoch is begun anew.

    Lightning writes most checkpoints at the end of an epoch, where `processed` already counts it.
    """
    step = int(checkpoint.get("global_step", 0))
    epoch = int(checkpoint.get("epoch", 0))
    batches = logger_step = step
    accumulate = 1
    try:
        fit_loop = checkpoint["loops"]["fit_loop"]
        epoch = int(fit_loop["epoch_progress"]["current"]["processed"])
        started = int(fit_loop["epoch_progress"]["current"]["started"])
        batches = int(fit_loop["epoch_loop.batch_progress"]["total"]["processed"])
        logger_step = int(fit_loop["epoch_loop.state_dict"].get("_batches_that_stepped", step)) + 1
        if started > epoch:
            rank_zero_warn(
                f"Lightning saved this checkpoint in the middle of epoch {epoch} without the position in the data: "
                "that epoch is begun anew, with the saved weights."
            )
    except (KeyError, TypeError):
        epoch += 1
    return {
        "epoch": epoch, "batches": batches, "global_step": step, "logger_step": logger_step, "accumulate": accumulate,
    }  # fmt: skip
