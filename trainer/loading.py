"""Feeds: the user's loaders, re-made so that the place in the data is one integer and every sample is seen once.

A DataLoader without a sampler of its own, or with torch's Sequential-, Random- or DistributedSampler, gets our order.
Another finite sampler or batch_sampler is drawn once per epoch from a seeded generator, the same on every rank, and
replayed as indices. Everything else about the loader stays as the user made it.
"""

from __future__ import annotations

import atexit
import copy
import dataclasses
import hashlib
import itertools
import random
import signal
import struct
import time
import weakref
from collections import deque
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    get_worker_info,
)

from trainer.errors import DataError
from trainer.sampling import Listed, Order, Permuted, Sequential, Share, as_ids, batch_count, shares
from trainer.seed import isolate_rng

if TYPE_CHECKING:
    from collections.abc import Callable

    from trainer.distributed import World
    from trainer.parallel import DataRank

__all__ = ["Feed", "draws_apart", "make_feed", "map_tensors", "to_device"]

# A sampler without a length that gives more than so many items for each sample of its dataset is taken as endless.
_ENDLESS = 100
_NOTHING = object()


class Feed:
    """Batches of one loader for one rank.

    position: the gang's place after the newest batch, to be handed to `batches` again. weight: what the newest
    batch's mean loss is multiplied with (1.0 but for a last incomplete batch; 0.0 for a copy that stands in for a
    missing sample). sized: whether `len` is known. waited_ns: how long `batches` has kept its caller waiting so far.
    """

    sized = True

    def __init__(self) -> None:
        self.position = 0
        self.weight = 1.0
        self.waited_ns = 0

    @property
    def indices(self) -> list[Any] | None:
        """The sample ids of the newest batch, if they are known."""
        return None

    def __len__(self) -> int:
        raise NotImplementedError

    def batches(self, epoch: int, consumed: int | None) -> Iterator[Any]:
        """The rank's batches of an epoch from the gang's position `consumed` (None: from the start).

        Loader workers that do not persist end with the iterator, also when it is closed before its end.
        """
        raise NotImplementedError

    def batches_done(self, position: int | None) -> int:
        """How many of the epoch's `len` batches are over at a position that any number of ranks reached."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """What this rank must keep beside the position."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what `state_dict` returned."""

    def close(self) -> None:
        """End loader workers that persist."""


# ------------------------------------------------------------------------------------------- sized, in a known order


class _PlannedFeed(Feed):
    """Batches of an order that is known before the epoch: what the feeds of samples and of batches share."""

    def __init__(self, loader: DataLoader[Any], *, seed: int, rank: int, world_size: int, train: bool) -> None:
        super().__init__()
        self._seed, self._rank, self._world_size, self._train = seed, rank, world_size, train
        self._indices = _Indices(self)
        self._batched = loader.batch_sampler is not None
        self._keyed = loader.num_workers > 0
        self._share: Share | None = None
        # A copy instead of a new loader: a subclass keeps its attributes, whatever its __init__ takes.
        self._loader = copy.copy(loader)
        ours: dict[str, Any] = {"batch_sampler" if self._batched else "sampler": self._indices, "_iterator": None}
        # The start of an iteration draws a seed for the workers: not from the main process's random state.
        ours["generator"] = torch.Generator()
        # Batches that overtake each other would make the position a lie.
        ours["in_order"] = True
        if self._keyed:
            ours["dataset"] = _KeyedDataset(loader.dataset, seed)
            ours["worker_init_fn"] = _WorkerInit(loader.worker_init_fn, loader.dataset)
        self._loader.__dict__.update(ours)

    def _shares(self, epoch: int, consumed: int) -> Iterator[Share]:
        raise NotImplementedError

    def pin_memory(self) -> None:
        """Have batches in pinned memory from the next iteration on, from where they are copied to a GPU unwaited."""
        self._loader.__dict__["pin_memory"] = True

    @property
    def indices(self) -> list[Any] | None:
        return None if self._share is None else self._share.ids[: max(self._share.seen, 1)].tolist()

    def batches(self, epoch: int, consumed: int | None) -> Iterator[Any]:
        start = self.position = consumed or 0
        ahead: deque[Share] = deque()
        # Workers run ahead, so the loader draws the shares and leaves each here until its batch arrives.
        self._indices.begin = lambda: self._draw(epoch, start, ahead)
        self._loader.generator.manual_seed(_key(self._seed, epoch, self._rank))
        world_size, train = self._world_size, self._train
        clock = time.monotonic_ns
        began = clock()
        iterator = _open(self._loader)
        try:
            for batch in iterator:
                self._share = share = ahead.popleft()
                self.position = share.position
                self.weight = share.weight(world_size) if train else float(share.seen > 0)
                self.waited_ns += clock() - began
                yield batch
                began = clock()
        finally:
            if not self._loader.persistent_workers:
                _end_workers(iterator)

    def close(self) -> None:
        _end_workers(self._loader._iterator)
        self._loader._iterator = None

    def _draw(self, epoch: int, start: int, ahead: deque[Share]) -> Iterator[Any]:
        for share in self._shares(epoch, start):
            ahead.append(share)
            items = share.ids.tolist()
            if self._keyed:
                items = [((epoch, place), item) for place, item in zip(share.places.tolist(), items, strict=True)]
            yield items if self._batched else items[0]


class _SampleFeed(_PlannedFeed):
    """Samples by position: the global batch is cut into the ranks' shares."""

    def __init__(self, loader: DataLoader[Any], *, drawn: _Drawn | None, shuffle: bool, **place: Any) -> None:
        super().__init__(loader, **place)
        inner: Any = loader.batch_sampler
        self._batch_size = 1 if inner is None else int(inner.batch_size)
        self._drop_last = inner is not None and bool(inner.drop_last)
        self._drawn, self._shuffle = drawn, shuffle
        self._size = len(loader.dataset) if drawn is None else drawn.length  # type: ignore[arg-type] # is map-style
        self.sized = self._size is not None

    def _count(self, samples: int) -> int:
        return batch_count(samples, batch_size=self._batch_size, world_size=self._world_size, drop_last=self._drop_last)

    def __len__(self) -> int:
        if self._size is None:
            raise DataError("The length of an epoch is unknown: its sampler has no __len__.")
        return self._count(self._size)

    def batches_done(self, position: int | None) -> int:
        if self._size is None:
            return (position or 0) // (self._batch_size * self._world_size)
        return len(self) - self._count(self._size - (position or 0))

    def _order(self, epoch: int) -> Order:
        if self._drawn is not None:
            return Listed(self._drawn.items(epoch))
        assert self._size is not None
        return Permuted(self._size, seed=self._seed, epoch=epoch) if self._shuffle else Sequential(self._size)

    def _shares(self, epoch: int, consumed: int) -> Iterator[Share]:
        return shares(
            self._order(epoch),
            batch_size=self._batch_size,
            rank=self._rank,
            world_size=self._world_size,
            start=consumed,
            drop_last=self._drop_last,
        )


class _BatchFeed(_PlannedFeed):
    """A custom batch_sampler: whole batches go to the ranks in turn; the position counts batches."""

    def __init__(self, loader: DataLoader[Any], *, drawn: _Drawn, **place: Any) -> None:
        super().__init__(loader, **place)
        self._drawn = drawn
        self.sized = drawn.length is not None

    def __len__(self) -> int:
        if self._drawn.length is None:
            raise DataError("The length of an epoch is unknown: its batch_sampler has no __len__.")
        return -(-self._drawn.length // self._world_size)

    def batches_done(self, position: int | None) -> int:
        if self._drawn.length is None:
            return (position or 0) // self._world_size
        return len(self) - -(-(self._drawn.length - (position or 0)) // self._world_size)

    def _shares(self, epoch: int, consumed: int) -> Iterator[Share]:
        drawn = self._drawn.items(epoch)
        if not 0 <= consumed <= len(drawn):
            raise DataError(f"The position {consumed} is outside of {len(drawn)} batches: has the dataset changed?")
        for base in range(consumed, len(drawn), self._world_size):
            group = drawn[base : base + self._world_size]
            number = self._rank if self._rank < len(group) else 0
            own = as_ids(list(group[number]))
            # A batch may have up to 2**20 samples before two of an epoch have the same place.
            places = ((base + number) << 20) + np.arange(len(own), dtype=np.int64)
            seen = len(own) if self._rank < len(group) else 0
            yield Share(own, places, seen, sum(len(b) for b in group), base + len(group))


class _Drawn:
    """What a custom sampler or batch_sampler gives in an epoch: the same on every rank, and again after a resume."""

    def __init__(self, source: Any, loader: DataLoader[Any], seed: int) -> None:
        self._source, self._seed = source, seed
        self._limit = _ENDLESS * max(1000, len(loader.dataset))  # type: ignore[arg-type] # is map-style
        try:
            self.length: int | None = len(source)
        except (TypeError, NotImplementedError):
            self.length = None
        self._epoch: int | None = None
        self._items: list[Any] = []

    def items(self, epoch: int) -> list[Any]:
        """Draw, unless this epoch was drawn last.

        Raises:
            DataError: the sampler is endless, or gives another number of items than its len().
        """
        if self._epoch != epoch:
            self._items = self._draw(epoch)
            self._epoch = epoch
        return self._items

    def _draw(self, epoch: int) -> list[Any]:
        name = type(self._source).__name__
        owners = [self._source, getattr(self._source, "sampler", None)]
        generators = {id(g): g for o in owners if isinstance(g := getattr(o, "generator", None), torch.Generator)}
        states = {i: g.get_state() for i, g in generators.items()}
        key = _key(self._seed, epoch)
        with isolate_rng():
            _seed_all(key)
            for generator in generators.values():
                generator.manual_seed(key & 0x7FFFFFFFFFFFFFFF)
            for owner in owners:
                if callable(set_epoch := getattr(owner, "set_epoch", None)):
                    set_epoch(epoch)
            items = list(itertools.islice(self._source, self._limit + 1))
        for i, generator in generators.items():
            generator.set_state(states[i])
        if len(items) > self._limit:
            raise DataError(
                f"{name} gave more than {self._limit} items without an end. An endless sampler cannot be shared "
                "between ranks or resumed: let it end with its epoch, or use an IterableDataset."
            )
        if self.length is not None and len(items) != self.length:
            raise DataError(
                f"{name} gave {len(items)} items in epoch {epoch}, but its len() is {self.length}. Mend its __len__, "
                "or leave it out if the number is not known beforehand."
            )
        return items


class _Indices(Sampler[Any]):
    """The batch_sampler (or, unbatched, sampler) of the copied loader."""

    def __init__(self, feed: Feed) -> None:
        self._feed = weakref.ref(feed)
        self.begin: Callable[[], Iterator[Any]] = lambda: iter(())

    def __iter__(self) -> Iterator[Any]:
        return self.begin()

    def __len__(self) -> int:
        feed = self._feed()
        return 0 if feed is None else len(feed)


# ------------------------------------------------------------------------------------------------ loader workers


class _KeyedDataset:
    """In loader workers: the random state at each sample is a function of (seed, epoch, place in the epoch).

    So augmentation is the same whichever worker, rank or resumed process loads the sample, and a sample that is drawn
    twice is augmented in two ways. Without workers the dataset draws from the main process's generators, whose state
    is in the checkpoint.
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        self._dataset, self._seed = dataset, seed

    def __getitem__(self, item: tuple[tuple[int, int], Any]) -> Any:
        key, index = item
        _seed_all(_key(self._seed, *key))
        return self._dataset[index]

    def __getattr__(self, name: str) -> Any:
        # torch asks whether the dataset loads whole batches; nothing else is looked for on it in a worker.
        if name != "__getitems__":
            raise AttributeError(name)
        batched = self._dataset.__getitems__

        def getitems(items: list[tuple[tuple[int, int], Any]]) -> Any:
            _seed_all(_key(self._seed, *items[0][0]))
            return batched([index for _, index in items])

        return getitems if batched else None

    def __reduce__(self) -> Any:
        return _KeyedDataset, (self._dataset, self._seed)


class _WorkerInit:
    """First in every loader worker: leave SIGTERM to the rank, which saves and then ends its workers itself."""

    def __init__(self, user: Any, dataset: Any = None) -> None:
        self._user, self._dataset = user, dataset

    def __call__(self, worker: int) -> None:
        # Slurm signals every process of a step; a loader that dies first takes the save down with it. A handler and
        # not SIG_IGN, which a program that the dataset starts would inherit.
        signal.signal(signal.SIGTERM, _leave_it_to_the_rank)
        if self._user is not None:
            info = get_worker_info()
            if self._dataset is not None and info is not None:
                # The user's function may set up the dataset of this worker: theirs, not the one around it.
                around: Any = info.dataset
                object.__setattr__(info, "dataset", around._dataset)
            self._user(worker)


def _leave_it_to_the_rank(signum: int, frame: Any) -> None:
    """Nothing."""


_running: weakref.WeakSet[Any] = weakref.WeakSet()
_ends_at_exit = False


def _open(loader: Any) -> Iterator[Any]:
    """Begin an iteration; at the latest when python exits its workers end.

    multiprocessing would send them SIGTERM then, which they leave to the rank, and wait for them for ever.
    """
    global _ends_at_exit
    iterator: Iterator[Any] = iter(loader)
    if getattr(iterator, "_workers", None):
        if not _ends_at_exit:
            atexit.register(_end_all_workers)
            _ends_at_exit = True
        _running.add(iterator)
    return iterator


def _end_all_workers() -> None:
    for iterator in list(_running):
        _end_workers(iterator)


def _end_workers(iterator: Any) -> None:
    workers = getattr(iterator, "_workers", None)
    if workers:
        iterator._shutdown_workers()
        for worker in workers:
            if worker.is_alive():  # stuck in a sample, and deaf to SIGTERM
                worker.kill()
                worker.join()
        _running.discard(iterator)


def _key(*values: int) -> int:
    # For every sample that is loaded: numpy's SeedSequence takes 22 us, this 2.
    content = struct.pack(f"<{len(values)}Q", *(value & 0xFFFFFFFFFFFFFFFF for value in values))
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def _seed_all(key: int) -> None:
    random.seed(key)
    np.random.seed(key & 0xFFFFFFFF)
    torch.default_generator.manual_seed(key & 0x7FFFFFFFFFFFFFFF)


# ----------------------------------------------------------------------------------------- in an order of their own


class _StreamFeed(Feed):
    """Batches that come in an order of their own: iterable datasets, and iterables that are no DataLoader.

    The loop looks one batch ahead where there is no length, to know the last one. So that a resumed run is the same,
    the loader's state is kept as of the batch in hand, and what is drawn at random for a batch (without workers) is
    keyed by its place.
    """

    def __init__(self, loader: Any, *, seed: int, rank: int, train: bool) -> None:
        super().__init__()
        self.loader = loader
        self._seed, self._rank, self._train = seed, rank, train
        self._pending: dict[str, Any] | None = None
        self._kept: tuple[int, Any] | None = None
        # Without workers a plain DataLoader is where its dataset is.
        dataset = getattr(loader, "dataset", None) if not getattr(loader, "num_workers", 0) else None
        self._keeper = next((o for o in (loader, dataset) if _stateful(o)), None)
        try:
            len(loader)
        except (TypeError, NotImplementedError):
            self.sized = False

    def __len__(self) -> int:
        return len(self.loader)

    def batches_done(self, position: int | None) -> int:
        return position or 0

    def batches(self, epoch: int, consumed: int | None) -> Iterator[Any]:
        self.position = consumed or 0
        self._kept = None
        clock = time.monotonic_ns
        began = clock()
        iterator = self._begin(epoch, self.position)
        looks_ahead = self._train and not self.sized
        keyed = looks_ahead and not getattr(self.loader, "num_workers", 0)
        try:
            if not looks_ahead:
                while (batch := next(iterator, _NOTHING)) is not _NOTHING:
                    self.position += 1
                    self.waited_ns += clock() - began
                    yield batch
                    began = clock()
                return
            while True:
                if keyed:
                    with isolate_rng():
                        _seed_all(_key(self._seed, epoch, self.position, self._rank))
                        batch = next(iterator, _NOTHING)
                else:
                    batch = next(iterator, _NOTHING)
                if batch is _NOTHING:
                    return
                self.position += 1
                self.waited_ns += clock() - began
                yield batch
                began = clock()
                if self._keeper is not None:
                    self._kept = self.position, copy.deepcopy(self._keeper.state_dict())
        finally:
            if not getattr(self.loader, "persistent_workers", False):
                _end_workers(iterator)

    def _begin(self, epoch: int, consumed: int) -> Iterator[Any]:
        loader = self.loader
        for owner in (getattr(loader, "dataset", None), getattr(loader, "sampler", None), loader):
            if callable(set_epoch := getattr(owner, "set_epoch", None)):
                set_epoch(epoch)
        if self._pending is not None and self._keeper is not None:
            self._keeper.load_state_dict(self._pending)
            self._pending = None
        elif consumed and hasattr(type(loader), "__getitem__") and self.sized:
            return (loader[i] for i in range(consumed, len(loader)))
        elif consumed and self._keeper is not None:
            raise DataError(
                f"The run stopped after {consumed} batches of a {type(loader).__name__} whose state was saved by each "
                "rank for itself, and this rank has none: the number of ranks has changed. Resume with the same "
                "number, or begin the epoch anew: Trainer(resume='epoch')."
            )
        elif consumed:
            raise DataError(
                f"The run stopped after {consumed} batches of a {type(loader).__name__} that cannot say where it was. "
                "Use torchdata's StatefulDataLoader, or give the loader state_dict() and load_state_dict(); or begin "
                "the epoch anew, with the weights as they are: Trainer(resume='epoch')."
            )
        if not isinstance(loader, DataLoader):
            return _open(loader)
        # For as long as it takes to begin: seeds that do not come from the main process's random state, and
        # workers that leave SIGTERM to the rank.
        generator, init = loader.generator, loader.worker_init_fn
        if generator is None:
            loader.generator = torch.Generator().manual_seed(_key(self._seed, epoch, self._rank) >> 1)
        if loader.num_workers:
            loader.worker_init_fn = _WorkerInit(init)
        try:
            return _open(loader)
        finally:
            loader.generator, loader.worker_init_fn = generator, init

    def close(self) -> None:
        if getattr(self.loader, "persistent_workers", False):
            _end_workers(self.loader._iterator)
            self.loader._iterator = None

    def state_dict(self) -> dict[str, Any]:
        if self._keeper is None or not self._train:
            return {}
        if self._kept is not None and self._kept[0] == self.position:
            return {"loader": self._kept[1]}
        return {"loader": self._keeper.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self._keeper is not None and "loader" in state:
            self._pending = state["loader"]


# ------------------------------------------------------------------------------------------------- making a feed


def make_feed(
    loader: Any,
    *,
    world: World | DataRank,
    seed: int | None,
    train: bool,
    shuffle_override: bool | None = None,
    distribute: bool = True,
) -> Feed:
    """The feed of a loader: a DataLoader, or any iterable of batches.

    shuffle_override: False for the dataset's own order whatever the loader says. distribute=False: this rank gets
    all that the loader gives (its sampler is the user's business). So it does with a subclass of torch's
    DistributedSampler, which gives each rank its own part already.
    """
    seed = seed or 0
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return _StreamFeed(loader, seed=seed, rank=world.rank, train=train)
    batch_sampler: Any = loader.batch_sampler
    custom_batches = batch_sampler is not None and not _is(batch_sampler, BatchSampler)
    # Of a BatchSampler that the user made, loader.sampler knows nothing.
    sampler: Any = loader.sampler if batch_sampler is None or custom_batches else batch_sampler.sampler
    shuffle = _shuffles(sampler, distribute=distribute)
    if isinstance(sampler, DistributedSampler) and shuffle is None:
        distribute = False
    rank, world_size = (world.rank, world.size) if distribute else (0, 1)
    place = {"seed": seed, "rank": rank, "world_size": world_size, "train": train}
    if custom_batches:
        return _BatchFeed(loader, drawn=_Drawn(batch_sampler, loader, seed), **place)
    if shuffle is None:
        return _SampleFeed(loader, drawn=_Drawn(sampler, loader, seed), shuffle=False, **place)
    return _SampleFeed(loader, drawn=None, shuffle=shuffle if shuffle_override is None else shuffle_override, **place)


def draws_apart(feed: Any) -> bool:
    """Whether to draw a batch changes no random state or other state of this process: loader workers do it all."""
    return isinstance(feed, _PlannedFeed) and feed._keyed


def _shuffles(sampler: Any, *, distribute: bool) -> bool | None:
    """Whether torch's own sampler shuffles; None for one that has to be asked what it gives."""
    if _is(sampler, SequentialSampler):
        return False
    if _is(sampler, DistributedSampler) and distribute:
        return bool(sampler.shuffle)
    if _is(sampler, RandomSampler) and not sampler.replacement and sampler.num_samples == len(sampler.data_source):
        return True
    return None


def _stateful(owner: Any) -> bool:
    return all(callable(getattr(owner, name, None)) for name in ("state_dict", "load_state_dict"))


def _is(sampler: Any, kind: type) -> bool:
    """Whether it is this sampler of torch's itself, or torchdata's copy of it, and no subclass that does otherwise."""
    found = type(sampler)
    return found is kind or (
        found.__module__ == "torchdata.stateful_dataloader.sampler" and found.__name__ == kind.__name__
    )


# ------------------------------------------------------------------------------------------------ on the device


def to_device(batch: Any, device: torch.device) -> Any:
    """Every tensor of a nested batch (and whatever has `.to(device)`) on the device; pinned tensors without waiting."""

    def move(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device, non_blocking=device.type == "cuda" and value.device.type == "cpu")
        moved = value.to(device)
        return value if moved is None else moved

    return map_tensors(batch, move, objects=True)


def map_tensors(batch: Any, function: Callable[[Any], Any], *, objects: bool = False) -> Any:
    """The batch with `function(tensor)` in place of its tensors, in lists, tuples, mappings and dataclasses.

    objects: call it for other things with a `.to` method as well (a PackedSequence, a graph batch, a BatchEncoding).
    """
    if isinstance(batch, Tensor):
        return function(batch)
    if type(batch) in (list, tuple):
        return type(batch)(map_tensors(v, function, objects=objects) for v in batch)
    if type(batch) is dict:
        return {k: map_tensors(v, function, objects=objects) for k, v in batch.items()}
    if objects and callable(getattr(batch, "to", None)):
        return function(batch)
    if isinstance(batch, tuple):
        parts = [map_tensors(v, function, objects=objects) for v in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    if isinstance(batch, list):
        return [map_tensors(v, function, objects=objects) for v in batch]
    if isinstance(batch, Mapping):
        changed = copy.copy(batch)
        for key, value in batch.items():
            changed[key] = map_tensors(value, function, objects=objects)  # type: ignore[index] # they are mutable
        return changed
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        other = copy.copy(batch)
        for field in dataclasses.fields(batch):
            value = map_tensors(getattr(batch, field.name), function, objects=objects)
            object.__setattr__(other, field.name, value)  # also of a frozen one
        return other
    return batch
