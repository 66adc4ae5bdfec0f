"""What a checkpoint holds, by its records, and its shards' bytes, each block verified on the way.

Torch-free: `ls`, `show` and `verify` read without it.
"""

from __future__ import annotations

import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trainer.checkpoint.manifest import BLOCK, File, Piece, Record, Stretch, block_checksum, next_block
from trainer.errors import CheckpointDamagedError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from trainer.checkpoint.catalog import Checkpoint
    from trainer.checkpoint.folder import Folder

# Requests in flight: enough to fill a link to an object store, and more than the cores that hash.
THREADS = 8
# Blocks per request: 16 MiB are one good ranged GET.
RUN = 16


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
    with ThreadPoolExecutor(THREADS) as pool:
        records = list(pool.map(lambda file: _read_record(checkpoint.folder, file), checkpoint.manifest.files))
    contents = Contents(checkpoint, records)
    for record in records:
        for piece in record.pieces:
            contents.pieces.setdefault(piece.key, []).append((record.rank, piece))
    for key, pieces in contents.pieces.items():
        covered = sum(numel(piece.size) for _, piece in pieces)
        if covered != numel(pieces[0][1].shape):
            raise CheckpointDamagedError(
                f"{checkpoint.path} is damaged: its records hold {covered} of the {numel(pieces[0][1].shape)} "
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
    """Bytes [begin, end) of a shard, wanted in `target`, which can be written."""

    begin: int
    end: int
    target: memoryview


def files_of(folder: Folder, record: Record) -> list[ShardFile]:
    """The files of a rank's shard; close them."""
    return [ShardFile(folder, stretch, record.blocks) for stretch in record.stretches]


class ShardFile:
    """One file of a shard, read by the shard's blocks [first, last); safe to use from several threads."""

    def __init__(self, folder: Folder, stretch: Stretch, blocks: Sequence[str]) -> None:
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
            target = only.target[begin - only.begin : end - only.begin]
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
    for request in requests:
        a, b = max(request.begin, begin), min(request.end, begin + len(content))
        if a >= b:  # it is of another file
            continue
        request.target[a - request.begin : b - request.begin] = content[a - begin : b - begin]


def verify(checkpoint: Checkpoint, report: Callable[[str], object] = lambda _: None) -> list[str]:
    """Read every byte of a checkpoint. Returns what is wrong, one line per file; empty if all is well."""
    problems: list[str] = []
    for file in checkpoint.manifest.files:
        try:
            record = _read_record(checkpoint.folder, file)
            for shard in files_of(checkpoint.folder, record):
                try:
                    with ThreadPoolExecutor(THREADS) as pool:
                        begins = range(shard.first, shard.last, RUN)
                        list(pool.map(lambda b: shard.read(b, b + RUN, ()), begins))  # noqa: B023
                finally:
                    shard.close()
            for stretch in file.stretches:
                report(f"{stretch.name}: {stretch.size} bytes, whole")
        except CheckpointDamagedError as error:  # noqa: PERF203 - a turn reads a whole shard
            problems.append(str(error))
    return problems


def plain_values(skeleton: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """The plain values of a state by their paths, as JSON."""
    if isinstance(skeleton, dict) and skeleton.keys() & {"$dict", "$ordered"}:
        (pairs,) = skeleton.values()
        if all(isinstance(key, (str, int)) for key, _ in pairs):
            skeleton = {str(key): value for key, value in pairs}
    if isinstance(skeleton, dict) and not any(key.startswith("$") for key in skeleton):
        for key, value in skeleton.items():
            yield from plain_values(value, f"{path}.{key}" if path else key)
    elif isinstance(skeleton, dict) and "$tuple" in skeleton:
        yield from plain_values(skeleton["$tuple"], path)
    elif isinstance(skeleton, list):
        for index, value in enumerate(skeleton):
            yield from plain_values(value, f"{path}.{index}")
    elif not (isinstance(skeleton, dict) and skeleton.keys() & {"$tensor", "$complex_tensor", "$array"}):
        yield path, json.dumps(skeleton)


def numel(shape: Iterable[int]) -> int:
    """How many elements a box of this size has."""
    count = 1
    for length in shape:
        count *= length
    return count
