"""Everything that stops a run, from inside, from outside, at the worst moment: it ends as if nobody had disturbed it.

One of each kind is in the lab's own suite, its variants are soak.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from typing import TYPE_CHECKING

import pytest
from job import HERE, LAUNCH, Job
from netns import wait_for

if TYPE_CHECKING:
    from lab import Lab

pytestmark = [pytest.mark.lab, pytest.mark.timeout(240)]

RANKS = 4
EVERY = 10  # steps between two checkpoints
STOPPED = -1  # in place of a step: the last one that the attempt before made


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """What the training comes to on this machine when nothing happens."""
    cwd = tmp_path_factory.mktemp("undisturbed")
    own = {"OMP_NUM_THREADS": "1", "XDG_STATE_HOME": str(cwd / "state")}
    subprocess.run(
        [LAUNCH, "--procs", str(RANKS), "--run", "job", HERE / "digits.py"],
        cwd=cwd, env=os.environ | own, check=True, stdout=subprocess.DEVNULL, timeout=120,
    )  # fmt: skip
    return json.loads((cwd / "runs" / "job" / "result").read_text())


@pytest.fixture
def submit(lab, tmp_path):
    """`submit(*words of digits.py, options=(...))`: the run, submitted."""
    return lambda *words, options=(): Job.submit(lab, tmp_path, *options, program=(HERE / "digits.py", *words))


@pytest.fixture
def short_grace(lab):
    """2 s from the warning of a preemption to the end that Slurm makes."""
    lab.run("scontrol", "update", "PartitionName=main", "GraceTime=2")
    yield
    lab.run("scontrol", "update", "PartitionName=main", f"GraceTime={lab.settings.grace}")


def let_go(job: Job) -> None:
    (job.folder / "go").touch()


def wait_held(job: Job) -> None:
    """Until every rank is where `--hold` holds it."""
    job.wait(lambda: len(list(job.folder.glob("held-*"))) == RANKS, "all ranks at the place")


def preempt(job: Job) -> None:
    """Until Slurm has decided on it; the ranks have SIGTERM by then or a moment later."""
    job.lab.preempt(job.id)
    wait_for(lambda: job.lab.job(job.id).get("PreemptTime", "None") != "None", 30, "the preemption")


def preempted_at(submit, place: str) -> Job:
    """A job that has been preempted where `--hold` holds all its ranks, and whose supervisor knows of it."""
    job = submit("--hold", place)
    wait_held(job)
    preempt(job)
    job.wait(lambda: job.of("stop"), "the stop")
    return job


def end_slurmctld(lab: Lab, how: str) -> None:
    """shut down: it saves its state; killed: it forgets what it had not saved."""
    if how == "killed":
        lab.kill_slurmctld()
    else:
        lab.shut_down_slurmctld()


def shown(job: Job) -> dict:
    """What `launch show --json` says of the run."""
    text = job.lab.run(LAUNCH, "show", "--json", job.folder, environment={"XDG_STATE_HOME": str(job.folder / "state")})
    return json.loads(text)[0]


def ended_as(undisturbed: dict, job: Job, *began: int, at_most: int = EVERY) -> list[dict]:
    """The run is finished with the undisturbed one's result, its attempts after the first began at these steps and lost
    `at_most` so many, and the cluster has done with it; the attempts, as `launch show` tells of them.
    """
    state = job.wait_over()
    assert state["status"] == "finished", job.story()
    assert json.loads(job.result) == undisturbed, job.story()
    told = shown(job)
    assert told["status"] == "finished"
    attempts = told["history"]["attempts"]
    steps = [job.step(number) if step == STOPPED else step for number, step in enumerate(began)]
    assert [a["resumed_step"] for a in attempts[1:]] == steps, job.story()
    lost = [a["lost_steps"] or 0 for a in attempts]
    assert max(lost) <= at_most, job.story()
    assert not any(steps for steps, step in zip(lost, began, strict=False) if step == STOPPED), job.story()
    at_rest(job)
    return attempts


def at_rest(job: Job) -> None:
    """No process of the job anywhere, no node in COMPLETING."""
    lab = job.lab

    def busy():
        states = {n: s for n, s in lab.node_states().items() if s != "idle"}
        processes = [p.command[:200] for n in lab.settings.node_names for p in lab.node_processes(n)]
        # Slurm's own may try for a minute to tell a cluster that was away of a step's end.
        return states, [p for p in processes if not p.startswith("slurmstepd")]

    try:
        wait_for(lambda: not any(busy()), 60, "the nodes to be idle and empty")
    except Exception as error:
        raise AssertionError(f"{error}: {busy()}\n{job.story()}") from None


# ---------------------------------------------------------------------------------------------- with a warning


def test_preempted_in_training(lab, submit, undisturbed):
    job = submit("--slow-from", "14", options=("--notify", 'cat >> "$LAUNCH_RUN_DIR/told.jsonl"'))
    job.wait_step(14)
    preempt(job)
    job.wait(lambda: job.of("requeued"), "the requeue")
    stop = job.stop()
    assert stop["requested"] < stop["deadline"] <= stop["requested"] + lab.settings.grace
    attempts = ended_as(undisturbed, job, STOPPED)
    assert attempts[0]["cause"] == stop["cause"] == "preempted"
    assert [e["by"] for e in job.of("requeued")] == ["supervisor"]
    assert [e["restart"] for e in job.of("job")] == [0, 1]
    assert len(job.markers) == 1
    told = [json.loads(line) for line in (job.folder / "told.jsonl").read_text().splitlines()]
    assert [(t["event"], t["status"], t["job_id"]) for t in told] == [
        ("requeue", "stopped", job.id), ("end", "finished", job.id),
    ]  # fmt: skip


def test_the_time_limit_is_foreseen(submit, lab, undisturbed):
    job = submit("--slow-from", "14", options=("--time", "1", "--stop-lead", "30"))
    job.wait(lambda: job.of("requeued"), "the requeue")
    lab.wait_state(job.id, "PENDING")
    lab.run("scontrol", "update", f"JobId={job.id}", "TimeLimit=UNLIMITED")  # a busy machine needs more than 30 s
    attempts = ended_as(undisturbed, job, STOPPED)
    assert attempts[0]["cause"] == "time limit"
    assert job.state["ledger"]["timeouts"] == 1


def test_cancelled_it_saves_and_stays_stopped(submit, lab, undisturbed):
    job = submit("--slow-from", "14")
    job.wait_step(14)
    lab.run("scancel", job.id)
    state = job.wait_over()
    assert (state["status"], state["exit_code"]) == ("stopped", 75), job.story()
    assert lab.state(job.id) == "CANCELLED"
    assert not job.markers
    (attempt,) = shown(job)["history"]["attempts"]
    assert (attempt["cause"], attempt["lost_steps"]) == ("cancelled", 0)
    assert attempt["last_step"] == job.step(0)
    at_rest(job)
    # It goes on when its owner wants it to.
    words = (LAUNCH, "resume", "-d", job.folder)
    job.id = lab.run(*words, environment={"XDG_STATE_HOME": str(job.folder / "state")}).strip()
    job.wait_attempts(2)
    ended_as(undisturbed, job, STOPPED)


@pytest.mark.soak
def test_requeued_by_hand_it_is_not_requeued_again(submit, lab, undisturbed):
    job = submit("--slow-from", "14")
    job.wait_step(14)
    lab.run("scontrol", "requeue", job.id)
    attempts = ended_as(undisturbed, job, STOPPED)
    assert attempts[0]["cause"] == "requeued"
    assert not job.markers
    assert lab.job(job.id)["Restarts"] == "1"


# ---------------------------------------------------------------------------------------------- without one


def test_a_killed_rank_costs_a_failure_of_the_budget(submit, undisturbed):
    job = submit("--hold", "15", options=("--max-failures", "1"))
    wait_held(job)
    job.kill("node2", "rank", 1)
    attempts = ended_as(undisturbed, job, EVERY)
    assert "was killed by SIGKILL" in attempts[0]["cause"]
    assert attempts[0]["lost_steps"] == 4  # the 15th had not come to its end
    assert job.state["ledger"]["failures"] == 1
    assert len(job.of("job")) == 1


@pytest.mark.parametrize("node", ["node2", pytest.param("node1", marks=pytest.mark.soak)])
def test_a_killed_agent_is_no_failure_of_the_run(submit, undisturbed, node):
    job = submit("--hold", "15")
    wait_held(job)
    job.kill(node, "agent")
    attempts = ended_as(undisturbed, job, EVERY)
    assert f"agent on {node}" in attempts[0]["cause"]
    # Rank 0's node tells every 5 s how far it is: killed before that, nobody knows.
    assert attempts[0]["lost_steps"] in (*range(EVERY), *([None] if node == "node1" else []))
    assert job.state["ledger"]["failures"] == 0
    assert len(job.markers) == 1


def test_a_killed_supervisor_is_replaced(submit, lab, undisturbed):
    job = submit("--slow-from", "14")
    job.wait_step(14)
    job.kill("node1", "supervisor")
    attempts = ended_as(undisturbed, job, STOPPED)
    assert attempts[0]["cause"] == "the supervisor was killed"
    assert [e["by"] for e in job.of("requeued")] == ["agent"]
    assert lab.job(job.id)["Restarts"] == "1"


def test_a_killed_slurmd_takes_the_run_elsewhere(submit, lab, undisturbed):
    job = submit("--slow-from", "14")
    job.wait_step(14)
    lab.kill_slurmd("node2")
    # slurmctld takes up to half a minute to see it for itself.
    lab.run("scontrol", "update", "NodeName=node2", "State=DOWN", "Reason=slurmd")
    job.wait_attempts(2)
    assert job.of("attempt")[1]["hosts"] == ["node1", "node3"]
    lab.start_slurmd("node2")
    attempts = ended_as(undisturbed, job, STOPPED)
    assert attempts[0]["cause"] == "node failure"


@pytest.mark.soak
def test_a_powered_off_node_is_avoided(submit, lab, undisturbed):
    job = submit("--slow-from", "14", options=("--max-failures", "1"))  # of which this costs none
    job.wait_step(14)
    lab.kill_node("node2")
    job.wait_attempts(2)
    assert job.of("attempt")[1]["hosts"] == ["node1", "node3"]
    lab.boot_node("node2")
    attempts = ended_as(undisturbed, job, EVERY)
    assert "node2 no longer answers" in attempts[0]["cause"]
    assert job.state["ledger"]["failures"] == 0
    assert list(job.state["ledger"]["excluded"]) == ["node2"]


# ---------------------------------------------------------------------------------------------- the cluster fails


def test_a_cut_cable_takes_the_run_elsewhere(lab, submit, undisturbed):
    job = submit("--slow-from", "14")
    job.wait_step(14)
    lab.link_down("node2")
    job.wait(lambda: job.of("requeued"), "the requeue")
    # Nobody can reach that node, and still nothing of the run goes on there.
    wait_for(
        lambda: not job.processes("node2", "agent") + job.processes("node2", "rank"), 30, "the ranks of node2 to end"
    )
    job.wait_attempts(2)
    assert job.of("attempt")[1]["hosts"] == ["node1", "node3"]
    lab.link_up("node2")
    attempts = ended_as(undisturbed, job, EVERY)
    assert "node2 no longer answers" in attempts[0]["cause"]
    assert len(job.markers) == 1


@pytest.mark.soak
def test_the_supervisors_own_cable_is_cut(lab, submit, undisturbed):
    job = submit("--slow-from", "14")
    job.wait_step(14)
    lab.link_down("node1")
    # slurmctld gives the node up after SlurmdTimeout (10 s here) and puts the job back into the queue.
    job.wait(lambda: job.state.get("status") != "running", "the supervisor to give up")
    lab.wait_state(job.id, "PENDING", "RUNNING", timeout=60)
    job.wait_attempts(2)
    assert job.of("attempt")[1]["hosts"] == ["node2", "node3"]
    lab.link_up("node1")
    ended_as(undisturbed, job, EVERY)
    assert lab.job(job.id)["Restarts"] == "1"


@pytest.mark.parametrize("how", ["killed", pytest.param("shut down", marks=pytest.mark.soak)])
def test_training_goes_on_while_slurmctld_is_away(lab, submit, undisturbed, how):
    job = submit("--slow-from", "5")
    job.wait_step(5)
    end_slurmctld(lab, how)
    step = job.step(0)
    job.wait_step(step + 2)
    lab.start_slurmctld()
    let_go(job)
    ended_as(undisturbed, job)
    assert lab.state(job.id) == "COMPLETED"
    assert lab.job(job.id)["Restarts"] == "0"


@pytest.mark.soak
def test_a_run_ends_while_slurmctld_is_away(lab, submit, undisturbed):
    job = submit("--hold", "55")
    wait_held(job)
    lab.kill_slurmctld()
    let_go(job)
    job.wait(lambda: job.state["status"] == "finished", "the end")
    wait_for(lambda: not job.processes("node1", "supervisor"), 30, "the supervisor to leave")
    lab.start_slurmctld()
    ended_as(undisturbed, job)
    assert lab.wait_state(job.id, "COMPLETED", timeout=30)["Restarts"] == "0"


def test_accounting_is_dead_from_before_submission_on(lab, submit, undisturbed):
    lab.stop_slurmdbd()
    job = submit("--hold", "15")
    wait_held(job)
    assert shown(job)["status"] == "running"
    preempt(job)
    job.wait(lambda: job.of("stop"), "the stop")
    let_go(job)
    attempts = ended_as(undisturbed, job, STOPPED)
    assert attempts[0]["cause"].startswith("preempted")


@pytest.mark.soak
@pytest.mark.parametrize("how", ["shut down", "killed"])
def test_slurmctld_ends_as_it_preempts(lab, submit, undisturbed, how):
    job = submit("--hold", "15")
    wait_held(job)
    # The supervisor hears of it when there is nobody left to ask.
    job.kill("node1", "supervisor", number=signal.SIGSTOP)
    preempt(job)
    end_slurmctld(lab, how)
    job.kill("node1", "supervisor", number=signal.SIGCONT)
    job.wait(lambda: job.of("stop"), "the stop")
    let_go(job)
    job.wait(lambda: job.of("end"), "the end of the attempt")
    lab.start_slurmctld()
    attempts = ended_as(undisturbed, job, STOPPED)
    # One that was killed may have forgotten, and then nobody knows.
    forgotten = ["SIGTERM while Slurm's controller was away"] if how == "killed" else []
    assert attempts[0]["cause"] in ["preempted", *forgotten]


@pytest.mark.soak
def test_slurmctld_is_away_at_the_time_limit(lab, submit, undisturbed):
    job = submit("--slow-from", "5", options=("--time", "1", "--stop-lead", "40"))
    job.wait_step(5)
    lab.kill_slurmctld()
    job.wait(lambda: job.of("end"), "the end of the attempt")
    assert job.stop()["cause"] == "time limit"
    lab.start_slurmctld()
    attempts = ended_as(undisturbed, job, STOPPED)
    assert attempts[0]["cause"].startswith("time limit")


# ---------------------------------------------------------------------------------------------- the worst moments


def test_preempted_in_a_save_that_the_grace_is_too_short_for(lab, submit, undisturbed, short_grace):
    job = submit("--hold", "save")
    wait_held(job)
    preempt(job)
    # Training goes on beside a save until the next one is due.
    attempts = ended_as(undisturbed, job, EVERY, at_most=2 * EVERY)
    assert attempts[0]["cause"].startswith("preempted")


def test_preempted_in_a_save(lab, submit, undisturbed):
    job = preempted_at(submit, "save")
    let_go(job)
    ended_as(undisturbed, job, STOPPED)
    assert job.step(0) >= 20


@pytest.mark.soak
def test_preempted_in_a_validation(lab, submit, undisturbed):
    job = preempted_at(submit, "validation")
    let_go(job)
    ended_as(undisturbed, job, STOPPED)


@pytest.mark.soak
def test_preempted_in_the_last_step(lab, submit, undisturbed):
    job = preempted_at(submit, "60")
    let_go(job)
    job.wait_over()
    ended_as(undisturbed, job, *([60] * (len(job.of("attempt")) - 1)))


@pytest.mark.soak
def test_preempted_while_the_ranks_import(lab, submit, undisturbed):
    job = submit("--hold", "start")
    wait_held(job)
    preempt(job)
    job.wait(lambda: job.of("requeued"), "the requeue")
    attempts = ended_as(undisturbed, job, 0)
    assert attempts[0]["cause"].startswith("preempted")
    assert attempts[0]["resumed_step"] is None


@pytest.mark.soak
def test_preempted_while_the_agents_import(lab, submit, undisturbed, tmp_path):
    (tmp_path / "slow_start.py").write_text(
        "import socket, time\n"
        "from pathlib import Path\n"
        "import torch\n"
        f"here = Path({str(tmp_path)!r})\n"
        "(here / f'importing-{socket.gethostname()}').touch()\n"
        "while not (here / 'imported').exists(): time.sleep(0.02)\n"
    )
    (tmp_path / "digits.py").write_text((HERE / "digits.py").read_text())
    job = Job.submit(lab, tmp_path, "--preload", "slow_start", program=(tmp_path / "digits.py",))
    job.wait(lambda: len(list(tmp_path.glob("importing-*"))) == 2, "both agents in their imports")
    preempt(job)
    (tmp_path / "imported").touch()
    job.wait(lambda: job.of("requeued"), "the requeue")
    ended_as(undisturbed, job)


# ---------------------------------------------------------------------------------------------- two at a time


@pytest.mark.soak
def test_cancelled_in_the_grace_of_a_preemption(lab, submit):
    job = preempted_at(submit, "15")
    lab.run("scancel", job.id)
    job.wait(lambda: len(job.of("stop")) == 2, "the ranks to be told of less time")
    let_go(job)
    state = job.wait_over()
    assert (state["status"], state["exit_code"]) == ("stopped", 75), job.story()
    (attempt,) = shown(job)["history"]["attempts"]
    assert (attempt["cause"], attempt["lost_steps"]) == ("cancelled", 0)
    assert not job.markers
    at_rest(job)


@pytest.mark.soak
def test_cancelled_while_it_waits_to_go_on(lab, submit, undisturbed):
    job = preempted_at(submit, "15")
    let_go(job)
    job.wait(lambda: job.of("requeued"), "the requeue")
    lab.wait_state(job.id, "PENDING")
    lab.run("scancel", job.id)
    state = {"XDG_STATE_HOME": str(job.folder / "state")}
    assert lab.try_run(LAUNCH, "wait", job.folder, environment=state).returncode == 75
    assert shown(job)["status"] == "stopped"
    job.id = lab.run(LAUNCH, "resume", "-d", job.folder, environment=state).strip()
    job.wait_attempts(2)
    ended_as(undisturbed, job, STOPPED)


@pytest.mark.soak
def test_a_node_dies_in_the_save_of_a_preemption(lab, submit, undisturbed):
    job = preempted_at(submit, "save")
    lab.kill_node("node2")
    job.wait_attempts(2)
    lab.boot_node("node2")
    state = job.wait_over()
    assert state["status"] == "finished", job.story()
    assert json.loads(job.result) == undisturbed
    # The urgent job waits for the dead node, and preempts the run again when it is back.
    told = shown(job)["history"]["attempts"]
    assert {a["resumed_step"] for a in told[1:]} <= {EVERY, None}
    assert {a["cause"].split(";")[0] for a in told[:-1]} == {"preempted"}
    at_rest(job)


@pytest.mark.soak
def test_the_supervisor_dies_in_the_stop(lab, submit, undisturbed):
    job = submit("--slow-from", "14")
    job.wait_step(14)
    preempt(job)
    job.wait(lambda: job.of("stop"), "the stop")
    job.kill("node1", "supervisor")
    job.wait_over()
    # 2 s of KillWait are left for the save here: enough, unless the machine is busy.
    (began,) = (a["resumed_step"] for a in shown(job)["history"]["attempts"][1:])
    ended_as(undisturbed, job, began)
    assert began in (EVERY, job.step(0))
    assert [e["by"] for e in job.of("requeued")] == ["agent"]


@pytest.mark.soak
def test_an_agent_hangs_in_a_preemption(lab, submit, undisturbed):
    job = submit("--hold", "15")
    wait_held(job)
    job.kill("node2", "agent", number=signal.SIGSTOP)
    preempt(job)
    job.wait(lambda: job.of("stop"), "the stop")
    let_go(job)
    ended_as(undisturbed, job, STOPPED)
