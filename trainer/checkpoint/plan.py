"""Which rank writes which part of a state: a pure function of the state's tensors, so that no rank need ask another.

A sharded tensor (DTensor) is written where it lies; of several replicas of a shard the first one writes. What every
rank has is written once: tensors of SPLIT bytes or more are laid end to end, cut into one stretch per rank at rows of
their first dimension, and smaller ones, and all plain values, are rank 0's. Buffers that differ between the ranks of
a DDP job (running means of BatchNorm: DDP hands out rank 0's before each forward) are thus rank 0's, as long as they
are small.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from trainer.checkpoint.values import is_dtensor
from trainer.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Container, Mapping, Sequence

    import torch

SPLIT = 64 * 1024


@dataclass(frozen=True)
class Part:
    """A box of a tensor that this rank writes; `data` is its content, of shape `size`."""

    key: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    size: tuple[int, ...]
    data: torch.Tensor


def parts_of_rank(tensors: Mapping[str, torch.Tensor], rank: int, world_size: int) -> list[Part]:
    """The parts that one rank writes, in the order of `tensors`."""
    replicated = {key: t for key, t in tensors.items() if not is_dtensor(t)}
    rows = _rows_of_rank({k: (t.shape, t.element_size()) for k, t in replicated.items()}, rank, world_size)
    parts = []
    for key, tensor in tensors.items():
        if key not in replicated:
            part = _local_part(key, tensor)
            if part is not None:
                parts.append(part)
        elif key in rows:
            first, last = rows[key]
            data = tensor if tensor.dim() == 0 else tensor[first:last]
            offset = (first, *([0] * (tensor.dim() - 1))) if tensor.dim() else ()
            parts.append(Part(key, tuple(tensor.shape), offset, tuple(data.shape), data))
    return parts


def structure(tensors: Mapping[str, torch.Tensor]) -> str:
    """A digest of what all ranks must agree on: the keys, shapes, dtypes and layouts of the state's tensors."""
    return hashlib.sha256("\n".join(outline(tensors)).encode()).hexdigest()


def outline(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """One line per tensor, as compared by `structure`."""
    return [f"{k} {tuple(t.shape)} {t.dtype} {t.placements if is_dtensor(t) else ''}" for k, t in tensors.items()]  # type: ignore[attr-defined]


def _rows_of_rank(
    tensors: Mapping[str, tuple[tuple[int, ...], int]], rank: int, world_size: int
) -> dict[str, tuple[int, int]]:
    """The rows [first, last) of each replicated tensor that a rank writes; a tensor of which it writes none is absent.

    tensors: shape and bytes per element by key.
    """
    sizes = {key: _numel(shape) * width for key, (shape, width) in tensors.items()}
    large = {key for key, size in sizes.items() if size >= SPLIT and tensors[key][0]}
    small = sum(size for key, size in sizes.items() if key not in large)
    total = sum(sizes.values())
    # Rank 0's stretch begins with the small tensors; [begin, end) is this rank's, in bytes of the large ones.
    begin = 0 if rank == 0 else max(0, total * rank // world_size - small)
    end = max(0, total * (rank + 1) // world_size - small)
    rows, position = {}, 0
    for key, ((*shape,), _) in tensors.items():
        size = sizes[key]
        if key not in large:
            if rank == 0:
                rows[key] = (0, shape[0] if shape else 1)
            continue
        first, last = _rows_between(begin - position, end - position, shape[0], size)
        if first < last:
            rows[key] = (first, last)
        position += size
    return rows


def cut(parts: Sequence[Part], count: int, whole: Container[str]) -> list[list[Part]]:
    """The parts in `count` groups of about the same size in bytes. Large ones are cut at rows, but those of `whole`."""
    sizes = [part.data.numel() * part.data.element_size() for part in parts]
    total = sum(sizes)
    groups: list[list[Part]] = [[] for _ in range(count)]
    position = 0
    for part, size in zip(parts, sizes, strict=True):
        if size == 0:
            groups[0].append(part)
            continue
        rows = part.size[0] if size >= SPLIT and part.size and part.key not in whole else 1
        for number, group in enumerate(groups):
            begin, end = (total * n // count - position for n in (number, number + 1))
            first, last = _rows_between(begin, end, rows, size)
            if (first, last) == (0, rows):
                group.append(part)
            elif first < last:
                group.append(_rows_of(part, first, last))
        position += size
    return groups


def _rows_of(part: Part, first: int, last: int) -> Part:
    data = part.data[first:last]
    return replace(part, offset=(part.offset[0] + first, *part.offset[1:]), size=tuple(data.shape), data=data)


def _rows_between(begin: int, end: int, rows: int, size: int) -> tuple[int, int]:
    """The rows [first, last) of a box of `size` bytes that lie between two of its bytes.

    A cut in the middle of a row goes to its nearer edge; both neighbours round alike, so nothing is lost.
    """
    first, last = (min(max(0, _nearest(edge, size // rows)), rows) for edge in (begin, end))
    return first, last


def _nearest(numerator: int, denominator: int) -> int:
    return (2 * numerator + denominator) // (2 * denominator)


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for length in shape:
        count *= length
    return count


def _local_part(key: str, tensor: torch.Tensor) -> Part | None:
    """The box of a DTensor that this rank holds and is the one to write; None if another replica writes it."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    assert isinstance(tensor, DTensor)
    if any(p.is_partial() for p in tensor.placements):
        raise CheckpointError(f"{key} is a DTensor with unreduced parts ({tensor.placements}); redistribute it first.")
    whole = tensor.device_mesh._get_root_mesh()
    if whole is not tensor.device_mesh:
        # With tensor parallelism the ranks that hold a layer together each have all of what was not cut.
        places = zip(whole.mesh_dim_names or (), whole.get_coordinate() or (), strict=True)
        if any(c for name, c in places if name not in (tensor.device_mesh.mesh_dim_names or ())):
            return None
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None or any(c for c, p in zip(coordinate, tensor.placements, strict=True) if p.is_replicate()):
        return None
    size, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    empty = 0 in size
    if empty and (0 not in tensor.shape or any(coordinate)):
        return None
    return Part(key, tuple(tensor.shape), tuple(offset), tuple(size), tensor.to_local())
