"""Feeds: the user's loaders, re-made so that the place in the data is one integer and every sample is seen once.

A DataLoader without a sampler of its own, or with torch's Sequential-, Random- or DistributedSampler, gets our order.
Another finite sampler or batch_sampler is drawn once per epoch from a seeded generator, the same on every rank, and
replayed as indices. Everything else about the loader stays as the user made it.
"""

from __future__ import annotations

import inspect
import random
import signal
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
)

from trainer.errors import DataError
from trainer.sampling import Listed, Order, Permuted, Sequential, Share, batch_count, shares
from trainer.seed import isolate_rng

if TYPE_CHECKING:
    from trainer.distributed import World

__all__ = ["Feed", "make_feed", "to_device"]


class Feed:
    """Batches of one loader for one rank.

    position: the gang's place after the newest batch, to be handed to `batches` again. weight: what the newest
    batch's mean loss is multiplied with (1.0 but for a last incomplete batch; 0.0 for a copy that stands in for a
    missing sample). sized: whether `len` is known. indices: sample ids of the newest batch, if they are known.
    """

    sized = True

    def __init__(self) -> None:
        self.position = 0
        self.weight = 1.0
        self.indices: list[int] | None = None

    def __len__(self) -> int:
        raise NotImplementedError

    def batches(self, epoch: int, consumed: int | None) -> Iterator[Any]:
        """The rank's batches of an epoch from the gang's position `consumed` (None: from the start)."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """What this rank must keep beside the position."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what `state_dict` returned."""


class _Planned(Feed):
    """Shares the machinery of the feeds that know their order: one iteration of the loader per epoch."""

    def __init__(self, world_size: int, *, train: bool) -> None:
        super().__init__()
        self._world_size = world_size
        self._train = train
        self._plan = _Plan()
        self._loader: DataLoader[Any]

    def _shares(self, epoch: int, consumed: int) -> Iterator[Share]:
        raise NotImplementedError

    def batches(self, epoch: int, consumed: int | None) -> Iterator[Any]:
        consumed = consumed or 0
        self.position = consumed
        # The loader's workers run ahead; the bookkeeping must not, so each side goes through the plan by itself.
        self._plan.begin(epoch, lambda: self._shares(epoch, consumed))
        if self._loader.generator is not None and getattr(self._loader, "_launch_owns_generator", False):
            self._loader.generator.manual_seed(self._plan.seed ^ epoch)
        for share, batch in zip(self._shares(epoch, consumed), self._loader, strict=True):
            self.position = share.position
            self.indices = share.ids[: max(share.seen, 1)].tolist()
            if self._train:
                self.weight = share.weight(self._world_size)
            else:
                self.weight = 1.0 if share.seen else 0.0
            yield batch


class _SampleFeed(_Planned):
    """Samples by position: the global batch is cut into the ranks' shares."""

    def __init__(self, *, size: int, batch_size: int, drop_last: bool, rank: int, world_size: int, train: bool) -> None:
        super().__init__(world_size, train=train)
        self._size, self._batch_size, self._drop_last, self._rank = size, batch_size, drop_last, rank

    def __len__(self) -> int:
        return batch_count(
            self._size, batch_size=self._batch_size, world_size=self._world_size, drop_last=self._drop_last
        )

    def _order(self, epoch: int) -> Order:
        return self._plan.order(epoch)

    def _shares(self, epoch: int, consumed: int) -> Iterator[Share]:
        return shares(
            self._order(epoch),
            batch_size=self._batch_size,
            rank=self._rank,
            world_size=self._world_size,
            start=consumed,
            drop_last=self._drop_last,
        )


class _BatchFeed(_Planned):
    """A custom batch_sampler: whole batches go to the ranks in turn; the position counts batches."""

    def __init__(self, count: int, *, rank: int, world_size: int, train: bool) -> None:
        super().__init__(world_size, train=train)
        self._count, self._rank = count, rank

    def __len__(self) -> int:
        return -(-self._count // self._world_size)

    def _shares(self, epoch: int, consumed: int) -> Iterator[Share]:
        drawn = self._plan.drawn(epoch)
        if not 0 <= consumed <= len(drawn):
            raise DataError(f"The position {consumed} is outside of {len(drawn)} batches: has the dataset changed?")
        for base in range(consumed, len(drawn), self._world_size):
            group = drawn[base : base + self._world_size]
            own = group[self._rank] if self._rank < len(group) else group[0]
            seen = len(own) if self._rank < len(group) else 0
            total = sum(len(b) for b in group)
            yield Share(np.asarray(own, dtype=np.int64), seen, total, base + len(group))


class _Plan:
    """What an epoch's order is; made by `make_feed`, read by the feed and, through `_Indices`, by the loader."""

    def __init__(self) -> None:
        self.seed = 0
        self.shuffle = False
        self.size = 0
        self.source: Any = None  # a custom sampler or batch_sampler to draw from
        self._drawn_for: int | None = None
        self._drawn: list[Any] = []
        self._epoch = 0
        self._begin: Any = lambda: iter(())

    def order(self, epoch: int) -> Order:
        if self.source is not None:
            return Listed(self.drawn(epoch))
        return Permuted(self.size, seed=self.seed, epoch=epoch) if self.shuffle else Sequential(self.size)

    def drawn(self, epoch: int) -> list[Any]:
        """The custom sampler's items of an epoch: the same on every rank, and again after a resume."""
        if self._drawn_for != epoch:
            with isolate_rng():
                key = _key(self.seed, epoch, 0)
                _seed_all(key)
                generator = getattr(self.source, "generator", None)
                if isinstance(generator, torch.Generator):
                    generator.manual_seed(key)
                if callable(set_epoch := getattr(self.source, "set_epoch", None)):
                    set_epoch(epoch)
                self._drawn = list(self.source)
            self._drawn_for = epoch
        return self._drawn

    def begin(self, epoch: int, start: Any) -> None:
        self._epoch, self._begin = epoch, start

    def ids(self) -> Iterator[tuple[int, list[int]]]:
        for share in self._begin():
            yield self._epoch, share.ids.tolist()


class _Indices(Sampler[Any]):
    """The batch_sampler (or, unbatched, sampler) of the re-made loader."""

    def __init__(self, plan: _Plan, length: Any, *, keyed: bool, batched: bool) -> None:
        self._plan, self._length, self._keyed, self._batched = plan, length, keyed, batched

    def __iter__(self) -> Iterator[Any]:
        for epoch, ids in self._plan.ids():
            items = [(epoch, i) for i in ids] if self._keyed else ids
            yield items if self._batched else items[0]

    def __len__(self) -> int:
        return int(self._length())


class _KeyedDataset:
    """In loader workers: the random state at each sample is a function of (seed, epoch, sample).

    So augmentation is the same whichever worker, rank or resumed process loads the sample. Without workers the
    dataset draws from the main process's generators, whose state is in the checkpoint.
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        self._dataset, self._seed = dataset, seed

    def __getitem__(self, item: tuple[int, int]) -> Any:
        epoch, index = item
        _seed_all(_key(self._seed, epoch, index))
        return self._dataset[index]

    def __len__(self) -> int:
        return len(self._dataset)

    def __getattr__(self, name: str) -> Any:
        # worker_init_fn and collate_fn may look for the user's own attributes through get_worker_info().dataset.
        if name.startswith("__") and name != "__getitems__":
            raise AttributeError(name)
        if name == "__getitems__":
            batched = self._dataset.__getitems__

            def getitems(items: list[tuple[int, int]]) -> Any:
                _seed_all(_key(self._seed, *items[0]))
                return batched([index for _, index in items])

            return getitems
        return getattr(self.__dict__["_dataset"], name)

    def __reduce__(self) -> Any:
        return _KeyedDataset, (self._dataset, self._seed)


class _WorkerInit:
    """First in every loader worker: leave SIGTERM to the rank, which saves and then ends its workers itself."""

    def __init__(self, user: Any) -> None:
        self._user = user

    def __call__(self, worker: int) -> None:
        # Slurm signals every process of a step; a loader that dies first takes the save down with it.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if self._user is not None:
            self._user(worker)


def _key(seed: int, epoch: int, sample: int) -> int:
    values = np.random.SeedSequence([seed & 0xFFFFFFFFFFFFFFFF, epoch, sample]).generate_state(2)
    return int(values[0]) << 32 | int(values[1])


def _seed_all(key: int) -> None:
    random.seed(key)
    np.random.seed(key & 0xFFFFFFFF)
    torch.default_generator.manual_seed(key & 0x7FFFFFFFFFFFFFFF)


class _StreamFeed(Feed):
    """Batches that come in an order of their own: iterable datasets, and iterables that are no DataLoader."""

    def __init__(self, loader: Any, *, train: bool) -> None:
        super().__init__()
        self.loader = loader
        self._train = train
        self._pending: dict[str, Any] | None = None
        self._stateful = callable(getattr(loader, "state_dict", None)) and callable(
            getattr(loader, "load_state_dict", None)
        )
        try:
            len(loader)
        except (TypeError, NotImplementedError):
            self.sized = False

    def __len__(self) -> int:
        return len(self.loader)

    def batches(self, epoch: int, consumed: int | None) -> Iterator[Any]:
        consumed = consumed or 0
        self.position = consumed
        self._set_epoch(epoch)
        if self._pending is not None:
            self.loader.load_state_dict(self._pending)
            self._pending = None
            batches = iter(self.loader)
        elif consumed and hasattr(type(self.loader), "__getitem__") and self.sized:
            batches = (self.loader[i] for i in range(consumed, len(self.loader)))
        elif consumed:
            raise DataError(
                f"The run stopped after {consumed} batches of a {type(self.loader).__name__} over an iterable dataset, "
                "which cannot say where it was. Use torchdata's StatefulDataLoader, or give the loader state_dict() and "
                "load_state_dict(); to begin the epoch anew instead, resume from a checkpoint of an epoch's end."
            )
        else:
            batches = iter(self.loader)
        for batch in batches:
            self.position += 1
            yield batch

    def _set_epoch(self, epoch: int) -> None:
        for owner in (getattr(self.loader, "dataset", None), getattr(self.loader, "sampler", None), self.loader):
            if callable(set_epoch := getattr(owner, "set_epoch", None)):
                set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        return {"loader": self.loader.state_dict()} if self._stateful and self._train else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self._stateful and "loader" in state:
            self._pending = state["loader"]


def make_feed(
    loader: Any,
    *,
    world: World,
    seed: int | None,
    train: bool,
    shuffle_override: bool | None = None,
    distribute: bool = True,
) -> Feed:
    """The feed of a loader: a DataLoader, or any iterable of batches.

    shuffle_override: False for the dataset's own order whatever the loader says. distribute=False: this rank gets
    all that the loader gives (its sampler is the user's business).

    Raises:
        DataError: the loader cannot be re-made, or what it draws from is empty or endless.
    """
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return _StreamFeed(loader, train=train)
    rank, world_size = (world.rank, world.size) if distribute else (0, 1)
    size = len(loader.dataset)  # type: ignore[arg-type]  # a map-style dataset has one
    plan_source, shuffle = _what_it_draws(loader)
    if shuffle_override is not None and plan_source is None:
        shuffle = shuffle_override
    custom_batches = loader.batch_sampler is not None and type(loader.batch_sampler) is not BatchSampler
    feed: _Planned
    if custom_batches:
        feed = _BatchFeed(_length(loader.batch_sampler, loader), rank=rank, world_size=world_size, train=train)
    else:
        inner = loader.batch_sampler
        feed = _SampleFeed(
            size=size if plan_source is None else _length(plan_source, loader),
            batch_size=int(inner.batch_size) if isinstance(inner, BatchSampler) else 1,
            drop_last=bool(inner.drop_last) if isinstance(inner, BatchSampler) else False,
            rank=rank,
            world_size=world_size,
            train=train,
        )
    plan = feed._plan
    plan.seed, plan.shuffle, plan.size, plan.source = seed or 0, shuffle, size, plan_source
    keyed = loader.num_workers > 0
    indices = _Indices(plan, lambda: len(feed), keyed=keyed, batched=loader.batch_sampler is not None)
    feed._loader = _remake(loader, indices, seed or 0, keyed=keyed)
    return feed


def _what_it_draws(loader: DataLoader[Any]) -> tuple[Any, bool]:
    """A custom sampler or batch_sampler to draw from (or None), and whether torch's own shuffles."""
    if loader.batch_sampler is not None and type(loader.batch_sampler) is not BatchSampler:
        return loader.batch_sampler, False
    sampler: Any = loader.sampler
    if type(sampler) is SequentialSampler:
        return None, False
    if type(sampler) is DistributedSampler:
        return None, bool(sampler.shuffle)
    if type(sampler) is RandomSampler and not sampler.replacement and sampler.num_samples == len(sampler.data_source):
        return None, True
    return sampler, False


def _length(sampler: Any, loader: DataLoader[Any]) -> int:
    try:
        return len(sampler)
    except TypeError as error:
        raise DataError(
            f"{type(sampler).__name__} of the {type(loader).__name__} has no length, so it cannot be shared between "
            "ranks or resumed. Give it __len__, or use an IterableDataset."
        ) from error


def _remake(loader: DataLoader[Any], indices: _Indices, seed: int, *, keyed: bool) -> DataLoader[Any]:
    """The same loader over our indices; a subclass is made again through its own __init__."""
    arguments: dict[str, Any] = {
        "dataset": _KeyedDataset(loader.dataset, seed) if keyed else loader.dataset,
        "num_workers": loader.num_workers,
        "collate_fn": loader.collate_fn,
        "pin_memory": loader.pin_memory,
        "timeout": loader.timeout,
        "worker_init_fn": _WorkerInit(loader.worker_init_fn) if keyed else loader.worker_init_fn,
        "multiprocessing_context": loader.multiprocessing_context,
        "prefetch_factor": loader.prefetch_factor,
        "persistent_workers": loader.persistent_workers,
        "pin_memory_device": loader.pin_memory_device,
        "in_order": getattr(loader, "in_order", True),
        # A generator of its own: else each epoch's start would draw from the main process's random state.
        "generator": loader.generator or torch.Generator(),
    }
    if loader.batch_sampler is None:
        arguments |= {"sampler": indices, "batch_size": None}
    else:
        arguments |= {"batch_sampler": indices}
    kind = type(loader)
    if kind is not DataLoader:
        arguments = _subclass_arguments(loader, arguments)
    try:
        remade = kind(**arguments)
    except TypeError as error:
        raise DataError(
            f"{kind.__name__} cannot be made again with another sampler: {error}. Let its __init__ take **kwargs and "
            "hand them to DataLoader, or pass Trainer(use_distributed_sampler=False)."
        ) from error
    remade._launch_owns_generator = loader.generator is None  # type: ignore[attr-defined]
    return remade


def _subclass_arguments(loader: DataLoader[Any], ours: dict[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(type(loader).__init__).parameters
    takes_rest = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    arguments = {k: v for k, v in ours.items() if takes_rest or k in parameters}
    for name, parameter in list(parameters.items())[1:]:
        if name in arguments or parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        if hasattr(loader, name) and name not in ("batch_size", "shuffle", "sampler", "drop_last", "batch_sampler"):
            arguments[name] = getattr(loader, name)
        elif parameter.default is parameter.empty:
            raise DataError(
                f"{type(loader).__name__}.__init__ needs {name!r}, and the loader has no attribute of that name: keep "
                f"it as self.{name}, so that the loader can be made again with a sampler for several ranks."
            )
    return arguments


def to_device(batch: Any, device: torch.device) -> Any:
    """Every tensor of a nested batch (and whatever has `.to(device)`) on the device; pinned tensors without waiting."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=batch.device.type == "cpu" and device.type == "cuda")
    if isinstance(batch, Mapping):
        moved = {k: to_device(v, device) for k, v in batch.items()}
        if type(batch) is dict:
            return moved
        try:
            return type(batch)(moved)  # type: ignore[call-arg]  # mappings take a mapping, by convention
        except TypeError:
            return moved
    if isinstance(batch, tuple):
        parts = [to_device(v, device) for v in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else tuple(parts)
    if isinstance(batch, list):
        return [to_device(v, device) for v in batch]
    if callable(getattr(batch, "to", None)):
        moved_object = batch.to(device)
        return batch if moved_object is None else moved_object
    return batch
