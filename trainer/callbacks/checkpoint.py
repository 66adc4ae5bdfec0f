"""`ModelCheckpoint`: the checkpoints a person wants by name: the best ones, the last one, one per so many steps.

What a restarted run continues from is another matter: the trainer keeps that itself, in the run folder.
"""

from __future__ import annotations

import math
import os
import re
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import proxy

import torch
from torch import Tensor

from trainer.callbacks.callback import Callback
from trainer.callbacks.interval import AgreedInterval
from trainer.checkpoint.catalog import is_unfinished
from trainer.checkpoint.folder import Folder
from trainer.checkpoint.saved import remove
from trainer.errors import CheckpointError, ConfigError
from trainer.ranks import rank_zero_info, rank_zero_warn, read_ranks
from trainer.resume import exists

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import timedelta

    from trainer.module import Module
    from trainer.trainer import Trainer

_FIELD = re.compile(r"\{([^{}:!]+)((?::[^{}]*)?)\}")


class Checkpoint(Callback):
    """Base of callbacks that write checkpoints: the trainer calls them last, and adds none of its own if one is there.

    Their `on_train_epoch_end` runs after the module's, so that values logged there can be monitored.
    """

    monitors_epoch_end = True

    def snapshot_state(self) -> dict[str, Any]:
        return {}  # what is written stays written when steps are undone


class _Choice(NamedTuple):
    """Rank 0's decision about one save; it is sent to the other ranks, so that all of them write the same one."""

    path: str
    score: float | None
    error: str | None = None


class ModelCheckpoint(Checkpoint):
    """Writes checkpoints during `fit` and keeps the best `save_top_k` of them by a logged value.

    A single process writes files, several ranks write folders; both can be given as `ckpt_path` and to
    `load_from_checkpoint`. They are written beside the training; an old one is removed only after the one that
    replaces it is durable. While a save is under way the attributes name it already; if it fails, they go back.

    Args:
        dirpath: folder or fsspec URL. Default: `checkpoints` in the logger's folder, else in `default_root_dir`.
        filename: name with fields, such as `{epoch}-{step}-{val_loss:.2f}`; any logged name may be a field.
            Default `{epoch}-{step}`.
        monitor: logged name that says which checkpoint is better. None: the newest is the best.
        verbose: say so when a checkpoint is written.
        save_last: also keep the newest one as `last.ckpt`, a second name of the same file where the disk can do that;
            "link" makes it a symbolic link (local folders only).
        save_top_k: how many to keep; -1 keeps all, 0 none.
        save_on_exception: write one when an exception ends `fit`. Every rank must be able to take part, so with
            several ranks this helps only where all of them raise.
        save_weights_only: leave out optimizers, schedulers, callbacks and counters.
        mode: "min" or "max": which values of `monitor` are better.
        auto_insert_metric_name: write `epoch=3`, not `3`, for `{epoch}`.
        every_n_train_steps, train_time_interval, every_n_epochs: when to write, at most one of them; the default is
            every epoch. A time interval is kept by rank 0's clock.
        save_on_train_epoch_end: write at the end of the training epoch, not of the validation. Default: whichever
            of the two comes last.
        enable_version_counter: append `-v1`, `-v2`, ... rather than overwrite a file that is already there.

    Raises:
        ConfigError: an argument is out of range, or two of them contradict each other.
    """

    CHECKPOINT_JOIN_CHAR = "-"
    CHECKPOINT_EQUALS_CHAR = "="
    CHECKPOINT_NAME_LAST = "last"
    FILE_EXTENSION = ".ckpt"
    STARTING_VERSION = 1

    def __init__(
        self,
        dirpath: str | os.PathLike[str] | None = None,
        filename: str | None = None,
        monitor: str | None = None,
        verbose: bool = False,
        save_last: bool | str | None = None,
        save_top_k: int = 1,
        save_on_exception: bool = False,
        save_weights_only: bool = False,
        mode: str = "min",
        auto_insert_metric_name: bool = True,
        every_n_train_steps: int | None = None,
        train_time_interval: timedelta | None = None,
        every_n_epochs: int | None = None,
        save_on_train_epoch_end: bool | None = None,
        enable_version_counter: bool = True,
    ) -> None:
        if mode not in ("min", "max"):
            raise ConfigError(f"ModelCheckpoint(mode={mode!r}). Allowed: 'min', 'max'.")
        if save_top_k < -1:
            raise ConfigError(f"ModelCheckpoint(save_top_k={save_top_k}). Allowed: -1 (all), 0 (none), or a count.")
        if monitor is None and save_top_k not in (-1, 0, 1):
            raise ConfigError(
                f"ModelCheckpoint(save_top_k={save_top_k}) needs monitor='a logged name' to say which are best."
            )
        if save_last not in (None, True, False, "link"):
            raise ConfigError(f"ModelCheckpoint(save_last={save_last!r}). Allowed: True, False, 'link'.")
        for name, value in (("every_n_train_steps", every_n_train_steps), ("every_n_epochs", every_n_epochs)):
            if value is not None and value < 0:
                raise ConfigError(f"ModelCheckpoint({name}={value}). Allowed: 0 (never) or more.")
        if bool(every_n_train_steps) + bool(every_n_epochs) + (train_time_interval is not None) > 1:
            raise ConfigError(
                f"ModelCheckpoint(every_n_train_steps={every_n_train_steps}, every_n_epochs={every_n_epochs}, "
                f"train_time_interval={train_time_interval}): give one of them, or use several ModelCheckpoints."
            )
        self.dirpath = None if dirpath is None else _absolute(os.fspath(dirpath))
        self.filename = filename
        self.monitor = monitor
        self.verbose = verbose
        self.save_last = save_last
        self.save_top_k = save_top_k
        self.save_on_exception = save_on_exception
        self.save_weights_only = save_weights_only
        self.mode = mode
        self.auto_insert_metric_name = auto_insert_metric_name
        if every_n_train_steps is None and every_n_epochs is None and train_time_interval is None:
            every_n_epochs = 1
        self._every_n_train_steps = every_n_train_steps or 0
        self._every_n_epochs = every_n_epochs or 0
        self._train_time_interval = train_time_interval
        self._interval = None if train_time_interval is None else AgreedInterval(train_time_interval.total_seconds())
        self._save_on_train_epoch_end = save_on_train_epoch_end
        self._enable_version_counter = enable_version_counter

        self.best_model_path = ""
        self.best_model_score: Tensor | None = None
        self.current_score: Tensor | None = None
        self.best_k_models: dict[str, Tensor] = {}
        self.kth_best_model_path = ""
        self.kth_value = torch.tensor(math.inf if mode == "min" else -math.inf)
        self.last_model_path = ""
        self._last_checkpoint_saved = ""
        self._last_global_step_saved = 0
        self._validated = False
        # What the save that is under way replaces. A restart from that save removes it, if we do not get to it.
        self._replaced: list[str] = []
        self._resumed = False
        # A save that came due before the monitored value was there, or while it was an old one.
        self._waits_for_validation = False

    @property
    def state_key(self) -> str:
        return self._generate_state_key(
            monitor=self.monitor,
            mode=self.mode,
            every_n_train_steps=self._every_n_train_steps,
            every_n_epochs=self._every_n_epochs,
            train_time_interval=self._train_time_interval,
        )

    @property
    def every_n_epochs(self) -> int:
        """Epochs between two checkpoints; 0 means that epochs do not count."""
        return self._every_n_epochs

    # ------------------------------------------------------------------------------------------ when to save

    def setup(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        if stage != "fit":
            return
        if self.dirpath is None:
            self.dirpath = _absolute(self._default_dirpath(trainer))
        self.dirpath = trainer.strategy.broadcast(self.dirpath)
        if self.save_last == "link" and "://" in str(self.dirpath):
            raise ConfigError(f"ModelCheckpoint(save_last='link') needs a local folder, not {self.dirpath}.")
        _check_place(self.dirpath)

    @staticmethod
    def _default_dirpath(trainer: Trainer) -> str:
        for logger in trainer.loggers[:1]:
            folder = logger.log_dir
            if folder is None and logger.save_dir is not None:
                version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
                folder = os.path.join(logger.save_dir, str(logger.name), version)
            if folder is not None:
                return os.path.join(folder, "checkpoints")
        return os.path.join(trainer.default_root_dir, "checkpoints")

    def on_train_start(self, trainer: Trainer, pl_module: Module) -> None:
        if self._interval is not None:
            self._interval.begin()
        self._remove_replaced(trainer)
        if self._resumed:
            self._forget_missing(trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Module, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._every_n_train_steps:
            if trainer.global_step % self._every_n_train_steps:
                return
        elif self._interval is None or not self._interval.passed(trainer):
            return
        if self._skips(trainer):
            return
        if self._interval is not None:
            self._interval.begin()
        if self.monitor is not None and (
            self.monitor not in trainer.callback_metrics or self._validation_follows(trainer, batch_idx)
        ):
            self._waits_for_validation = True
            return
        self._save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Module) -> None:
        if not self._skips(trainer) and self._after_train_epoch(trainer):
            self._save_for_epoch(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: Module) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        self._validated = True
        if self._skips(trainer):
            return
        if self._waits_for_validation:
            self._save(trainer)
        elif not self._after_train_epoch(trainer):
            self._save_for_epoch(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: Module) -> None:
        if self.save_last and not trainer.fast_dev_run and self._last_global_step_saved != trainer.global_step:
            trainer.saves.settle()
            before = self.state_dict()
            self._write(trainer, self._next_last(trainer), None, before)

    def on_exception(self, trainer: Trainer, pl_module: Module, exception: BaseException) -> None:
        if not self.save_on_exception or self._skips(trainer):
            return
        path = trainer.strategy.broadcast(self.format_checkpoint_name(self._candidates(trainer)))
        trainer.saves.settle()
        before = self.state_dict()
        self._write(trainer, path, self._next_last(trainer) if self.save_last else None, before)
        trainer.saves.settle()
        rank_zero_info(f"{type(exception).__name__}: {exception}. Checkpoint written to {path}")

    def _skips(self, trainer: Trainer) -> bool:
        return (
            bool(trainer.fast_dev_run)
            or trainer.state.fn != "fit"
            or trainer.sanity_checking
            or self._last_global_step_saved == trainer.global_step
        )

    def _after_train_epoch(self, trainer: Trainer) -> bool:
        """Whether epochs are saved when their training ends; else when their validation ends."""
        if self._save_on_train_epoch_end is not None:
            return self._save_on_train_epoch_end
        if trainer.check_val_every_n_epoch != 1:
            return False
        return sum(trainer.num_val_batches) == 0 or trainer.val_check_interval == 1.0

    def _validation_follows(self, trainer: Trainer, batch_idx: int) -> bool:
        """Whether a validation comes right after this batch, so that the monitored value is about to be renewed."""
        if self._after_train_epoch(trainer) or batch_idx + 1 != trainer.num_training_batches:
            return False
        every = trainer.check_val_every_n_epoch
        return sum(trainer.num_val_batches) > 0 and (every is None or (trainer.current_epoch + 1) % every == 0)

    # ------------------------------------------------------------------------------------------- what to save

    def _save_for_epoch(self, trainer: Trainer) -> None:
        if self._every_n_epochs and (trainer.current_epoch + 1) % self._every_n_epochs == 0:
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        """One save: the top-k one if this state is among them, the last one if it is wanted, or one of both names."""
        # What became of the one before comes first: it may not be there.
        trainer.saves.settle()
        self._waits_for_validation = False
        before = self.state_dict()
        best = self._next_best(trainer) if self.save_top_k != 0 else None
        last = self._next_last(trainer) if self.save_last and (best is not None or self.save_top_k == 0) else None
        if best is not None:
            self._write(trainer, best, last, before)
        elif last is not None:
            self._write(trainer, last, None, before)

    def _next_best(self, trainer: Trainer) -> str | None:
        """The path of this state if it is among the best, whose list it joins; else None."""
        candidates = self._candidates(trainer)
        choice = self._choose(trainer, candidates) if trainer.is_global_zero else None
        choice = trainer.strategy.broadcast(choice)
        if choice is None:
            return None
        choice = _Choice(*choice)
        if choice.error is not None:
            raise ConfigError(choice.error)
        # The state changes before the checkpoint is written, because it is part of it.
        if choice.score is None:
            if self.save_top_k == 1:
                self._replaced.append(self.best_model_path)
            self.best_model_path = choice.path
        else:
            self._rank(choice.path, choice.score)
        if self.verbose:
            score = "" if choice.score is None else f": {self.monitor} = {choice.score:.5g}"
            rank_zero_info(f"epoch {trainer.current_epoch}, step {trainer.global_step}{score}, saving {choice.path}")
        return choice.path

    def _choose(self, trainer: Trainer, candidates: dict[str, Tensor]) -> _Choice | None:
        if self.monitor is None:
            return _Choice(self._free_path(trainer, candidates, None, self.best_model_path), None)
        value = candidates.get(self.monitor)
        if value is None:
            message = (
                f"ModelCheckpoint(monitor={self.monitor!r}): nothing was logged under that name; there are "
                f"{sorted(trainer.callback_metrics)}. Call self.log({self.monitor!r}, value) in the module."
            )
            if self._validated:
                return _Choice("", None, message)
            rank_zero_warn(message + " Nothing is saved.")
            return None
        score = float(value)
        if not self.check_monitor_top_k(trainer, value):
            if self.verbose:
                rank_zero_info(f"step {trainer.global_step}: {self.monitor} is not among the best {self.save_top_k}")
            return None
        full = len(self.best_k_models) == self.save_top_k
        return _Choice(self._free_path(trainer, candidates, None, self.kth_best_model_path if full else None), score)

    def check_monitor_top_k(self, trainer: Trainer, current: Tensor | None = None) -> bool:
        """Whether a state with this value of `monitor` is among the best `save_top_k` so far."""
        if current is None:
            return False
        if self.save_top_k == -1 or len(self.best_k_models) < self.save_top_k:
            return True
        kth = float(self.best_k_models[self.kth_best_model_path])
        return float(current) < kth if self.mode == "min" else float(current) > kth

    def _rank(self, path: str, score: float) -> None:
        """Take a new one among the best, and the worst one out if there are too many."""
        worst = math.inf if self.mode == "min" else -math.inf
        value = torch.tensor(worst if math.isnan(score) else score)
        if len(self.best_k_models) == self.save_top_k:
            del self.best_k_models[self.kth_best_model_path]
            self._replaced.append(self.kth_best_model_path)
        self.current_score = value
        self.best_k_models[path] = value
        ordered = sorted(self.best_k_models, key=lambda p: float(self.best_k_models[p]), reverse=self.mode == "max")
        self.best_model_path = ordered[0]
        self.best_model_score = self.best_k_models[ordered[0]]
        if len(ordered) == self.save_top_k or self.save_top_k == -1:
            self.kth_best_model_path = ordered[-1]
            self.kth_value = self.best_k_models[ordered[-1]]

    def _next_last(self, trainer: Trainer) -> str:
        """The path of the last checkpoint, which is this state now."""
        path: str = trainer.strategy.broadcast(
            self._free_path(trainer, self._candidates(trainer), self.CHECKPOINT_NAME_LAST, self.last_model_path)
            if trainer.is_global_zero
            else None
        )
        self._replaced.append(self.last_model_path)
        self.last_model_path = path
        return path

    def _write(self, trainer: Trainer, path: str, also: str | None, before: dict[str, Any]) -> None:
        """Save under one name or two, beside the training. before: our state, which counts again if that fails."""
        self._last_global_step_saved = trainer.global_step
        self._last_checkpoint_saved = path
        replaced = [p for p in self._replaced if p and p not in self._files() and self._may_remove(trainer, p)]

        def then(durable: bool) -> None:
            if not durable:
                self._set_state(before)
                return
            self._replaced = []
            if trainer.is_global_zero:
                for logger in trainer.loggers:
                    logger.after_save_checkpoint(proxy(self))

        trainer.saves.save(
            path,
            weights_only=self.save_weights_only,
            wait=False,
            also=also,
            symbolic=self.save_last == "link",
            replaced=replaced,
            then=then,
        )

    def _remove_replaced(self, trainer: Trainer) -> None:
        """Remove what the checkpoint that this run goes on from has replaced, if its writer did not get to it."""
        replaced, self._replaced = self._replaced, []
        if trainer.is_global_zero:
            for path in replaced:
                if path and path not in self._files() and self._may_remove(trainer, path):
                    remove(path)

    def _forget_missing(self, trainer: Trainer) -> None:
        """Forget checkpoints that are not there: a newer attempt removed them, which this one goes back behind."""
        found = {path: exists(path) for path in self.best_k_models} if trainer.is_global_zero else None
        found = trainer.strategy.broadcast(found)
        kept = {path: score for path, score in self.best_k_models.items() if found[path]}
        if len(kept) == len(self.best_k_models):
            return
        self.best_k_models = {}
        self.best_model_path = self.kth_best_model_path = ""
        self.best_model_score = None
        for path, score in kept.items():
            self._rank(path, float(score))

    def _may_remove(self, trainer: Trainer, path: str) -> bool:
        """Whether a checkpoint is ours, and not the one that the user started this run from."""
        started_from = trainer.ckpt_path
        given = started_from is not None and _absolute(str(started_from)) == _absolute(path)
        return (not given or trainer.saves.went_on) and path.startswith(str(self.dirpath))

    # ------------------------------------------------------------------------------------------------ its name

    def _candidates(self, trainer: Trainer) -> dict[str, Tensor]:
        candidates = dict(trainer.callback_metrics)
        for name, count in (("epoch", trainer.current_epoch), ("step", trainer.global_step)):
            logged = candidates.get(name)
            candidates[name] = logged.int() if isinstance(logged, Tensor) else torch.tensor(count)
        return candidates

    def format_checkpoint_name(
        self,
        metrics: Mapping[str, Any],
        filename: str | None = None,
        ver: int | None = None,
        prefix: str | None = None,
    ) -> str:
        """The path for a checkpoint with these values; a field that was not logged counts as 0.

        >>> ModelCheckpoint(filename="{epoch:02d}-{val_loss:.2f}").format_checkpoint_name({"epoch": 3, "val_loss": 0.5})
        'epoch=03-val_loss=0.50.ckpt'
        """
        filename = filename or self.filename or f"{{epoch}}{self.CHECKPOINT_JOIN_CHAR}{{step}}"

        def fill(match: re.Match[str]) -> str:
            name, spec = match.groups()
            value = metrics.get(name, 0)
            value = value.item() if isinstance(value, Tensor) else value
            label = f"{name}{self.CHECKPOINT_EQUALS_CHAR}" if self.auto_insert_metric_name else ""
            return label + format(value, spec[1:])

        parts = [prefix, _FIELD.sub(fill, filename), None if ver is None else f"v{ver}"]
        name = self.CHECKPOINT_JOIN_CHAR.join(p for p in parts if p is not None) + self.FILE_EXTENSION
        return os.path.join(self.dirpath, name) if self.dirpath else name

    def _free_path(
        self, trainer: Trainer, candidates: dict[str, Tensor], filename: str | None, ours: str | None
    ) -> str:
        """The name with these values that is not taken; `ours` may be overwritten, since it is being replaced."""
        path = self.format_checkpoint_name(candidates, filename)
        version = self.STARTING_VERSION
        while self._enable_version_counter and path != ours and self._taken(trainer, path):
            path = self.format_checkpoint_name(candidates, filename, ver=version)
            version += 1
        return path

    def _taken(self, trainer: Trainer, path: str) -> bool:
        for other in trainer.checkpoint_callbacks:
            if isinstance(other, ModelCheckpoint) and path in other._files():
                return True
        if _in_run_folder(path):
            # Ours, from an attempt that died after the state it goes on from: the same step is written again.
            return trainer.saves.is_of_another(path)
        # What a save of several ranks left that died is no checkpoint; the new one lies beside it.
        return exists(path) and not (trainer.world_size > 1 and is_unfinished(Folder.at(path)))

    def _files(self) -> set[str]:
        return {*self.best_k_models, self.best_model_path, self.last_model_path}

    def file_exists(self, filepath: str, trainer: Trainer) -> bool:
        """Whether rank 0 sees the file or folder; the same answer on all ranks."""
        return bool(trainer.strategy.broadcast(exists(filepath)))

    def to_yaml(self, filepath: str | os.PathLike[str] | None = None) -> None:
        """Write the best checkpoints and their scores; default: `best_k_models.yaml` beside them."""
        import fsspec

        from trainer.loggers.hparams_file import to_yaml

        if filepath is None:
            if self.dirpath is None:
                raise ConfigError("ModelCheckpoint.to_yaml() needs a filepath: no checkpoint was written yet.")
            filepath = os.path.join(self.dirpath, "best_k_models.yaml")
        with fsspec.open(os.fspath(filepath), "w") as file:
            file.write(to_yaml({path: float(score) for path, score in self.best_k_models.items()}))

    # ------------------------------------------------------------------------------------------------ its state

    def state_dict(self) -> dict[str, Any]:
        return {
            "monitor": self.monitor,
            "best_model_score": self.best_model_score,
            "best_model_path": self.best_model_path,
            "current_score": self.current_score,
            "dirpath": self.dirpath,
            "best_k_models": dict(self.best_k_models),
            "kth_best_model_path": self.kth_best_model_path,
            "kth_value": self.kth_value,
            "last_model_path": self.last_model_path,
            "last_global_step_saved": self._last_global_step_saved,
            "last_checkpoint_saved": self._last_checkpoint_saved,
            "validated": self._validated,
            "waits_for_validation": self._waits_for_validation,
            "replaced": list(self._replaced),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_model_path = state_dict["best_model_path"]
        was = state_dict.get("dirpath", self.dirpath)
        if was != self.dirpath:
            rank_zero_warn(
                f"ModelCheckpoint wrote to {was} before and writes to {self.dirpath} now: it ranks new checkpoints "
                "among themselves and leaves the old ones alone."
            )
            return
        self._resumed = True
        self._set_state(state_dict)

    def _set_state(self, state_dict: dict[str, Any]) -> None:
        self.best_model_path = state_dict["best_model_path"]
        self.best_model_score = state_dict["best_model_score"]
        self.current_score = state_dict.get("current_score")
        self.best_k_models = dict(state_dict.get("best_k_models", {}))
        self.kth_best_model_path = state_dict.get("kth_best_model_path", "")
        self.kth_value = state_dict.get("kth_value", self.kth_value)
        self.last_model_path = state_dict.get("last_model_path", "")
        self._last_global_step_saved = state_dict.get("last_global_step_saved", 0)
        self._last_checkpoint_saved = state_dict.get("last_checkpoint_saved", "")
        self._validated = state_dict.get("validated", False)
        self._waits_for_validation = state_dict.get("waits_for_validation", False)
        self._replaced = list(state_dict.get("replaced", []))


class OnExceptionCheckpoint(Checkpoint):
    """Writes one checkpoint when an exception ends `fit`.

    Args:
        dirpath: folder or fsspec URL.
        filename: its name, without the extension.
    """

    FILE_EXTENSION = ".ckpt"

    def __init__(self, dirpath: str | os.PathLike[str], filename: str = "on_exception") -> None:
        if not filename:
            raise ConfigError("OnExceptionCheckpoint(filename='') needs a name.")
        self.dirpath = _absolute(os.fspath(dirpath))
        self.filename = filename

    @property
    def ckpt_path(self) -> str:
        """Where it is written."""
        return os.path.join(self.dirpath, self.filename + self.FILE_EXTENSION)

    def on_exception(self, trainer: Trainer, pl_module: Module, exception: BaseException) -> None:
        if trainer.state.fn == "fit" and not trainer.fast_dev_run:
            trainer.save_checkpoint(self.ckpt_path)


def _check_place(dirpath: str) -> None:
    """Raise CheckpointError where no folder can be: it would be found after an epoch else. Looks, and makes nothing."""
    place = Folder.at(dirpath)
    if not place.local:
        return
    there = place.path
    while not os.path.lexists(there):
        there = os.path.dirname(there)
    if not os.path.isdir(there) or not os.access(there, os.W_OK | os.X_OK):
        what = "cannot be written" if os.path.isdir(there) else "is no folder"
        raise CheckpointError(f"ModelCheckpoint(dirpath={dirpath!r}): {there} {what}; give another dirpath.")


def _absolute(path: str) -> str:
    if "://" in path:
        return path.rstrip("/")
    return os.path.realpath(os.path.expanduser(path))


def _in_run_folder(path: str) -> bool:
    run_dir = read_ranks().run_dir
    return run_dir is not None and path.startswith(os.path.realpath(run_dir) + os.sep)
