"""A supervisor between agents that are this program, or processes that never become agents."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

from launcher.channel import Channel
from launcher.failure import RankExit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

# A run on two machines, one of which lets nobody in: the way to it hangs. With all the time in the world for agents to
# write out what they have to say.
HANGS = """
import pathlib, subprocess, sys
from launcher import channel, starting, supervisor
from launcher.processes import become_subreaper
from launcher.runs import RunFolder
from launcher.spec import LaunchSpec, Program, Ssh

class Machines:
    names = ("good", "dead")

    def start(self, node, environment):
        if node == 0:
            return starting.spawn_agent(environment, cwd="/", own_session=True)
        self.ours, self.theirs = channel.pair()
        return self.ours, subprocess.Popen(["sleep", "1000"])

    def why(self, node, code):
        return "gone"

become_subreaper()
supervisor._CONSOLES_WITHIN_S = 1e6
spec = LaunchSpec(Program("script", sys.argv[2]), "/", nodes=2, least=1, procs=1, preload=("json",), last_call_s=0.1)
with RunFolder.open(pathlib.Path(sys.argv[1]), spec) as run:
    outcome = supervisor.Supervisor(run, local=(0, 1), say=print, fleet=Machines()).work()
print("ended:", outcome.status)
"""


def test_the_end_waits_for_nobody_who_never_came(tmp_path: Path) -> None:
    program = tmp_path / "job.py"
    program.write_text("")
    done = subprocess.run(
        [sys.executable, "-c", HANGS, tmp_path / "run", program], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.endswith("ended: finished\n"), done.stdout + done.stderr


# A supervisor in a job that can be elastic: all its agents are one step, which is started again as a whole.
STEP = """
import pathlib, socket, subprocess, sys
from launcher.runs import RunFolder
from launcher.spec import LaunchSpec, Program
from launcher.supervisor import Supervisor

class Job:
    orphan_grace_s, heir = 1.0, []

    def start_agents(self, port, environment):
        step = subprocess.Popen(["sleep", "1000"])
        print("step", port, step.pid, flush=True)
        return step

    def stop_now(self, number):
        return None

    stop_at = stop_now

spec = LaunchSpec(Program("module", "json"), "/", nodes=3, least=1, procs=1, max_restarts=1, preload=("json",),
                  last_call_s=0.1)
listener = socket.create_server(("127.0.0.1", 0))
with RunFolder.open(pathlib.Path(sys.argv[1]), spec) as run:
    Supervisor(run, local=(), say=print, listener=listener, token="t", scheduler=Job()).work()
"""


class Agents:
    """Connections that say what agents say, by node."""

    def __init__(self, port: int, count: int) -> None:
        self.links = [Channel(socket.create_connection(("127.0.0.1", port))) for _ in range(count)]
        self.told: list[list[dict[str, Any]]] = [[] for _ in self.links]
        for node, link in enumerate(self.links):
            link.send({"hello": {"token": "t", "host": f"host{node}", "pid": 1, "started": 1,
                                 "now_ns": time.monotonic_ns(), "node_rank": node, "procs": 1,
                                 "address": "127.0.0.1"}})  # fmt: skip

    def until(self, done: Callable[[], bool], beating: int) -> None:
        """Hear what the supervisor says; one of them goes on saying that it is there."""
        deadline = time.monotonic() + 60
        while not done():
            assert time.monotonic() < deadline, self.told
            with contextlib.suppress(ConnectionError):
                self.links[beating].send({"beat": True})
            select.select([link for link in self.links if not link.closed], [], [], 0.5)
            for link, told in zip(self.links, self.told, strict=True):
                told.extend(link.receive())
            assert done() or not all(link.closed for link in self.links), "the supervisor is gone"

    def close(self) -> None:
        for link in self.links:
            link.close()


@pytest.fixture
def step(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen([sys.executable, "-c", STEP, tmp_path / "run"], stdout=subprocess.PIPE, text=True)
    with process:
        yield process
        process.kill()


@pytest.mark.slow
def test_nodes_that_stand_still_together_are_given_up_while_one_step_ends_with_all(step: subprocess.Popen[str]) -> None:
    assert step.stdout is not None
    _, port, pid = step.stdout.readline().split()
    agents = Agents(int(port), 3)
    agents.until(lambda: any("host" in m for m in agents.told[0]), 0)
    agents.links[0].send({"store": {"addr": "127.0.0.1", "port": 9}, "attempt": 0})
    agents.until(lambda: all(any("world" in m for m in told) for told in agents.told), 0)
    failed = RankExit(0, 0, 0, "host0", 1, 3, time.monotonic_ns(), False, "")
    for link in agents.links[1:]:
        link.send({"beat": True})
    agents.links[0].send({"exited": failed.to_json(), "attempt": 0, "progress": None})
    agents.links[0].send({"drained": True, "attempt": 0})
    agents.links[2].send({"drained": True, "attempt": 0})
    agents.links[1].send({"beat": True})
    # Nodes 1, whose ranks have not ended, and 2 say no more: when node 1 is given up, the next attempt begins.
    agents.until(lambda: all(link.closed for link in agents.links), 0)
    agents.close()
    os.kill(int(pid), signal.SIGKILL)
    assert any(line.startswith("step ") for line in iter(step.stdout.readline, ""))
    agents = Agents(int(port), 1)
    agents.until(lambda: any("host" in m for m in agents.told[0]), 0)
    agents.close()
