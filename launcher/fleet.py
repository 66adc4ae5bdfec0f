"""For a supervisor whose agents are on other machines: who did not come, why, and who is tried again."""

from __future__ import annotations

import contextlib
import subprocess
import time
from typing import TYPE_CHECKING, Protocol

from launcher.errors import MeetingError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from launcher.channel import Channel

__all__ = ["Fleet", "Remains", "Roll"]

_AGAIN_S = 1.0
# Logins that have not come to an end: a jump host's sshd drops some by chance from the 10th on (MaxStartups 10:30:100),
# and a login takes a tenth of the time until an agent says hello.
_AT_ONCE = 32
_SLOW_S = 10.0  # whoever takes longer holds nobody else up
_MOST_AGAIN_S = 15.0  # for one that stays away


class Fleet(Protocol):
    """Machines, and a way to them."""

    names: Sequence[str]  # by node

    def start(self, node: int, environment: dict[str, str]) -> tuple[Channel, subprocess.Popen[bytes]]:
        """The agent of a node, connected; the process lives as long as the way to it."""

    def why(self, node: int, code: int) -> str:
        """Why the way to a node has ended with `code`, for people."""

    def fence(self, node: int, pid: int, started: int) -> subprocess.Popen[bytes]:
        """End there, over a new way, what is left of an agent that was given up; ends with 0 when that is done."""

    def passing(self, node: int, code: int) -> bool:
        """Whether it is worth trying again where nothing of the run was ever there."""


class Roll:
    """Which nodes of a fleet are awaited, by the supervisor's clock."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.in_no_hurry = False  # the run has begun, and nobody waits in front of it for whoever is missing
        self._seen: set[int] = set()
        self._hopeless: set[int] = set()
        self._absent: dict[int, str] = {}
        self._try_at: dict[int, float] = {}
        self._setting_out: dict[int, float] = {}  # when: they have not said anything yet
        self._tries: dict[int, int] = {}  # in vain, since it was last here

    def call(self, nodes: Iterable[int]) -> None:
        """These are to be started, some at once."""
        self._try_at.update(dict.fromkeys(nodes, time.monotonic()))

    def came(self, node: int) -> None:
        self._seen.add(node)
        self._setting_out.pop(node, None)
        self._absent.pop(node, None)
        self._try_at.pop(node, None)
        self._tries.pop(node, None)

    def stayed_away(self, node: int, code: int, *, hopeless: str | None) -> None:
        """The way to a node ended before its agent had said anything. hopeless: what it said of a lasting reason."""
        self._setting_out.pop(node, None)
        self._absent[node] = hopeless or self.fleet.why(node, code)
        if hopeless is not None:
            self._hopeless.add(node)
        # Who was there once is rebooting, perhaps; for who never was, a person is waiting who may have to mend it.
        if hopeless is None and (self.in_no_hurry or node in self._seen or self.fleet.passing(node, code)):
            self._try_later(node)

    def go_on_without(self, missing: Sequence[int]) -> None:
        """The run goes on without these, and whoever did not come for a reason that may pass is tried again."""
        self.in_no_hurry = True
        for node in missing:
            if node in self._absent and node not in self._try_at and node not in self._hopeless:
                self._try_later(node)

    def _try_later(self, node: int) -> None:
        tries = self._tries[node] = self._tries.get(node, 0) + 1
        self._try_at[node] = time.monotonic() + min(_MOST_AGAIN_S, _AGAIN_S * 2.0 ** (tries - 1))

    def due(self) -> list[int]:
        """Nodes to be tried now; while many are on their way the others wait."""
        now = time.monotonic()
        room = _AT_ONCE - len(self._in_time())
        found = [node for node, at in self._try_at.items() if now >= at][: max(0, room)]
        for node in found:
            del self._try_at[node]
            self._setting_out[node] = now
        return found

    def _in_time(self) -> list[float]:
        """Since when those are on their way that do not take too long."""
        now = time.monotonic()
        return [at for at in self._setting_out.values() if now - at < _SLOW_S]

    def check(self, missing: Sequence[int]) -> None:
        """Raise `MeetingError` that names every missing node, once none of them can still come."""
        may_come = self._try_at.keys() | self._setting_out.keys()
        if missing and all(node in self._absent and node not in may_come for node in missing):
            raise MeetingError(self.story(missing))

    def story(self, missing: Sequence[int]) -> str:
        """Who is missing, and why."""
        told = [f"{self.fleet.names[i]}: {self._absent.get(i, 'it has not said anything yet')}" for i in missing]
        counted = f"{len(missing)} of {len(self.fleet.names)} hosts did not come"
        return "\n  ".join([counted, *told[:20], *([f"and {len(told) - 20} more"] if len(told) > 20 else [])])

    def wait_s(self) -> float | None:
        """Seconds until somebody is to be tried; None: nobody is, or one on its way must come first."""
        if not self._try_at:
            return None
        due = min(self._try_at.values())
        if len(under_way := self._in_time()) >= _AT_ONCE:
            due = max(due, min(under_way) + _SLOW_S)
        return max(0.0, due - time.monotonic())


class Remains:
    """What lost agents may have left on the hosts of a fleet: agents that stand still, and their ranks.

    An agent that still runs sees to its ranks itself, and an agent that does not is ended over a new way to its host,
    now and, where that was in vain, once a new agent has come from there.
    """

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        # By node, and by pid and start of the agent: what is ending it. A node may have lost several meanwhile.
        self._left: dict[int, dict[tuple[int, int], subprocess.Popen[bytes] | None]] = {}
        self._leaving: list[subprocess.Popen[bytes]] = []

    def lost(self, node: int, pid: int, started: int, *, given_up: subprocess.Popen[bytes] | None = None) -> None:
        """An agent is lost. given_up: it no longer answers; the way to it, over which it may still be told so."""
        self._left.setdefault(node, {})[pid, started] = None
        if given_up is not None:
            self._leaving.append(given_up)
            self.end(node)

    def end(self, node: int) -> None:
        """End what agents of this node left, but for those of which it is known to be done."""
        self._leaving = [process for process in self._leaving if process.poll() is None]
        left = self._left.get(node, {})
        for agent, fence in list(left.items()):
            if fence is not None and fence.poll() == 0:
                del left[agent]
                continue
            if fence is not None:
                self._leaving.append(fence)
            left[agent] = self._fleet.fence(node, *agent)

    def close(self, within_s: float) -> None:
        """Wait for what is being ended; nothing that was started here is left."""
        deadline = time.monotonic() + within_s
        fences = [fence for left in self._left.values() for fence in left.values() if fence is not None]
        for process in fences:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
        for process in (*self._leaving, *fences):
            process.kill()
            process.wait()
