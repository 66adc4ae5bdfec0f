"""What a supervisor in a scheduler's job takes for a stop, and what it tells the ranks of it."""

from __future__ import annotations

import signal
import time
from typing import TYPE_CHECKING

import pytest

from launcher.backends.slurm_stop import Stop
from launcher.scheduling import StopWatch, Word
from launcher.spec import LaunchSpec, Program

if TYPE_CHECKING:
    import subprocess


class Scripted:
    """A scheduler that answers what it is told to; the real one answers on the lab."""

    orphan_grace_s = 1.0
    heir: list[str] = []  # noqa: RUF012  # of the protocol

    def __init__(self) -> None:
        self.stop: Stop | None = None
        self.limit: float | None = None
        self.asked = 0

    def start_agents(self, port: int, environment: dict[str, str]) -> subprocess.Popen[bytes]:
        raise NotImplementedError

    def stop_now(self, number: int | None) -> Stop | None:
        self.asked += 1
        unnamed = self.stop is not None and self.stop.cause in ("signalled", "unknown")
        return None if unnamed and number is None else self.stop

    def stop_at(self, save_s: float | None) -> float | None:
        return None if self.limit is None else self.limit - (save_s or 0.0)


@pytest.fixture
def scheduler() -> Scripted:
    return Scripted()


def watch(scheduler: Scripted, grace_s: float | None = None) -> StopWatch:
    return StopWatch(scheduler, LaunchSpec(Program("script", "job.py"), "/", grace_s=grace_s))


def test_nothing_is_a_stop_until_the_scheduler_says_so(scheduler: Scripted) -> None:
    on = watch(scheduler)
    assert on.inquire() is None
    assert (on.wait_s(), on.look(running=True), on.stopping) == (None, None, False)
    scheduler.stop = Stop("signalled", None)
    assert on.inquire() is None  # a rank failed; nobody asked for that


@pytest.mark.parametrize(
    ("deadline_s", "grace_s", "left_s"), [(100, None, 98), (4, None, 3), (100, 10, 10), (-5, 7, 0)]
)
def test_the_time_that_is_left(scheduler: Scripted, deadline_s: float, grace_s: float | None, left_s: float) -> None:
    """What is left after a record and a requeue, and no more than --grace allows."""
    scheduler.stop = Stop("preempted", time.time() + deadline_s)
    word = watch(scheduler, grace_s).inquire(signal.SIGTERM)
    assert word is not None
    assert (word.cause, word.sooner) == ("preempted", False)
    assert word.grace_s == pytest.approx(left_s, abs=1.0)


def test_a_nameless_sigterm_waits_for_its_reason(scheduler: Scripted) -> None:
    scheduler.stop = Stop("signalled", None)
    on = watch(scheduler, 9.0)
    assert on.inquire(signal.SIGTERM) is None
    waits = on.wait_s()
    assert waits is not None
    assert waits > 0
    assert on.explain(running=False) is None  # a lost agent was the reason
    assert on.wait_s() is None
    assert on.inquire(signal.SIGTERM) is None
    assert on.explain(running=True) == Word("SIGTERM", 9.0)
    assert on.inquire(signal.SIGUSR1) is None  # the same stop, told again
    on = watch(scheduler, 9.0)
    assert on.inquire(signal.SIGUSR1) == Word("SIGUSR1", 9.0)  # nobody sends this by accident


def test_a_scheduler_that_is_away_is_asked_once_for_all_agents(scheduler: Scripted) -> None:
    on = watch(scheduler, 9.0)
    scheduler.stop = Stop("unknown", None)
    assert [on.inquire(signal.SIGTERM) for _ in range(1000)] == [None] * 1000
    assert on.explain(running=True) == Word("SIGTERM", 9.0)
    assert scheduler.asked == 1


def test_the_reason_may_come_with_a_second_signal(scheduler: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.monotonic()
    monkeypatch.setattr("launcher.scheduling.time.monotonic", lambda: now)
    on = watch(scheduler)
    scheduler.stop = Stop("unknown", None)
    assert on.inquire(signal.SIGTERM) is None
    scheduler.stop = Stop("cancelled", time.time() + 20)
    now += 1
    word = on.inquire(signal.SIGTERM)
    assert word is not None
    assert word.cause == "cancelled"
    assert on.wait_s() is None


def test_a_stop_that_comes_sooner_and_one_that_does_not(scheduler: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.monotonic()
    monkeypatch.setattr("launcher.scheduling.time.monotonic", lambda: now)
    on = watch(scheduler)
    scheduler.stop = Stop("preempted", time.time() + 100)
    assert on.inquire(signal.SIGTERM) is not None
    scheduler.stop = Stop("cancelled", time.time() + 10)
    assert on.inquire(signal.SIGTERM) is None  # a thousand agents pass the same signal on
    assert on.look(running=True) is None
    assert scheduler.asked == 1
    waits = on.wait_s()  # but it may have been another one
    assert waits is not None
    now += waits
    word = on.look(running=True)
    assert word is not None
    assert (word.cause, word.sooner) == ("cancelled", True)
    assert on.wait_s() is None
    now += 2
    scheduler.stop = Stop("preempted", time.time() + 100)
    assert on.inquire(signal.SIGTERM) is None


def test_the_time_limit_comes_without_a_signal(scheduler: Scripted) -> None:
    on = watch(scheduler)
    scheduler.limit = time.time() + 1000
    waits = on.wait_s()
    assert waits is not None
    assert 900 < waits <= 1000
    assert on.look(running=True) is None
    on.save_s = 1001.0  # saves turned out to take so long
    assert on.wait_s() == 0
    scheduler.stop = Stop("time limit", scheduler.limit)
    word = on.look(running=True)
    assert word is not None
    assert word.cause == "time limit"
    assert (on.wait_s(), on.look(running=True)) == (None, None)  # told once
