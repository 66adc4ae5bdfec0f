"""Nodes that come and go while a run goes on, as agents on this machine: killed, stopped, late."""

from __future__ import annotations

import signal
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

if TYPE_CHECKING:
    from conftest import Launch, Launched

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

# Leaves when it is asked to, or when the test says that it is done.
WORK = """
import os, signal, sys, time
from pathlib import Path
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
here = os.environ
print("<{RANK} of {WORLD_SIZE} in {LAUNCH_ATTEMPT} after {TORCHELASTIC_RESTART_COUNT}>".format(**here), flush=True)
while not Path(here["LAUNCH_RUN_DIR"], "done").exists():
    time.sleep(0.02)
"""
SHORT = ("--show-ranks", "all", "--rdzv-conf", "last_call_timeout=0.5")


def free_endpoint() -> str:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{sock.getsockname()[1]}"


def agent_of(job: Launched, node: int) -> psutil.Process | None:
    """The agent of a node, as `launch` itself started it."""
    for pid in job.of_role("agent"):
        if f"LAUNCH_NODE_RANK={node}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            return psutil.Process(pid)
    return None


def kill(job: Launched, node: int) -> None:
    agent = agent_of(job, node)
    assert agent is not None
    agent.kill()


def test_a_node_that_stands_still_is_given_up_and_taken_in_again(launch: Launch) -> None:
    """No more than the agent is stopped; its rank would go on for ever."""
    job = launch.start("--backend", "local", "--nodes", "1:2", "--procs", "1", "--preload", "json", *SHORT,
                       launch.script(WORK))  # fmt: skip
    job.says(r"<. of 2 in 0 after 0>", times=2)
    agent = agent_of(job, 0)
    assert agent is not None
    ranks = [rank for zygote in agent.children() for rank in zygote.children()]
    assert len(ranks) == 1
    agent.send_signal(signal.SIGSTOP)
    job.says(r"node 0: no longer answers, nothing was heard for 4\.\d s; going on with 1 node")
    job.until(lambda: not ranks[0].is_running() or ranks[0].status() == psutil.STATUS_ZOMBIE, "the rank's end")
    job.says(r"<0 of 1 in 1 after 0>")
    job.says(r"a node joined: \S+: asking the ranks to save and leave")
    job.says(r"<. of 2 in 2 after 0>", times=2)
    (job.run.path / "done").touch()
    assert job.wait().returncode == 0, job.output
    assert [e["status"] for e in job.run.events if e["event"].startswith("attempt-")] == ["failed", "stopped"]
    assert job.run.json("stop-1.json")["cause"].startswith("a node joined: ")


def test_nodes_started_one_by_one_come_late_and_go(launch: Launch) -> None:
    """The least meet without the others; one that comes in the middle is taken in, and one that is gone not missed."""
    how = ("--nnodes", "1:3", "--nproc-per-node", "1", "--rdzv-endpoint", free_endpoint(), "--rdzv-id", "both",
           "--preload", "json", *SHORT, launch.script(WORK))  # fmt: skip
    host = launch.start("--node-rank", "1", "--rdzv-conf", "is_host=1", *how)
    host.says("<0 of 1 in 0 after 0>")
    zero = launch.start("--node-rank", "0", "--rdzv-conf", "is_host=0", *how)
    zero.says("<0 of 2 in 1 after 0>")
    host.says("<1 of 2 in 1 after 0>")
    zero.signal(signal.SIGKILL)
    host.says("<0 of 1 in 2 after 0>")
    (host.run.path / "done").touch()
    assert host.wait().returncode == 0, host.output


def test_a_spare_stands_in_and_show_tells_of_it(launch: Launch) -> None:
    job = launch.start("--backend", "local", "--nodes", "2", "--spares", "1", "--procs", "1", "--preload", "json",
                       "--run", "r", *SHORT, launch.script(WORK))  # fmt: skip
    job.says("standing by: ")
    job.says(r"<. of 2 in 0 after 0>", times=2)
    kill(job, 1)
    job.says(r"<. of 2 in 1 after 0>", times=2)
    job.until(lambda: job.run.json("state.json")["spares"] == [socket.gethostname()], "the lost node as a spare")
    shown = launch.ok("show", "r").stdout
    assert f"spares  {socket.gethostname()} standing by" in shown
    assert "node 1: its agent was killed by SIGKILL" in shown
    (job.run.path / "done").touch()
    assert job.wait().returncode == 0, job.output


def test_weights_after_losses_and_joins_are_those_of_an_undisturbed_run(launch: Launch, programs: Path) -> None:
    program = programs / "virtual_elastic.py"
    holds = (6, 14, 22)
    quiet = launch.start("--backend", "local", "--nodes", "2", "--procs", "1", "--run", "quiet", program)
    quiet.says("folder ")
    for step in holds:
        (quiet.run.path / f"go-{step}").touch()
    assert quiet.wait(90).returncode == 0, quiet.output
    how = ("--nnodes", "1:2", "--nproc-per-node", "1", "--rdzv-endpoint", free_endpoint(), "--run", "hurt", *SHORT)
    zero = launch.start("--node-rank", "0", *how, program)
    zero.says("attempt 0: 1 rank")
    folder = zero.run.path

    def held(step: int, ranks: int) -> None:
        def look() -> bool:
            assert zero.process.poll() is None, zero.output
            return len(list(folder.glob(f"held-{step}-?-of-{ranks}"))) == ranks

        zero.until(look, f"{ranks} at {step}", 90)

    held(6, 1)
    one = launch.start("--node-rank", "1", *how, program)  # late
    held(14, 2)
    for pid in (*one.of_role("agent"), one.process.pid):
        one.signal(signal.SIGKILL, pid)
    held(14, 1)  # alone again, from the checkpoint of step 12
    launch.start("--node-rank", "1", *how, program)
    held(22, 2)
    kill(zero, 0)  # which holds the store, and comes back
    zero.says("attempt 5: 2 rank", timeout=90)
    (folder / "go-22").touch()
    assert zero.wait(90).returncode == 0, zero.output
    assert (folder / "result").read_text() == (quiet.run.path / "result").read_text()
    assert (folder / "result").read_text().startswith("28 ")
