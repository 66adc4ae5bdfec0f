"""What one supervisor costs as its agents grow in number: meeting, signs of life, an attempt after a failure.

    python benchmarks/agents.py [--agents 32,64,128,256] [--restarts 5] [--beats 5] [--json FILE]

The supervisor is the real one, in a process of its own. The agents are light ones: each is a connection over TCP that
says and hears what a real agent's does (hello, store, sign of life every second, exited, drained), many in one process
and with no ranks. Processor time is that of the supervisor's process alone (/proc/PID/task/*/schedstat, nanoseconds).

meet      connections to the first attempt's ranks told to start, per agent
beat      one second of a run in which nothing happens, per agent
attempt   one rank has failed: everyone stopped, drained, and started again, per agent
"""

from __future__ import annotations

import argparse
import os
import secrets
import selectors
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from facts import facts, tell

from launcher.arrival import connect
from launcher.channel import Channel
from launcher.failure import RankExit
from launcher.processes import start_ticks
from launcher.runs import RunFolder
from launcher.spec import LaunchSpec, Program
from launcher.supervisor import Supervisor

WITHIN_S = 300


def supervise(folder: str, agents: int, restarts: int, token: str) -> None:
    """Body of the supervisor's process: prints its port, then runs the run."""
    spec = LaunchSpec(Program("module", "json"), "/", nodes=agents, procs=1, max_restarts=restarts, preload=("json",))
    listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
    sys.stdout.write(f"{listener.getsockname()[1]}\n")
    sys.stdout.flush()
    with RunFolder.open(Path(folder), spec) as run:
        outcome = Supervisor(run, local=(), say=lambda _: None, listener=listener, token=token).work()
    sys.exit(outcome.code)


class Crowd:
    """All light agents, in this process."""

    def __init__(self, port: int, count: int, token: str) -> None:
        self.met = 0  # agents that were told the present attempt's world
        self.attempt = -1
        self.ended = 0
        self._selector = selectors.DefaultSelector()
        self._links = []
        self._beat_at = float("inf")
        for node in range(count):
            link = Channel(connect("127.0.0.1", port, 60))
            link.send({"hello": {"token": token, "host": f"host{node}", "pid": os.getpid(),
                                 "started": start_ticks(os.getpid()), "now_ns": time.monotonic_ns(),
                                 "node_rank": node, "procs": 1, "address": "127.0.0.1"}})  # fmt: skip
            self._links.append(link)
            self._selector.register(link, selectors.EVENT_READ, node)

    def until(self, condition, what: str) -> float:
        """Serve until `condition()`; when that was."""
        deadline = time.monotonic() + WITHIN_S
        while not condition():
            if time.monotonic() > deadline:
                raise SystemExit(f"waited {WITHIN_S} s in vain for {what}")
            self.serve(0.02)
        return time.monotonic()

    def beat(self, seconds: float) -> None:
        """A run in which nothing happens."""
        end = time.monotonic() + seconds
        self._beat_at = time.monotonic()
        while time.monotonic() < end:
            self.serve(0.02)
        self._beat_at = float("inf")

    def serve(self, timeout_s: float) -> None:
        if time.monotonic() >= self._beat_at:
            self._beat_at += 1.0
            for link in self._links:
                link.send({"beat": True})
        for key, _ in self._selector.select(timeout_s):
            link, node = self._links[key.data], key.data
            for message in link.receive():
                self._hear(link, node, message)
            if link.closed:
                self._selector.unregister(link)
                link.close()

    def _hear(self, link: Channel, node: int, message: dict) -> None:
        if "host" in message:
            link.send({"store": {"addr": "127.0.0.1", "port": 9}, "attempt": message["host"]["attempt"]})
        elif "world" in message:
            if message["world"]["attempt"] != self.attempt:
                self.attempt, self.met = message["world"]["attempt"], 0
            self.met += 1
        elif "abort" in message:
            self.leave(node, -15, asked=True)
        elif "end" in message:
            self.ended += 1

    def leave(self, node: int, code: int, *, asked: bool = False) -> None:
        """The rank of a node ends."""
        ended = RankExit(rank=node, local_rank=0, node=node, host=f"host{node}", pid=1, code=code,
                         ended_ns=time.monotonic_ns(), asked=asked, log="", error=None, tail=(),
                         killed_for_memory=False)  # fmt: skip
        link = self._links[node]
        link.send({"exited": ended.to_json(), "attempt": self.attempt, "progress": None})
        link.send({"drained": True, "attempt": self.attempt})

    def finish(self) -> None:
        for node in range(len(self._links)):
            self.leave(node, 0)


def processor_s(pid: int) -> float:
    # The process's own file is that of its first thread.
    return sum(int(path.read_text().split()[0]) for path in Path(f"/proc/{pid}/task").glob("*/schedstat")) / 1e9


def memory_kb(pid: int) -> int:
    (line,) = (x for x in Path(f"/proc/{pid}/status").read_text().splitlines() if x.startswith("VmRSS"))
    return int(line.split()[1])


def measure(agents: int, restarts: int, beats: float) -> dict:
    token = secrets.token_hex(8)
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, __file__, "--supervise", f"{folder}/run", str(agents), str(restarts), token]
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            port, pid = int(process.stdout.readline()), process.pid
            at, used, memory = time.monotonic(), processor_s(pid), memory_kb(pid)
            crowd = Crowd(port, agents, token)
            met = crowd.until(lambda: crowd.met == agents, "all to meet")
            meet_s, meet_cpu = met - at, processor_s(pid) - used
            memory = memory_kb(pid) - memory
            used = processor_s(pid)
            crowd.beat(beats)
            beat_cpu = (processor_s(pid) - used) / beats
            used, at = processor_s(pid), time.monotonic()
            for restart in range(1, restarts + 1):
                crowd.leave(restart % agents, 1)
                crowd.until(lambda n=restart: crowd.attempt == n and crowd.met == agents, f"attempt {restart}")
            attempt_s, attempt_cpu = time.monotonic() - at, processor_s(pid) - used
            crowd.finish()
            crowd.until(lambda: crowd.ended == agents, "the end")
            code = process.wait(60)
            assert code == 0, code
    return {
        "agents": agents,
        "meet: us per agent": round(meet_cpu / agents * 1e6, 1),
        "meet: wall s": round(meet_s, 3),
        "beat: us per agent and second": round(beat_cpu / agents * 1e6, 1),
        "attempt: us per agent": round(attempt_cpu / restarts / agents * 1e6, 1),
        "attempt: wall s": round(attempt_s / restarts, 3),
        "memory: KiB per agent": round(memory / agents, 1),
    }


def main() -> None:
    if sys.argv[1:2] == ["--supervise"]:
        folder, agents, restarts, token = sys.argv[2:]
        supervise(folder, int(agents), int(restarts), token)
    parser = argparse.ArgumentParser()
    parser.add_argument("--agents", default="32,64,128,256", help="numbers of agents, one after the other")
    parser.add_argument("--restarts", type=int, default=5)
    parser.add_argument("--beats", type=float, default=5, help="seconds of a quiet run")
    parser.add_argument("--json")
    o = parser.parse_args()
    counts = [int(text) for text in o.agents.split(",")]
    tell({**facts(), "results": [measure(count, o.restarts, o.beats) for count in counts]}, o.json)


if __name__ == "__main__":
    main()
