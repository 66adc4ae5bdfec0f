"""For an agent: what it tells the supervisor of its ranks while they run, by itself or because somebody asks."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from launcher.hangs import EVERY_S
from launcher.native import Search
from launcher.nvml import GpuWatch, of_rank
from launcher.pace import Taken, every_s, summary
from launcher.stacks import SIGNAL
from launcher.vitals import gathered, memory_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from launcher.channel import Message
    from launcher.logs import Console
    from launcher.progress import Progress
    from launcher.spec import LaunchSpec
    from launcher.watching import Ranks

__all__ = ["Telling"]

_PROGRESS_EVERY_S = 5.0  # rank 0's node tells the supervisor, if anything has changed
_STACKS_WITHIN_S = 1.0  # a rank that can write its stacks at all does so in milliseconds


class Telling:
    """report: sends to the supervisor; signal: sends a signal to a local rank; rouse: has the agent's loop call `look`;
    base: the environment of the ranks; progress: whether the supervisor wants to know how far rank 0 is.
    """

    def __init__(
        self,
        ranks: Ranks,
        spec: LaunchSpec,
        run_dir: Path,
        host: str,
        base: Mapping[str, str],
        console: Console,
        *,
        report: Callable[[Message], None],
        signal: Callable[[int, int], None],
        rouse: Callable[[], None],
        progress: bool,
    ) -> None:
        self._ranks = ranks
        self._spec = spec
        self._run_dir = run_dir
        self._host = host
        self._base = base
        self._console = console
        self._report = report
        self._signal = signal
        self._rouse = rouse
        self._progress = progress
        self._told: Progress | None = None
        self._tell_at = 0.0
        self._look_at = 0.0
        self._pace_at = 0.0
        self._gpus = GpuWatch()
        self._asked_for: str | None = None  # stacks, under this name
        self._collect_at = 0.0
        self._search: Search | None = None  # for where they are below Python

    def attempt_begins(self) -> None:
        self._look_at = time.monotonic() + EVERY_S

    @property
    def _tells_progress(self) -> bool:
        return self._progress and 0 in self._ranks.pids and self._ranks.places[0].rank == 0

    def due(self) -> list[float]:
        """When (monotonic) there is something to tell that no event announces."""
        if not self._ranks.pids:
            return []
        found = [self._look_at]
        if self._asked_for is not None:
            found.append(self._collect_at)
        if self._tells_progress:
            found.append(self._tell_at)
        return found

    def look(self) -> None:
        """Tell what is due."""
        now = time.monotonic()
        if now >= self._tell_at and self._tells_progress:
            self._tell_progress()
        if now >= self._look_at:
            self._look_at = now + EVERY_S
            self._look_for_hangs()
            self._tell_pace()
        if self._asked_for is not None and now >= self._collect_at:
            self._collect_stacks(self._asked_for)
        if self._search is not None and self._search.over:
            self._tell_stacks(self._search)

    def _tell_progress(self) -> None:
        self._tell_at = time.monotonic() + _PROGRESS_EVERY_S
        if 0 in self._ranks.views and (progress := self._ranks.views[0].progress) not in (None, self._told):
            self._told = progress
            self._report({"progress": progress.to_json()})

    def _look_for_hangs(self) -> None:
        for local, view in self._ranks.views.items():
            if local in self._ranks.pids and self._ranks.asked_ns is None and (stalled := view.stalled()) is not None:
                seconds, tells = stalled
                self._report({"stalled": {"rank": view.rank, "seconds": seconds, "tells": tells}})

    def _tell_pace(self) -> None:
        """How fast the ranks are of themselves, and what they take."""
        now, world = time.monotonic(), self._ranks.world
        if world is None or not self._ranks.pids or now < self._pace_at:
            return
        self._pace_at = now + every_s(len(world.slots)) - EVERY_S / 2
        views = {local: (self._ranks.views[local], pid) for local, pid in self._ranks.pids.items()}
        paces = [view.pace(pid, now) for view, pid in views.values()]
        taken = [Taken(v.rank, memory_of(pid), self._gpu_memory(local)) for local, (v, pid) in views.items()]
        progress: Progress | None = None
        for view, _ in views.values():
            if (one := view.progress) is not None:
                progress = one.and_of(progress)
        self._report({"pace": summary(filter(None, paces), taken, progress), "attempt": world.attempt})

    def _gpu_memory(self, local: int) -> int | None:
        gpus = [] if self._spec.device == "cpu" else self._gpus.look()
        gpu = of_rank(gpus, self._base.get("CUDA_VISIBLE_DEVICES"), local)
        return None if gpu is None else int(gpu["used"])

    def vitals(self, most: int) -> None:
        """Somebody watches: what each rank does and takes. most: of how many it is to be told one by one."""
        gpus = [] if self._spec.device == "cpu" else self._gpus.look()
        rows: list[dict[str, Any]] = [{"rank": e.rank, "rss": 0, "exit": e.code} for e in self._ranks.exits.values()]
        for local, pid in self._ranks.pids.items():
            row = self._ranks.views[local].vitals(pid)
            if local in self._ranks.logs and (tail := self._ranks.logs[local].tail):
                row["line"] = tail[-1][:200]
            if (gpu := of_rank(gpus, self._base.get("CUDA_VISIBLE_DEVICES"), local)) is not None:
                row["gpu"] = gpu
            rows.append(row)
        self._report({"vitals": gathered(rows, most)})

    def ask_for_stacks(self, name: str) -> None:
        """Somebody wants to know where all ranks are; what is found goes under this name."""
        if self._asked_for is None:
            self._asked_for, self._collect_at = name, time.monotonic() + _STACKS_WITHIN_S
            for local in self._ranks.pids:
                self._ranks.views[local].forget_stacks()
                self._signal(local, SIGNAL)

    def _collect_stacks(self, name: str) -> None:
        """What the ranks have written; where they are below Python is looked for beside everything else."""
        self._asked_for = None
        groups = [self._ranks.views[local].place(pid) for local, pid in sorted(self._ranks.pids.items())]
        pids = {self._ranks.views[local].rank: pid for local, pid in self._ranks.pids.items()}
        self._search = Search(name, self._ranks.places[0].node if groups else -1, groups, pids)
        self._search.start(self._rouse)

    def _tell_stacks(self, search: Search) -> None:
        """Whole into this node's file, and what tells the ranks apart to the supervisor."""
        self._search = None
        if search.groups:
            path = self._run_dir / "stacks" / search.name / f"node-{search.node}.txt"
            try:
                path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                path.write_text(search.whole(self._host))
            except OSError as error:
                self._console.write(2, f"launch: {path}: {error.strerror}; these stacks are lost\n".encode())
        stalled = any(self._ranks.views[local].stalled() is not None for local in self._ranks.pids)
        self._report({"stacks": search.name, "still": stalled, **search.told()})
