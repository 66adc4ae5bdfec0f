"""For a supervisor that works in a scheduler's job: that the job is being stopped, why, and how much time is left."""

from __future__ import annotations

import signal
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from launcher.failure import signal_name

if TYPE_CHECKING:
    import subprocess

    from launcher.backends.slurm_stop import Stop
    from launcher.spec import LaunchSpec

__all__ = ["Scheduler", "StopWatch", "Word"]

_EXPLAINED_WITHIN_S = 1.5
# Each of a thousand agents passes the same signal on, and a controller that is away costs seconds each time.
_ASKED_AGAIN_AFTER_S = 0.25


class Scheduler(Protocol):
    """The job that a supervisor works in, as its scheduler knows it."""

    def start_agents(self, port: int, environment: dict[str, str]) -> subprocess.Popen[bytes]:
        """One agent on every node, each connecting to `port` here; the process ends with the last of them."""

    def start_agent(self, node: int, port: int, environment: dict[str, str]) -> subprocess.Popen[bytes]:
        """One agent, on a node whose agent was lost, beside those that still run; the process ends with it."""

    def stop_now(self, number: int | None) -> Stop | None:
        """What the scheduler is stopping the job for, after a signal came (`number`) or without one; None: nothing."""

    def stop_at(self, save_s: float | None) -> float | None:
        """When (seconds since 1970) the ranks are to be told of the time limit, with saves that take `save_s`."""

    @property
    def orphan_grace_s(self) -> float:
        """How long the ranks have to leave when the supervisor is killed."""

    @property
    def heir(self) -> list[str]:
        """What node 0's agent becomes when the supervisor is killed."""


@dataclass(frozen=True)
class Word:
    """What the ranks are to be told: why, and how many seconds they have. sooner: a stop is under way already."""

    cause: str
    grace_s: float
    sooner: bool = False


class StopWatch:
    """Asks the scheduler when a signal, a failure or the clock is a reason to. save_s: how long saves take, if known.

    A SIGTERM that the scheduler does not explain is taken at its word only after a while: the signal may be faster than
    the controller's record of why, and srun sends it to all agents when one of them is gone, which is about to be
    heard. Whom it was meant for has it already.
    """

    def __init__(self, scheduler: Scheduler, spec: LaunchSpec) -> None:
        self.save_s: float | None = None
        self.stopping = False
        self._scheduler = scheduler
        self._spec = spec
        self._deadline: float | None = None
        self._asked = float("-inf")
        self._unexplained: Stop | None = None  # what a SIGTERM was answered with that nothing has explained so far
        self._explain_by: float | None = None
        self._again_at: float | None = None  # when to ask what a further signal was for

    def wait_s(self) -> float | None:
        """Seconds until `look` has something to do; None: never."""
        due = []
        if (at := self._limit()) is not None:
            due.append(at - time.time())
        due += [at - time.monotonic() for at in (self._explain_by, self._again_at) if at is not None]
        return max(0.0, min(due)) if due else None

    def look(self, *, running: bool) -> Word | None:
        """The time limit that has come near, or the SIGTERM that nothing has explained."""
        if self._explain_by is not None and time.monotonic() >= self._explain_by:
            return self.explain(running=running)
        if self._again_at is not None and time.monotonic() >= self._again_at:
            return self.inquire(signal.SIGTERM)
        at = self._limit()
        return self.inquire() if at is not None and time.time() >= at else None

    def _limit(self) -> float | None:
        return None if self.stopping else self._scheduler.stop_at(self.save_s)

    def explain(self, *, running: bool) -> Word | None:
        """Decide now on a SIGTERM that nothing has explained, if there is one.

        running: no rank and no agent has failed meanwhile; one that has explains it.
        """
        if self._explain_by is None:
            return None
        self._explain_by = None
        if not running or self.stopping:
            return None
        if self._unexplained is not None and self._unexplained.cause == "unknown":
            return self._word(self._unexplained, signal.SIGTERM)  # whoever was away would only cost as long again
        return self.inquire(signal.SIGTERM, last=True)

    def inquire(self, number: int | None = None, *, last: bool = False) -> Word | None:
        """Ask, after a signal (`number`) or a failure; what the ranks are to be told, if anything is new."""
        if (self.stopping or self._explain_by is not None) and time.monotonic() - self._asked < _ASKED_AGAIN_AFTER_S:
            self._again_at = self._asked + _ASKED_AGAIN_AFTER_S
            return None
        stop = self._scheduler.stop_now(number)
        self._asked, self._again_at = time.monotonic(), None
        if stop is None:
            return None
        if stop.cause in ("signalled", "unknown") and number == signal.SIGTERM and not last:
            if self._explain_by is None and not self.stopping:
                self._explain_by = time.monotonic() + _EXPLAINED_WITHIN_S
            self._unexplained = stop
            return None
        return self._word(stop, number)

    def _word(self, stop: Stop, number: int | None) -> Word | None:
        self._explain_by = None
        unnamed = stop.cause in ("signalled", "unknown")
        cause = signal_name(number) if unnamed and number is not None else stop.cause
        first, known = not self.stopping, self._deadline
        if not first and (stop.deadline is None or (known is not None and stop.deadline >= known - 1)):
            return None
        self.stopping, self._deadline = True, stop.deadline
        return Word(cause, self._grace(stop.deadline), sooner=not first)

    def _grace(self, deadline: float | None) -> float:
        """Seconds for the ranks before a deadline, after which there is still time to record it and to requeue."""
        if deadline is None:
            return self._spec.grace
        left = max(0.0, deadline - time.time())
        left -= min(2.0, left / 4)
        return left if self._spec.grace_s is None else min(left, self._spec.grace_s)
