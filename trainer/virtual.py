"""Training whose weights do not depend, in a single bit, on the number of ranks: `Trainer(virtual_ranks=V)`.

A step's batch is cut into a fixed number of virtual ranks' shares. A rank runs the shares that are its own, one after
another, each from the same buffers and from random states that are a function of (seed, step, virtual rank). The
gradients are summed along one fixed binary tree over the virtual ranks, whoever computed them. Validation is cut up in
the same way, and what is logged per epoch is summed exactly, so that what looks at a logged value decides alike too.
One intra-op thread and deterministic kernels are set; what remains to be kept fixed outside is the kind of processor.

Hooks see a step, not a share: on_train_batch_start and _end are called once per step, with lists of this rank's
batches and of what training_step returned for them. A value logged per step is virtual rank 0's.

The idea is EasyScale's (Li et al., SC 2023); the tree lets a rank send sums of its own shares in place of all of them.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.errors import ConfigError, DataError, ModuleError
from trainer.loading import Feed, _key, _KeyedDataset, _SampleFeed, _seed_all, make_feed
from trainer.parallel import Parallel
from trainer.sampling import Order, Share, shares

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from trainer.distributed import World
    from trainer.loop import Fit
    from trainer.precision import Precision

__all__ = ["Replicas", "VirtualFeed", "VirtualRanks", "own_range", "subtrees", "tree_sum", "virtual_shares"]

# What the random states of a place in the run are keyed by, before its batches and its virtual rank.
TRAINING, VALIDATION = 0, 1


def own_range(count: int, rank: int, world_size: int) -> range:
    """The virtual ranks that a rank runs: neighbours, and as many as any other rank, or one more or less.

    Raises:
        ConfigError: there are fewer virtual ranks than ranks.
    """
    if count < world_size:
        raise ConfigError(
            f"virtual_ranks={count} leaves some of {world_size} ranks without work; use a number that is at least the "
            "largest number of ranks this run may have."
        )
    return range(rank * count // world_size, (rank + 1) * count // world_size)


def virtual_shares(
    order: Order, *, batch_size: int, count: int, own: range, start: int = 0, drop_last: bool = False
) -> Iterator[list[tuple[int, Share]]]:
    """Per step, what this rank runs: (virtual rank, share) pairs, none for virtual ranks that have no sample left.

    batch_size is per virtual rank. The first virtual rank always has a sample, so that on rank 0 no list is empty.
    """
    each = [
        shares(order, batch_size=batch_size, rank=v, world_size=count, start=start, drop_last=drop_last) for v in own
    ]
    for step in zip(*each, strict=True):
        yield [(v, share) for v, share in zip(own, step, strict=True) if share.seen]


def subtrees(first: int, stop: int) -> list[tuple[int, int]]:
    """The fewest whole subtrees, as (level, index), whose leaves are first to stop - 1, from left to right.

    Subtree (l, i) has the leaves i * 2**l to (i + 1) * 2**l - 1.
    """
    found = []
    while first < stop:
        level = min((first & -first).bit_length() - 1 if first else 63, (stop - first).bit_length() - 1)
        found.append((level, first >> level))
        first += 1 << level
    return found


def tree_sum(nodes: dict[tuple[int, int], Tensor], leaves: int) -> Tensor:
    """The sum over leaves 0 to leaves - 1, in the tree's order, from any whole subtrees that cover them once."""

    def value(level: int, index: int) -> Tensor | None:
        if (level, index) in nodes:
            return nodes[level, index]
        if level == 0 or index << level >= leaves:
            return None
        left, right = value(level - 1, 2 * index), value(level - 1, 2 * index + 1)
        return left if right is None or left is None else left + right

    total = value((leaves - 1).bit_length(), 0)
    assert total is not None, "no subtree covers the first leaf"
    return total


class VirtualFeed(Feed):
    """A loader whose batches are virtual ranks' shares: `batches` gives a list per step, of this rank's.

    What the dataset draws at random is keyed by (seed, epoch, place), with and without workers. shares: the (virtual
    rank, share) pairs of the newest step, in the order of its batches; a rank whose virtual ranks have no sample left
    has none. total: samples of the step over all ranks. position: as in Feed, on any number of ranks.

    Raises:
        DataError: the loader gives no samples that can be shared out: an iterable dataset, or whole batches.
    """

    def __init__(
        self, loader: Any, world: World, count: int, *, seed: int | None, train: bool = True,
        shuffle_override: bool | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        place: Any = _Place(count)
        feed = make_feed(loader, world=place, seed=seed, train=train, shuffle_override=shuffle_override)
        if not isinstance(feed, _SampleFeed):
            raise DataError(
                f"virtual_ranks cannot share out the {type(loader).__name__}: it needs a DataLoader over a dataset "
                "with a length, that makes its own batches."
            )
        self.sized = feed.sized
        self.count, self.total = count, 0
        self.shares: list[tuple[int, Share]] = []
        self._feed, self._own = feed, own_range(count, world.rank, world.size)
        feed._shares = self._flat  # type: ignore[method-assign] # the copied loader draws what this rank runs
        if not feed._keyed:
            feed._keyed = True
            feed._loader.__dict__["dataset"] = _KeyedDataset(loader.dataset, seed or 0)

    def __len__(self) -> int:
        return len(self._feed)

    def batches_done(self, position: int | None) -> int:
        return self._feed.batches_done(position)

    def _plan(self, epoch: int, start: int) -> Iterator[list[tuple[int, Share]]]:
        feed = self._feed
        return virtual_shares(
            feed._order(epoch), batch_size=feed._batch_size, count=self.count, own=self._own, start=start,
            drop_last=feed._drop_last,
        )  # fmt: skip

    def _flat(self, epoch: int, consumed: int) -> Iterator[Share]:
        return (share for step in self._plan(epoch, consumed) for _, share in step)

    def batches(self, epoch: int, consumed: int | None) -> Iterator[list[Any]]:
        start = self.position = consumed or 0
        clock = time.monotonic_ns
        began = clock()
        size = len(self._feed._order(epoch))
        batches = self._feed.batches(epoch, start)
        try:
            for own in self._plan(epoch, start):
                step = [next(batches) for _ in own]
                before, self.position = self.position, min(self.position + self.count * self._feed._batch_size, size)
                self.shares, self.total, self.weight = own, self.position - before, float(bool(own))
                self.waited_ns += clock() - began
                yield step
                began = clock()
        finally:
            batches.close()  # type: ignore[attr-defined] # a generator: its workers end with it

    def close(self) -> None:
        self._feed.close()


class _Place:
    """As much of a world as the first of `size` ranks shows to a loader."""

    rank = 0

    def __init__(self, size: int) -> None:
        self.size = size


class Replicas(Parallel):
    """The same weights on every rank, whose gradients the virtual ranks exchange."""

    name = "virtual"

    def __init__(self, world: World, precision: Precision) -> None:
        super().__init__()
        self.world, self.precision = world, precision

    def wrap(self, module: nn.Module, *, training: bool = True) -> None:  # noqa: ARG002 - it is the same
        self._same_start(module)
        self.module = module
        self.step = module.training_step  # type: ignore[assignment]


@contextmanager
def one_thread(wanted: bool) -> Iterator[None]:
    """Operators sum in an order that depends on the number of threads: one of them, if this is wanted."""
    before = torch.get_num_threads()
    if wanted:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if wanted:
            torch.set_num_threads(before)


def refuse(run: Fit) -> None:
    """Raise for what cannot be the same on any number of ranks."""
    reasons = {
        "manual optimization: the steps must be the Trainer's": not run.module.automatic_optimization,
        "an optimizer that wants a closure, or an optimizer_step of the module's": run.by_closure,
        "a validation by time (val_check_interval as a duration)": run.validate_seconds is not None,
        "StochasticWeightAveraging, whose last pass over the data each rank makes for itself": any(
            type(c).__name__ == "StochasticWeightAveraging" for c in run.trainer.callbacks
        ),
    }
    for what, found in reasons.items():
        if found:
            raise ConfigError(f"virtual_ranks does not work with {what}. Leave one of them out.")


class VirtualRanks:
    """Runs a module's shares and sums their gradients; the same bits on any number of ranks.

    For each step: `begin(total)`; for each own share `enter(place)`, forward, backward of its mean loss times
    `share.seen / share.total`, `add(virtual rank, share)`; then `finish()`, after which every rank's `.grad`s and
    buffers are the whole batch's.
    """

    def __init__(self, module: nn.Module, world: World, count: int, *, seed: int | None) -> None:
        self.count, self.seed = count, seed or 0
        self.own = own_range(count, world.rank, world.size)
        self._module, self._world = module, world
        self._parameters: list[nn.Parameter] = []
        self._floating: list[Tensor] = []
        self._whole: list[Tensor] = []
        self._before: dict[int, Tensor] = {}
        self._counted: list[Tensor] = []
        self._held: dict[nn.Parameter, Tensor] = {}
        self._nodes: dict[tuple[int, int], Tensor] = {}
        self._active = 0
        for name, parameter in module.named_parameters():
            if hasattr(parameter, "full_tensor"):
                raise ConfigError(f"virtual_ranks needs whole parameters on each rank, and {name} is sharded: use ddp.")

    def bind(self, run: Fit, micro_batch: Callable[[Any, int], Any]) -> Callable[[Any, int], list[Any]]:
        """A step over this rank's shares, in place of one over a batch; what training_step returned for each."""
        state, metrics, feed = run.state, run.metrics, run.feed

        def step(batches: Any, index: int) -> list[Any]:
            outputs = []
            self.begin(feed.total, accumulating=bool((index - state.windows_from) % state.accumulate))
            for (virtual_rank, share), batch in zip(feed.shares, batches, strict=True):
                self.enter(TRAINING, state.batches, virtual_rank)
                metrics.batch, feed.weight = batch, share.seen / share.total
                output = micro_batch(batch, index)
                outputs.append(output.detach() if isinstance(output, Tensor) else output)
                metrics.keeps_steps = False
                self.add(virtual_rank, share)
            metrics.batch, metrics.keeps_steps, feed.weight = batches, True, float(bool(batches))
            self.finish()
            self.enter(TRAINING, state.batches, self.count)
            return outputs

        return step

    def each(self, batches: Any, *place: int) -> Iterator[Any]:
        """The batches of a validation's step, each with the random state of its own place."""
        for virtual_rank, batch in zip(self.own, batches, strict=False):
            self.enter(VALIDATION, *place, virtual_rank)
            yield batch

    def begin(self, total: int, *, accumulating: bool = False) -> None:
        """A step over `total` samples begins. accumulating: its gradients come on top of those that are there."""
        self._active = min(self.count, total)
        self._parameters = [p for p in self._module.parameters() if p.requires_grad]
        dtypes = {p.dtype for p in self._parameters}
        if len(dtypes) > 1:
            raise ModuleError(f"virtual_ranks needs parameters of one dtype, and there are {sorted(map(str, dtypes))}.")
        buffers = list(self._module.buffers())
        self._floating = [b for b in buffers if b.is_floating_point()]
        self._whole = [b for b in buffers if not b.is_floating_point()]
        self._before = {id(b): b.clone() for b in buffers}
        self._nodes = {}
        self._held = {p: p.grad for p in self._parameters if accumulating and p.grad is not None}
        for parameter in self._parameters:
            parameter.grad = None

    def enter(self, *place: int) -> None:
        """Set all random states to what they are at a place of the run, such as (batches before, virtual rank)."""
        key = _key(self.seed, *place)
        _seed_all(key)
        if self._world.device.type != "cpu":  # it goes through all kinds of devices: 0.1 ms
            torch.manual_seed(key >> 1)

    def add(self, virtual_rank: int, share: Share) -> None:
        """Take this share's gradients and buffers out of the module, and put the buffers of before back."""
        weight = share.seen / share.total
        with torch.no_grad():
            node = self._collect(weight)
            if virtual_rank == 0:  # its counters (such as num_batches_tracked) become everyone's
                self._counted = [b.clone() for b in self._whole]
            for buffer in (*self._floating, *self._whole):
                buffer.copy_(self._before[id(buffer)])
        level, index = 0, virtual_rank
        # Whole subtrees of two own children become one; what hangs over waits for its sibling, here or elsewhere.
        while index % 2 and (level, index - 1) in self._nodes:
            node = self._nodes.pop((level, index - 1)) + node
            level, index = level + 1, index // 2
        self._nodes[level, index] = node

    def _collect(self, weight: float) -> Tensor:
        """One vector: gradients, which parameters have one, weighted changes of floating buffers."""
        parameters = self._parameters
        dtype, device = parameters[0].dtype, parameters[0].device
        parts = [torch.zeros_like(p).view(-1) if p.grad is None else p.grad.reshape(-1) for p in parameters]
        parts.append(torch.tensor([p.grad is not None for p in parameters], dtype=dtype, device=device))
        for now in self._floating:
            before = self._before[id(now)]
            # Equal ones are left out before they are subtracted: a mask's -inf less -inf is not 0.
            change = torch.where(now == before, torch.zeros_like(now), now - before) * weight
            parts.append(change.reshape(-1).to(dtype))
        for parameter in parameters:
            parameter.grad = None
        # Filled up to what every rank can have an equal slice of.
        parts.append(torch.zeros(-sum(map(len, parts)) % self._world.size, dtype=dtype, device=device))
        return torch.cat(parts)

    def finish(self) -> None:
        """Sum over all virtual ranks; every rank must call it, also one that had no share in this step."""
        with torch.no_grad():
            total = self._exchange() if self._world.size > 1 else tree_sum(self._nodes, self._active)
            self._nodes = {}
            start = 0
            used = total[sum(p.numel() for p in self._parameters) :]
            for number, parameter in enumerate(self._parameters):
                parameter.grad = self._held.get(parameter)
                if used[number]:
                    gradient = total[start : start + parameter.numel()].view_as(parameter)
                    parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
                start += parameter.numel()
            self._held = {}
            start += len(self._parameters)
            for buffer in self._floating:
                buffer += total[start : start + buffer.numel()].view_as(buffer).to(buffer.dtype)
                start += buffer.numel()
            for number, buffer in enumerate(self._whole):
                if self._world.rank == 0:
                    buffer.copy_(self._counted[number])
                if self._world.size > 1:
                    dist.broadcast(buffer, src=0)

    def _exchange(self) -> Tensor:
        """Each rank sums a slice of the vector over all subtrees, in the tree's order, and all share the slices.

        With as many subtrees per rank as one (V and W powers of two) this moves what a ring all-reduce moves.
        """
        world, size = self._world, self._world.size
        owned = [
            subtrees(r.start, min(r.stop, self._active))
            for r in (own_range(self.count, rank, size) for rank in range(size))
        ]
        first = self._parameters[0]
        chunk = -(-self._length() // size)
        mine = [self._nodes.pop(place) for place in owned[world.rank]]
        # For each rank its slice of every subtree of ours.
        sent = torch.cat(
            [node[r * chunk : (r + 1) * chunk] for r in range(size) for node in mine] or [first.new_empty(0)]
        )
        received = sent.new_empty(sum(map(len, owned)) * chunk)
        dist.all_to_all_single(received, sent, [len(places) * chunk for places in owned], [len(mine) * chunk] * size)
        order = [place for places in owned for place in places]
        own_slice = tree_sum(dict(zip(order, received.view(-1, chunk), strict=True)), self._active)
        total = own_slice.new_empty(size * chunk)
        dist.all_gather_into_tensor(total, own_slice)
        return total

    def _length(self) -> int:
        return sum(p.numel() for p in self._parameters) + len(self._parameters) + sum(b.numel() for b in self._floating)
