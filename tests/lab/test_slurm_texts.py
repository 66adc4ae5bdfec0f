"""What we write, Slurm reads; what Slurm writes, we read: the launcher's texts against the real tools."""

from __future__ import annotations

import json
import random
import sys
import time

import pytest
from netns import wait_for

from launcher.backends.slurm_records import (
    SACCT,
    SCONTROL,
    SQUEUE,
    merge,
    query_environment,
    read_sacct,
    read_scontrol,
    read_squeue,
)
from launcher.backends.slurm_script import batch_script
from launcher.backends.slurm_stop import grace_of_partition, kill_wait_of_config, why

pytestmark = [pytest.mark.lab, pytest.mark.timeout(120)]

AWKWARD = ["a b", "it's", 'x"y"', "back\\slash", "end\\", "# hash # mark", "$HOME `id` ; | & > <", "tab\there",
           "é 日本", "%j", "!@*()[]{}?~^", "\\\\\"'\\'", "--nodes=9"]  # fmt: skip


def ask(lab, command, *more):
    done = lab.try_run(*command, *more, environment=query_environment({}))
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_value_and_word_arrives_byte_for_byte(lab, tmp_path):
    seed = random.randrange(2**32)
    dice = random.Random(seed)
    values = AWKWARD + ["".join(dice.choices("ab \\\"'#$`;%=\t-", k=12)).strip() + "." for _ in range(8)]
    words = [*values, "a\nb\r\n", "", "\udcff\x01"]
    echo = "import json, sys; json.dump(sys.argv[1:], open(sys.argv[1], 'w'))"
    for number, value in enumerate(values):
        script = tmp_path / f"{number}.sh"
        script.write_text(batch_script({"comment": value, "job-name": "after", "hold": True}, ["true"]))
        job = lab.sbatch(script)
        shown = lab.run(*SCONTROL, job).split("\n")
        assert [line for line in shown if line.startswith("   Comment=")] == [f"   Comment={value} "], f"seed {seed}"
        assert f"JobId={job} JobName=after" in shown
    script = tmp_path / "words.sh"
    command = [sys.executable, "-c", echo, str(tmp_path / "words.json"), *words]
    script.write_text(batch_script({"output": "/dev/null", "wait": True}, command, setup=["cd /"]))
    lab.run("sbatch", script)
    assert json.loads((tmp_path / "words.json").read_text())[1:] == words


def test_what_the_tools_say_is_read(lab):
    array = lab.sbatch("--array=0-70:2%3", "--hold", "--output=/dev/null", "--wrap=true")
    sparse = lab.sbatch("--array=" + ",".join(str(i * i) for i in range(31)), "--hold", "--output=/dev/null",
                        "--wrap=true")  # fmt: skip
    failed = lab.sbatch("--output=/dev/null", "--comment=JobState=RUNNING", "--wrap=exit 7")
    running = lab.sbatch("--nodes=2", "--time=1-02:03", "--output=/dev/null", "--wrap=sleep 100")
    lab.wait_state(failed, "FAILED")
    lab.wait_state(running, "RUNNING")

    def accounted():
        lives = read_sacct(ask(lab, SACCT, "-j", f"{failed},{running}"))
        return lives if set(lives) == {failed, running} and lives[failed][-1].over else None

    lives = wait_for(accounted, 20, "accounting to know both jobs")
    queue = read_squeue(ask(lab, SQUEUE))
    shown = read_scontrol(ask(lab, SCONTROL))
    assert set(shown) == set(queue)
    elements = {f"{array}_{i}" for i in range(0, 71, 2)} | {f"{sparse}_{i * i}" for i in range(31)}
    assert elements < set(queue)
    for job in (failed, running, f"{sparse}_900", f"{array}_70"):
        from_queue = merge(job, controller=queue, accounting=lives)
        from_show = merge(job, controller=shown, accounting=lives)
        assert (from_queue.state, from_queue.nodes, from_queue.limit_s, from_queue.submit, from_queue.start) == (
            from_show.state, from_show.nodes, from_show.limit_s, from_show.submit, from_show.start,
        )  # fmt: skip
    assert queue[running].nodes == ("node1", "node2")
    assert queue[running].limit_s == ((24 + 2) * 60 + 3) * 60
    assert queue[running].end - queue[running].start == queue[running].limit_s
    assert merge(failed, controller=queue, accounting=lives).exit_code == shown[failed].exit_code == 7
    assert queue[f"{array}_70"].reason == "JobHeldUser"
    lab.run("scancel", array, sparse)

    lab.run("scontrol", "requeue", running)
    lab.wait_state(running, "RUNNING", "PENDING")
    assert read_scontrol(ask(lab, SCONTROL, running))[running].restarts == 1

    def states():
        return [life.state for life in read_sacct(ask(lab, SACCT, "-j", running))[running]]

    wait_for(lambda: len(states()) == 2, 20, "both lives in accounting")
    assert states()[0] == "REQUEUED"

    def cancelled():
        lives = read_sacct(ask(lab, SACCT, "-j", f"{array},{sparse}"))
        return {job for job in lives if lives[job][-1].state == "CANCELLED"}

    wait_for(lambda: cancelled() == elements, 20, "accounting to know that all elements were cancelled")


def test_each_stop_tells_its_cause(lab):
    grace_s = grace_of_partition(lab.run("scontrol", "show", "partition", "main"))
    kill_wait_s = kill_wait_of_config(lab.run("scontrol", "show", "config"))
    assert (grace_s, kill_wait_s) == (lab.settings.grace, lab.settings.kill_wait)
    deaf = "trap '' TERM; srun bash -c \"trap '' TERM; for i in \\$(seq 600); do sleep 0.1; done\""
    submit = ["--nodes=2", "--output=/dev/null", f"--wrap={deaf}"]
    cancelled, requeued, broken = (lab.sbatch(*submit, "--nodelist=node1,node2") for _ in range(3))
    jobs = [cancelled, requeued, broken]
    for job in jobs:
        lab.wait_state(job, "RUNNING")
    before = read_scontrol(ask(lab, SCONTROL))

    def cause(job):
        now = read_scontrol(ask(lab, SCONTROL, job))[job]
        before.setdefault(job, now)
        stop = why(before[job], now, at=time.time(), grace_s=grace_s, kill_wait_s=kill_wait_s)
        if stop.cause == "preempted" and not stop.requeued:
            before[job] = now
        return stop

    assert {cause(job).cause for job in jobs} == {"signalled"}
    lab.run("scancel", cancelled)
    assert wait_for(lambda: (s := cause(cancelled)).cause != "signalled" and s, 10, "a cause").cause == "cancelled"
    lab.run("scontrol", "requeue", requeued)
    stop = wait_for(lambda: (s := cause(requeued)).cause != "signalled" and s, 10, "a cause")
    assert (stop.cause, stop.requeued) == ("requeued", True)
    lab.run("scontrol", "update", "NodeName=node2", "State=DOWN", "Reason=test")
    stop = wait_for(lambda: (s := cause(broken)).cause != "signalled" and s, 10, "a cause")
    assert (stop.cause, stop.requeued) == ("node failure", True)
    lab.run("scancel", *jobs)

    preempted = lab.sbatch("--nodelist=node3", *submit[1:], "--exclusive", "--time=5")
    lab.wait_state(preempted, "RUNNING")
    assert cause(preempted).cause == "signalled"
    asked = time.time()
    lab.preempt(preempted)
    stop = wait_for(lambda: (s := cause(preempted)).cause != "signalled" and s, 10, "a cause")
    assert stop.cause == "preempted"
    assert asked + grace_s - 1 <= stop.deadline <= time.time() + grace_s
    lab.run("scancel", preempted)
    stop = wait_for(lambda: (s := cause(preempted)).cause != "preempted" and s, 10, "another cause")
    assert stop.cause == "cancelled"
