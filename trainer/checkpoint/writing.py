"""Making a checkpoint durable: each rank its shard and its record, then rank 0 the manifest.

Torch-free: the writer's process imports it.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import TYPE_CHECKING

from trainer.checkpoint.contents import RUN, ShardFile
from trainer.checkpoint.manifest import (
    BLOCK,
    FIRST_LINE,
    MANIFEST,
    File,
    Manifest,
    Record,
    Stretch,
    block_checksum,
    record_name,
)
from trainer.checkpoint.seal import SEAL_BYTES, seal_of
from trainer.errors import CheckpointDamagedError, CheckpointWriteError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from trainer.checkpoint.folder import Folder
    from trainer.checkpoint.peers import Peer


@dataclass(frozen=True)
class Content:
    """What a rank writes: its bytes, cut at BLOCK. descriptor: of the memory file that holds just them, if one does."""

    blocks: Iterable[memoryview]
    descriptor: int | None = None


def write_part(folder: Folder, record: Record, content: Content) -> None:
    """Write one rank's shard, read it back, and then write its record: all durable on return.

    So a checkpoint that is committed was whole when it was, and older ones may go. What the store itself has compared
    with checksums of ours, as S3 does, is not read back.

    If that fails, a note is left for rank 0, which waits for this record.

    Raises:
        OSError, or what the file system raises: nothing was committed.
    """
    try:
        folder.make()
        checksums: list[str] = []
        blocks = iter(content.blocks)
        for stretch in record.stretches:
            hashed = _hashed(_of_stretch(blocks, stretch.size), checksums)
            if content.descriptor is None or folder.local:
                folder.write_blocks(stretch.name, hashed)
            else:
                _exhaust(hashed)
        checked = False
        if record.stretches and content.descriptor is not None and not folder.local:
            checked = folder.upload(record.stretches, content.descriptor)
        _exhaust(blocks)  # its end lets go of the memory, which may be unmapped before the commit is over
        if not checked:
            for stretch in record.stretches:
                _read_back(folder, stretch, checksums)
        whole = replace(record, blocks=tuple(checksums)).dump()
        folder.write_whole(record_name(record.rank), whole)
        if not checked:
            _compare(folder, record_name(record.rank), whole)
    except Exception as error:
        try:
            folder.write_whole(_failure_name(record.rank), json.dumps(f"{type(error).__name__}: {error}").encode())
        except Exception as second:  # the store is gone; the first error says why
            raise error from second
        raise


def write_file(folder: Folder, name: str, size: int, content: Content) -> None:
    """Write one file, sealed with the checksum of its content, and read it back. It is whole, or as it was before.

    size: bytes of the content.
    """
    checksums: list[str] = []
    hashed = _hashed(content.blocks, checksums)
    if content.descriptor is None or folder.local:
        seal = (memoryview(seal_of(checksums)) for _ in range(1))  # made when the blocks have been hashed
        folder.replace_blocks(
            name, chain(hashed, seal), lambda part: _read_back(folder, Stretch(part, 0, size), checksums)
        )
        return
    _exhaust(hashed)
    os.pwrite(content.descriptor, seal_of(checksums), size)
    if not folder.upload([Stretch(name, 0, size + SEAL_BYTES)], content.descriptor):
        _read_back(folder, Stretch(name, 0, size), checksums)


def commit(folder: Folder, manifest: Manifest, timeout_s: float, peers: Mapping[int, Peer]) -> Manifest:
    """Wait for the records of all ranks, check that all files are there, and write the manifest (without `files`).

    peers: the processes of ranks on this machine.

    Raises:
        CheckpointWriteError: a rank failed, ended, or did not come in time, or the store lost a file.
    """
    sizes = _await_records(folder, manifest.world_size, timeout_s, peers)
    files = []
    for rank in range(manifest.world_size):
        where = f"{folder}/{record_name(rank)}"
        beginning = folder.fs.cat_file(f"{folder.path}/{record_name(rank)}", start=0, end=FIRST_LINE)
        try:
            file = File.parse(bytes(beginning), rank, where)
        except CheckpointDamagedError as error:
            raise CheckpointWriteError(f"The store changed {where} while it was written.") from error
        for name, size in file.sizes.items():
            if sizes.get(name) != size:
                raise CheckpointWriteError(
                    f"The store lost a part of {folder}/{name}: {size} bytes were written, {sizes.get(name, 0)} are "
                    "there. The checkpoint is not committed."
                )
        files.append(file)
    whole = replace(manifest, files=tuple(files))
    folder.write_whole(MANIFEST, whole.dump())
    _compare(folder, MANIFEST, whole.dump())
    return whole


def blocks_of(content: memoryview) -> Iterator[memoryview]:
    """A shard in memory, cut at BLOCK bytes."""
    for begin in range(0, len(content), BLOCK):
        yield content[begin : begin + BLOCK]


def cut_into_blocks(views: Iterable[memoryview]) -> Iterator[memoryview]:
    """The bytes of all views, one after the other, cut at BLOCK bytes."""
    pending = bytearray()
    for view in views:
        if pending:
            taken = BLOCK - len(pending)
            pending += view[:taken]
            view = view[taken:]
            if len(pending) < BLOCK:
                continue
            yield memoryview(bytes(pending))
            pending.clear()
        whole = len(view) // BLOCK * BLOCK
        yield from blocks_of(view[:whole])
        pending += view[whole:]
    if pending:
        yield memoryview(pending)


@dataclass
class _Pause:
    """Waits that grow, so that a store is not asked in vain too often: 10 ms to 1 s."""

    seconds: float = 0.01

    def wait(self) -> None:
        time.sleep(self.seconds)
        self.seconds = min(1.0, self.seconds * 1.5)


def _await_records(folder: Folder, world_size: int, timeout_s: float, peers: Mapping[int, Peer]) -> dict[str, int]:
    """The files of the folder, once every rank's record is among them."""
    deadline = time.monotonic() + timeout_s
    pause = _Pause()
    while True:
        ended = [rank for rank, peer in peers.items() if peer.ended]  # before the look at what they left
        sizes = folder.sizes()
        missing = [rank for rank in range(world_size) if record_name(rank) not in sizes]
        if not missing:
            return sizes
        if missing[0] == 0:
            # Rank 0's own, which it has just written: no waiting brings it back.
            raise CheckpointWriteError(f"The store lost {folder}/{record_name(0)}. The checkpoint is not committed.")
        failed = [rank for rank in missing if _failure_name(rank) in sizes]
        if failed:
            why = json.loads(folder.read(_failure_name(failed[0])))
            raise CheckpointWriteError(f"Rank {failed[0]} could not write its part of {folder}: {why}")
        lost = [rank for rank in missing if rank in ended]
        if lost:
            raise CheckpointWriteError(
                f"Rank {lost[0]} (process {peers[lost[0]].pid}) ended before it had written its part of {folder}."
            )
        if time.monotonic() > deadline:
            raise CheckpointWriteError(
                f"Ranks {missing[:8]} ({len(missing)} of {world_size}) did not write their part of {folder} within "
                f"{timeout_s:.0f} s of the others."
            )
        pause.wait()


def _hashed(blocks: Iterable[memoryview], checksums: list[str]) -> Iterator[memoryview]:
    for block in blocks:
        # Just before it is written, while it is in the cache.
        checksums.append(block_checksum(block))
        yield block


def _of_stretch(blocks: Iterator[memoryview], size: int) -> Iterator[memoryview]:
    """The next blocks, as far as they belong to a file of so many bytes; the rest of the last is a gap."""
    for block in islice(blocks, -(-size // BLOCK)):
        yield block[:size]
        size -= len(block)


def _compare(folder: Folder, name: str, content: bytes) -> None:
    try:
        found = folder.read(name)
    except FileNotFoundError as error:
        raise CheckpointWriteError(f"The store lost {folder}/{name}. The checkpoint is not committed.") from error
    if found != content:
        raise CheckpointWriteError(f"The store changed {folder}/{name} while it was written.")


def _read_back(folder: Folder, stretch: Stretch, checksums: list[str]) -> None:
    file = ShardFile(folder, stretch, checksums)
    try:
        for first in range(file.first, file.last, RUN):
            file.read(first, first + RUN, ())
    except CheckpointDamagedError as error:
        raise CheckpointWriteError(f"What was written is not what is read back: {error}") from error
    finally:
        file.close()


def _exhaust(blocks: Iterable[memoryview]) -> None:
    for _ in blocks:
        pass


def _failure_name(rank: int) -> str:
    return f"rank-{rank:05d}.failed"
