"""The checksum at the end of a torch file: the comment of the zip archive that such a file is.

`torch.load` and unzip pass over a comment, so the file stays an ordinary one. A file without it (Lightning's,
torch.save's) is read unverified.

Torch-free: the writer's process imports it.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING

from trainer.checkpoint.manifest import BLOCK, block_checksum, checksum
from trainer.errors import CheckpointDamagedError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from trainer.checkpoint.folder import Folder

# The end of a zip archive (APPNOTE 4.3.16): signature, 16 bytes, length of the comment, comment.
_END = b"PK\x05\x06"
_END_BYTES = 22
_THREADS = 8
# How a zip archive begins, which is what torch writes.
_ZIP = b"PK\x03\x04"


def seal_of(checksums: Sequence[str]) -> bytes:
    """The seal of a file whose blocks of BLOCK bytes have these checksums; always SEAL_BYTES long."""
    return json.dumps({"muster": 1, "xxh3": checksum("".join(checksums).encode()), "block_bytes": BLOCK}).encode()


SEAL_BYTES = len(seal_of(()))
# So much at the end of a file tells whether it has a seal.
_TAIL_BYTES = _END_BYTES + SEAL_BYTES
_BEGINNING = seal_of(())[:12]
# What a sealed archive ends with before its seal: the length of the comment.
COMMENT_LENGTH = struct.pack("<H", SEAL_BYTES)


def is_sealed(content: memoryview) -> bool:
    """Whether the file was written with a seal, even if what shows it is damaged in one of two places, or cut off."""
    tail = bytes(content[-_TAIL_BYTES:])
    end = tail.rfind(_END)
    announced = end >= 0 and tail[end + _END_BYTES - 2 : end + _END_BYTES] == COMMENT_LENGTH
    return announced or _BEGINNING in tail


def _is_whole(content: memoryview) -> bool:
    """Whether a sealed file holds what was written."""
    body = content[:-SEAL_BYTES]
    with ThreadPoolExecutor(_THREADS) as pool:
        checksums = list(pool.map(lambda at: block_checksum(body[at : at + BLOCK]), range(0, len(body), BLOCK)))
    return bytes(content[-SEAL_BYTES:]) == seal_of(checksums)


def verify_file(place: Folder) -> tuple[bool, bytes | None]:
    """Compare a file with its seal. Returns whether it has one; and its content, if that had to be fetched for it.

    Raises:
        FileNotFoundError, IsADirectoryError
        CheckpointDamagedError: it is not what was sealed, or too short for an archive.
    """
    if place.local:
        with open(place.path, "rb") as file, _mapped(file.fileno()) as content:
            return _verify(content, place), None
    fetched = place.parent.read(place.name)
    return _verify(memoryview(fetched), place), fetched


@contextmanager
def _mapped(descriptor: int) -> Iterator[memoryview]:
    """The content of an open file. (An empty one cannot be mapped.)"""
    if os.fstat(descriptor).st_size == 0:
        yield memoryview(b"")
        return
    # Not closed by hand: views of it may live a moment longer, in the frames of threads.
    yield memoryview(mmap.mmap(descriptor, 0, prot=mmap.PROT_READ))


def _verify(content: memoryview, place: Folder) -> bool:
    if len(content) < len(_ZIP):
        raise CheckpointDamagedError(f"{place} is not a whole torch file: it ends after {len(content)} bytes.")
    sealed = is_sealed(content)
    if sealed and not _is_whole(content):
        raise CheckpointDamagedError(f"{place} is damaged: its checksum does not fit its content.")
    return sealed
