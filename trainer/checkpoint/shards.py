"""A rank's shard: safetensors files that say of each tensor where it lies in the whole one.

The layout is safetensors' (8 bytes: length of the header; the header, JSON; the data). `DCP_SHARDING_INFO` in its
metadata is what `torch.distributed.checkpoint.HuggingFaceStorageReader` reads to put shards together.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from trainer.checkpoint.manifest import Piece, next_block
from trainer.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trainer.checkpoint.plan import Part

# safetensors' names (https://huggingface.co/docs/safetensors/index#format); a few dtypes came to torch late.
_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.int64: "I64", torch.int32: "I32",
    torch.int16: "I16", torch.int8: "I8", torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
# The data begins at a multiple of this, and so does every tensor whose size allows it: reading can then map it.
_ALIGNMENT = 64


@dataclass(frozen=True)
class Layout:
    """The shard's size, its files' headers by their places in it, where each part lies, and the sizes of its files."""

    headers: dict[int, bytes]
    bytes: int
    pieces: tuple[Piece, ...]
    files: tuple[int, ...]


def lay_out(groups: Sequence[Sequence[Part]]) -> Layout:
    """Where the parts come to lie: a file for each group that is not empty.

    Raises:
        CheckpointError: a dtype that safetensors has no name for.
    """
    headers: dict[int, bytes] = {}
    pieces: list[Piece] = []
    files: list[int] = []
    end = 0
    for parts in groups:
        if parts:
            begin = next_block(end)
            headers[begin], of_file, end = _lay_out_file(parts, begin)
            pieces += of_file
            files.append(end - begin)
    return Layout(headers, end, tuple(pieces), tuple(files))


def _lay_out_file(parts: Sequence[Part], begin: int) -> tuple[bytes, list[Piece], int]:
    """A file's header, its pieces, and where it ends. The parts are ordered by element size, so each is aligned."""
    entries: dict[str, object] = {}
    places: list[tuple[Part, str, int, int]] = []
    position = 0
    for part in sorted(parts, key=lambda p: -p.data.element_size()):
        name = _NAMES.get(part.data.dtype)
        if name is None:
            raise CheckpointError(f"{part.key} is of {part.data.dtype}, which safetensors files cannot hold.")
        end = position + part.data.numel() * part.data.element_size()
        entries[part.key] = {"dtype": name, "shape": part.size, "data_offsets": (position, end)}
        places.append((part, name, position, end))
        position = end
    sharding = {part.key: {"saved_offsets": part.offset} for part, *_ in places}
    # safetensors' metadata maps strings to strings.
    metadata = {"format": "pt", "DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(sharding)}
    header = json.dumps({"__metadata__": metadata, **entries}, separators=(",", ":")).encode()
    header += b" " * (-(8 + len(header)) % _ALIGNMENT)
    start = begin + 8 + len(header)
    pieces = [Piece(p.key, name, p.shape, p.offset, p.size, start + a, start + b) for p, name, a, b in places]
    return struct.pack("<Q", len(header)) + header, pieces, start + position


def dtype_of(piece: Piece) -> torch.dtype:
    """The torch dtype of a piece."""
    return _DTYPES[piece.dtype]


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a contiguous tensor on the CPU, as a flat uint8 tensor that shares its memory."""
    return tensor.reshape(-1).view(torch.uint8)
