"""Each kind of fault, in a gang that has met: who failed first, how, where its log is, and what launch exits with."""

from __future__ import annotations

import re
import socket

import pytest

CRASHES = [
    # how, exit code of launch, what the report says, whether a traceback is shown
    ("raise", 1, r"failed( first)?: it exited with code 1", "ValueError: no such label: 17"),
    ("kill", 137, r"failed( first)?: it was killed by SIGKILL", None),
    ("exit0", 1, r"left with exit code 0 while its peers still needed it", None),
    ("exit3", 3, r"failed( first)?: it exited with code 3", None),
    ("segv", 139, r"failed( first)?: it was killed by SIGSEGV", None),
    ("oom", 1, r"failed( first)?: it exited with code 1", "MemoryError"),
]
_EVERY_DAY = ("raise", "kill", "exit0")  # the others differ in nothing but their words


@pytest.mark.parametrize(
    ("how", "code", "says", "error"),
    [pytest.param(*c, id=c[0], marks=[] if c[0] in _EVERY_DAY else pytest.mark.soak) for c in CRASHES],
)
def test_the_first_failure_is_named_last_on_the_screen(launch, programs, how, code, says, error) -> None:
    job = launch("--procs", "3", programs / "crash.py", how, "--rank", "1")
    assert job.returncode == code, job.output
    lines = job.stderr.splitlines()
    log = job.run.path / "logs" / "attempt-0" / "rank-1.log"
    assert lines[-1] == f"log: {log}"
    assert "met its peers in attempt 0" in log.read_text()
    first = next(i for i, line in enumerate(lines) if line.startswith("rank 1 of 3 on "))
    assert socket.gethostname() in lines[first]
    assert re.search(says, lines[first])
    if how == "exit0":  # the others had the time to notice: nobody is asked to leave because of an exit 0
        assert re.match(r"after it failed: ranks? [02]", lines[first + 1])
    if error is not None:
        report = "\n".join(lines[first:])
        assert error in report
        assert "Traceback (most recent call last):" in report
        assert 'crash.py", line' in report
        assert "launcher/" not in report
    failure = job.run.json("failure.json")
    assert failure["exit_code"] == code
    assert failure["first"]["rank"] == 1
    assert failure["first"]["host"] == socket.gethostname()
    assert failure["first"]["log"] == str(log)
    assert failure["attempt"] == 0
    assert set(failure["followers"]) <= {0, 2}
    assert failure["left_early"] == (how == "exit0")
    assert job.run.json("state.json")["status"] == "failed"


LEAVING = """
import atexit, os, time
from pathlib import Path
def linger():
    Path('left').touch()
    time.sleep(60)
if os.environ['RANK'] == '1':
    atexit.register(linger)
    raise AssertionError('boom')
while not Path('left').exists(): time.sleep(0.01)
raise RuntimeError('Connection closed by peer [127.0.0.1]:1')
"""


@pytest.mark.parametrize("how", ["--preload=json", "--no-preload"])
def test_a_rank_that_was_stopped_on_its_way_out_is_told_by_its_exception(launch, how) -> None:
    job = launch("--procs", "2", how, launch.script(LEAVING))
    assert job.returncode == 1, job.output
    assert re.search(r"rank 1 of 2 on .* failed first: it raised AssertionError: boom", job.stderr), job.output
    assert "class of fault: user code (rank 1 said: AssertionError: boom)" in job.stderr
    assert job.run.json("failure.json")["fault"]["kind"] == "user code"
    assert "class of fault: user code" in launch.ok("show", job.run.path).stdout


def test_what_cannot_go_better_is_not_tried_again(launch) -> None:
    job = launch("--procs", "2", "--preload", "json", "--max-restarts", "3", launch.script("import no_such_module"))
    assert job.returncode == 1
    assert "No module named 'no_such_module'" in job.stderr
    assert [e["event"] for e in job.run.events] == ["attempt", "end"]
    assert job.run.events[-1]["cause"].endswith("another try would end in the same way, so it is not made")


def test_a_run_restarts_until_its_ranks_are_done(launch, programs) -> None:
    """Two attempts crash, the third meets again on a fresh store and ends; the count is in LAUNCH_ATTEMPT."""
    job = launch.ok("--procs", "2", "--max-restarts", "2", programs / "crash.py", "segv", "--attempts", "2")
    events = [(e["event"], e["attempt"]) for e in job.run.events]
    assert events == [("attempt", 0), ("attempt-failed", 0), ("attempt", 1), ("attempt-failed", 1), ("attempt", 2),
                      ("end", 2)]  # fmt: skip
    assert "rank 1 was killed by SIGSEGV; restarting (2 of 2)" in job.stderr
    for attempt in (0, 1, 2):
        assert f"met its peers in attempt {attempt}" in job.run.log(1, attempt)
    assert job.run.json("state.json")["status"] == "finished"


def test_a_rank_that_is_done_early_is_no_fault(launch) -> None:
    script = launch.script(
        "import os, time\n"
        "from pathlib import Path\n"
        "if os.environ['RANK'] == '1':\n"
        "    while not Path('go').exists(): time.sleep(0.01)\n"
        "print('done', flush=True)\n"
    )
    job = launch.start("--procs", "2", "--no-preload", script)
    job.says("done")
    (launch.cwd / "go").touch()
    job.wait()
    assert job.returncode == 0, job.output


def test_a_command_that_cannot_be_started(launch) -> None:
    """Found at start, not in the ranks; what vanishes in between is told by the rank."""
    job = launch("--procs", "1", "--no-python", "no-such-program")
    assert job.returncode == 2
    assert "there is no program 'no-such-program' on PATH" in job.stderr


def test_a_preloaded_module_that_cannot_be_forked(launch) -> None:
    """Named, before any rank is started, and not tried again."""
    launch.script(
        "import threading, time\nthreading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n", "busy.py"
    )
    script = launch.script("print('ran')")
    job = launch("--procs", "2", "--preload", "json,busy", "--max-restarts", "3", script)
    assert job.returncode == 2
    assert "--preload busy started 1 thread" in job.stderr
    assert "restarting" not in job.stderr
    job = launch("--procs", "2", "--preload", "nothing_there", "--max-restarts", "3", script)
    assert job.returncode == 2
    assert "--preload nothing_there: No module named" in job.stderr
    assert job.stdout == ""
