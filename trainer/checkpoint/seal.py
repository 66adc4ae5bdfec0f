"""The checksum at the end of a torch file: the comment of the zip archive that such a file is.

`torch.load` and unzip pass over a comment, so the file stays an ordinary one. A file without it (Lightning's,
torch.save's) is read unverified.

Torch-free: the writer's process imports it.
"""

from __future__ import annotations

import json
import struct
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from trainer.checkpoint.manifest import BLOCK, block_checksum, checksum

if TYPE_CHECKING:
    from collections.abc import Sequence

# The end of a zip archive (APPNOTE 4.3.16): signature, 16 bytes, length of the comment, comment.
_END = b"PK\x05\x06"
_END_BYTES = 22
_THREADS = 8


def seal_of(checksums: Sequence[str]) -> bytes:
    """The seal of a file whose blocks of BLOCK bytes have these checksums; always SEAL_BYTES long."""
    return json.dumps({"muster": 1, "xxh3": checksum("".join(checksums).encode()), "block_bytes": BLOCK}).encode()


SEAL_BYTES = len(seal_of(()))
# So much at the end of a file tells whether it has a seal.
TAIL_BYTES = _END_BYTES + SEAL_BYTES
_BEGINNING = seal_of(())[:12]
# What a sealed archive ends with before its seal: the length of the comment.
COMMENT_LENGTH = struct.pack("<H", SEAL_BYTES)


def is_sealed(content: memoryview) -> bool:
    """Whether the file was written with a seal, even if what shows it is damaged in one of two places, or cut off."""
    tail = bytes(content[-TAIL_BYTES:])
    end = tail.rfind(_END)
    announced = end >= 0 and tail[end + _END_BYTES - 2 : end + _END_BYTES] == COMMENT_LENGTH
    return announced or _BEGINNING in tail


def is_whole(content: memoryview) -> bool:
    """Whether a sealed file holds what was written."""
    body = content[:-SEAL_BYTES]
    with ThreadPoolExecutor(_THREADS) as pool:
        checksums = list(pool.map(lambda at: block_checksum(body[at : at + BLOCK]), range(0, len(body), BLOCK)))
    return bytes(content[-SEAL_BYTES:]) == seal_of(checksums)
