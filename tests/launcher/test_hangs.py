"""Ranks that get nowhere: where they are, and when that ends the attempt."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from launcher.errors import UsageError
from launcher.gang import Gang
from launcher.hangs import Patience
from launcher.native import Search, frames, spy
from launcher.progress import Beat
from launcher.stacks import Census, Group, merged, numbers, where

DUMP = """Thread 0x00007f0000000001 [Thread-1] (most recent call first):
  File "/usr/lib/python3.11/threading.py", line 327 in wait

Current thread 0x00007f0000000002 [python] (most recent call first):
  File "/venv/lib/python3.11/site-packages/torch/distributed/distributed_c10d.py", line 2810 in all_reduce
  File "/venv/lib/python3.11/site-packages/torch/distributed/c10d_logger.py", line 83 in wrapper
  File "/home/me/model.py", line 88 in training_step
  File "/home/me/main.py", line 12 in <module>
"""


def test_a_stack_in_one_line() -> None:
    assert where(DUMP) == "in all_reduce, called by training_step at model.py:88"
    own = 'Current thread 0x1 (most recent call first):\n  File "/home/me/data.py", line 41 in __getitem__\n'
    assert where(own) == "in __getitem__ at data.py:41"
    library = 'Current thread 0x1 (most recent call first):\n  File "/usr/lib/python3.11/queue.py", line 171 in get\n'
    assert where(library) == "in get at queue.py:171"
    assert where("Current thread 0x1 (most recent call first):\n  <no Python frame>\n") == "without a Python stack"


def test_groups_are_one_per_place_and_the_odd_ones_first() -> None:
    found = merged([Group("a", (0, 2), "x"), Group("b", (3,), "y"), Group("a", (1, 7), "z")])
    assert [str(g) for g in found] == ["rank 3 b", "ranks 0-2, 7 a"]
    assert numbers([5]) == "5"
    assert numbers([]) == ""


def native(name: str, library: str) -> dict[str, object]:
    return {"name": name, "filename": library, "module": library, "line": 0}


def test_a_place_below_python() -> None:
    """As `py-spy dump --native --json` tells it; the addresses are of functions that have no name."""
    python = {"name": "all_reduce", "filename": "torch/distributed.py", "module": None, "line": 41}
    other = {"thread_id": 9, "thread_name": None, "os_thread_id": 8, "frames": [python]}

    def main(*stack: dict[str, object]) -> str:
        told = frames(
            [other, {"thread_id": 7, "thread_name": "Main", "os_thread_id": 7, "frames": [*stack, python]}], 7
        )
        assert where(told.text) == "in all_reduce at distributed.py:41"
        assert told.text.startswith("Current thread 0x7 [Main] (most recent call first):\n")
        assert "\nThread 0x9 [] (most recent call first):\n" in told.text
        return told.place

    libc, torch = "/lib/libc.so.6", "/venv/torch/lib/libtorch_cpu.so"
    wait = native("pthread_cond_wait", libc), native("std::condition_variable::wait", "/lib/libstdc++.so.6.0.30")
    assert main() == ""
    assert main(native("0x7f01", libc)) == ""
    assert main(native("0x7f01", libc), wait[0], native("ffi_call", "/lib/libffi.so.8.1.2")) == "pthread_cond_wait"
    assert main(*wait, native("c10d::Work::wait", torch)) == (
        "pthread_cond_wait, called by c10d::Work::wait (libtorch_cpu.so)"
    )
    assert main(native("c10d::Work::wait", torch)) == "c10d::Work::wait (libtorch_cpu.so)"
    assert main(native("f" * 500, libc)) == "f" * 79 + "…"


def test_ranks_at_one_place_that_are_apart_below_python() -> None:
    groups = [Group("a", (0,), "x"), Group("a", (1,), "y", (("f", (1,)),)), Group("a", (2,), "z", (("f", (2,)),))]
    (group,) = merged(groups)
    assert (str(group), group.sample) == ("ranks 0-2 a (native: f)", "y")
    (group,) = merged([group, Group("a", (3,), "w", (("g", (3,)),))])
    assert str(group) == "ranks 0-3 a (native: f: rank 1-2; g: rank 3)"
    assert Group.from_json(json.loads(json.dumps(group.to_json()))) == group


LOCKED = """
import ctypes, os, torch, torch.distributed as dist
def lock():
    mutex = ctypes.create_string_buffer(64)
    print("apart", flush=True)
    for _ in range(2):
        ctypes.CDLL(None).pthread_mutex_lock(mutex)
def meet():
    dist.init_process_group("gloo")
    dist.all_reduce(torch.ones(1))
lock() if os.environ["RANK"] == "1" else meet()
"""


@pytest.mark.slow
@pytest.mark.skipif(spy() is None, reason="py-spy is not installed")
@pytest.mark.parametrize("how", [(), ("--no-preload",)])
def test_ranks_that_hang_in_c_are_told_by_what_they_hang_in(how, launch) -> None:
    script = launch.script(LOCKED)
    job = launch.start("--procs", "2", *how, "--show-ranks", "all", "--run", "here", script)
    job.says("apart", timeout=90)

    def told() -> list[str] | None:
        lines = launch.ok("stacks", "here").stdout.splitlines()
        return lines if "pthread_mutex_lock" in str(lines) and "meet" in str(lines) else None

    lines = job.until(told, "both ranks to be where they stay", timeout=60)
    (locked,) = [line for line in lines if line.startswith("rank 1 ")]
    assert re.fullmatch(r"rank 1 in lock at job\.py:7 \(native: pthread_mutex_lock\)", locked)
    newest = max((job.run.path / "stacks").iterdir(), key=lambda folder: folder.stat().st_mtime)
    whole = (newest / "node-0.txt").read_text()
    assert "  Native libc" in whole
    assert "in meet" in whole
    launch.ok("cancel", "here")
    job.wait()


def search(pid: int) -> Search:
    found = Search("a", 0, [Group("in f at a.py:1", (5,), "x")], {5: pid})
    over = threading.Event()
    found.start(over.set)
    assert over.wait(60)
    assert found.over
    assert found.told()["groups"] == [Group("in f at a.py:1", (5,), "x").to_json()]
    return found


def test_why_nothing_is_told_below_python(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert search(os.getpid()).lacking == "py-spy is not installed there: pip install py-spy"
    stand_in = tmp_path / "py-spy"  # as py-spy 0.4.3 ends where Yama or a container's seccomp forbids ptrace
    stand_in.write_text(
        "#!/bin/sh\necho 'Permission Denied: Try running again with elevated permissions' >&2\nexit 1\n"
    )
    stand_in.chmod(0o755)
    told = search(os.getpid()).lacking
    assert told == "py-spy: Permission Denied: Try running again with elevated permissions"


@pytest.mark.skipif(spy() is None, reason="py-spy is not installed")
def test_a_process_that_is_gone_has_nothing_below_python() -> None:
    with subprocess.Popen(["true"]) as process:
        process.wait()
    assert search(process.pid).lacking.startswith("py-spy: ")


def test_patience_that_was_given() -> None:
    patience = Patience(10.0, since=100.0)
    assert patience.look(109, None, None) is None
    assert patience.look(111, None, None) == 11
    assert patience.look(111, None, 105) is None  # it has printed
    assert patience.look(111, Beat(3, 1, 100.5), 111) == 10.5  # it tells its steps: what it prints is no progress
    assert patience.look(111, Beat(3, 6, 100.5), None) is None  # it is done
    assert Patience(0.0, since=0).look(1e9, None, None) is None


def test_patience_that_is_learned() -> None:
    patience = Patience(None, since=0.0)
    now = 0.0
    for step in range(1, 30):  # the longest pause is 20 s
        now = step * 20.0
        assert patience.look(now - 0.5, Beat(step - 1, 1, now - 20), None) is None
        assert patience.look(now, Beat(step, 1, now), None) is None
    beat = Beat(29, 1, now)
    assert patience.look(now + 300, beat, None) is None
    assert patience.look(now + 700, Beat(29, 5, now), None) is None  # saving
    assert patience.look(now + 580, beat, None) is None
    assert patience.look(now + 600, beat, None) == 600
    assert Patience(None, since=0.0).look(1e6, None, None) is None  # nothing is known of its steps
    quick = Patience(None, since=0.0)
    for step in range(30):
        assert quick.look(step, Beat(step, 2, step), None) is None
    assert quick.look(29 + 299, Beat(29, 2, 29), None) is None
    assert quick.look(29 + 301, Beat(29, 2, 29), None) == 301


def test_ranks_that_went_on_while_they_were_asked_are_left_alone() -> None:
    census = Census("a", {0, 1}, hang="rank 1 has made no step for 30 s")
    assert not census.answered("a", 0, [], stalled=False)
    assert census.hangs  # nobody knows of node 1
    assert census.answered("a", 1, [], stalled=False)
    assert not census.hangs
    census = Census("b", {0, 1}, hang="rank 1 has made no step for 30 s")
    census.answered("b", 1, [], stalled=True)
    assert census.answered("b", 0, [], stalled=False)
    assert census.hangs


def test_a_hang_is_a_failure_whatever_the_ranks_say_when_they_are_ended() -> None:
    gang = Gang([1], first_attempt=0, max_restarts=0, grace_s=1)
    gang.node_here(0, 1, None)
    gang.store_ready(0, "127.0.0.1", 1)
    assert [a.message for a in gang.hung("rank 0 has made no step")] == [{"abort": {}}]
    assert gang.hung("again") == []
    gang.node_drained(0, 0)
    assert gang.outcome is not None
    assert (gang.outcome.status, gang.outcome.code, gang.outcome.cause) == ("failed", 1, "rank 0 has made no step")


@pytest.mark.parametrize("text", ["0", "-1", "soon", "nan"])
def test_what_is_no_timeout(text, launch) -> None:
    job = launch("--hang-timeout", text, launch.script("pass"))
    assert job.returncode == UsageError.exit_code
    assert "give seconds, or off" in job.stderr


MEET = """
import os, threading, torch, torch.distributed as dist
dist.init_process_group("gloo")
def forget():
    print("apart", flush=True)
    threading.Event().wait()
def meet():
    print("apart", flush=True)
    dist.all_reduce(torch.ones(1))
if os.environ["LAUNCH_ATTEMPT"] == "0":
    forget() if os.environ["RANK"] == "1" else meet()
"""


def test_a_rank_that_forgets_its_peers_is_named_and_the_run_starts_again(launch) -> None:
    script = launch.script(MEET)
    job = launch.ok("--procs", "3", "--hang-timeout", "4", "--max-restarts", "1", script)
    (failed,) = [e for e in job.run.events if e["event"] == "attempt-failed"]
    assert "has printed nothing for" in failed["cause"]
    assert "rank 1 in wait, called by forget at " in failed["cause"]
    assert "ranks 0, 2 in all_reduce, called by meet at " in failed["cause"]
    (folder,) = (job.run.path / "stacks").iterdir()
    whole = (folder / "node-0.txt").read_text()
    assert whole.count("Current thread") == 3
    assert json.loads((folder / "groups.json").read_text())["hang"].startswith("rank ")


def test_stacks_of_a_live_run_are_told_and_it_goes_on(launch, tmp_path) -> None:
    script = launch.script(
        "import os, time\nfrom pathlib import Path\n"
        "def doze():\n    while not Path('go').exists(): time.sleep(0.01)\n"
        "def stop():\n    os.kill(os.getpid(), 19)\n"
        "print('up', flush=True)\n"
        "doze() if os.environ['RANK'] != '2' else stop()\n"
    )
    job = launch.start("--procs", "3", "--preload", "json", "--show-ranks", "all", "--run", "here", script)
    job.says("up", 3)

    def stopped() -> list[int]:
        stats = {pid: Path(f"/proc/{pid}/stat").read_text() for pid in job.processes()}
        return [pid for pid, stat in stats.items() if stat.rpartition(")")[2].split()[0] == "T"]

    job.until(stopped, "rank 2 to stop itself")
    told = launch.ok("stacks", "here")
    first, second = told.stdout.splitlines()
    assert first.startswith("rank 2 stopped by a signal")
    assert second.startswith("ranks 0-1 in doze at ")
    for pid in stopped():
        os.kill(pid, signal.SIGCONT)
    (launch.cwd / "go").touch()
    assert job.wait().returncode == 0
