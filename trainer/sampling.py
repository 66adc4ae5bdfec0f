"""Pure: which sample ids belong to (seed, epoch, step, rank), for any number of ranks, in O(1).

An order is a function of the position. The position of a gang is one integer: how many samples of the epoch all ranks
together have taken. Rank r of W takes positions base + r, base + r + W, ...: without shuffling this is what torch's
DistributedSampler gives where everything divides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from trainer.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["Listed", "Order", "Permuted", "Sequential", "Share", "as_ids", "batch_count", "shares"]

Places = npt.NDArray[np.int64]
Ids = npt.NDArray[Any]  # of int64, but for custom samplers whose items are no numbers

# Four rounds of random functions look random (Luby and Rackoff 1988); twice that for cheaper ones.
_ROUNDS = 8
_BLOCK = 1 << 14
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_M1 = np.uint64(0xBF58476D1CE4E5B9)
_M2 = np.uint64(0x94D049BB133111EB)


class Order(Protocol):
    """Position in the epoch -> sample id."""

    def __len__(self) -> int: ...

    def ids(self, positions: Places) -> Ids:
        """The sample ids at these positions."""
        ...


class Sequential:
    """The dataset's own order."""

    def __init__(self, size: int) -> None:
        self._size = size

    def __len__(self) -> int:
        return self._size

    def ids(self, positions: Places) -> Ids:
        """The positions themselves."""
        return positions


class Listed:
    """An order that was drawn beforehand, such as that of a custom sampler. Its items need not be numbers."""

    def __init__(self, items: Sequence[Any]) -> None:
        self._items = as_ids(items)

    def __len__(self) -> int:
        return len(self._items)

    def ids(self, positions: Places) -> Ids:
        """What was drawn at these positions."""
        return self._items[positions]


def as_ids(items: Sequence[Any]) -> Ids:
    """Sample ids as an array, of whatever kind they are."""
    if all(isinstance(item, (int, np.integer)) for item in items):
        return np.asarray(items, dtype=np.int64)
    ids = np.empty(len(items), dtype=object)
    for place, item in enumerate(items):
        ids[place] = item
    return ids


class Permuted:
    """A keyed permutation of 0..size-1 with O(1) access to any place and no memory that grows with it.

    Up to one block it is the order of keyed hashes. Beyond, a balanced Feistel network on the smallest even number of
    bits that holds `size`, whose values outside are sent through it again (cycle walking; Black and Rogaway 2002).
    Hash and round function are splitmix64's finaliser (Steele, Lea, Flood 2014). Not a cipher: it needs to look
    random, not to keep a secret.
    """

    def __init__(self, size: int, *, seed: int, epoch: int) -> None:
        self._size = size
        self._half = np.uint64(((max(size, 2) - 1).bit_length() + 1) // 2)
        self._mask = np.uint64((1 << int(self._half)) - 1)
        keys = np.array([seed & 0xFFFFFFFFFFFFFFFF, epoch & 0xFFFFFFFFFFFFFFFF], dtype=np.uint64)
        with np.errstate(over="ignore"):
            state = _mix(_mix(keys[:1] + _GOLDEN) + keys[1:])
            self._keys = _mix(state + np.arange(1, _ROUNDS + 1, dtype=np.uint64) * _GOLDEN)
        self._block_start = -1
        self._block: Places = np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        return self._size

    def ids(self, positions: Places) -> Ids:
        """The permutation at these positions, which ascend. Neighbouring calls share a block, computed once."""
        if not len(positions):
            return positions
        start = int(positions[0]) // _BLOCK * _BLOCK
        if start != self._block_start:
            self._block = self._permute(start, min(start + _BLOCK, self._size))
            self._block_start = start
        within = positions - start
        if within[-1] < len(self._block):
            return self._block[within]
        split = int(np.searchsorted(within, len(self._block)))
        return np.concatenate([self._block[within[:split]], self.ids(positions[split:])])

    def _permute(self, start: int, stop: int) -> Places:
        values = np.arange(start, stop, dtype=np.uint64)
        size = np.uint64(self._size)
        if self._size <= _BLOCK:
            with np.errstate(over="ignore"):
                hashes = _mix(_mix(values * _GOLDEN + self._keys[0]) ^ self._keys[1])
            return np.argsort(hashes, kind="stable").astype(np.int64)
        values = self._network(values)
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


@dataclass(frozen=True, slots=True)
class Share:
    """One rank's part of one global batch.

    ids: what it loads (never empty). places: their positions in the epoch. seen: how many of them are its own; 0
    means that the rank has no sample in this batch and runs a copy of another's, which counts for nothing. total:
    samples of the batch over all ranks. position: the gang's position after the batch.
    """

    ids: Ids
    places: Places
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

    Raises:
        DataError: `start` lies outside of the order.
    """
    size = len(order)
    if not 0 <= start <= size:
        raise DataError(f"The position {start} is outside of a dataset of {size} samples: has the dataset changed?")
    step = batch_size * world_size
    offsets = rank + world_size * np.arange(batch_size, dtype=np.int64)
    base = start
    while base + step <= size:
        places = base + offsets
        yield Share(order.ids(places), places, batch_size, step, base + step)
        base += step
    if base < size and not drop_last:
        places = base + offsets
        places = places[places < size]
        seen = len(places)
        if not seen:
            places = np.array([base], dtype=np.int64)
        yield Share(order.ids(places), places, seen, size - base, size)


def batch_count(size: int, *, batch_size: int, world_size: int, drop_last: bool) -> int:
    """Batches per rank for `size` samples of the gang."""
    step = batch_size * world_size
    return size // step if drop_last else -(-size // step)
