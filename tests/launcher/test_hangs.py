"""Ranks that get nowhere: where they are, and when that ends the attempt."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from launcher.errors import UsageError
from launcher.gang import Gang
from launcher.hangs import Patience
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
