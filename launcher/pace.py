"""Pure: which ranks are slower than the others, by the time that each one's steps take without waiting for the others.

Where gradients are exchanged, the steps of all ranks take as long as those of the slowest, because the others wait for
it in the exchange. Of its own time (see progress.py) only the slow one needs more. The supervisor gets one message per
node, two numbers for each of its ranks, and a rank only writes its page.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

    from launcher.progress import Beat, Progress

__all__ = ["Meter", "Pace", "Paces", "Slow", "Taken", "every_s", "summary"]

_STEPS = 4  # the least that say anything
_NAMED = 4  # at a time, unless a new one is worse than all of them
_EXPLAINED = 4  # of a node: the slowest, told with what the kernel says of them
_TIMES = 1.25  # so much more than half of the ranks need
_SHARE = 0.05  # and so much of every step is lost by it
_STILL = 0.5  # who is named already stays so down to this part of either excess: nobody comes and goes at the border
_MIB = 1 << 20
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


@dataclass(frozen=True)
class Taken:
    """Bytes of memory: of a rank and all below it, and on its GPU, if it has one."""

    rank: int
    rss: int
    gpu: int | None = None


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


def summary(paces: Iterable[Pace], taken: Iterable[Taken] = (), progress: Progress | None = None) -> dict[str, Any]:
    """A node's message: own_s and step_s of its ranks, and what the slowest did instead; what all that live take; how
    far they are.
    """
    found, alive = list(paces), list(taken)
    slowest = sorted(found, key=lambda p: -p.own_s)[:_EXPLAINED]
    saved = None if progress is None or progress.saved is None else progress
    begun = progress is not None and (progress.step > 0 or progress.began is not None)
    return {
        "alive": [t.rank for t in alive],
        "rss": [round(t.rss / _MIB, 1) for t in alive],
        "gpu": [None if t.gpu is None else round(t.gpu / _MIB, 1) for t in alive],
        "step": progress.step if progress is not None and begun else None,
        "save": None if saved is None else [saved.saved, saved.save_s, saved.stall_s],
        "ranks": [p.rank for p in found],
        "own_s": [_short(p.own_s) for p in found],
        "step_s": [_short(p.step_s) for p in found],
        "shares": {str(p.rank): [p.on_cpu, p.for_cpu] for p in slowest},
    }


def _short(value: float) -> float:
    return float(f"{value:.4g}")


@dataclass(frozen=True)
class Slow:
    """A rank that holds up the others; or a node, all of whose ranks do, with the pace of its middle one.

    median_s: what half of all ranks need at most. node, ranks: of a node.
    """

    pace: Pace
    host: str
    median_s: float
    over: bool = False
    node: int | None = None
    ranks: tuple[int, ...] = ()

    def __str__(self) -> str:
        who = f"rank {self.pace.rank} on {self.host}" if self.node is None else f"node {self.node} ({self.host})"
        if self.over:
            return f"{who} keeps up again"
        own, p = _seconds(self.pace.own_s), self.pace
        many = f"{p.own_s / max(self.median_s, 1e-9):.1f} times the {_seconds(self.median_s)} of the median"
        if self.node is not None:
            return (
                f"{who}: all its {len(self.ranks)} ranks are slow: half of them need {own} of their own or more for "
                f"each step, {many}; a step takes {_seconds(p.step_s)}"
            )
        text = f"{who} is slow: each step needs {own} of its own, {many}; a step takes {_seconds(p.step_s)}"
        if p.on_cpu is None or p.for_cpu is None:
            return text
        return f"{text} (its main thread ran {p.on_cpu:.0%} of the time and waited for a processor {p.for_cpu:.0%})"

    def to_json(self) -> dict[str, Any]:
        return {"rank": None if self.node is not None else self.pace.rank, "node": self.node, "ranks": list(self.ranks),
                "host": self.host, "told": str(self), "over": self.over,
                "own_s": self.pace.own_s, "median_s": self.median_s, "step_s": self.pace.step_s}  # fmt: skip


def _seconds(value: float) -> str:
    if value >= 1:
        return f"{value:.1f} s"
    return f"{value * 1e3:.3g} ms" if value >= 1e-3 else f"{value * 1e6:.3g} us"


@dataclass
class _Node:
    """What it told last. fresh: since the last comparison."""

    host: str
    paces: dict[int, Pace]
    fresh: bool = True


# A rank by its number, a node, all of whose ranks are slow, by minus one.
_ALL = -1
_Key = tuple[int, int]


@dataclass
class Paces:
    """Of all nodes in one attempt."""

    attempt: int
    nodes: int
    _told: dict[int, _Node] = field(default_factory=dict)
    _due: float = 0.0
    _slow: dict[_Key, int] = field(default_factory=dict)  # by node and rank: looks in a row, not named yet
    _named: dict[_Key, tuple[int, Slow]] = field(default_factory=dict)  # looks in a row in which it was not slow

    @property
    def slow(self) -> list[int]:
        """The ranks that hold up the others now."""
        return sorted(rank for _, slow in self._named.values() for rank in slow.ranks or (slow.pace.rank,))

    def told(self, node: int, host: str, message: dict[str, Any], now: float) -> list[Slow]:
        """A node's message has come; who has turned out to be slow with it, and who no longer is."""
        if not self._due:
            self._due = now + every_s(self.nodes)
        rows = zip(message["ranks"], message["own_s"], message["step_s"], strict=True)
        shares = message["shares"]
        if message["ranks"]:
            self._told[node] = _Node(host, {r: Pace(r, own, step, *shares.get(str(r), ())) for r, own, step in rows})
        return self._compare(now) if now >= self._due and self._told else []

    def _compare(self, now: float) -> list[Slow]:
        self._due = now + every_s(self.nodes)
        median = statistics.median_low(p.own_s for node in self._told.values() for p in node.paces.values())
        # Of nodes that have told nothing new, nothing new is known.
        fresh = {number: node for number, node in self._told.items() if node.fresh}
        before, self._slow = self._slow, {key: n for key, n in self._slow.items() if key[0] not in fresh}
        still: set[_Key] = set()
        candidates: list[tuple[_Key, Slow]] = []
        for number, node in fresh.items():
            node.fresh = False
            slow = [p for p in node.paces.values() if self._holds_up((number, p.rank), p, median)]
            still.update((number, p.rank) for p in slow)
            whole = 1 < len(slow) == len(node.paces)
            if whole or ((number, _ALL) in self._named and 2 * len(slow) > len(node.paces)):
                still.add((number, _ALL))
                middle = sorted(slow, key=lambda p: p.own_s)[len(slow) // 2]
                of_all = Slow(middle, node.host, median, node=number, ranks=tuple(sorted(node.paces)))
                candidates.append(((number, _ALL), of_all))
            else:
                candidates += [((number, p.rank), Slow(p, node.host, median)) for p in slow]
        found = self._over(fresh, still)
        for key, slow_one in sorted(candidates, key=lambda c: -c[1].pace.own_s):
            if key not in self._named:
                self._slow[key] = before.get(key, 0) + 1
                if self._slow[key] >= _IN_A_ROW and self._room_for(slow_one):
                    found.append(self._name(key, slow_one))
        return found

    def _holds_up(self, key: _Key, pace: Pace, median: float) -> bool:
        part = _STILL if key in self._named or (key[0], _ALL) in self._named else 1.0
        return (
            pace.own_s > (1 + (_TIMES - 1) * part) * median and pace.own_s - median > _SHARE * part * pace.step_s
        )  # fmt: skip

    def _over(self, fresh: dict[int, _Node], still: set[_Key]) -> list[Slow]:
        """Those that have kept up for some looks in a row."""
        found = []
        for key, (looks, slow) in list(self._named.items()):
            if key in still:
                self._named[key] = 0, slow
            elif key[0] in fresh:
                self._named[key] = looks + 1, slow
                if looks + 1 >= _IN_A_ROW:
                    del self._named[key]
                    found.append(replace(slow, host=fresh[key[0]].host, over=True))
        return found

    def _room_for(self, slow: Slow) -> bool:
        worst = max((named.pace.own_s for _, named in self._named.values()), default=0.0)
        return slow.node is not None or len(self._named) < _NAMED or slow.pace.own_s > _TIMES * worst

    def _name(self, key: _Key, slow: Slow) -> Slow:
        del self._slow[key]
        if slow.node is not None:  # which speaks for its ranks from here on
            self._named = {k: named for k, named in self._named.items() if k[0] != slow.node}
        self._named[key] = 0, slow
        return slow
