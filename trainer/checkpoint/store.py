"""The store of a run: saves that are whole or absent, and loads that are verified."""

from __future__ import annotations

import json
import os
import platform
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from trainer.checkpoint import catalog
from trainer.checkpoint.background import Alone, Background, Ranks, Saved
from trainer.checkpoint.catalog import Checkpoint
from trainer.checkpoint.contents import Contents, read_contents
from trainer.checkpoint.folder import Folder
from trainer.checkpoint.job import Commit, ShardJob
from trainer.checkpoint.manifest import DAMAGED, Manifest, Record, new_attempt, next_block
from trainer.checkpoint.peers import Peer
from trainer.checkpoint.plan import Part, cut, outline, parts_of_rank, structure
from trainer.checkpoint.reader import Reading
from trainer.checkpoint.saved import After, process_start
from trainer.checkpoint.shards import Layout, bytes_of, lay_out
from trainer.checkpoint.values import decode, encode, is_dtensor
from trainer.checkpoint.writing import cut_into_blocks
from trainer.errors import CheckpointDamagedError, CheckpointError
from trainer.ranks import rank_zero_warn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from types import TracebackType

    from trainer.checkpoint.retention import Retention
    from trainer.checkpoint.snapshot import Snapshot


_T = TypeVar("_T")

# Where a shard is written as several files side by side: how many, and the bytes below which that is not worth it.
_FILES = 4
_SMALLEST_FILE = 16 << 20


@dataclass(frozen=True)
class Loaded:
    """A verified checkpoint in memory.

    state: tensors on the CPU, DTensors as `state_like` had them. rank_state: what this rank had saved, or {} if the
    checkpoint was written by fewer ranks. orphans: if asked for, what those ranks had saved that are no more and that
    this rank stands in for: its number plus once, twice, ... the number of ranks. world_size: how many ranks wrote it.
    """

    state: Any
    rank_state: Any
    orphans: tuple[Any, ...]
    extra: dict[str, Any]
    world_size: int
    path: str


class Store:
    """Checkpoints under one path or fsspec URL. Every rank makes it alike; without a world it is one process's.

    A checkpoint is `<url>/<name>`; it exists from the moment its manifest is written, which is after everything else
    is durable, and its files are never changed. Saving a name again makes a new attempt, which replaces the older one
    only when it is durable.

    retention: what is removed after a save is durable; None: nothing.

    collect: what was begun before this process and never committed is removed after the first save; only where no other
    run writes to the same store.

    background: shared by several stores, whose saves then take turns; None: one of its own.

    Close it, or use it in `with`: a save in the background has a process of its own, which ends then.
    """

    def __init__(
        self,
        url: str | os.PathLike[str],
        world: Ranks | None = None,
        *,
        retention: Retention | None = None,
        background: Background | None = None,
        collect: bool = True,
    ) -> None:
        self.folder = Folder.at(url)
        self.world: Ranks = world if world is not None else Alone()
        self.retention = retention
        self._collect_before = process_start() if collect else None
        if self.world.size > 1 and self.folder.in_this_process:
            raise CheckpointError("memory:// lives in one process: a store for several ranks needs one they all reach.")
        self._owns = background is None
        self.background = Background(self.world) if background is None else background

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ------------------------------------------------------------------------------------------------ save

    def save(
        self,
        state: Mapping[str, Any],
        *,
        step: int,
        name: str | None = None,
        rank_state: Mapping[str, Any] | None = None,
        extra: Mapping[str, Any] | None = None,
        after: After | None = None,
        wait: bool = True,
    ) -> Saved:
        """Save a state; every rank calls it.

        state: what all ranks share: plain values (rank 0's are taken), tensors that every rank has alike (written
        once, the ranks share the work), and DTensors (each rank writes its shard). rank_state: this rank's own.
        extra: JSON for the manifest, such as metrics. name: the folder's, default `step-<step>`. after: what follows on
        rank 0 once it is durable.

        wait=True returns when the checkpoint is committed. wait=False returns when the state is copied, so that
        training may change it; a process of its own writes it. `poll` and `wait` tell when it is durable. If the save
        before it is still being written, that is awaited first. A rank without memory for the copy writes at once,
        with a warning.

        Raises:
            CheckpointError: the state holds something that cannot be written, or the ranks' states do not fit
                together; on every rank, before anything is written.
            CheckpointWriteError: the store failed in this save, or in the one before it; on every rank. What was there
                before is untouched, and the next save starts anew.
        """
        began = time.monotonic()
        self.wait()
        name = name if name is not None else f"step-{step:012d}"
        _check_name(name)
        files = _FILES if self.folder.s3 else 1
        attempt, peers, prepared = self._agree(
            lambda: _prepare(state, rank_state or {}, extra or {}, self.world, files)
        )
        task = self._job(prepared.record, Manifest(
            name, attempt, step, self.world.size, (), time.time(), dict(extra or {}),
            {"python": platform.python_version(), "torch": str(torch.__version__)},
        ), after or After(), peers)  # fmt: skip
        saved = Saved(str(self.folder / name), name, step, 0.0)
        if wait and self.folder.local:
            return self.background.at_once(task, prepared, saved, began)
        saved = self.background.begin(task, prepared, saved, began, self.folder)
        # From a copy also where it is awaited: other file systems take a file faster than a stream.
        return self.background.finish(saved, began) if wait else saved

    def poll(self) -> Saved | None:
        """The save in the background if it has become durable since; see `Background.poll`."""
        return self.background.poll()

    def wait(self) -> bool:
        """Wait until the save in the background is committed; every rank calls it; see `Background.wait`."""
        return self.background.wait()

    def close(self) -> None:
        """Wait for what this rank writes, and let its process and memory go. Asks no other rank."""
        if self._owns:
            self.background.close()

    def _job(self, record: Record, manifest: Manifest, after: After, peers: dict[int, Peer]) -> ShardJob:
        commit = None
        if self.world.rank == 0:
            commit = Commit(self.folder, manifest, self.retention, self._collect_before, after, peers)
            self._collect_before = None
        return ShardJob(self.folder / manifest.name / manifest.attempt, record, commit)

    def _agree(self, prepare: Callable[[], _Prepared]) -> tuple[str, dict[int, Peer], _Prepared]:
        """One exchange: rank 0's attempt name, whether all could prepare, and whether their states fit together.

        And the processes of those ranks that are on this machine.
        """
        prepared, error = _attempt(prepare, "The state could not be taken apart")
        answers = self.world.gather((new_attempt(), Peer.own(), prepared and prepared.structure, error and str(error)))
        failures = [(rank, message) for rank, (*_, message) in enumerate(answers) if message is not None]
        if failures:
            rank, message = failures[0]
            raise CheckpointError(f"Rank {rank}: {message}" if self.world.size > 1 else message) from error
        assert prepared is not None
        if any(digest != answers[0][2] for _, _, digest, _ in answers):
            self._explain_difference(prepared.outline)
        peers = {rank: peer for rank, (_, peer, _, _) in enumerate(answers) if peer.here}
        return answers[0][0], peers, prepared

    def _explain_difference(self, own: list[str]) -> None:
        lines = self.world.gather(own)
        for rank, other in enumerate(lines):
            missing, more = set(lines[0]) - set(other), set(other) - set(lines[0])
            if missing or more or other != lines[0]:
                raise CheckpointError(
                    f"The ranks' states do not hold the same tensors in the same order. Only on rank 0: "
                    f"{sorted(missing)[:5]}; only on rank {rank}: {sorted(more)[:5]}. What differs between ranks "
                    "belongs into rank_state."
                )

    # ------------------------------------------------------------------------------------------------ load

    def newest(self) -> Manifest | None:
        """The newest committed checkpoint, by step, then by time; the same on every rank."""
        return next(iter(self.list()), None)

    def list(self) -> list[Manifest]:
        """The committed checkpoints, newest first; the same on every rank."""
        answer = None
        if self.world.rank == 0:
            answer = _attempt(lambda: _manifests(self.folder), f"{self.folder} could not be read")
        manifests, error = self.world.broadcast(answer)
        if error is not None:
            raise error
        return manifests  # type: ignore[no-any-return]

    def load(
        self,
        which: Manifest | str | os.PathLike[str],
        state_like: Mapping[str, Any] | None = None,
        *,
        orphans: bool = False,
    ) -> Loaded:
        """Load one checkpoint, verified; every rank calls it. which: a manifest, a name in this store, or a path.

        state_like: a state whose DTensors say which part of each this rank needs: those come as DTensors of the same
        mesh and placements, read from the shards that hold them, whatever the world size was. All other tensors come
        whole, on the CPU.

        Raises:
            CheckpointNotFoundError, CheckpointDamagedError, CheckpointError: on every rank.
        """
        loaded, error = _attempt(
            lambda: _load(self._open(which), state_like, self.world, orphans=orphans),
            f"{_spelled(which)} cannot be read",
        )
        errors = [e for e in self.world.gather(error) if e is not None]
        if errors:
            # One error for all, as what is done about it must be one thing: a store that could not be asked says
            # nothing about damage. The cause is known where it happened only.
            shown = next((e for e in errors if not isinstance(e, CheckpointDamagedError)), errors[0])
            raise shown from error
        assert loaded is not None
        return loaded

    def load_newest(self, state_like: Mapping[str, Any] | None = None) -> Loaded | None:
        """Load the newest checkpoint that is whole; None if there is none. Every rank calls it.

        A damaged one is named in a warning and set aside (a note is put beside its manifest; nothing is removed), and
        the next older one is taken, by all ranks alike.

        Raises:
            CheckpointDamagedError: there are checkpoints, but not one of them is whole.
        """
        damaged = self._set_aside_before()
        while (manifest := self.newest()) is not None:
            try:
                return self.load(manifest, state_like)
            except CheckpointDamagedError as error:  # noqa: PERF203 - one turn per damaged checkpoint
                damaged = str(error)
                rank_zero_warn(f"{error} It is set aside; trying the next older checkpoint.")
                self._set_aside(manifest, str(error))
        if damaged is not None:
            raise CheckpointDamagedError(f"No checkpoint in {self.folder} is whole. The last one tried: {damaged}")
        return None

    def remove(self, name: str) -> None:
        """Remove a checkpoint, all its attempts. Every rank may call it; rank 0 acts."""
        _check_name(name)
        if self.world.rank == 0:
            folder = self.folder / name
            for checkpoint in catalog.attempts_of(folder):
                catalog.remove_attempt(checkpoint.folder)
            folder.remove_all()

    def _open(self, which: Manifest | str | os.PathLike[str]) -> Checkpoint:
        if isinstance(which, Manifest):
            return Checkpoint(self.folder / which.name / which.attempt, which)
        text = os.fspath(which)
        inside = "/" not in text and bool((self.folder / text).sizes())
        return catalog.open_checkpoint(str(self.folder / text) if inside else text)

    def _set_aside_before(self) -> str | None:
        """One of the checkpoints that cannot be read any more, in words; the same on every rank."""
        answer = None
        if self.world.rank == 0:
            answer = _attempt(lambda: catalog.damaged_in(self.folder), f"{self.folder} could not be read")
        damaged, error = self.world.broadcast(answer)
        if error is not None:
            raise error
        for path, known in damaged.items():
            if not known:
                rank_zero_warn(f"The manifest of {path} is damaged: that checkpoint is passed over.")
        return next(iter(damaged), None)

    def _set_aside(self, manifest: Manifest, why: str) -> None:
        if self.world.rank == 0:
            folder = self.folder / manifest.name / manifest.attempt
            folder.write_whole(DAMAGED, why.encode())
        self.world.broadcast(None)


@dataclass(frozen=True)
class _Prepared:
    """What one rank writes in a save, before anything is written."""

    record: Record
    layout: Layout
    parts: list[Part]
    structure: str
    outline: list[str] = field(repr=False)

    @property
    def bytes(self) -> int:
        """Size of the shard."""
        return self.layout.bytes

    def fill(self, snapshot: Snapshot) -> None:
        """Copy the shard."""
        snapshot.fill(self.layout, self.parts)

    def blocks(self) -> Iterator[memoryview]:
        """The bytes of the shard, straight from the tensors, cut at the blocks that are checksummed."""
        return cut_into_blocks(self._views()) if self.layout.pieces else iter(())

    def _views(self) -> Iterator[memoryview]:
        data = {(part.key, part.offset): part.data for part in self.parts}
        position = 0
        for piece in self.layout.pieces:
            if piece.begin != position:  # it is the first of a file
                begin = next_block(position)
                yield memoryview(bytes(begin - position) + self.layout.headers[begin])
            yield memoryview(bytes_of(data[piece.key, piece.offset].cpu().contiguous()).numpy())  # type: ignore[arg-type]
            position = piece.end


def _prepare(
    state: Mapping[str, Any], rank_state: Mapping[str, Any], extra: Mapping[str, Any], world: Ranks, files: int
) -> _Prepared:
    try:
        json.dumps(extra)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"extra={extra!r} is for the manifest, which is JSON: {error}.") from error
    skeleton, tensors = encode(state)
    own_skeleton, own_tensors = encode(rank_state, f"rank-{world.rank:05d}.")
    sharded = next((key for key, tensor in own_tensors.items() if is_dtensor(tensor)), None)
    if sharded is not None:
        raise CheckpointError(f"{sharded}: a DTensor is shared by the ranks: it belongs into state, not rank_state.")
    clash = next((key for key in tensors if key in own_tensors), None)
    if clash is not None:
        raise CheckpointError(f"The state's key {clash} is spelled like one of rank_state; rename it.")
    shared = parts_of_rank(tensors, world.rank, world.size)
    own = [Part(k, tuple(t.shape), (0,) * t.dim(), tuple(t.shape), t) for k, t in own_tensors.items()]
    of_rank = {part.key for part in own}
    parts = [*shared, *own]
    size = sum(part.data.numel() * part.data.element_size() for part in parts)
    groups = cut(parts, min(files, max(1, size // _SMALLEST_FILE)), whole=of_rank)
    layout = lay_out(groups)
    record = Record(
        world.rank,
        tuple(p for p in layout.pieces if p.key not in of_rank),
        tuple(p for p in layout.pieces if p.key in of_rank),
        layout.bytes,
        (),
        skeleton if world.rank == 0 else None,
        own_skeleton,
        layout.files if len(layout.files) > 1 else (),
    )
    return _Prepared(record, layout, [part for group in groups for part in group], structure(tensors), outline(tensors))


def _load(checkpoint: Checkpoint, state_like: Mapping[str, Any] | None, world: Ranks, *, orphans: bool) -> Loaded:
    contents = read_contents(checkpoint)
    reading = Reading(contents)
    like = {k: t for k, t in encode(state_like)[1].items() if is_dtensor(t)} if state_like is not None else {}
    tensors = {key: _local_target(reading, contents, key, like.get(key)) for key in contents.keys()}  # noqa: SIM118
    of_ranks = range(world.rank, checkpoint.manifest.world_size, world.size)
    mine = {rank: reading.own(rank) for rank in (of_ranks if orphans else of_ranks[:1])}
    reading.run()
    whole = {key: _rewrapped(tensor, like.get(key)) for key, tensor in tensors.items()}
    rank_states = [
        decode(contents.records[rank].rank_state, lambda key, own=own: _of(own, key, checkpoint))  # type: ignore[misc]
        for rank, own in mine.items()
    ]
    return Loaded(
        decode(contents.state, lambda key: _of(whole, key, checkpoint)),
        rank_states[0] if rank_states else {},
        tuple(rank_states[1:]),
        checkpoint.manifest.extra,
        checkpoint.manifest.world_size,
        checkpoint.path,
    )


def _local_target(reading: Reading, contents: Contents, key: str, like: Any) -> torch.Tensor:
    if like is None:
        return reading.tensor(key)
    shape = contents.pieces[key][0][1].shape
    if tuple(like.shape) != shape:
        raise CheckpointError(f"{key} has shape {shape} in the checkpoint, {tuple(like.shape)} in the model.")
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    size, offset = compute_local_shape_and_global_offset(like.shape, like.device_mesh, like.placements)
    return reading.box(key, tuple(offset), tuple(size))


def _rewrapped(tensor: torch.Tensor, like: Any) -> torch.Tensor:
    if like is None:
        return tensor
    from torch.distributed.tensor import DTensor

    local = tensor.to(like.to_local().device)
    return DTensor.from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def _of(tensors: Mapping[str, torch.Tensor], key: str, checkpoint: Checkpoint) -> torch.Tensor:
    try:
        return tensors[key]
    except KeyError:
        raise CheckpointDamagedError(f"{checkpoint.path} is damaged: no shard holds {key}.") from None


def _attempt(act: Callable[[], _T], what: str) -> tuple[_T | None, CheckpointError | None]:
    """What `act` returns, or an error that can be sent to the other ranks: a file system may raise anything."""
    try:
        return act(), None
    except CheckpointError as error:
        return None, error
    except Exception as cause:
        failure = CheckpointError(f"{what}: {type(cause).__name__}: {cause}")
        failure.__cause__ = cause
        return None, failure


def _manifests(folder: Folder) -> list[Manifest]:
    return [checkpoint.manifest for checkpoint in catalog.checkpoints_in(folder)]


def _spelled(which: Manifest | str | os.PathLike[str]) -> str:
    return which.name if isinstance(which, Manifest) else os.fspath(which)


def _check_name(name: str) -> None:
    if not name or "/" in name or name in (".", ".."):
        raise CheckpointError(f"A checkpoint's name is one part of a path, not {name!r}.")
