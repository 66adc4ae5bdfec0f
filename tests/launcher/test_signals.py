"""Stop requests: who is told, how long they have, and what launch makes of their answer."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

LIGHT = ("--procs", "2", "--no-preload", "--show-ranks", "all")


@pytest.mark.parametrize(
    ("how", "number", "code"),
    [("leave75", signal.SIGINT, 75), ("leave0", signal.SIGTERM, 0), ("default", signal.SIGTERM, 143)],
)  # fmt: skip
def test_the_ranks_answer_to_a_stop_is_what_launch_exits_with(
    launch, programs: Path, how: str, number: int, code: int
) -> None:
    """The ranks can read the cause before SIGTERM reaches them, and nothing that they started outlives them."""
    job = launch.start(*LIGHT, programs / "patient.py", how, "--children", "1")
    job.says(r"rank \d is ready", 2)
    job.says(r"worker 0 of rank \d is ready", 2)
    job.signal(number)
    job.wait()
    job.gone()
    assert job.returncode == code, job.output
    name = signal.Signals(number).name
    if how != "default":
        for rank in (0, 1):
            assert f"rank {rank} got SIGTERM ({name})" in job.run.log(rank)
    stop = job.run.json("stop-0.json")
    assert stop["cause"] == name
    assert stop["deadline"] == pytest.approx(stop["requested"] + 30, abs=1)
    state = job.run.json("state.json")
    assert (state["status"], state["exit_code"]) == ("finished" if code == 0 else "stopped", code)


def test_ranks_that_ignore_a_stop_are_killed_when_the_grace_is_over(launch, programs: Path) -> None:
    job = launch.start(*LIGHT, "--grace", "0.5", programs / "patient.py", "ignore", "--children", "1")
    job.says(r"rank \d is ready", 2)
    job.signal(signal.SIGTERM)
    job.wait(10)
    job.gone()
    assert job.returncode == 128 + signal.SIGKILL
    assert "0.5 s of grace were over" in job.stderr
    assert "launch resume" in job.stderr


def test_second_stop_does_not_wait_for_the_grace(launch, programs: Path) -> None:
    job = launch.start(*LIGHT, "--grace", "600", programs / "patient.py", "ignore")
    job.says(r"rank \d is ready", 2)
    job.signal(signal.SIGINT)
    job.says("asking the ranks to save and leave")
    job.signal(signal.SIGINT)
    job.wait(10)
    job.gone()
    assert job.returncode == 128 + signal.SIGKILL
    assert "killed at once" in job.stderr


def test_a_rank_may_use_its_grace(launch, programs: Path) -> None:
    """Ranks that save slowly are let be, and their children (a loader's workers) are told nothing meanwhile."""
    job = launch.start(*LIGHT, programs / "patient.py", "slow", "--children", "1")
    job.says(r"rank \d is ready", 2)
    job.says(r"worker 0 of rank \d is ready", 2)
    job.signal(signal.SIGTERM)
    job.says(r"rank \d saves", 2)
    assert not list(job.run.path.glob("worker-got-*"))
    (launch.cwd / "go").touch()
    job.wait()
    assert job.returncode == 75, job.output
    assert "go on with: launch resume" in job.stderr.splitlines()[-1]


def test_a_stopped_rank_is_killed_too(launch, programs: Path) -> None:
    """A rank under SIGSTOP (a debugger, a frozen cgroup) answers nothing, and goes all the same."""
    job = launch.start(*LIGHT, "--grace", "0.3", programs / "patient.py", "leave75")
    pid = int(job.says(r"rank 1 is ready in attempt 0, pid (\d+)")[0][1])
    job.says(r"rank 0 is ready")
    job.signal(signal.SIGSTOP, pid)
    job.signal(signal.SIGTERM)
    job.wait(10)
    job.gone()
    assert job.returncode == 128 + signal.SIGKILL
