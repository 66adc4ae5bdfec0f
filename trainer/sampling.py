"""Pure: which sample ids belong to (seed, epoch, step, rank), for any number of ranks, in O(1).

An order is a function of the position. The position of a gang is one integer: how many samples of the epoch all ranks
together have taken. Rank r of W takes positions base + r, base + r + W, ...: without shuffling this is what torch's
DistributedSampler gives where everything divides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from trainer.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["Listed", "Order", "Permuted", "Sequential", "Share", "shares"]

Ids = npt.NDArray[np.int64]

_ROUNDS = 8
_BLOCK = 1 << 14
_M1 = np.uint64(0xBF58476D1CE4E5B9)
_M2 = np.uint64(0x94D049BB133111EB)


class Order(Protocol):
    """Position in the epoch -> sample id."""

    def __len__(self) -> int: ...

    def ids(self, positions: Ids) -> Ids:
        """The sample ids at these positions."""
        ...


class Sequential:
    """The dataset's own order."""

    def __init__(self, size: int) -> None:
        self._size = size

    def __len__(self) -> int:
        return self._size

    def ids(self, positions: Ids) -> Ids:
        """The positions themselves."""
        return positions


class Listed:
    """An order that was drawn beforehand, such as that of a custom sampler."""

    def __init__(self, ids: Sequence[int]) -> None:
        self._ids = np.asarray(ids, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ids)

    def ids(self, positions: Ids) -> Ids:
        """What was drawn at these positions."""
        return self._ids[positions]


class Permuted:
    """A keyed permutation of 0..size-1 with O(1) access to any place and no memory of its own.

    A balanced Feistel network on the smallest even number of bits that holds `size` (at least 8), whose values
    outside are sent through it again (cycle walking; Black and Rogaway 2002). The round function is splitmix64's
    finaliser (Steele, Lea, Flood 2014). Not a cipher: it needs to look random, not to keep a secret.
    """

    def __init__(self, size: int, *, seed: int, epoch: int) -> None:
        self._size = size
        bits = max(8, (max(size, 2) - 1).bit_length())
        self._half = np.uint64((bits + 1) // 2)
        self._mask = np.uint64((1 << int(self._half)) - 1)
        keys = np.array([seed & 0xFFFFFFFFFFFFFFFF, epoch & 0xFFFFFFFFFFFFFFFF], dtype=np.uint64)
        with np.errstate(over="ignore"):
            state = _mix(keys[0] + np.uint64(0x9E3779B97F4A7C15)) ^ _mix(keys[1] + np.uint64(0xD1B54A32D192ED03))
            steps = np.arange(1, _ROUNDS + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
            self._keys = _mix(state + steps)
        self._block_start = -1
        self._block: Ids = np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        return self._size

    def ids(self, positions: Ids) -> Ids:
        """The permutation at these positions. Neighbouring calls share a block that is computed once."""
        if not len(positions):
            return positions
        first, last = int(positions[0]), int(positions[-1])
        start = first - first % _BLOCK
        if start != self._block_start:
            self._block = self._permute(np.arange(start, min(start + _BLOCK, self._size), dtype=np.int64))
            self._block_start = start
        if last < start + _BLOCK:
            return self._block[positions - start]
        return self._permute(positions)

    def _permute(self, positions: Ids) -> Ids:
        values = self._network(positions.astype(np.uint64))
        size = np.uint64(self._size)
        outside = np.flatnonzero(values >= size)
        while len(outside):
            again = self._network(values[outside])
            values[outside] = again
            outside = outside[again >= size]
        return values.astype(np.int64)

    def _network(self, values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        left, right = values >> self._half, values & self._mask
        with np.errstate(over="ignore"):
            for key in self._keys:
                left, right = right, left ^ (_mix(right + key) & self._mask)
        joined: npt.NDArray[np.uint64] = (left << self._half) | right
        return joined


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    values = (values ^ (values >> np.uint64(30))) * _M1
    values = (values ^ (values >> np.uint64(27))) * _M2
    mixed: npt.NDArray[np.uint64] = values ^ (values >> np.uint64(31))
    return mixed


@dataclass(frozen=True)
class Share:
    """One rank's part of one global batch.

    ids: what it loads (never empty). seen: how many of them are its own; 0 means that the rank has no sample in this
    batch and runs a copy of another's, which counts for nothing. total: samples of the batch over all ranks.
    position: the gang's position after the batch.
    """

    ids: Ids
    seen: int
    total: int
    position: int

    def weight(self, world_size: int) -> float:
        """What this rank's mean loss is multiplied with, so that the mean over ranks is the mean over samples."""
        return self.seen * world_size / self.total


def shares(
    order: Order, *, batch_size: int, rank: int, world_size: int, start: int = 0, drop_last: bool = False
) -> Iterator[Share]:
    """One rank's batches from the gang's position `start` to the end of the epoch.

    batch_size is per rank. Over any schedule of world sizes the ids of all ranks, each continued from the position
    that the last one reached, are the order's ids, once each (less a last incomplete batch with drop_last).
    """
    size = len(order)
    if not 0 <= start <= size:
        raise DataError(f"The position {start} is outside of a dataset of {size} samples: has the dataset changed?")
    step = batch_size * world_size
    offsets = rank + world_size * np.arange(batch_size, dtype=np.int64)
    base = start
    while base + step <= size:
        yield Share(order.ids(base + offsets), batch_size, step, base + step)
        base += step
    if base < size and not drop_last:
        own = base + offsets
        own = own[own < size]
        seen = len(own)
        if not seen:
            own = np.array([base], dtype=np.int64)
        yield Share(order.ids(own), seen, size - base, size)


def batch_count(size: int, *, batch_size: int, world_size: int, drop_last: bool) -> int:
    """Batches per rank in one epoch."""
    step = batch_size * world_size
    return size // step if drop_last else -(-size // step)
