"""Several loaders as one, in the modes that users know from Lightning's CombinedLoader."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.utils._pytree import tree_flatten, tree_unflatten

from trainer.errors import ConfigError, DataError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trainer.loading import Feed

MODES = ("min_size", "max_size_cycle", "max_size", "sequential")


class CombinedLoader:
    """A collection (list, tuple, dict, nested) of loaders that gives one batch of each at a time.

    mode: "min_size" ends with the shortest; "max_size_cycle" with the longest, starting the others again;
    "max_size" with the longest, giving None for those that have ended; "sequential" goes through one after another,
    with `(batch, batch_idx, dataloader_idx)` as items.
    """

    def __init__(self, iterables: Any, mode: str = "min_size") -> None:
        if mode not in MODES:
            raise ConfigError(f"CombinedLoader(mode={mode!r}). Allowed: {', '.join(MODES)}.")
        self.iterables = iterables
        self.mode = mode
        self.flattened, self.spec = tree_flatten(iterables)
        self.limits: list[float] | None = None

    def __iter__(self) -> Iterator[tuple[Any, int, int]]:
        if self.mode == "sequential":
            for number, loader in enumerate(self.flattened):
                for index, batch in enumerate(loader):
                    if self.limits is not None and index >= self.limits[number]:
                        break
                    yield batch, index, number
            return
        for index, parts in enumerate(_together([lambda _, it=it: iter(it) for it in self.flattened], self.mode)):
            if self.limits is not None and index >= len(self):
                return
            yield tree_unflatten(parts, self.spec), index, 0

    def __len__(self) -> int:
        lengths = [len(loader) for loader in self.flattened]
        if self.limits is not None:
            lengths = [int(min(n, limit)) for n, limit in zip(lengths, self.limits, strict=True)]
        return sum(lengths) if self.mode == "sequential" else (min if self.mode == "min_size" else max)(lengths)


def _together(starts: list[Any], mode: str, ended: list[bool] | None = None) -> Iterator[list[Any]]:
    """One item of each at a time. starts: functions that begin an iteration, given how often it was begun before.

    ended: which have come to their end before, in the part of the epoch that an earlier process went through.
    """
    iterators = [start(0) for start in starts]
    cycles = [0] * len(starts)
    ended = ended or [False] * len(starts)
    while True:
        parts: list[Any] = []
        for i in range(len(starts)):
            try:
                parts.append(next(iterators[i]))
            except StopIteration:  # noqa: PERF203 - it ends that loader only
                ended[i] = True
                if mode == "min_size" or all(ended):
                    return
                if mode == "max_size":
                    parts.append(None)
                    continue
                cycles[i] += 1
                iterators[i] = start = starts[i](cycles[i])
                try:
                    parts.append(next(start))
                except StopIteration:
                    raise DataError(f"Loader {i} of the CombinedLoader is empty, so it cannot be cycled.") from None
        yield parts


class CombinedFeed:
    """Several Feeds that give one collection of batches at a time; looks like a Feed to the loop."""

    def __init__(self, feeds: list[Feed], spec: Any, mode: str) -> None:
        if mode == "sequential":
            raise ConfigError('CombinedLoader(mode="sequential") is for evaluation; training takes another mode.')
        self.feeds, self.spec, self.mode = feeds, spec, mode
        self.sized = all(f.sized for f in feeds)
        self.weight = 1.0
        self.position: list[list[int]] = [[0, 0] for _ in feeds]

    @property
    def waited_ns(self) -> int:
        """How long `batches` has kept its caller waiting so far."""
        return sum(feed.waited_ns for feed in self.feeds)

    def __len__(self) -> int:
        return (min if self.mode == "min_size" else max)(len(f) for f in self.feeds)

    def batches_done(self, position: Any) -> int:
        """How many of the epoch's `len` batches are over at a position that any number of ranks reached."""
        # A loader that was begun again came to its end before: it does not say when the epoch ends.
        left = [
            len(feed) - feed.batches_done(consumed)
            for feed, (cycle, consumed) in zip(self.feeds, position or [(0, 0)] * len(self.feeds), strict=True)
            if not cycle
        ]
        return len(self) - (min if self.mode == "min_size" else max)(left)

    def batches(self, epoch: int, consumed: Any) -> Iterator[Any]:
        """One epoch from where `position` (a pair of cycle and samples per loader) says."""
        where = [list(p) for p in consumed] if consumed else [[0, 0] for _ in self.feeds]
        self.position = where

        def start(number: int, feed: Feed) -> Any:
            first = where[number][0]

            def begin(cycle: int) -> Iterator[Any]:
                where[number] = [first + cycle, where[number][1] if cycle == 0 else 0]
                # A loader that starts again within an epoch gets another order each time.
                batches = feed.batches(epoch + (where[number][0] << 20), where[number][1])
                for batch in batches:
                    where[number] = [where[number][0], feed.position]
                    yield batch

            return begin

        ended = [cycle > 0 for cycle, _ in where]
        for parts in _together([start(i, f) for i, f in enumerate(self.feeds)], self.mode, ended):
            self.weight = min(f.weight for f, part in zip(self.feeds, parts, strict=True) if part is not None)
            self.position = [list(p) for p in where]
            yield tree_unflatten(parts, self.spec)

    def state_dict(self) -> dict[str, Any]:
        """The states of the loaders."""
        return {str(i): f.state_dict() for i, f in enumerate(self.feeds)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Hand each loader its state."""
        for i, feed in enumerate(self.feeds):
            feed.load_state_dict(state[str(i)])
