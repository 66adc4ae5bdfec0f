"""Which checkpoint a run goes on from, and how one is read, whatever wrote it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trainer.errors import CheckpointDamagedError, CheckpointError
from trainer.ranks import rank_zero_warn

if TYPE_CHECKING:
    from trainer.checkpoint.saved import Entry, SavedList
    from trainer.distributed import World


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


def newest_whole(entries: list[Entry], saved: SavedList, world: World, like: dict[str, Any] | None) -> Found | None:
    """The newest of a list's entries that is whole; None if there is none yet.

    A damaged one is named in a warning and set aside, and the next older one is taken, by all ranks alike.

    Raises:
        CheckpointDamagedError: there are checkpoints, but not one of them is whole.
        CheckpointError: one could not be looked at; that says nothing about damage.
    """
    damaged = None
    for entry in sorted(entries, key=lambda e: (e.batches, e.finished), reverse=True):
        # Retention may have removed it since: rank 0 looks, so that all ranks skip the same ones.
        if not world.broadcast(exists(entry.path) if world.is_global_zero else None):
            continue
        if entry.damaged:
            damaged = damaged or entry.path
            continue
        found, failure = None, None
        try:
            found = read(entry.path, world, like=like)
        except CheckpointError as error:
            failure = error
        failures = [f for f in world.gather(failure) if f is not None]
        if not failures:
            return found
        other = next((f for f in failures if not isinstance(f, CheckpointDamagedError)), None)
        if other is not None:
            raise other from failure
        damaged = damaged or entry.path
        rank_zero_warn(f"{failures[0]} It is set aside; trying an older one.")
        if world.is_global_zero:
            saved.set_aside(entry.path)
    if damaged is not None:
        raise CheckpointDamagedError(
            f"No checkpoint of the run in {saved.path.parent.parent} is whole; the newest was {damaged}. "
            "To begin anew, start a new run."
        )
    return None


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
