"""SIGKILL of every kind of process in turn: nothing is left 3 s later, and a restart goes on where it should."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

LIGHT = ("--procs", "2", "--no-preload", "--show-ranks", "all")


def _ready(job, ranks: int = 2, attempt: int = 0) -> list[int]:
    """Wait for all ranks of an attempt; their pids."""
    return [int(m[1]) for m in job.says(rf"rank \d is ready in attempt {attempt}, pid (\d+)", ranks)]


@pytest.mark.parametrize(
    ("victims", "forked"),
    [("launch", True), ("agent zygote", True), ("launch agent zygote", False),
     pytest.param("launch agent", True, marks=pytest.mark.soak),
     pytest.param("launch zygote", False, marks=pytest.mark.soak)],
)  # fmt: skip
def test_nothing_is_left_when_ours_are_killed(launch, programs: Path, victims: str, forked: bool) -> None:
    how = ("--preload", "json") if forked else ("--no-preload",)
    job = launch.start("--procs", "2", *how, "--show-ranks", "all", programs / "patient.py", "ignore")
    _ready(job)
    pids = {"launch": [job.process.pid], "agent": job.of_role("agent"), "zygote": job.of_role("zygote")}
    for role in victims.split():
        for pid in pids[role]:
            job.signal(signal.SIGKILL, pid)
    job.wait(5)
    job.gone(3)


def test_launch_is_killed_or_stopped_while_its_agent_starts(launch) -> None:
    """The preloaded module waits: the agent hears nothing meanwhile, and goes all the same."""
    launch.script("import time\nopen('importing', 'w').close()\ntime.sleep(600)\n", "slow.py")
    script = launch.script("print('ran')")
    job = launch.start("--procs", "2", "--preload", "slow", script)
    job.until(lambda: (launch.cwd / "importing").exists(), "the import")
    job.signal(signal.SIGKILL)
    job.wait(5)
    job.gone(3)
    (launch.cwd / "importing").unlink()
    job = launch.start("--procs", "2", "--preload", "slow", script)
    job.until(lambda: (launch.cwd / "importing").exists(), "the import")
    job.signal(signal.SIGTERM)
    job.wait(5)
    job.gone(3)
    assert job.returncode == 75
    assert "Traceback" not in job.stderr


@pytest.mark.parametrize(("victim", "code"), [("agent", 1), ("zygote", 1), ("rank", 128 + signal.SIGKILL)])
def test_the_run_goes_on_after_a_kill_and_a_second_one_is_named(launch, programs: Path, victim: str, code: int) -> None:
    job = launch.start(*LIGHT, "--max-restarts", "1", programs / "patient.py", "ignore", "--children", "1")
    old = _ready(job)
    job.signal(signal.SIGKILL, job.of_role(victim)[0])
    _ready(job, attempt=1)
    assert not set(old) & set(job.processes())
    assert job.run.json("state.json")["attempt"] == 1
    (failed,) = [e for e in job.run.events if e["event"] == "attempt-failed"]
    killed = rf"{victim}.* was killed by SIGKILL"
    assert re.search(killed, failed["cause"])
    assert re.search(r"restarting \(1 of 1\)", job.stderr)
    job.signal(signal.SIGKILL, job.of_role(victim)[0])
    job.wait(20)
    job.gone(3)
    assert job.returncode == code, job.output
    assert re.search(killed, job.run.json("failure.json")["cause"])
    if victim == "rank":
        assert re.fullmatch(r"log: .*/attempt-1/rank-\d.log", job.stderr.splitlines()[-1])
    else:
        assert "node 0" in job.stderr
        assert job.stderr.splitlines()[-1] == f"logs: {job.run.path}/logs"


def test_a_node_of_two_is_killed_and_both_start_again(launch, programs: Path) -> None:
    job = launch.start(
        "--backend", "local", "--nodes", "2", "--procs", "1", "--no-preload", "--show-ranks", "all",
        "--max-restarts", "1", programs / "patient.py", "leave75",
    )  # fmt: skip
    _ready(job)
    job.signal(signal.SIGKILL, job.of_role("agent")[1])
    _ready(job, attempt=1)
    job.signal(signal.SIGTERM)
    job.wait()
    job.gone()
    assert job.returncode == 75, job.output


def test_a_node_that_stands_still_is_given_up_and_started_again(launch, programs: Path) -> None:
    job = launch.start(
        "--backend", "local", "--nodes", "2", "--procs", "1", "--no-preload", "--show-ranks", "all",
        "--max-restarts", "1", programs / "patient.py", "leave75",
    )  # fmt: skip
    _ready(job)
    for role in ("rank", "zygote", "agent"):
        job.signal(signal.SIGSTOP, job.of_role(role)[1])
    stopped = job.of_role("agent")[1]
    job.signal(signal.SIGKILL, job.of_role("rank")[0])
    _ready(job, attempt=1)
    assert stopped not in job.of_role("agent")
    job.signal(signal.SIGTERM)
    job.wait()
    job.gone()
    assert job.returncode == 75, job.output


@pytest.mark.parametrize("count", [4, pytest.param(16, marks=pytest.mark.soak)])
def test_launches_at_once_all_start(launch, programs: Path, count: int) -> None:
    """Each holds its port before it tells anybody."""
    jobs = [launch.start(*LIGHT, programs / "patient.py", "leave75", "--attempts", "0") for _ in range(count)]
    for job in jobs:
        job.wait()
        assert job.returncode == 0, job.output
    assert len({job.run.path for job in jobs}) == count


# Fills the disk that the run's folder is on and dies; started again it leaves well, with an argument after making room.
FILLS = """
import os, sys
from pathlib import Path
filler = Path(os.environ["LAUNCH_RUN_DIR"], "filler")
if os.environ["LAUNCH_ATTEMPT"] == "0":
    try:
        with open(filler, "wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
    except OSError as error:
        sys.exit(f"full: {error.strerror}")
if sys.argv[1:]:
    filler.unlink()
print("again", flush=True)
"""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "none", disk], capture_output=True, text=True, check=False
    )
    if mounted.returncode:  # root of a container is not root of the machine
        pytest.skip(f"a small disk needs CAP_SYS_ADMIN: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="a small disk needs root")
@pytest.mark.parametrize("room", [(), ("room",)])
def test_a_full_disk_under_the_run_folder_ends_no_run(launch, small_disk: Path, room: tuple[str, ...]) -> None:
    job = launch("--procs", "1", "--max-restarts", "1", "--preload", "json", "--run", small_disk / "run",
                 launch.script(FILLS), *room)  # fmt: skip
    assert job.returncode == 0, job.output
    assert len(re.findall(r"cannot be written: No space left on device", job.stderr)) == 1
    assert "rank 0 exited with code 1" in job.stderr  # its log had no room for what it said
    assert "[0] again" in job.stdout
    incomplete = re.search("launch: the record of this run is incomplete: .*state.json", job.stderr)
    state = job.run.json("state.json")["status"]
    assert (incomplete is None, state) == ((True, "finished") if room else (False, "running"))
    if room:
        assert [e["event"] for e in job.run.events] == ["attempt", "attempt-failed", "attempt", "end"]
