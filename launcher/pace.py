"""Pure: which ranks are slower than the others, by the time that each one's steps take without waiting for the others.

Where gradients are exchanged, the steps of all ranks take as long as those of the slowest, because the others wait for
it in the exchange. Of its own time (see progress.py) only the slow one needs more. Agents sum up what their ranks do:
the supervisor gets one small message per node, and a rank only writes its page.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

    from launcher.progress import Beat

__all__ = ["Meter", "Pace", "Paces", "Slow", "every_s", "summary"]

_STEPS = 4  # the least that say anything
_SLOWEST = 4  # of a node, in its message; of a run, named at a time
_TIMES = 1.25  # so much more than half of the ranks need
_SHARE = 0.05  # and so much of every step is lost by it
_IN_A_ROW = 2  # looks, before it is named; and as many before it is said to be over


def every_s(nodes: int) -> float:
    """Seconds between two messages of a node: the supervisor hears a hundred a second at most."""
    return max(5.0, nodes / 100)


@dataclass(frozen=True)
class Pace:
    """What a rank's last steps took, in seconds of one step: own_s without waiting, step_s in all.

    on_cpu, for_cpu: shares of the time in which its main thread ran, and was ready to but had no processor.
    """

    rank: int
    own_s: float
    step_s: float
    on_cpu: float | None = None
    for_cpu: float | None = None


@dataclass
class Meter:
    """Of one rank: what it did between two looks. A program that tells no own time is measured by its whole steps."""

    rank: int
    _last: Beat | None = None
    _ran: tuple[float, float, float] | None = None

    def look(self, beat: Beat | None, now: float, ran: tuple[float, float] | None = None) -> Pace | None:
        """Its pace since the last time that this said something; None: too few steps, or it does not train.

        ran: seconds that its main thread was on a processor, and waited for one, since it began.
        """
        if beat is None or not beat.at or beat.phase != 1:
            return None
        last, was = self._last, self._ran
        if last is None or beat.step < last.step or (beat.own_s or 0) < (last.own_s or 0):
            self._last, self._ran = beat, None if ran is None else (now, *ran)
            return None
        steps = beat.step - last.step
        if steps < _STEPS:
            return None
        self._last, self._ran = beat, None if ran is None else (now, *ran)
        step_s = (beat.at - last.at) / steps
        own_s = step_s if beat.own_s is None or last.own_s is None else (beat.own_s - last.own_s) / steps
        shares: list[float | None] = [None, None]
        if ran is not None and was is not None and now > was[0]:
            shares = [min(1.0, max(0.0, (a - b) / (now - was[0]))) for a, b in zip(ran, was[1:], strict=True)]
        return Pace(self.rank, own_s, step_s, *shares)


def summary(paces: Iterable[Pace]) -> dict[str, Any]:
    """A node's message: how many ranks, what half of them need, the slowest."""
    found = sorted(paces, key=lambda p: p.own_s)
    slowest = [asdict(p) for p in found[: -_SLOWEST - 1 : -1]]
    return {"ranks": len(found), "median_s": found[(len(found) - 1) // 2].own_s, "slowest": slowest}


@dataclass(frozen=True)
class Slow:
    """A rank that holds up the others. median_s: what half of the ranks need at most."""

    pace: Pace
    host: str
    median_s: float
    over: bool = False

    def __str__(self) -> str:
        rank = f"rank {self.pace.rank} on {self.host}"
        if self.over:
            return f"{rank} keeps up again"
        own, p = _seconds(self.pace.own_s), self.pace
        text = (
            f"{rank} is slow: each step needs {own} of its own, {p.own_s / max(self.median_s, 1e-9):.1f} times the "
            f"{_seconds(self.median_s)} of the median; a step takes {_seconds(p.step_s)}"
        )
        if p.on_cpu is None or p.for_cpu is None:
            return text
        return f"{text} (its main thread ran {p.on_cpu:.0%} of the time and waited for a processor {p.for_cpu:.0%})"

    def to_json(self) -> dict[str, Any]:
        return {"rank": self.pace.rank, "host": self.host, "told": str(self), "over": self.over,
                "own_s": self.pace.own_s, "median_s": self.median_s, "step_s": self.pace.step_s}  # fmt: skip


def _seconds(value: float) -> str:
    if value >= 1:
        return f"{value:.1f} s"
    return f"{value * 1e3:.3g} ms" if value >= 1e-3 else f"{value * 1e6:.3g} us"


@dataclass
class Paces:
    """Of all nodes in one attempt."""

    attempt: int
    nodes: int
    _told: dict[int, tuple[str, int, float]] = field(default_factory=dict)  # by node: host, ranks, median
    _fresh: dict[int, list[Pace]] = field(default_factory=dict)  # by node, since the last comparison
    _due: float = 0.0
    _slow: dict[tuple[int, int], int] = field(default_factory=dict)  # by node and rank: looks in a row, not named yet
    _named: dict[tuple[int, int], int] = field(default_factory=dict)  # looks in a row in which it was not slow

    @property
    def slow(self) -> list[int]:
        """The ranks that hold up the others now."""
        return sorted(rank for _, rank in self._named)

    def told(self, node: int, host: str, message: dict[str, Any], now: float) -> list[Slow]:
        """A node's message has come; who has turned out to be slow with it, and who no longer is."""
        if not self._due:
            self._due = now + every_s(self.nodes)
        self._told[node] = host, message["ranks"], message["median_s"]
        self._fresh[node] = [Pace(**p) for p in message["slowest"]]
        return self._compare(now) if now >= self._due else []

    def _median(self) -> float:
        """The lower one, taking all ranks of a node for as fast as its median."""
        found = sorted((median, ranks) for _, ranks, median in self._told.values())
        half = (sum(ranks for _, ranks in found) + 1) // 2
        for median, ranks in found:
            half -= ranks
            if half <= 0:
                return median
        return 0.0

    def _compare(self, now: float) -> list[Slow]:
        self._due = now + every_s(self.nodes)
        median = self._median()
        slow = sorted(
            (
                (p.own_s, node, p)
                for node, paces in self._fresh.items()
                for p in paces
                if p.own_s > _TIMES * median and p.own_s - median > _SHARE * p.step_s
            ),
            key=lambda s: -s[0],
        )
        # Of nodes that have told nothing new, nothing new is known.
        before = self._slow
        self._slow = {key: looks for key, looks in before.items() if key[0] not in self._fresh}
        found = []
        now_slow = set()
        for _, node, pace in slow[:_SLOWEST]:
            key = node, pace.rank
            now_slow.add(key)
            if key in self._named:
                self._named[key] = 0
                continue
            self._slow[key] = before.get(key, 0) + 1
            if self._slow[key] >= _IN_A_ROW:
                del self._slow[key]
                self._named[key] = 0
                found.append(Slow(pace, self._told[node][0], median))
        for key in [k for k in self._named if k[0] in self._fresh and k not in now_slow]:
            self._named[key] += 1
            if self._named[key] >= _IN_A_ROW:
                del self._named[key]
                found.append(Slow(Pace(key[1], 0.0, 0.0), self._told[key[0]][0], median, over=True))
        self._fresh = {}
        return found
