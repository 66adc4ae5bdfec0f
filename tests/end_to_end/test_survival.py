"""The main job goes on after every way in which a rank can die, and tells what happened."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
LAUNCH = str(Path(sys.executable).parent / "launch")
MEMORY_CGROUPS = Path("/sys/fs/cgroup/memory")


def launch(*arguments, cwd, timeout=100):
    return subprocess.run([LAUNCH, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=timeout,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip


@pytest.fixture
def small_memory():
    """A memory cgroup in which the kernel's OOM killer comes soon, or "" where there can be none."""
    folder = MEMORY_CGROUPS / f"launch-test-{os.getpid()}"
    try:
        folder.mkdir()
        (folder / "memory.limit_in_bytes").write_text(str(256 << 20))
    except OSError:
        yield ""
        return
    yield str(folder)
    folder.rmdir()


@pytest.mark.slow
def test_digits_survive_every_death_of_a_rank(tmp_path, small_memory):
    ways = ["raise", "exit3", "segv", f"oom:{small_memory}", "kill"]
    done = launch("--procs", 2, "--max-restarts", 5, "--run", "r", ROOT / "tests/programs/digits_faulty.py",
                  ",".join(ways), "--epochs", 9, "--accelerator", "cpu", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert float(re.search(r"test accuracy ([\d.]+)%", done.stdout)[1]) >= 97.0

    events = [json.loads(line) for line in (tmp_path / "runs/r/events.jsonl").read_text().splitlines()]
    causes = [e["cause"] for e in events if e["event"] == "attempt-failed"]
    oom = "rank 1 was killed by SIGKILL (out of memory" if small_memory else "rank 1 exited with code 1"
    expected = ["rank 0 exited with code 1", "rank 1 exited with code 3", "rank 0 was killed by SIGSEGV", oom,
                "rank 0 was killed by SIGKILL"]  # fmt: skip
    assert len(causes) == len(expected)
    for cause, start in zip(causes, expected, strict=True):
        assert cause.startswith(start)
    # Every attempt went on from the checkpoint of the last one, so no attempt began anew.
    assert done.stderr.count("fit goes on from") == len(ways)
    # One rank writes TensorBoard's files, one folder for the whole run.
    folders = {p.parent for p in (tmp_path / "runs/r").rglob("events.out.tfevents.*")}
    assert len(folders) == 1


def test_a_finished_run_is_left_alone(tmp_path):
    program = tmp_path / "job.py"
    program.write_text("print('worked')\n")
    first = launch("--procs", 1, "--no-preload", "--run", "r", "job.py", cwd=tmp_path)
    again = launch("--procs", 1, "--no-preload", "--run", "r", "job.py", cwd=tmp_path)
    assert (first.returncode, again.returncode) == (0, 0)
    assert "worked" in first.stdout
    assert "worked" not in again.stdout
    assert "finished already" in again.stderr
