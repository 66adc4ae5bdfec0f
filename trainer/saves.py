"""Checkpoints of a run: when they are written for going on, where they are listed, which one is loaded."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from trainer import resume
from trainer.errors import CheckpointError, ConfigError
from trainer.progress import DONE, SAVE, TRAIN, VALIDATE
from trainer.ranks import rank_zero_warn
from trainer.state import RunningStage, capture

if TYPE_CHECKING:
    from trainer.trainer import Trainer


class Saves:
    """Writes and finds the checkpoints of one Trainer."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        # The batches that the newest whole checkpoint counts, and the paths of those that nobody asked for by name.
        self._saved_batches = -1
        self._own: list[str] = []

    def save(self, filepath: str | Path, *, weights_only: bool) -> None:
        """Write a checkpoint and, if a run can go on from it, list it in the run folder. Every rank must call it."""
        trainer = self._trainer
        if trainer.lightning_module is None or trainer.parallel is None:
            raise CheckpointError("save_checkpoint() before fit, validate, test or predict: there is nothing to save.")
        began = time.monotonic()
        if trainer.page is not None:
            trainer.page.phase(SAVE)
        if trainer.fit_run is not None:
            trainer.train_state.elapsed = time.monotonic() - trainer.fit_run.last_validation
        state, rank_state = capture(trainer, weights_only=weights_only)
        path = str(filepath)
        resume.write(path, state, rank_state, trainer.world, step=trainer.train_state.global_step)
        if not weights_only:
            self._saved_batches = trainer.train_state.batches
            if trainer.run_dir is not None and trainer.is_global_zero:
                whole = path if "://" in path else str(Path(path).resolve())
                entry = resume.Entry(whole, trainer.train_state.batches, trainer.train_state.finished)
                resume.SavedList(trainer.run_dir).add(entry)
        if trainer.page is not None:
            trainer.page.saved(trainer.train_state.global_step, time.monotonic() - began)
            trainer.page.phase(TRAIN if trainer.state.stage is RunningStage.TRAINING else VALIDATE)
        trainer.world.barrier("save_checkpoint()")

    def for_resume(self, why: str) -> str | None:
        """A checkpoint of our own making, for going on; those before it that we made are removed."""
        trainer = self._trainer
        if not trainer.config.enable_checkpointing or trainer.config.fast_dev_run or trainer.fit_run is None:
            return None
        # A string: the root may be a URL.
        root = (trainer.run_dir or trainer.default_root_dir).rstrip("/")
        path = f"{root}/checkpoints/resume-step={trainer.global_step}-{why}.ckpt"
        self.save(path, weights_only=False)
        if trainer.is_global_zero:
            for older in self._own[:-1]:
                resume.remove(older)
        self._own = [*self._own[-1:], path]
        return path

    def after_epoch(self) -> None:
        """In a run folder every epoch leaves a checkpoint, whatever the user's own checkpoints keep."""
        trainer = self._trainer
        saved = self._saved_batches == trainer.train_state.batches
        if trainer.run_dir is not None and trainer.config.enable_checkpointing and not saved:
            self.for_resume("epoch")

    def after_fit(self) -> None:
        """In a run folder the last checkpoint says that the run is over, so that a restart does nothing."""
        trainer = self._trainer
        trainer.train_state.finished = True
        if trainer.run_dir is not None:
            self.for_resume("finished")
            if trainer.page is not None:
                trainer.page.phase(DONE)

    def find(self, ckpt_path: str | Path | None, weights_only: bool | None, *, fitting: bool) -> resume.Found | None:
        """What to load, by the run folder, the argument, or `trainer.ckpt_path`; None to load nothing."""
        trainer = self._trainer
        like = None
        if trainer.world_size > 1 and trainer.parallel.sharded:
            like = {"state_dict": trainer.parallel.module_state()}
        if fitting and trainer.run_dir and (found := resume.newest_in(trainer.run_dir, trainer.world, like)):
            trainer.ckpt_path = found.name
            return found
        path = str(ckpt_path or trainer.ckpt_path or "")
        if path in ("best", "last"):
            path = self._named(path) or ""
        if not path:
            return None
        trainer.ckpt_path = path
        return resume.read(path, trainer.world, like=like, weights_only=weights_only is not False)

    def _named(self, which: str) -> str | None:
        trainer = self._trainer
        callback = trainer.checkpoint_callback
        if callback is None:
            raise ConfigError(f"ckpt_path={which!r} needs a ModelCheckpoint callback; pass a path instead.")
        if which == "best":
            path = callback.best_model_path
            if not path:
                raise CheckpointError("ckpt_path='best': no checkpoint has been written by ModelCheckpoint yet.")
            return str(path)
        last = trainer.world.broadcast(
            resume.newest_of(trainer.checkpoint_callbacks) if trainer.is_global_zero else None
        )
        if last is None:
            rank_zero_warn("ckpt_path='last': there is no last checkpoint yet; starting from the beginning.")
        return None if last is None else str(last)
