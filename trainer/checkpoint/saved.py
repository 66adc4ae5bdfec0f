"""The run folder's list of the checkpoints that training can go on from.

Torch-free: the writer's process imports it.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.checkpoint import catalog
from trainer.checkpoint.folder import Folder
from trainer.checkpoint.manifest import MANIFEST, new_attempt
from trainer.ranks import rank_zero_warn

if TYPE_CHECKING:
    from collections.abc import Collection

# Newest entries of a training that are kept; older ones are long gone from disk.
_KEPT = 32
# Of a training's checkpoints that nobody asked for by name so many stay: the newest, and one to fall back on.
_OWN_KEPT = 2


@dataclass(frozen=True)
class Entry:
    """A checkpoint that was durable when it was listed.

    batches: training batches that it has seen. finished: the training was over. own: nobody asked for it by name, so
    it goes when newer ones are there. damaged: it could not be read again; it is passed over for ever. fit: which of
    the run's trainings it is of, where a script makes several one after the other; from 0.
    """

    path: str
    batches: int
    finished: bool = False
    own: bool = False
    damaged: bool = False
    fit: int = 0


@dataclass(frozen=True)
class SavedList:
    """`checkpoints/saved.json` in the run folder. One process at a time changes it; it is replaced as a whole."""

    path: Path

    @classmethod
    def of(cls, run_dir: str) -> SavedList:
        """The list of a run folder."""
        return cls(Path(run_dir) / "checkpoints" / "saved.json")

    def read(self) -> list[Entry]:
        """The entries, oldest first."""
        try:
            return [Entry(**line) for line in json.loads(self.path.read_text())]
        except FileNotFoundError:
            return []
        except (ValueError, TypeError) as error:
            rank_zero_warn(f"{self.path} is damaged ({error}); looking for checkpoints without it.")
            return []

    def add(self, entry: Entry, replaced: Collection[str] = ()) -> list[str]:
        """List a checkpoint that is durable now; returns the paths that may go: `replaced`, and own ones too many."""
        before = [e for e in self.read() if e.path != entry.path and e.path not in replaced]
        entries = [*(e for e in before if e.fit == entry.fit), entry]
        own = [e for e in entries if e.own and not e.damaged]
        superseded = [e.path for e in own[:-_OWN_KEPT]]
        others = [e for e in before if e.fit != entry.fit]
        self._write([*others, *[e for e in entries if e.path not in superseded][-_KEPT:]])
        return [*replaced, *superseded]

    def set_aside(self, path: str) -> None:
        """Note that a checkpoint is damaged."""
        self._write([replace(e, damaged=True) if e.path == path else e for e in self.read()])

    def _write(self, entries: list[Entry]) -> None:
        folder = Folder.at(self.path.parent)
        folder.make()
        folder.write_whole(self.path.name, json.dumps([asdict(e) for e in entries], indent=1).encode())


@dataclass(frozen=True)
class After:
    """What follows on rank 0 once a checkpoint is durable: it gets its second name, is listed, and replaces others.

    also: path or URL of its second name, made of hard links where there are such, else a copy; symbolic: a symbolic
    link instead. replaced: paths or URLs of checkpoints that may go then. begun_before: in the folder of a file, parts
    that were begun before this time (seconds since 1970) and never finished may go.
    """

    also: str | None = None
    symbolic: bool = False
    saved: SavedList | None = None
    entry: Entry | None = None
    replaced: tuple[str, ...] = ()
    begun_before: float | None = None

    def record(self, path: str) -> list[str]:
        """Give the checkpoint at a path its second name, and list it; returns what may be removed then."""
        if self.also is not None:
            (_link if self.symbolic else _duplicate)(Folder.at(path), Folder.at(self.also))
        if self.saved is None or self.entry is None:
            return list(self.replaced)
        return self.saved.add(self.entry, self.replaced)


def _link(source: Folder, target: Folder) -> None:
    """Point a symbolic link at a checkpoint, with no moment at which it points nowhere."""
    temporary = Path(f"{target.parent.path}/.{target.name}.{os.getpid()}.part")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(os.path.relpath(source.path, target.parent.path))
    temporary.replace(target.path)


def _duplicate(source: Folder, target: Folder) -> None:
    """Give a checkpoint a second name; what had that name before goes when the new one is whole."""
    if source.fs.isdir(source.path):
        newest = catalog.attempts_of(source)[0].folder
        before = [c.folder for c in catalog.attempts_of(target)]
        twin = target / new_attempt()
        twin.make()
        # The manifest last: it makes a checkpoint of the rest.
        for name in sorted(newest.sizes(), key=lambda n: n == MANIFEST):
            newest.duplicate(name, twin / name)
        for older in before:
            catalog.remove_attempt(older)
    else:
        source.parent.duplicate(source.name, target)


def remove(path: str) -> None:
    """Remove a checkpoint, a file or a folder, at a path or URL; it may be gone already."""
    place = Folder.at(path)
    if place.local and Path(place.path).is_symlink():
        Path(place.path).unlink()
        return
    place.remove_all()


def unfinished_parts(folder: Folder, before: float) -> list[Path]:
    """The unfinished files of writers that died, begun before a time (seconds since 1970)."""
    # Elsewhere than on a local disk an object appears when it is whole.
    parts = Path(folder.path).glob(".*.part") if folder.local else ()
    return [part for part in parts if part.stat().st_mtime < before]


def process_start() -> float:
    """When this process began, in seconds since 1970: what is older and not committed never will be.

    Not when a store was opened: another store of this process may be writing into the same folder.
    """
    # Field 22 of /proc/pid/stat (proc(5)), counted after the name, which may hold anything but ends with ")".
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks / os.sysconf("SC_CLK_TCK")
