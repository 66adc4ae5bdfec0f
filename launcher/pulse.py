"""Signs of life between the supervisor and its agents: who says every second that it is there, and who no longer does.

The kernel tells of a process that died and of a host that no longer answers, but not of one that stands still: its
connections live on. Signs come from threads of their own, so that nothing that a process waits for (a slow file system,
a scheduler, a long message) stops them. No rank sends any.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from launcher.channel import Channel, Link

__all__ = ["Beating", "Presence", "Pulse", "Ran"]

_BEAT_S = 1.0
# Beside 8 busy processes on 2 cores, at a load of 19, and with a busy main thread of its own, signs came at worst
# 1.45 s apart in 100 s (benchmarks/liveness.py). After 2 s it is noted, after 4 the agent is given up: a node that
# stands still is known within 5, and one that only has too much to do has twice the time that was ever seen.
_LATE_S = 2.0
_SILENT_S = 4.0
_LOOK_S = 0.25
_HELD_S = 600.0
_FORGIVEN_S = 15.0


class Pulse:
    """When each peer was last heard, by node; the clock is the caller's. A peer counts from its first sign on.

    One that looks must not take its own standstill (a suspended machine, a debugger) for the others': what it was late
    to look is granted to all.
    """

    def __init__(self, now: float) -> None:
        self._heard: dict[int, float] = {}
        self._late: set[int] = set()
        self._look_at = now + _LOOK_S

    def heard(self, node: int, now: float, *, sign: bool) -> None:
        """Something came from a node. sign: a sign of life, the first of which begins the count."""
        if sign or node in self._heard:
            self._heard[node] = now
            self._late.discard(node)

    def forget(self, node: int) -> None:
        self._heard.pop(node, None)
        self._late.discard(node)

    def wait_s(self, now: float) -> float:
        """Seconds until it is time to look."""
        return max(0.0, self._look_at - now)

    def look(self, now: float) -> tuple[dict[int, float], dict[int, float]]:
        """Nodes that are late now and were not before, and those that are silent, with how long. O(nodes), four times
        a second; nothing between.
        """
        if now < self._look_at:
            return {}, {}
        if (own := now - self._look_at) > _LOOK_S:
            self._heard = {node: at + own for node, at in self._heard.items()}
        self._look_at = now + _LOOK_S
        quiet = {node: now - at for node, at in self._heard.items() if now - at > _LATE_S}
        late = {node: seconds for node, seconds in quiet.items() if node not in self._late}
        self._late.update(late)
        return late, {node: seconds for node, seconds in quiet.items() if seconds > _SILENT_S}


class Ran:
    """When a process has run, to find that it stood still; the clock is the caller's."""

    def __init__(self, now: float) -> None:
        self._last = now
        self._woke = -math.inf

    def on(self, now: float) -> None:
        """It runs."""
        if now - self._last > _SILENT_S:
            self._woke = now
        self._last = now

    def stood_still(self, now: float) -> bool:
        """Whether it stood still until now, or a moment ago, for so long that others have given it up.

        It hears of that within seconds of waking up; if it does not, nobody has, and what happens later is another
        matter.
        """
        return now - self._last > _SILENT_S or now - self._woke < _FORGIVEN_S


class Beating:
    """Says over `link` every second that this process is there, from a thread. To be begun after the last fork."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._ran = Ran(time.monotonic())
        threading.Thread(target=self._beat, name="beat", daemon=True).start()

    @property
    def stood_still(self) -> bool:
        """Whether this process counts as lost, because it did not run for so long."""
        return self._ran.stood_still(time.monotonic())

    def _beat(self) -> None:
        while not self._link.closed:
            self._ran.on(time.monotonic())
            try:
                self._link.send({"beat": True})
            except OSError:
                return  # the event loop finds out
            time.sleep(_BEAT_S)


class Presence:
    """Says over all links every second that the supervisor is there, from a thread.

    What holds its loop up (a file system, a scheduler that gives no answer) is borne for 10 minutes, as long as a
    controller of Slurm's may be away. Nobody would hear of a loop that stands still for ever; after that time it counts
    as one that is gone.
    """

    def __init__(self) -> None:
        self._links: set[Channel] = set()
        self._changing = threading.Lock()
        self._turned = time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._speak, name="presence", daemon=True)

    def begin(self) -> None:
        self._thread.start()

    def add(self, link: Channel) -> None:
        with self._changing:
            self._links.add(link)

    def discard(self, link: Channel) -> None:
        with self._changing:
            self._links.discard(link)

    def turned(self, now: float) -> None:
        """The loop is at work."""
        self._turned = now

    def say(self, now: float) -> None:
        """Say so to all, if the loop has turned in time; nobody is waited for."""
        if now - self._turned > _HELD_S:
            return
        with self._changing:
            links = tuple(self._links)
        for link in links:
            with contextlib.suppress(OSError):  # the loop finds out
                link.offer({"here": True})

    def end(self) -> None:
        self._over.set()
        self._thread.join()

    def _speak(self) -> None:
        while not self._over.wait(_BEAT_S):
            self.say(time.monotonic())
