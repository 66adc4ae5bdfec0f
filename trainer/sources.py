"""Where batches come from: the loaders given to the Trainer, or the hooks of the DataModule or Module."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from torch.utils._pytree import tree_flatten

from trainer.combined import CombinedFeed, CombinedLoader
from trainer.errors import ConfigError, DataError
from trainer.hooks import overridden
from trainer.loading import make_feed
from trainer.module import DataHooks
from trainer.state import TrainerFn
from trainer.virtual import VirtualFeed

if TYPE_CHECKING:
    from trainer.data import DataModule
    from trainer.loading import Feed
    from trainer.module import Module
    from trainer.trainer import Trainer


class Source:
    """The loader(s) of one kind ("train", "val", "test", "predict"), asked for when they are needed."""

    def __init__(self, kind: str, given: Any, module: Module, datamodule: DataModule | None) -> None:
        self.kind = kind
        self.given = given
        self._owner = None
        if given is None:
            name = f"{kind}_dataloader"
            owners = [o for o in (datamodule, module) if o is not None and overridden(o, name, DataHooks)]
            # A DataModule that was passed stands for the data of the whole run: it comes first.
            self._owner = owners[0] if owners else None

    @property
    def defined(self) -> bool:
        """Whether there is anything to ask."""
        return self.given is not None or self._owner is not None

    def loaders(self) -> Any:
        """Ask for the loader(s).

        Raises:
            DataError: there is none, or what was returned cannot be iterated.
        """
        if self.given is not None:
            return self.given
        if self._owner is None:
            raise DataError(
                f"There is no {self.kind}_dataloader: pass a loader, or a DataModule, or define "
                f"{self.kind}_dataloader() in the module."
            )
        return getattr(self._owner, f"{self.kind}_dataloader")()


class Loaders:
    """The feeds of one kind and how many batches of each are used."""

    def __init__(self, raw: Any, kind: str, trainer: Trainer) -> None:
        self.raw = raw
        combined = raw if isinstance(raw, CombinedLoader) else None
        loaders, self.spec = (combined.flattened, combined.spec) if combined is not None else tree_flatten(raw)
        self.mode = combined.mode if combined is not None else "max_size_cycle" if kind == "train" else "sequential"
        self.single = combined is None and len(loaders) == 1 and loaders[0] is raw
        for loader in loaders:
            batches = hasattr(type(loader), "__iter__") or hasattr(type(loader), "__getitem__")
            if not batches or isinstance(loader, (str, bytes)):
                raise DataError(
                    f"A {type(loader).__name__} was given as {kind} loader; it must be a DataLoader or another "
                    "iterable of batches, or a list or dict of them."
                )
        self.feeds: list[Feed] = [self._feed(loader, kind, trainer) for loader in loaders]
        limit = getattr(trainer, f"limit_{kind}_batches")
        self.limits = [batches_used(feed, limit, kind) for feed in self.feeds]

    def _feed(self, loader: Any, kind: str, trainer: Trainer) -> Feed:
        shuffle_override = False if trainer.overfit_batches and kind in ("train", "val") else None
        virtual_ranks = trainer.config.virtual_ranks
        seed, train = trainer.train_state.seed, kind == "train"
        if virtual_ranks is None or trainer.state.fn is not TrainerFn.FITTING:
            return make_feed(
                loader, world=trainer.parallel.data_rank, seed=seed, train=train, shuffle_override=shuffle_override,
                distribute=trainer.config.use_distributed_sampler,
            )  # fmt: skip
        if train and not self.single:
            raise ConfigError("virtual_ranks works with one training loader; here are several.")
        return VirtualFeed(
            loader, trainer.world, virtual_ranks, seed=seed, train=train, shuffle_override=shuffle_override
        )

    def training_feed(self) -> Feed | CombinedFeed:
        """What the training loop iterates."""
        if self.single:
            return self.feeds[0]
        return CombinedFeed(self.feeds, self.spec, self.mode)

    def together(self) -> CombinedFeed | None:
        """The evaluation loaders as one, if their mode is not to go through one after another."""
        return None if self.mode == "sequential" else CombinedFeed(self.feeds, self.spec, self.mode)

    @property
    def batches(self) -> float:
        """Batches of one epoch in which the loaders are gone through together."""
        return min(self.limits) if self.mode == "min_size" else max(self.limits, default=0)


def batches_used(feed: Feed, limit: float, kind: str) -> float:
    """How many batches of a loader are used, given `limit_*_batches`: a number, or a part of its length."""
    length = len(feed) if feed.sized else math.inf
    if isinstance(limit, int):
        return min(length, limit)
    if length == math.inf:
        if limit not in (0.0, 1.0):
            raise ConfigError(
                f"limit_{kind}_batches={limit} is a part of a loader that has no length; pass a number of batches."
            )
        return length if limit else 0
    used = int(length * limit)
    if used == 0 and limit > 0 and length > 0:
        raise ConfigError(
            f"limit_{kind}_batches={limit} of {length} batches is less than one batch; use at least {1 / length:.3g}."
        )
    return used
