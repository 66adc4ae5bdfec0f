"""What stops a run, what becomes of it, and what is told of that: preemption, limits, people, kills."""

from __future__ import annotations

import pytest
from job import Job

pytestmark = [pytest.mark.lab, pytest.mark.timeout(240)]


@pytest.fixture
def submit(lab, tmp_path):
    return lambda *options, **settings: Job.submit(lab, tmp_path, *options, **settings)


def went_on_without_a_loss(job: Job, attempts: int = 2, steps: int = 60) -> None:
    """Finished in so many attempts, each of which began where the one before had stopped."""
    state = job.wait_over()
    assert state["status"] == "finished", job.story()
    assert job.result.split()[0] == str(steps)
    history = job.history
    assert len(history.attempts) == attempts, job.story()
    for number, after in enumerate(history.attempts[1:]):
        assert after.progress.began == max(job.step(number), 0), job.story()
    assert history.attempts[-1].progress.began >= 5


def test_a_preempted_run_saves_and_goes_on(submit, lab):
    job = submit()
    job.wait_step(5)
    lab.preempt(job.id)
    job.wait(lambda: job.of("requeued"), "the requeue")
    stop = job.stop()
    assert stop["cause"] == "preempted"
    assert stop["requested"] < stop["deadline"] <= stop["requested"] + lab.settings.grace
    went_on_without_a_loss(job)
    assert len(job.markers) == 1
    assert [e["by"] for e in job.of("requeued")] == ["supervisor"]
    assert [e["restart"] for e in job.of("job")] == [0, 1]
    assert job.history.attempts[0].cause.startswith("preempted")


def test_the_time_limit_is_foreseen(submit):
    job = submit("--time", "1", "--stop-lead", "36", program=("train.py", "--steps", "200"))
    job.wait(lambda: job.of("requeued"), "the requeue")
    job.wait_over()
    went_on_without_a_loss(job, attempts=len(job.of("job")), steps=200)
    assert job.stop()["cause"] == "time limit"
    assert job.state["ledger"]["timeouts"] >= 1


def test_a_cancelled_run_saves_and_stays_stopped(submit, lab):
    job = submit()
    job.wait_step(5)
    lab.run("scancel", job.id)
    state = job.wait_over()
    assert (state["status"], state["exit_code"]) == ("stopped", 75), job.story()
    assert job.stop()["cause"] == "cancelled"
    assert not job.markers
    assert job.history.attempts[0].progress.step == job.step(0) >= 5
    assert lab.state(job.id) == "CANCELLED"


def test_requeued_by_hand_it_is_not_requeued_again(submit, lab):
    job = submit()
    job.wait_step(5)
    lab.run("scontrol", "requeue", job.id)
    went_on_without_a_loss(job)
    assert job.stop()["cause"] == "requeued"
    assert not job.markers
    assert lab.job(job.id)["Restarts"] == "1"


def test_a_killed_rank_costs_a_failure_of_the_budget(submit):
    job = submit("--max-failures", "1", program=("train.py", "--every", "5"))
    job.wait_step(7)
    job.kill("node2", "rank", 1)
    state = job.wait_over()
    assert state["status"] == "finished", job.story()
    first, second = job.history.attempts
    assert "was killed by SIGKILL" in first.cause
    assert second.progress.began >= 5
    assert state["ledger"]["failures"] == 1
    assert len(job.of("job")) == 1


@pytest.mark.parametrize("node", ["node1", "node2"])
def test_a_killed_agent_is_no_failure_of_the_run(submit, node):
    job = submit(program=("train.py", "--every", "5"))
    job.wait_step(7)
    job.kill(node, "agent")
    state = job.wait_over()
    assert state["status"] == "finished", job.story()
    assert job.history.attempts[1].progress.began >= 5
    assert len(job.markers) == 1


def test_a_killed_supervisor_is_replaced(submit, lab):
    job = submit()
    job.wait_step(5)
    job.kill("node1", "supervisor")
    went_on_without_a_loss(job)
    assert [e["by"] for e in job.of("requeued")] == ["agent"]
    assert lab.job(job.id)["Restarts"] == "1"


def test_a_killed_slurmd_takes_the_run_elsewhere(submit, lab):
    job = submit(program=("train.py", "--steps", "150"))
    job.wait_step(5)
    lab.kill_slurmd("node2")
    # slurmctld takes up to half a minute to see it for itself.
    lab.run("scontrol", "update", "NodeName=node2", "State=DOWN", "Reason=slurmd")
    state = job.wait_over()
    assert state["status"] == "finished", job.story()
    assert "node2" not in job.of("job")[-1]["nodes"]
