"""One save as it is handed to a writer, and the doing of it: the same in a process, a thread, or at once.

Torch-free: the writer's process imports it.
"""

from __future__ import annotations

import errno
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from trainer.checkpoint import catalog, saved
from trainer.checkpoint.retention import Retention, remove_unwanted
from trainer.checkpoint.writing import commit, write_file, write_part

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from trainer.checkpoint.folder import Folder
    from trainer.checkpoint.manifest import Manifest, Record
    from trainer.checkpoint.peers import Peer
    from trainer.checkpoint.saved import After
    from trainer.checkpoint.writing import Content

# How long rank 0 waits for the records of the others once its own is written.
COMMIT_TIMEOUT_S = 1800.0


class Job(Protocol):
    """One rank's part of one save."""

    @property
    def bytes(self) -> int:
        """Size of what it writes."""

    def write(self, content: Content) -> None:
        """Make this rank's part durable. May raise anything."""

    def finish(self) -> None:
        """Once it is: commit, list, clean up. May raise anything as long as the checkpoint is not durable."""

    def discard(self) -> None:
        """On rank 0, once no rank is writing any more: remove what is left of a save that failed."""


@dataclass(frozen=True)
class Commit:
    """Rank 0's further work: the manifest, then the removal of what it makes superfluous.

    collect_before: attempts begun before this time (seconds since 1970) and never committed are removed. peers: the
    processes of ranks on this machine.
    """

    store: Folder
    manifest: Manifest
    retention: Retention | None
    collect_before: float | None
    after: After
    peers: dict[int, Peer]


@dataclass(frozen=True)
class ShardJob:
    """One rank's shard and record in a store. commit: on rank 0 only."""

    folder: Folder
    record: Record
    commit: Commit | None

    @property
    def bytes(self) -> int:
        """Size of the shard."""
        return self.record.shard_bytes

    def write(self, content: Content) -> None:
        """Write the shard, then the record."""
        write_part(self.folder, self.record, content)

    def finish(self) -> None:
        """On rank 0: commit, then clean up. What cannot be cleaned up does not make the save fail."""
        if self.commit is None:
            return
        commit(self.folder, self.commit.manifest, COMMIT_TIMEOUT_S, self.commit.peers)
        unwanted = self.commit.after.record(str(self.folder.parent))
        with suppress(Exception):
            self._clean_up(self.commit, unwanted)

    def discard(self) -> None:
        """Remove the attempt."""
        catalog.remove_attempt(self.folder)

    def _clean_up(self, work: Commit, unwanted: list[str]) -> None:
        for older in catalog.attempts_of(self.folder.parent)[1:]:
            catalog.remove_attempt(older.folder)
        for path in unwanted:
            saved.remove(path)
        if work.collect_before is not None:
            for dead in catalog.dead_attempts(work.store, work.collect_before):
                catalog.remove_attempt(dead)
        if work.retention is not None:
            remove_unwanted(work.store, work.retention)


@dataclass(frozen=True)
class FileJob:
    """A checkpoint that is one file, replaced as a whole."""

    folder: Folder
    name: str
    bytes: int
    after: After

    def write(self, content: Content) -> None:
        """Write the file, with the checksum of what was in memory at its end."""
        self.folder.make()
        write_file(self.folder, self.name, self.bytes, content)

    def finish(self) -> None:
        """List it, then clean up. What cannot be cleaned up does not make the save fail."""
        unwanted = self.after.record(str(self.folder / self.name))
        with suppress(Exception):
            for path in unwanted:
                saved.remove(path)
            if self.after.begun_before is not None:
                for part in saved.unfinished_parts(self.folder, self.after.begun_before):
                    part.unlink(missing_ok=True)

    def discard(self) -> None:
        """Nothing: what is written of a file is removed with the error."""


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


def run(job: Job, content: Content) -> Iterator[Outcome]:
    """Do a job in its two stages: this rank's part is durable; then, on rank 0, the checkpoint is committed."""
    written = Outcome.of(lambda: job.write(content))
    yield written
    yield written if written.failure is not None else Outcome.of(job.finish)


def _is_disk_full(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__
    return False
