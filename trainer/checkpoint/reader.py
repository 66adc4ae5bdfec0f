"""Reading just the needed parts of a checkpoint, every byte verified on the way."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from trainer.checkpoint.manifest import (
    BLOCK,
    File,
    Piece,
    Record,
    Stretch,
    block_checksum,
    next_block,
)
from trainer.checkpoint.shards import bytes_of, dtype_of
from trainer.checkpoint.values import is_dtensor
from trainer.errors import CheckpointDamagedError, CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from trainer.checkpoint.catalog import Checkpoint
    from trainer.checkpoint.folder import Folder

# Requests in flight: enough to fill a link to an object store, and more than the cores that hash.
_THREADS = 8
# Blocks per request: 16 MiB are one good ranged GET.
_RUN = 16


@dataclass
class Contents:
    """All records of a checkpoint, and where each tensor's pieces lie."""

    checkpoint: Checkpoint
    records: list[Record]
    pieces: dict[str, list[tuple[int, Piece]]] = field(default_factory=dict)

    @property
    def state(self) -> Any:
        """The skeleton of the shared state."""
        return self.records[0].state

    def keys(self) -> list[str]:
        """The keys of the shared state's tensors."""
        return list(self.pieces)


def read_contents(checkpoint: Checkpoint) -> Contents:
    """Read and verify all records.

    Raises:
        CheckpointDamagedError: one is missing or changed, or a tensor has a part that no record tells of.
    """
    with ThreadPoolExecutor(_THREADS) as pool:
        records = list(pool.map(lambda file: _read_record(checkpoint.folder, file), checkpoint.manifest.files))
    contents = Contents(checkpoint, records)
    for record in records:
        for piece in record.pieces:
            contents.pieces.setdefault(piece.key, []).append((record.rank, piece))
    for key, pieces in contents.pieces.items():
        covered = sum(_numel(piece.size) for _, piece in pieces)
        if covered != _numel(pieces[0][1].shape):
            raise CheckpointDamagedError(
                f"{checkpoint.path} is damaged: its records hold {covered} of the {_numel(pieces[0][1].shape)} "
                f"elements of {key}."
            )
    return contents


def _read_record(folder: Folder, file: File) -> Record:
    where = f"{folder}/{file.record}"
    try:
        content = folder.read(file.record)
    except FileNotFoundError as error:
        raise CheckpointDamagedError(f"{where} is missing.") from error
    stated = File.parse(content[: content.find(b"\n") + 1], file.rank, where)
    if stated != file or len(content) != file.record_bytes:
        raise CheckpointDamagedError(f"{where} is damaged: the manifest confirms another content.")
    return Record.parse(content, where)


@dataclass(frozen=True)
class Request:
    """Bytes [begin, end) of a shard, wanted in `target` (flat uint8, on the CPU)."""

    begin: int
    end: int
    target: torch.Tensor


class Reading:
    """Collects what is wanted of a checkpoint, then reads all of it at once, verified, in parallel."""

    def __init__(self, contents: Contents) -> None:
        self._contents = contents
        self._requests: dict[int, list[Request]] = {}
        self._afterwards: list[Callable[[], object]] = []

    def tensor(self, key: str) -> torch.Tensor:
        """The whole tensor of a key, on the CPU; its content is there after `run`."""
        first = self._pieces(key)[0][1]
        return self.box(key, (0,) * len(first.shape), first.shape)

    def box(self, key: str, offset: tuple[int, ...], size: tuple[int, ...]) -> torch.Tensor:
        """The box of a tensor, on the CPU; its content is there after `run`."""
        pieces = self._pieces(key)
        result = torch.empty(size, dtype=dtype_of(pieces[0][1]))
        first, last = (offset[0], offset[0] + size[0]) if size else (0, 1)
        for rank, piece in pieces:
            # Most pieces of a tensor that many ranks wrote are of other rows.
            if not size or (piece.offset[0] < last and first < piece.offset[0] + piece.size[0]):
                self._want(rank, piece, offset, result)
        return result

    def own(self, rank: int) -> dict[str, torch.Tensor]:
        """The tensors of a rank's own state; their content is there after `run`."""
        found = {}
        for piece in self._contents.records[rank].rank_pieces:
            found[piece.key] = torch.empty(piece.size, dtype=dtype_of(piece))
            self._request(rank, piece.begin, piece.end, found[piece.key])
        return found

    def run(self) -> None:
        """Read what was asked for.

        Raises:
            CheckpointDamagedError: a shard is missing, cut off or changed; names the file and the place.
        """
        tasks: list[Callable[[], None]] = []
        opened: list[_File] = []
        for rank, requests in sorted(self._requests.items()):
            runs = _runs(requests)
            for shard in _shard_of(self._contents.checkpoint.folder, self._contents.records[rank]):
                opened.append(shard)
                tasks += [partial(shard.read, *run) for run in runs if shard.first < run[1] and run[0] < shard.last]
        try:
            with ThreadPoolExecutor(_THREADS) as pool:
                futures = [pool.submit(task) for task in tasks]
                try:
                    for future in futures:
                        future.result()
                except BaseException:
                    pool.shutdown(cancel_futures=True)
                    raise
        finally:
            for shard in opened:
                shard.close()
        for place in self._afterwards:
            place()

    def _pieces(self, key: str) -> list[tuple[int, Piece]]:
        try:
            return self._contents.pieces[key]
        except KeyError:
            raise CheckpointError(f"{self._contents.checkpoint.path} holds no tensor {key}.") from None

    def _want(self, rank: int, piece: Piece, offset: tuple[int, ...], result: torch.Tensor) -> None:
        """Ask for what a piece and a box have in common."""
        starts = [max(a, b) for a, b in zip(piece.offset, offset, strict=True)]
        ends = [min(a + n, b + m) for a, n, b, m in zip(piece.offset, piece.size, offset, result.shape, strict=True)]
        if any(start >= end for start, end in zip(starts, ends, strict=True)):
            return
        source = tuple(slice(s - o, e - o) for s, e, o in zip(starts, ends, piece.offset, strict=True))
        target = result[tuple(slice(s - o, e - o) for s, e, o in zip(starts, ends, offset, strict=True))]
        if not piece.size:
            self._request(rank, piece.begin, piece.end, result)
            return
        # Whole rows of the piece are contiguous in the file.
        row = (piece.end - piece.begin) // piece.size[0]
        begin, end = piece.begin + source[0].start * row, piece.begin + source[0].stop * row
        full_rows = all(s.stop - s.start == n for s, n in zip(source[1:], piece.size[1:], strict=True))
        if full_rows and target.is_contiguous():
            self._request(rank, begin, end, target)
            return
        staged = torch.empty((source[0].stop - source[0].start, *piece.size[1:]), dtype=result.dtype)
        self._request(rank, begin, end, staged)
        columns = (slice(None), *source[1:])
        self._afterwards.append(lambda: target.copy_(staged[columns]))

    def _request(self, rank: int, begin: int, end: int, target: torch.Tensor) -> None:
        if begin < end:
            self._requests.setdefault(rank, []).append(Request(begin, end, bytes_of(target)))


def _runs(requests: list[Request]) -> list[tuple[int, int, list[Request]]]:
    """Ranges of blocks to read, [first, last), with what each is for. No block is read twice."""
    wanted: dict[int, list[Request]] = {}
    for request in requests:
        for block in range(request.begin // BLOCK, (request.end - 1) // BLOCK + 1):
            wanted.setdefault(block, []).append(request)
    runs: list[tuple[int, int, list[Request]]] = []
    for block in sorted(wanted):
        if runs and runs[-1][1] == block and block - runs[-1][0] < _RUN:
            first, _, known = runs[-1]
            runs[-1] = (first, block + 1, known + [r for r in wanted[block] if r.begin // BLOCK == block])
        else:
            runs.append((block, block + 1, list(wanted[block])))
    return runs


def _shard_of(folder: Folder, record: Record) -> list[_File]:
    return [_File(folder, stretch, record.blocks) for stretch in record.stretches]


class _File:
    """One file of a shard, read by the shard's blocks [first, last); safe to use from several threads."""

    def __init__(self, folder: Folder, stretch: Stretch, blocks: tuple[str, ...]) -> None:
        self._folder = folder
        self._stretch = stretch
        self._blocks = blocks
        self._end = stretch.begin + stretch.size
        self.first, self.last = stretch.begin // BLOCK, next_block(self._end) // BLOCK
        self._name = stretch.name
        self._path = f"{folder.path}/{self._name}"
        self._lock = threading.Lock()
        self._descriptor: int | None = None

    def close(self) -> None:
        """Close the file."""
        if self._descriptor is not None:
            os.close(self._descriptor)

    def read(self, first: int, last: int, requests: Iterable[Request]) -> None:
        """Read and verify those of the blocks [first, last) that lie here, and hand their bytes out."""
        first, last = max(first, self.first), min(last, self.last)
        if self._folder.local:
            scratch = memoryview(bytearray(BLOCK))
            for block in range(first, last):
                self._read_block(block, requests, scratch)
            return
        begin, end = first * BLOCK, min(last * BLOCK, self._end)
        content = memoryview(self._fetched(begin, end))
        self._check_length(begin, end, len(content))
        for block in range(first, last):
            self._check(block, content[block * BLOCK - begin : (block + 1) * BLOCK - begin])
        _hand_out(content, begin, requests)

    def _read_block(self, block: int, requests: Iterable[Request], scratch: memoryview) -> None:
        """The same for one block of a local file: straight into its place if it all belongs to one tensor."""
        begin, end = block * BLOCK, min((block + 1) * BLOCK, self._end)
        concerned = [r for r in requests if r.begin < end and begin < r.end]
        if len(concerned) == 1 and concerned[0].begin <= begin and end <= concerned[0].end:
            only = concerned[0]
            target = memoryview(only.target[begin - only.begin : end - only.begin].numpy())  # type: ignore[arg-type]
            self._fill(target, begin)
            self._check(block, target)
            return
        content = scratch[: end - begin]
        self._fill(content, begin)
        self._check(block, content)
        _hand_out(content, begin, concerned)

    def _fill(self, target: memoryview, begin: int) -> None:
        with self._lock:
            if self._descriptor is None:
                try:
                    self._descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
                except FileNotFoundError as error:
                    raise CheckpointDamagedError(f"{self._folder}/{self._name} is missing.") from error
        got = 0
        while got < len(target):
            count = os.preadv(self._descriptor, [target[got:]], begin - self._stretch.begin + got)
            if count == 0:
                break
            got += count
        self._check_length(begin, begin + len(target), got)

    def _fetched(self, begin: int, end: int) -> bytearray:
        at = self._stretch.begin
        try:
            return bytearray(self._folder.fs.cat_file(self._path, start=begin - at, end=end - at))
        except FileNotFoundError as error:
            raise CheckpointDamagedError(f"{self._folder}/{self._name} is missing.") from error

    def _check_length(self, begin: int, end: int, got: int) -> None:
        if got != end - begin:
            raise CheckpointDamagedError(
                f"{self._folder}/{self._name} is cut off: {self._stretch.size} bytes were written, it ends at "
                f"{begin - self._stretch.begin + got}."
            )

    def _check(self, block: int, content: memoryview) -> None:
        if block_checksum(content) != self._blocks[block]:
            begin = block * BLOCK - self._stretch.begin
            raise CheckpointDamagedError(
                f"{self._folder}/{self._name} is damaged: the checksum of bytes {begin} to {begin + len(content)} does "
                "not fit."
            )


def _hand_out(content: memoryview, begin: int, requests: Iterable[Request]) -> None:
    """Copy verified bytes, which begin at `begin` of the shard, to where they are wanted."""
    flat = torch.frombuffer(content, dtype=torch.uint8)
    for request in requests:
        a, b = max(request.begin, begin), min(request.end, begin + len(content))
        if a >= b:  # it is of another file
            continue
        request.target[a - request.begin : b - request.begin].copy_(flat[a - begin : b - begin])


def verify(checkpoint: Checkpoint, report: Callable[[str], object] = lambda _: None) -> list[str]:
    """Read every byte of a checkpoint. Returns what is wrong, one line per file; empty if all is well."""
    problems: list[str] = []
    for file in checkpoint.manifest.files:
        try:
            record = _read_record(checkpoint.folder, file)
            for shard in _shard_of(checkpoint.folder, record):
                try:
                    with ThreadPoolExecutor(_THREADS) as pool:
                        begins = range(shard.first, shard.last, _RUN)
                        list(pool.map(lambda b: shard.read(b, b + _RUN, ()), begins))  # noqa: B023
                finally:
                    shard.close()
            for stretch in file.stretches:
                report(f"{stretch.name}: {stretch.size} bytes, whole")
        except CheckpointDamagedError as error:  # noqa: PERF203 - a turn reads a whole shard
            problems.append(str(error))
    return problems


def targets(state_like: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The DTensors of a state: those of which a rank loads only its own part."""
    return {key: tensor for key, tensor in state_like.items() if is_dtensor(tensor)}


def _numel(shape: Iterable[int]) -> int:
    count = 1
    for length in shape:
        count *= length
    return count
