"""Surroundings that are not kind: readers that leave, full disks, inherited signals and paths, many ranks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = str(Path(sys.executable).with_name("launch"))


def test_nohup_is_honoured(launch, programs: Path) -> None:
    """What whoever started launch has ignored stays ignored; SIGTERM still stops."""
    held = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        job = launch.start("--procs", "1", "--no-preload", programs / "patient.py", "leave75")
    finally:
        signal.signal(signal.SIGHUP, held)
    job.says("rank 0 is ready")
    job.signal(signal.SIGHUP)
    job.signal(signal.SIGTERM)
    assert job.wait().returncode == 75
    assert job.run.json("stop-0.json")["cause"] == "SIGTERM"


def test_readers_that_leave_do_not_end_the_run(launch) -> None:
    """`launch ... 2>&1 | head -1`: the ranks go on to the end, and their logs are whole."""
    script = launch.script("import sys\nfor i in range(50_000): print('line', i)\n")
    read, write = os.pipe()
    process = subprocess.Popen(
        [COMMAND, "--procs", "1", "--preload", "json", "--run", "r", script], cwd=launch.cwd, stdin=subprocess.DEVNULL,
        stdout=write, stderr=write, start_new_session=True,
    )  # fmt: skip
    os.close(write)
    assert os.read(read, 6) == b"launch"
    os.close(read)
    assert process.wait(60) == 0
    log = launch.cwd / "runs" / "r" / "logs" / "attempt-0" / "rank-0.log"
    assert log.read_text().splitlines()[-1] == "line 49999"


@pytest.mark.parametrize("safe", ["", "1"], ids=["usual", "safe-path"])
def test_python_path_and_faulthandler_reach_the_rank(launch, safe: str) -> None:
    """PYTHONPATH whole and in order, also under PYTHONSAFEPATH; no module of the working directory gets in the way."""
    for name in ("json", "socket", "typing", "selectors", "torch"):
        launch.script("raise SystemExit('the wrong module')\n", f"{name}.py")
    launch.script("where = 'first'\n", "paths/first/mine.py")
    launch.script("where = 'second'\n", "paths/second/mine.py")
    script = launch.script(
        "import ctypes, mine, sys\n"
        "print(mine.where, [p for p in sys.path if 'paths' in p or 'jobs' in p], flush=True)\n"
        "ctypes.string_at(0)\n",
        "jobs/job.py",
    )
    paths = [str(launch.cwd / "paths" / name) for name in ("first", "second")]
    environment = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONFAULTHANDLER": "1", "PYTHONSAFEPATH": safe}
    job = launch("--procs", "1", "--preload", "pickle", script, env=environment)
    assert job.returncode == 128 + signal.SIGSEGV
    jobs = [] if safe and sys.version_info >= (3, 11) else [str(launch.cwd / "jobs")]
    assert f"[0] first {jobs + paths}" in job.stdout
    assert "Fatal Python error: Segmentation fault" in job.stderr
    assert f'File "{script}", line 3 in <module>' in job.stderr


def test_more_ranks_than_the_usual_limit_of_open_files(launch) -> None:
    script = launch.script(
        "import os, resource\nprint(resource.getrlimit(resource.RLIMIT_NOFILE)[0], os.environ['RANK'])\n"
    )
    job = launch.ok("--procs", "40", "--preload", "json", "--show-ranks", "39", script, shell="ulimit -S -n 64")
    assert job.stdout == "[39] 64 39\n"
