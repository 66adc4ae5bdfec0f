"""What an agent sees of its ranks from outside: the page that it fills, its output, and where it is when it is asked.

Page and stacks are files in memory that this process holds and the rank opens through /proc: whoever dies, nothing is
left behind.
"""

from __future__ import annotations

import mmap
import os
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from launcher.hangs import Patience
from launcher.pace import Meter
from launcher.processes import schedule_of
from launcher.progress import PAGE, Beat, Progress
from launcher.stacks import Group, kernels_word, where
from launcher.vitals import Rate, memory_of, phase_name

if TYPE_CHECKING:
    from launcher.failure import RankExit
    from launcher.logs import RankLog
    from launcher.pace import Pace
    from launcher.topology import Place, World

__all__ = ["RankView", "Ranks"]

_MOST_OF_A_STACK = 1 << 20


class RankView:
    """hang_timeout_s: as of `Patience`."""

    def __init__(self, rank: int, hang_timeout_s: float | None) -> None:
        self.rank = rank
        self._patience = Patience(hang_timeout_s, time.monotonic())
        self._meter = Meter(rank)
        self._rate = Rate()
        self._printed: float | None = None
        self._stacks = os.memfd_create(f"launch-stacks-{rank}", os.MFD_CLOEXEC)
        self._page = os.memfd_create(f"launch-progress-{rank}", os.MFD_CLOEXEC)
        os.ftruncate(self._page, PAGE)
        self._map = mmap.mmap(self._page, PAGE, prot=mmap.PROT_READ)

    @property
    def page(self) -> str:
        """Where the rank finds its page."""
        return f"/proc/{os.getpid()}/fd/{self._page}"

    @property
    def stacks(self) -> str:
        """Where the rank writes its stacks."""
        return f"/proc/{os.getpid()}/fd/{self._stacks}"

    @property
    def progress(self) -> Progress | None:
        return Progress.of_page(self._map)

    def printed(self) -> None:
        """It has printed something just now."""
        self._printed = time.monotonic()

    def stalled(self) -> tuple[float, bool] | None:
        """So many seconds without anything, if that is too long, and whether it tells its steps at all."""
        beat = Beat.of_page(self._map)
        quiet = self._patience.look(time.monotonic(), beat, self._printed)
        return None if quiet is None else (quiet, beat is not None)

    def pace(self, pid: int, now: float) -> Pace | None:
        """How long its steps took since this was last answered; None: it does not tell, or they were too few."""
        return self._meter.look(Beat.of_page(self._map), now, schedule_of(pid))

    def vitals(self, pid: int) -> dict[str, Any]:
        """What it does and takes, for who watches. age_s: seconds since its last step."""
        beat = Beat.of_page(self._map)
        row: dict[str, Any] = {"rank": self.rank, "pid": pid, "rss": memory_of(pid)}
        if beat is None:
            return row
        age = round(time.monotonic() - beat.at, 2) if beat.at else None
        return row | {"step": beat.step, "phase": phase_name(beat.phase), "age_s": age, "loss": beat.loss,
                      "rate": self._rate.look(beat)}  # fmt: skip

    def forget_stacks(self) -> None:
        """It is about to be asked again."""
        os.ftruncate(self._stacks, 0)

    def place(self, pid: int) -> Group:
        """Where it is, by what it has written since; if it has not, by what the kernel says of it."""
        text = os.pread(self._stacks, _MOST_OF_A_STACK, 0).decode(errors="replace")
        return Group(where(text) if text else kernels_word(pid), (self.rank,), text)

    def close(self) -> None:
        self._map.close()
        os.close(self._page)
        os.close(self._stacks)


@dataclass
class Ranks:
    """Those of one node in an attempt, by local rank. pids: of the living; exits: of those that have ended; asked_ns:
    when (monotonic) they were asked to leave, or are to be as soon as they are there.
    """

    world: World | None = None
    asked_ns: int | None = None
    places: dict[int, Place] = field(default_factory=dict)
    pids: dict[int, int] = field(default_factory=dict)
    exits: dict[int, RankExit] = field(default_factory=dict)
    logs: dict[int, RankLog] = field(default_factory=dict)
    views: dict[int, RankView] = field(default_factory=dict)

    def begin(self, world: World) -> None:
        """Another attempt. It may have been asked to leave already."""
        self.world = world
        self.places, self.pids, self.exits = {}, {}, {}
