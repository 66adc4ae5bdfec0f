"""Nodes that come and go while a run goes on, on machines with a real sshd: see machines.py."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from job import Job
from netns import wait_for

if TYPE_CHECKING:
    from machines import Call, Machines

    from lab import Lab

pytestmark = [pytest.mark.lab, pytest.mark.ssh, pytest.mark.timeout(180)]

# Meets its peers, says who it is, and leaves when it is asked to, or when the test says that it is done.
WORK = """
import os, signal, socket, sys, time
from pathlib import Path
import torch.distributed as dist
dist.init_process_group("gloo")
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
print("ranks", os.environ["RANK"], os.environ["WORLD_SIZE"], socket.gethostname(), flush=True)
done = Path(os.environ["LAUNCH_RUN_DIR"], "done")
while not asked and not done.exists():
    time.sleep(0.05)
sys.exit(75 if asked else 0)
"""


@pytest.fixture
def work(launched, tmp_path: Path):
    """`work(*words)`: a launch of WORK."""
    (tmp_path / "work.py").write_text(WORK)
    return lambda *words: launched("--procs", "1", *words, "work.py")


def events(call: Call) -> list[dict]:
    path = call.folder / "events.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def attempts(call: Call) -> list[list[str]]:
    return [event["hosts"] for event in events(call) if event["event"] == "attempt"]


def attempt_on(call: Call, *hosts: str) -> None:
    """Wait until the latest attempt is one of these hosts, in this order, and all its ranks have met."""

    def here() -> bool:
        if not (made := attempts(call)) or made[-1] != list(hosts):
            return False
        logs = call.folder / "logs" / f"attempt-{len(made) - 1}"
        said = [(logs / f"rank-{rank}.log") for rank in range(len(hosts))]
        return all(
            path.exists() and f"ranks {rank} {len(hosts)} {hosts[rank]}" in path.read_text()
            for rank, path in enumerate(said)
        )

    wait_for(here, 60, f"an attempt on {hosts}; there were {attempts(call)}, {call.process.poll()}")


def agents(machines: Machines, name: str) -> list[int]:
    return [p.pid for p in machines.host(name).processes() if "launcher.agent" in p.command]


@pytest.mark.soak
def test_weights_after_losses_and_joins_are_those_of_an_undisturbed_run(launched, machines: Machines, tmp_path) -> None:
    """A host is cut off, mended, another stands still: each time the run goes on without it, and takes it in again."""
    program = Path(__file__).parent.parent / "programs" / "virtual_elastic.py"
    quiet = launched("--procs", "1", "--run", "quiet", "--hosts", "ada,bob", program)
    wait_for((tmp_path / "runs" / "quiet").is_dir, 30, "the undisturbed run")
    for step in (6, 14, 22):
        (tmp_path / "runs" / "quiet" / f"go-{step}").touch()
    assert quiet.end()[0] == 0
    hurt = launched("--procs", "1", "--hosts", "ada,bob,cyd", "--nodes", "1:3", program)

    def held(step: int, ranks: int) -> None:
        wait_for(lambda: len(list(hurt.folder.glob(f"held-{step}-?-of-{ranks}"))) == ranks, 60, f"{ranks} at {step}")

    held(6, 3)
    machines.network.link_down("ada")
    held(6, 2)
    machines.network.link_up("ada")
    held(14, 3)
    for pid in agents(machines, "cyd"):
        os.kill(pid, signal.SIGSTOP)
    wait_for(lambda: len(attempts(hurt)) == 5, 60, "an attempt with all three, whose agent was started again")
    (hurt.folder / "go-14").touch()
    held(22, 3)
    (hurt.folder / "go-22").touch()
    code, _, err = hurt.end()
    assert code == 0, err
    result = (hurt.folder / "result").read_text()
    assert result.startswith("28 ")
    assert result == (tmp_path / "runs" / "quiet" / "result").read_text()


def test_a_slurm_job_goes_on_without_a_node(lab: Lab, tmp_path: Path) -> None:
    """The same job, in the same life: it is not requeued, and what is left of the allocation is used."""
    (tmp_path / "work.py").write_text(WORK)
    job = Job.submit(lab, tmp_path, "--nodes", "2:3", "--procs", "1", program=(tmp_path / "work.py",))
    job.wait_attempts(1)
    assert job.of("attempt")[0]["hosts"] == ["node1", "node2", "node3"]
    job.wait(lambda: "ranks 0 3" in job.output, "the ranks")
    lab.kill_node("node3")
    job.wait_attempts(2)
    assert job.of("attempt")[1]["hosts"] == ["node1", "node2"]
    job.wait(lambda: "ranks 0 2" in job.output, "the ranks")
    (job.folder / "done").touch()
    assert job.wait_over()["status"] == "finished", job.story()
    assert not job.of("requeued")
    (failed,) = job.of("attempt-failed")
    assert "node 2: node3 " in failed["cause"]
    lab.boot_node("node3")


def test_an_agent_that_is_killed_in_a_slurm_job_is_started_again(lab: Lab, tmp_path: Path) -> None:
    """The run goes on with the others at once, and takes the node in again: in the same life, beside the same step."""
    (tmp_path / "work.py").write_text(WORK)
    job = Job.submit(lab, tmp_path, "--nodes", "1:2", "--procs", "1", program=(tmp_path / "work.py",))
    job.wait_attempts(1)
    job.wait(lambda: "ranks 0 2" in job.output, "the ranks")
    job.kill("node2", "agent")
    job.wait_attempts(3)
    assert [e["hosts"] for e in job.of("attempt")] == [["node1", "node2"], ["node1"], ["node1", "node2"]]
    job.wait(lambda: job.output.count("ranks 0 2") == 2, "the ranks")
    (job.folder / "done").touch()
    assert job.wait_over()["status"] == "finished", job.story()
    assert not job.of("requeued")


def test_the_first_host_is_cut_off_and_comes_back(work, machines: Machines) -> None:
    """It had the attempt's store. The others go on without it at once, and it joins when the cable is mended."""
    call = work("--hosts", "ada,bob,cyd", "--nodes", "2:3")
    attempt_on(call, "ada", "bob", "cyd")
    machines.network.link_down("ada")
    attempt_on(call, "bob", "cyd")
    # Nobody reaches it, and still nothing of the run goes on there.
    machines.wait_empty("launcher", 60, "the end of what was cut off", at=("ada",))
    machines.network.link_up("ada")
    attempt_on(call, "ada", "bob", "cyd")
    (call.folder / "done").touch()
    code, _, err = call.end()
    assert code == 0, err
    assert [e["status"] for e in events(call) if e["event"] in ("attempt-failed", "attempt-left")] == [
        "failed", "stopped",
    ]  # fmt: skip
    assert "node 0: no longer answers" in err
    assert "a node joined: ada: asking the ranks to save and leave" in err


def test_a_spare_takes_the_place_of_a_host_on_which_all_stands_still(work, machines: Machines) -> None:
    """What stands still is ended over a new connection, and the host becomes the spare."""
    call = work("--hosts", "ada,bob,cyd", "--spares", "1")
    attempt_on(call, "ada", "bob")
    still = agents(machines, "bob")
    for pid in still:
        os.kill(pid, signal.SIGSTOP)
    attempt_on(call, "ada", "cyd")
    wait_for(lambda: not set(still) & set(agents(machines, "bob")), 30, "the end of what stood still")
    wait_for(lambda: any(e["event"] == "node-here" and e["host"] == "bob" for e in events(call)), 60, "bob")
    assert json.loads((call.folder / "state.json").read_text())["spares"] == ["bob"]
    (call.folder / "done").touch()
    code, _, err = call.end()
    assert code == 0, err
    assert attempts(call) == [["ada", "bob"], ["ada", "cyd"]]
