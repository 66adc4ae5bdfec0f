"""Where ranks are: the stacks that a rank writes when it is asked to, made into one line, and ranks put together by it.

A rank writes them by faulthandler, from a signal handler in C: it answers also while its main thread waits in a
collective, in a lock or in the kernel, and while it is busy in Python; it does not while it is stopped or in an
uninterruptible sleep, and then the kernel's word stands in.
"""

from __future__ import annotations

import re
import signal
import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["SIGNAL", "Census", "Group", "kernels_word", "merged", "numbers", "where"]

# The kernel has 64 signals; libraries leave those at the upper end alone.
SIGNAL = signal.SIGRTMAX - 3

# An agent answers after a second, and ten at most if py-spy has much to read; one on a host that is lost never does.
_ANSWER_S = 15.0

_FRAME = re.compile(r'^  File "(?P<file>[^"]*)", line (?P<line>\d+) in (?P<function>.*)$', re.MULTILINE)
# The thread that got the signal, which is the main one, is called the current one.
_MAIN = re.compile(r"^Current thread .*\n((?:  .*\n?)*)", re.MULTILINE)
_LIBRARY = re.compile(r"/site-packages/|/dist-packages/|/lib/python3[^/]*/|^<frozen |/(?:launcher|trainer)/[^/]+\.py$")
_SLEEPS = {
    "T": "stopped by a signal",
    "t": "stopped by a debugger",
    "D": "in an uninterruptible sleep",
    "Z": "a zombie",
}
_GONE = "gone"
_NATIVES = 4  # places below Python that are told of a group


@dataclass(frozen=True)
class Group:
    """Ranks that are at the same place. where: in one line; sample: the whole of one of them; natives: where some of
    them are below Python, as far as that was looked at.
    """

    where: str
    ranks: tuple[int, ...]
    sample: str
    natives: tuple[tuple[str, tuple[int, ...]], ...] = ()

    def __str__(self) -> str:
        return f"rank{'s' if len(self.ranks) > 1 else ''} {numbers(self.ranks)} {self.where}{self.below}"

    @property
    def below(self) -> str:
        """The places below Python, in brackets."""
        if not self.natives:
            return ""
        alone = len(self.natives) == 1
        told = [place if alone else f"{place}: rank {numbers(ranks)}" for place, ranks in self.natives]
        return f" (native: {'; '.join(told)})"

    @property
    def stands_still(self) -> bool:
        """By the kernel's word, which stands where its own would: nothing more can be learned of it."""
        return self.where == _GONE or any(self.where.startswith(word) for word in _SLEEPS.values())

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, told: dict[str, Any]) -> Group:
        natives = tuple((place, tuple(ranks)) for place, ranks in told["natives"])
        return cls(told["where"], tuple(told["ranks"]), told["sample"], natives)


def where(text: str) -> str:
    """The main thread's place, of what faulthandler wrote: the innermost function, and the user's own line."""
    main = _MAIN.search(text)
    frames = [m.groupdict() for m in _FRAME.finditer(main[1] if main else text)]
    if not frames:
        return "without a Python stack"
    inner = frames[0]
    own = next((f for f in frames if not _LIBRARY.search(f["file"])), None)
    if own is None:
        return f"in {inner['function']} at {_short(inner)}"
    if own is inner:
        return f"in {own['function']} at {_short(own)}"
    return f"in {inner['function']}, called by {own['function']} at {_short(own)}"


def _short(frame: dict[str, str]) -> str:
    return f"{frame['file'].rpartition('/')[2]}:{frame['line']}"


def kernels_word(pid: int) -> str:
    """What the kernel says of a process that does not answer."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            state = file.read().rpartition(")")[2].split()[0]
        with open(f"/proc/{pid}/wchan") as file:
            channel = file.read().strip("0\n")
    except OSError:
        return _GONE
    said = _SLEEPS.get(state, "not answering")
    return f"{said}{f' ({channel})' if channel else ''}"


def merged(groups: Iterable[Group]) -> list[Group]:
    """One group for each place, those of few ranks first: whoever is not where the others are is of interest."""
    found: dict[str, Group] = {}
    for group in groups:
        before = found.get(group.where)
        if before is None:
            found[group.where] = group
            continue
        natives = dict(before.natives)
        for place, ranks in group.natives:
            natives[place] = tuple(sorted({*natives.get(place, ()), *ranks}))
        # What py-spy wrote says more than what the rank wrote itself.
        sample = group.sample if group.natives and not before.natives else before.sample
        found[group.where] = Group(
            group.where, tuple(sorted((*before.ranks, *group.ranks))), sample, tuple(natives.items())[:_NATIVES]
        )
    return sorted(found.values(), key=lambda g: (len(g.ranks), g.ranks))


@dataclass
class Census:
    """The stacks of all ranks, under way. awaited: nodes that have not answered; by: when they need not any more
    (monotonic); hang: what it is for, if the ranks are to be ended.
    """

    name: str
    awaited: set[int]
    hang: str | None = None
    by: float = field(default_factory=lambda: time.monotonic() + _ANSWER_S)
    _stalled: bool = False
    _groups: list[Group] = field(default_factory=list)
    _lacking: dict[str, list[int]] = field(default_factory=dict)  # nodes that tell nothing below Python, by the reason

    def answered(self, name: str, node: int, groups: list[dict[str, Any]], stalled: bool, lacking: str = "") -> bool:
        """A node's groups have come; returns whether they were the last. stalled: a rank there still gets nowhere."""
        if name == self.name and node in self.awaited:
            self.awaited.discard(node)
            self._stalled |= stalled
            self._groups = merged([*self._groups, *map(Group.from_json, groups)])
            if lacking:
                self._lacking.setdefault(lacking, []).append(node)
        return not self.awaited

    @property
    def hangs(self) -> bool:
        """Whether the ranks are to be ended: none of them went on while they were asked."""
        return self.hang is not None and (self._stalled or bool(self.awaited))

    def told(self) -> str:
        """In a sentence."""
        silent = [f"node {numbers(self.awaited)} did not answer"] if self.awaited else []
        return "; ".join([*map(str, self._groups), *silent]) or "no rank is there"

    def to_json(self) -> dict[str, Any]:
        return {"time": time.time(), "hang": self.hang, "silent_nodes": sorted(self.awaited),
                "groups": [g.to_json() for g in self._groups], "lacking": self._lacking}  # fmt: skip


def numbers(ranks: Iterable[int]) -> str:
    """`0-3, 7` for (0, 1, 2, 3, 7)."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
