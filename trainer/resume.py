"""Which checkpoint a run goes on from, and how one is read, whatever wrote it."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.errors import CheckpointError
from trainer.ranks import rank_zero_warn

if TYPE_CHECKING:
    from trainer.distributed import World

# Newest entries of the list of saved checkpoints that are kept; older ones are long gone from disk.
_KEPT = 32


@dataclass(frozen=True)
class Found:
    """A checkpoint in memory.

    rank_state: this rank's own part, or {} if it has none. orphans: those of ranks that are no more and that this one
    stands in for. world_size: how many ranks there were.
    """

    name: str
    state: dict[str, Any]
    rank_state: dict[str, Any]
    finished: bool
    orphans: tuple[dict[str, Any], ...] = ()
    world_size: int = 1


@dataclass(frozen=True)
class Entry:
    """One line of the run folder's list: a checkpoint that was whole when it was listed."""

    path: str
    batches: int
    finished: bool = False


class SavedList:
    """`checkpoints/saved.json` in the run folder: the checkpoints of this run that training can go on from.

    Rank 0 appends after a checkpoint is durable; the file is replaced as a whole.
    """

    def __init__(self, run_dir: str) -> None:
        self.path = Path(run_dir) / "checkpoints" / "saved.json"

    def read(self) -> list[Entry]:
        """The entries, oldest first."""
        try:
            return [Entry(**line) for line in json.loads(self.path.read_text())]
        except FileNotFoundError:
            return []
        except (ValueError, TypeError) as error:
            rank_zero_warn(f"{self.path} is damaged ({error}); looking for checkpoints without it.")
            return []

    def add(self, entry: Entry) -> None:
        """List a checkpoint that is durable now."""
        entries = [e for e in self.read() if e.path != entry.path] + [entry]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(f".{os.getpid()}.tmp")
        with open(temporary, "w") as file:
            json.dump([vars(e) for e in entries[-_KEPT:]], file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path)


def is_folder(path: str) -> bool:
    """Whether a checkpoint is a folder of shards (else a single file)."""
    import fsspec

    fs, inner = fsspec.core.url_to_fs(path)
    return bool(fs.isdir(inner))


def exists(path: str) -> bool:
    """Whether there is anything at a path or URL."""
    import fsspec

    fs, inner = fsspec.core.url_to_fs(path)
    return bool(fs.exists(inner))


def write(path: str, state: dict[str, Any], rank_state: dict[str, Any], world: World, *, step: int) -> None:
    """Write a checkpoint: one torch file on one process, a folder of shards on several. Every rank calls it."""
    if world.size == 1:
        from trainer.checkpoint import save_file

        save_file(state | {"rank_state": rank_state}, path)
        return
    from trainer.checkpoint import Store

    folder, _, name = path.rstrip("/").rpartition("/")
    Store(folder or ".", world).save(state, step=step, name=name, rank_state=rank_state)


def read(path: str, world: World | None, *, like: dict[str, Any] | None = None, weights_only: bool = True) -> Found:
    """Read a checkpoint that we or Lightning wrote. like: a state whose sharded tensors say who needs which part.

    Raises:
        CheckpointError: it is not there, is damaged, or is no checkpoint.
    """
    if not exists(path):
        raise CheckpointError(f"There is no checkpoint at {path}.")
    if is_folder(path):
        from trainer.checkpoint import Store

        folder, _, _ = path.rstrip("/").rpartition("/")
        loaded = Store(folder or ".", world).load(path, like, orphans=world is not None)
        state, rank_state, orphans, world_size = loaded.state, loaded.rank_state, loaded.orphans, loaded.world_size
    else:
        from trainer.checkpoint import load_file

        orphans, world_size = (), 1
        state = load_file(path, weights_only=weights_only)
        rank_state = state.pop("rank_state", {})
        if world is not None and world.size > 1:
            # A file is one process's; its random state and its place in a stream belong to rank 0.
            rank_state = rank_state if world.rank == 0 else {}
    if "state_dict" not in state:
        raise CheckpointError(f"{path} has no 'state_dict': it is not a checkpoint of this package or of Lightning.")
    finished = bool((state.get("progress") or {}).get("finished"))
    return Found(path, state, rank_state, finished, orphans, world_size)


def newest_in(run_dir: str, world: World, like: dict[str, Any] | None) -> Found | None:
    """The newest checkpoint of a run that all ranks can read; damaged ones are named and passed over."""
    entries = SavedList(run_dir).read() if world.is_global_zero else None
    entries = world.broadcast(entries)
    for entry in sorted(entries, key=lambda e: (e.batches, e.finished), reverse=True):
        # Retention may have removed it since: rank 0 looks, so that all ranks skip the same ones.
        if not world.broadcast(exists(entry.path) if world.is_global_zero else None):
            continue
        found, failure = None, None
        try:
            found = read(entry.path, world, like=like)
        except CheckpointError as error:
            failure = error
        if not world.any(failure is not None):
            return found
        rank_zero_warn(f"The checkpoint {entry.path} cannot be read ({failure}); trying an older one.")
    return None


def remove(path: str) -> None:
    """Remove a checkpoint that a newer one has replaced."""
    import fsspec

    fs, inner = fsspec.core.url_to_fs(path)
    if fs.exists(inner):
        fs.rm(inner, recursive=True)


def newest_of(callbacks: list[Any]) -> str | None:
    """The newest of the checkpoints that ModelCheckpoint callbacks call their last."""
    paths = {
        str(p) for c in callbacks for p in (getattr(c, "last_model_path", ""), getattr(c, "best_model_path", "")) if p
    }
    dated = []
    for path in paths:
        import fsspec

        fs, inner = fsspec.core.url_to_fs(path)
        if fs.exists(inner):
            dated.append((fs.modified(inner), path))
    return max(dated)[1] if dated else None
