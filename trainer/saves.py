"""Checkpoints of a run: when they are written for going on, where they are listed, which one is loaded."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer import resume
from trainer.checkpoint.background import Background
from trainer.checkpoint.file import save_file
from trainer.checkpoint.saved import After, Entry, SavedList, process_start
from trainer.checkpoint.store import Store
from trainer.errors import CheckpointError, CheckpointWriteError, ConfigError
from trainer.progress import DONE, SAVE, TRAIN, VALIDATE
from trainer.ranks import rank_zero_warn
from trainer.state import RunningStage, capture

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from trainer.checkpoint.background import Saved
    from trainer.trainer import Trainer


# Run folder -> trainings that this process has brought to their end there. A script may make several, and a restart
# makes all of them again: each goes on from its own checkpoints.
_trained: dict[str, int] = {}

# Waiting so long for the save before is worth a word.
_LONG_WAIT_S = 1.0


@dataclass(frozen=True)
class Cost:
    """What the newest save took, in seconds: training stood still for stall_s, and it was durable after durable_s."""

    stall_s: float
    durable_s: float


class Saves:
    """Writes and finds the checkpoints of one Trainer.

    A save is copied while training waits and written beside it, one at a time: the next one waits until that before
    it is durable. What came of it all ranks learn together: at the next save, at the end, or, if it failed, after a
    batch on which they agree (see `trainer.stop`).
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        # The batches that the newest checkpoint counts, and the paths of those that nobody asked for by name.
        self._saved_batches = -1
        self._own: list[str] = []
        # Which of the run's trainings this is, and what the others have saved.
        self._fit = 0
        self._others: set[str] = set()
        self._background: Background | None = None
        self._stores: dict[str, Store] = {}
        self._stall_s = 0.0
        # Since the save before: how long training waited for that one.
        self._waited_s = 0.0
        self._told_of_waiting = False
        self.cost: Cost | None = None
        # Whether the run goes on from a checkpoint of its own, which nobody named.
        self.went_on = False
        # Whether the save under way is that of a run that was told to stop.
        self.stopping = False
        # Called when all ranks know what came of the save in the background: with whether it is durable.
        self._then: Callable[[bool], object] | None = None

    @property
    def up_to_date(self) -> bool:
        """Whether nothing was trained since the newest save."""
        return self._saved_batches == self._trainer.train_state.batches

    def save(
        self,
        filepath: str | Path,
        *,
        weights_only: bool = False,
        wait: bool = True,
        own: bool = False,
        also: str | None = None,
        symbolic: bool = False,
        replaced: Sequence[str] = (),
        then: Callable[[bool], object] | None = None,
    ) -> None:
        """Write a checkpoint and, if a run can go on from it, list it in the run folder. Every rank must call it.

        wait: return when it is durable; else when the state is copied. own: nobody asked for it by name. also,
        symbolic, replaced: see `After`. then: called when all ranks know whether it is durable.

        Raises:
            CheckpointError: nothing was trained or loaded yet, or the state holds objects that are not plain values.
            CheckpointWriteError: it failed, or the one before it did. A full store is an error only with `wait`.
        """
        trainer = self._trainer
        if trainer.fit_run is not None and trainer.fit_run.guard is not None:
            trainer.fit_run.guard.settle()
            trainer.fit_run.guard.due = True
        if trainer.lightning_module is None or trainer.parallel is None:
            raise CheckpointError("save_checkpoint() before fit, validate, test or predict: there is nothing to save.")
        began = time.monotonic()
        if trainer.page is not None:
            trainer.page.phase(SAVE)
        self.settle()
        self._tell_of_waiting()
        if trainer.fit_run is not None:
            trainer.train_state.elapsed = time.monotonic() - trainer.fit_run.last_validation
        state, rank_state = capture(trainer, weights_only=weights_only)
        path, step = _absolute(filepath), trainer.global_step
        after = self._after(path, weights_only=weights_only, own=own, also=also, symbolic=symbolic, replaced=replaced)
        if self._background is None:
            self._background = Background(trainer.world, self._ended)
        self._then = then
        try:
            if trainer.world_size == 1:
                state |= {"rank_state": rank_state}
                save_file(state, path, step=step, background=self._background, after=after, wait=wait)
            else:
                folder, _, name = path.rpartition("/")
                self._store(folder).save(state, step=step, name=name, rank_state=rank_state, after=after, wait=wait)
        except CheckpointError:
            self._tell(durable=False)
            raise
        self._stall_s = time.monotonic() - began
        if not weights_only:
            self._saved_batches = trainer.train_state.batches
        if wait:
            self._tell(durable=True)
            if trainer.page is not None:
                trainer.page.saved(step, self._stall_s, self._stall_s)
        if trainer.page is not None:
            trainer.page.phase(TRAIN if trainer.state.stage is RunningStage.TRAINING else VALIDATE)
        if not trainer.running:
            self.close()

    def _tell_of_waiting(self) -> None:
        waited, self._waited_s = self._waited_s, 0.0
        if waited > _LONG_WAIT_S and not self._told_of_waiting:
            self._told_of_waiting = True
            rank_zero_warn(
                f"A checkpoint waited {waited:.1f} s for the one before it, which was still being written: they come "
                "more often than the store takes them. Save less often, or with save_every='auto'."
            )

    def settle(self) -> None:
        """Wait until the save in the background is durable, and let all know. Every rank must call it.

        Raises:
            CheckpointWriteError: it failed, on every rank. That the store is full is a warning.
        """
        if self._background is None:
            return
        durable, busy, began = False, self._background.busy, time.monotonic()
        try:
            durable = self._background.wait()
        finally:
            self._waited_s += busy * (time.monotonic() - began)
            if self._trainer.fit_run is not None:
                self._trainer.fit_run.agreement.answered()
            self._tell(durable=durable)

    def close(self) -> None:
        """Wait for what this rank writes, and let the writer go. Asks no other rank."""
        if self._background is not None:
            self._background.close()
        self._background, self._stores, self._then = None, {}, None

    def _tell(self, *, durable: bool) -> None:
        then, self._then = self._then, None
        if not durable:
            self._saved_batches = -1
        if then is not None:
            then(durable)

    def _ended(self, saved: Saved | None, unawaited: bool) -> None:
        """In a thread of the writer: this rank's part of a save is over."""
        trainer = self._trainer
        if saved is not None and saved.seconds is not None:
            self.cost = Cost(self._stall_s, saved.seconds)
            if trainer.page is not None:
                trainer.page.saved(saved.step, saved.seconds, self._stall_s)
        run = trainer.fit_run
        if run is not None and unawaited and (saved is None or trainer.world_size == 1):
            run.agreement.call()

    def _after(
        self, path: str, *, weights_only: bool, own: bool, also: str | None, symbolic: bool, replaced: Sequence[str]
    ) -> After:
        trainer = self._trainer
        if trainer.run_dir is None:
            return After(also, symbolic, replaced=tuple(replaced))
        state = trainer.train_state
        entry = None if weights_only else Entry(path, state.batches, state.finished, own, fit=self._fit)
        return After(also, symbolic, SavedList.of(trainer.run_dir), entry, tuple(replaced), process_start())

    def _store(self, folder: str) -> Store:
        if folder not in self._stores:
            # Outside a run folder another run may be at work in the same place.
            collect = self._trainer.run_dir is not None
            self._stores[folder] = Store(folder, self._trainer.world, background=self._background, collect=collect)
        return self._stores[folder]

    def for_resume(self, why: str, *, wait: bool = False) -> str | None:
        """A checkpoint of our own making, for going on; it replaces those before it that we made, but the last."""
        trainer = self._trainer
        if not trainer.config.enable_checkpointing or trainer.config.fast_dev_run or trainer.fit_run is None:
            return None
        # A string: the root may be a URL.
        root = (trainer.run_dir or trainer.default_root_dir).rstrip("/")
        fit = f"fit={self._fit}-" if self._fit else ""
        path = f"{root}/checkpoints/resume-{fit}step={trainer.global_step}-{why}.ckpt"
        replaced = [p for p in self._own[:-1] if p != path]
        self._own = [*[p for p in self._own if p != path][-1:], path]
        self.save(path, wait=wait, own=True, replaced=replaced)
        return path

    def after_epoch(self) -> None:
        """In a run folder every epoch leaves a checkpoint, whatever the user's own checkpoints keep."""
        if self._trainer.run_dir is not None and self._trainer.config.enable_checkpointing and not self.up_to_date:
            self.for_resume("epoch")

    def after_fit(self) -> None:
        """The last save is durable, and in a run folder says that the run is over: a restart does nothing."""
        trainer = self._trainer
        self.settle()
        self._waited_s = 0.0  # at the end one has to
        trainer.train_state.finished = True
        if trainer.run_dir is not None:
            self.for_resume("finished", wait=True)
            self.is_trained()
            if trainer.page is not None:
                trainer.page.phase(DONE)

    def is_trained(self) -> None:
        """Note that the training is over: the next one in this process and this run folder is another."""
        run_dir = self._trainer.run_dir
        assert run_dir is not None
        _trained[run_dir] = self._fit + 1

    def is_of_another(self, path: str) -> bool:
        """Whether another training of this run has written a checkpoint."""
        return path in self._others

    def at_stop(self) -> str | None:
        """The checkpoint of a run that was told to stop, durable; None if there is none, or no room for one."""
        try:
            self.settle()
        except CheckpointWriteError as error:
            rank_zero_warn(f"{error} The run stops now, and is saved once more.")
        self._waited_s = 0.0  # at the end one has to
        self.stopping = True
        try:
            return self.for_resume("stopped", wait=True)
        except CheckpointWriteError as error:
            if not error.disk_full:
                raise
            rank_zero_warn(f"{error} The run stops all the same, and goes on from an older checkpoint.")
            return None
        finally:
            self.stopping = False

    def find(self, ckpt_path: str | Path | None, weights_only: bool | None, *, fitting: bool) -> resume.Found | None:
        """What to load, by the run folder, the argument, or `trainer.ckpt_path`; None to load nothing."""
        trainer = self._trainer
        like = None
        self.went_on = False
        if trainer.world_size > 1 and trainer.parallel.sharded:
            like = {"state_dict": trainer.parallel.module_state()}
        if fitting and trainer.run_dir and (found := self._newest(trainer.run_dir, like)):
            self.went_on = True
            trainer.ckpt_path = found.name
            return found
        path = str(ckpt_path or trainer.ckpt_path or "")
        if path in ("best", "last"):
            path = self._named(path) or ""
        if not path:
            return None
        trainer.ckpt_path = path
        return resume.read(path, trainer.world, like=like, weights_only=weights_only is not False)

    def _newest(self, run_dir: str, like: dict[str, Any] | None) -> resume.Found | None:
        saved, world = SavedList.of(run_dir), self._trainer.world
        entries = world.broadcast(saved.read() if world.is_global_zero else None)
        self._fit, self._own, self._saved_batches = _trained.get(run_dir, 0), [], -1
        self._others = {entry.path for entry in entries if entry.fit != self._fit}
        return resume.newest_whole([entry for entry in entries if entry.fit == self._fit], saved, world, like)

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


def _absolute(path: str | Path) -> str:
    text = str(path).rstrip("/")
    return text if "://" in text else str(Path(text).resolve())
