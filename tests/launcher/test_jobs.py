"""Functions as jobs: results of every rank, errors with their traceback, arrays, cancelling; what is refused."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

import launcher
from launcher import FailedJobError, UncompletedJobError, jobs
from launcher.errors import RunError, UsageError

if TYPE_CHECKING:
    from pathlib import Path

LOCAL = {"backend": "local", "no_preload": True}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for process in jobs._started.values():
        process.wait(60)  # a launch of an array goes a moment after its last element
    jobs._started.clear()


def test_every_rank_returns_and_an_error_comes_with_its_traceback(here: Path) -> None:
    (here / "neighbour.py").write_text("def twice(x): return 2 * x")
    sys.path.insert(0, str(here))
    try:
        import neighbour

        def work(number: int) -> tuple[int, int]:
            print("rank", os.environ["RANK"], "works")
            if number < 0:
                raise ValueError(f"{number} is negative")
            return neighbour.twice(number), int(os.environ["RANK"])

        job = launcher.submit(work, 21, procs=2, run="mine", **LOCAL)
        found = launcher.map_array(work, [1, -1], array="%2", procs=1, run="several", **LOCAL)
    finally:
        sys.path.remove(str(here))
        del sys.modules["neighbour"]
    assert job.state in ("PENDING", "RUNNING", "COMPLETED")
    assert job.results() == [(42, 0), (42, 1)]
    assert (job.result(), job.state, job.exception(), job.job_id) == ((42, 0), "COMPLETED", None, "mine")
    assert job.done()
    assert (job.stdout(), job.stdout(1), job.stderr(5)) == ("rank 0 works\n", "rank 1 works\n", None)
    assert job.num_tasks == 2
    assert jobs.Job(here / "runs" / "mine").results() == job.results()  # whoever asks, at any later time
    with pytest.raises(RunError, match="is a run already"):
        launcher.submit(work, 1, run="mine", **LOCAL)

    assert [j.job_id for j in found] == ["several_0", "several_1"]
    assert found[0].result() == (2, 0)
    with pytest.raises(FailedJobError, match=r"(?s)rank 0:.*in work.*ValueError: -1 is negative") as caught:
        found[1].results()
    assert isinstance(caught.value, UncompletedJobError)
    assert found[1].state == "FAILED"


def test_cancelled_there_is_no_result(here: Path) -> None:
    job = launcher.submit(time.sleep, 600, procs=1, **LOCAL).cancel_at_deletion()
    while job.stdout() is None:
        time.sleep(0.05)  # the rank has begun; the test's own timeout is the deadline
    other = jobs.Job(job.folder)
    del job
    other.wait()
    assert other.state == "CANCELLED"
    with pytest.raises(UncompletedJobError, match=r"was stopped \(cancelled by"):
        other.result()


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"nods": 2}, "no option 'nods'; there are .*gpus.*nodes.*procs"),
        ({"detach": True}, "no option 'detach'"),
        ({"procs": 0}, "procs is 0"),
        ({"gpus": 99}, "--gpus 99: found"),
        ({"time": "1:00:00", "backend": "local"}, "--time is for a Slurm job"),
        ({"rdzv_endpoint": "a:1"}, "submit starts all nodes itself"),
    ],
)
def test_what_is_refused_before_anything_starts(here: Path, options, error) -> None:
    with pytest.raises(UsageError, match=error):
        launcher.submit(print, **options)
    assert [p.name for p in here.iterdir()] == []


def test_map_array_needs_something_to_call(here: Path) -> None:
    for iterables, error in (([], "nothing to call"), ([[]], "nothing to call"), ([[1], [1, 2]], "the same length")):
        with pytest.raises(UsageError, match=error):
            launcher.map_array(print, *iterables, **LOCAL)
    with pytest.raises(UsageError, match='give array="%N"'):
        launcher.map_array(print, [1], array="0-3", **LOCAL)


def test_importing_launcher_imports_nothing_heavy() -> None:
    code = (
        "import sys, launcher\nassert not {'torch', 'submitit', 'click', 'cloudpickle'} & set(sys.modules)\n"
        "launcher.submit, launcher.map_array, launcher.Job\n"
        "assert not {'torch', 'submitit', 'cloudpickle'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=60)


def test_launch_shows_what_is_said_and_returns_what_the_ranks_return(here: Path, capsys) -> None:
    def work(number: int) -> int:
        print(f"number {number}")
        return number + int(os.environ["RANK"])

    assert launcher.launch(work, 5, procs=2, no_preload=True) == [5, 6]
    assert "[0] number 5\n" in capsys.readouterr().out
    with pytest.raises(UsageError, match=r"launcher\.submit\(work"):
        launcher.launch(work, 5, backend="slurm")


def test_an_interrupted_launch_leaves_no_rank(here: Path) -> None:
    def work(caller: int) -> None:
        os.kill(caller, signal.SIGINT)
        time.sleep(600)

    with pytest.raises(KeyboardInterrupt):
        launcher.launch(work, os.getpid(), procs=1, no_preload=True, run="cut")
    job = jobs.Job(here / "runs" / "cut")
    assert job.done()
    assert job.state != "COMPLETED"
