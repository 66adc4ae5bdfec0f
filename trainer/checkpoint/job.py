"""One save as it is handed to a writer, and the doing of it: the same in a process, a thread, or at once.

Torch-free: the writer's process imports it.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainer.checkpoint import catalog
from trainer.checkpoint.retention import Retention, remove_unwanted
from trainer.checkpoint.writing import commit, write_part

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from trainer.checkpoint.folder import Folder
    from trainer.checkpoint.manifest import Manifest, Record

# How long rank 0 waits for the records of the others once its own is written.
COMMIT_TIMEOUT_S = 1800.0


@dataclass(frozen=True)
class Commit:
    """Rank 0's further work: the manifest, then the removal of what it makes superfluous.

    collect_before: attempts begun before this time (seconds since 1970) and never committed are removed.
    """

    store: Folder
    manifest: Manifest
    retention: Retention | None
    collect_before: float | None


@dataclass(frozen=True)
class Job:
    """One rank's part of one save. commit: on rank 0 only."""

    folder: Folder
    record: Record
    commit: Commit | None


@dataclass(frozen=True)
class Outcome:
    """How a stage of a job went. failure: in words; None if it went well. disk_full: the store has no space left."""

    failure: str | None = None
    disk_full: bool = False

    @classmethod
    def of(cls, act: Callable[[], object]) -> Outcome:
        """Do something, and say how it went. A file system may raise anything."""
        try:
            act()
        except Exception as error:
            return cls(f"{type(error).__name__}: {error}", _is_disk_full(error))
        return cls()


def run(job: Job, blocks: Iterable[memoryview]) -> Iterator[Outcome]:
    """Do a job in its two stages: this rank's part is durable; then, on rank 0, the checkpoint is committed."""
    written = write(job, blocks)
    yield written
    yield written if written.failure is not None else finish(job)


def write(job: Job, blocks: Iterable[memoryview]) -> Outcome:
    """Make this rank's part durable."""
    return Outcome.of(lambda: write_part(job.folder, job.record, blocks))


def finish(job: Job) -> Outcome:
    """On rank 0: commit, then clean up. What cannot be cleaned up does not make the save fail."""
    if job.commit is None:
        return Outcome()
    work = job.commit
    outcome = Outcome.of(lambda: commit(job.folder, work.manifest, COMMIT_TIMEOUT_S))
    if outcome.failure is None:
        Outcome.of(lambda: _clean_up(job.folder, work))
    return outcome


def _clean_up(folder: Folder, work: Commit) -> None:
    for older in catalog.attempts_of(folder.parent)[1:]:
        catalog.remove_attempt(older.folder)
    if work.collect_before is not None:
        for dead in catalog.dead_attempts(work.store, work.collect_before):
            catalog.remove_attempt(dead)
    if work.retention is not None:
        remove_unwanted(work.store, work.retention)


def _is_disk_full(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__
    return False
