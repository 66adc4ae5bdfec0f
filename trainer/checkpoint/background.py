"""Saves beside the training: a copy in memory, a writer, and what becomes of it, learnt by all ranks alike."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from trainer.checkpoint.job import Outcome
from trainer.checkpoint.snapshot import Snapshot, available_memory, has_memory
from trainer.checkpoint.writer import ProcessWriter, ThreadWriter
from trainer.checkpoint.writing import Content
from trainer.errors import CheckpointWriteError
from trainer.ranks import rank_zero_warn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from trainer.checkpoint.folder import Folder
    from trainer.checkpoint.job import Job

# A thread of this process writes less than this to a local disk sooner than a process has started (0.1 s). It takes
# the interpreter from the training for moments only, as long as rank 0 has few records to read.
_SMALL_BYTES = 4 << 20
_FEW_RANKS = 16


class Ranks(Protocol):
    """What saves need of a `trainer.distributed.World`."""

    @property
    def rank(self) -> int:
        """The number of this rank."""

    @property
    def size(self) -> int:
        """How many there are."""

    def gather(self, obj: Any) -> list[Any]:
        """The objects of all ranks, in their order, on every rank."""

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """The object of rank `src`, on every rank."""


class Alone:
    """One process."""

    rank = 0
    size = 1

    def gather(self, obj: Any) -> list[Any]:
        """The one object."""
        return [obj]

    def broadcast(self, obj: Any, src: int = 0) -> Any:  # noqa: ARG002
        """The object itself."""
        return obj


@dataclass(frozen=True)
class Saved:
    """A save that was begun; it is durable when it was awaited (`wait=True`, `wait()`), or `poll` gave it.

    stall_s: how long training stood still for it. seconds: until it was durable; None as long as that is not known.
    """

    path: str
    name: str
    step: int
    stall_s: float
    seconds: float | None = None


class State(Protocol):
    """What is saved, as this rank writes it."""

    @property
    def bytes(self) -> int:
        """Its size."""

    def fill(self, snapshot: Snapshot) -> None:
        """Copy it; on return the training may change it. Raises OSError: there is no memory."""

    def blocks(self) -> Iterator[memoryview]:
        """Its bytes without a copy of the whole, cut at the blocks that are checksummed."""


@dataclass
class _Pending:
    """The save in the background. told: `poll` has said how it went."""

    saved: Saved
    task: Job
    began: float
    writer: ThreadWriter | ProcessWriter
    told: bool = False


class Background:
    """One save at a time, whichever store or file it goes to: its memory and its process are taken once.

    `on_end` is called in a thread when this rank's part of a save is over: with the save if it went well, else with
    None; and with whether nobody has begun to wait for it yet. (`wait` is what lets all ranks know.)

    Close it: the process of the writer ends then.
    """

    def __init__(self, world: Ranks, on_end: Callable[[Saved | None, bool], object] = lambda *_: None) -> None:
        self.world = world
        self._on_end = on_end
        self._snapshot = Snapshot()
        self._thread = ThreadWriter(self._told)
        self._process = ProcessWriter(self._told)
        self._pending: _Pending | None = None
        # The newest, awaited or not: what a writer's thread tells of.
        self._newest: _Pending | None = None

    @property
    def memory(self) -> int:
        """Bytes of shared memory taken for the copy."""
        return self._snapshot.capacity

    @property
    def busy(self) -> bool:
        """Whether this rank's part of a save is still being written."""
        return self._pending is not None and self._pending.writer.stage(1, 0) is None

    def begin(self, task: Job, state: State, saved: Saved, began: float, folder: Folder) -> Saved:
        """Copy the state and write it beside the training; or, without memory for a copy, write it right now.

        Call `wait` before. saved.stall_s is filled in. began: by time.monotonic().
        """
        shortage = None
        growth = self._snapshot.growth(state.bytes)
        if not has_memory(growth):
            shortage = f"{growth / 2**20:.0f} MiB are needed, {available_memory() / 2**20:.0f} MiB are free"
        else:
            try:
                state.fill(self._snapshot)
            except OSError as error:
                shortage = str(error)
        if shortage is None:
            writer = self._writer_for(folder, task.bytes)
            self._pending = self._newest = _Pending(saved, task, began, writer)
            writer.start(task, self._snapshot)
        else:
            warnings.warn(
                f"Rank {self.world.rank} has no memory for a copy of its state ({shortage}): this checkpoint is "
                "written while training waits.",
                stacklevel=4,
            )
            # The process has the old copy mapped.
            self._process.close()
            self._snapshot.close()
            written = Outcome.of(lambda: task.write(Content(state.blocks())))
            self._pending = self._newest = _Pending(saved, task, began, self._thread)
            self._thread.start_written(task, written)
        self._pending.saved = replace(saved, stall_s=time.monotonic() - began)
        return self._pending.saved

    def finish(self, saved: Saved, began: float) -> Saved:
        """Wait for the save that `begin` returned, which is then that of one who waits: even a full store is an error.

        Raises:
            CheckpointWriteError: on every rank.
        """
        self.wait_strictly()
        seconds = time.monotonic() - began
        return replace(saved, stall_s=seconds, seconds=seconds)

    def at_once(self, task: Job, state: State, saved: Saved, began: float) -> Saved:
        """Write a state straight from where it is, while training waits. Every rank calls it, after `wait`.

        Raises:
            CheckpointWriteError: on every rank.
        """
        written = Outcome.of(lambda: task.write(Content(state.blocks())))
        try:
            self._settle(written, lambda: Outcome.of(task.finish), saved.path)
        except CheckpointWriteError:
            self._discard(task)
            raise
        seconds = time.monotonic() - began
        return replace(saved, stall_s=seconds, seconds=seconds)

    def poll(self) -> Saved | None:
        """The save in the background if it has become durable since (on ranks other than 0: its part has); else None.

        Never waits, and asks no other rank.

        Raises:
            CheckpointWriteError: it failed on this rank. That the store is full is a warning only, given once.
        """
        pending = self._pending
        if pending is None or pending.told:
            return None
        outcome = pending.writer.stage(1, 0)
        if outcome is None:
            return None
        pending.told = True
        if outcome.failure is None:
            return replace(pending.saved, seconds=time.monotonic() - pending.began)
        error = CheckpointWriteError(f"The checkpoint {pending.saved.path} was not written: {outcome.failure}")
        if not outcome.disk_full:
            raise error
        warnings.warn(_disk_full(error), stacklevel=3)
        return None

    def wait(self) -> bool:
        """Wait until the save in the background is committed; every rank calls it. Without one, nothing.

        Returns whether it is durable. That the store is full is a warning, and False.

        Raises:
            CheckpointWriteError: it failed in another way, on any rank.
        """
        told = self._pending is not None and self._pending.told
        try:
            self.wait_strictly()
        except CheckpointWriteError as error:
            if not error.disk_full:
                raise
            if not told:
                rank_zero_warn(_disk_full(error))
            return False
        return True

    def wait_strictly(self) -> None:
        """The same, but a full store is an error too."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        written = pending.writer.stage(0, None)
        assert written is not None
        try:
            self._settle(written, lambda: pending.writer.stage(1, None) or Outcome(), pending.saved.path)
        except CheckpointWriteError:
            pending.writer.abandon()
            self._discard(pending.task)
            raise

    def close(self) -> None:
        """Wait for what this rank writes, and let its process and memory go. Asks no other rank.

        That a save has failed which nobody had awaited is a warning: whoever closes then has an error to tell already.
        """
        pending, self._pending = self._pending, None
        # Each tells of its own last job, which may be one that was awaited long ago.
        outcomes = {writer: writer.close() for writer in (self._thread, self._process)}
        self._snapshot.close()
        outcome = None if pending is None or pending.told else outcomes[pending.writer]
        if pending is not None and outcome is not None and outcome.failure is not None:
            warnings.warn(f"The checkpoint {pending.saved.path} was not committed: {outcome.failure}", stacklevel=3)

    def _writer_for(self, folder: Folder, size: int) -> ThreadWriter | ProcessWriter:
        small = folder.local and size < _SMALL_BYTES and self.world.size <= _FEW_RANKS
        return self._thread if small or folder.in_this_process else self._process

    def _told(self, outcome: Outcome) -> None:
        newest = self._newest
        assert newest is not None
        saved = replace(newest.saved, seconds=time.monotonic() - newest.began)
        self._on_end(None if outcome.failure is not None else saved, self._pending is newest)

    def _discard(self, task: Job) -> None:
        """All have written what they could: a full store has use for the space."""
        if self.world.rank == 0:
            Outcome.of(task.discard)

    def _settle(self, written: Outcome, finish: Callable[[], Outcome], path: str) -> None:
        """All ranks learn how all of them fared; then rank 0 commits, or learns that it has."""
        failed = {rank: o for rank, o in enumerate(self.world.gather(written)) if o.failure is not None}
        if failed:
            rank, outcome = next(iter(failed.items()))
            where = f"rank {rank}: " if self.world.size > 1 else ""
            full = any(o.disk_full for o in failed.values())
            raise CheckpointWriteError(
                f"The checkpoint {path} was not written: {where}{outcome.failure}", disk_full=full
            )
        committed = finish() if self.world.rank == 0 else None
        committed = self.world.broadcast(committed)
        assert committed is not None
        if committed.failure is not None:
            raise CheckpointWriteError(
                f"The checkpoint {path} was not committed: {committed.failure}", disk_full=committed.disk_full
            )


def _disk_full(error: CheckpointWriteError) -> str:
    return f"The store is full, and training goes on without this checkpoint. {error}"
