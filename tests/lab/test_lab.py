"""The lab is a real cluster: what Slurm promises its users holds on it, and it leaves no trace."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from netns import processes, wait_for

from lab import FOLDER, Lab, LabError, Settings

pytestmark = [pytest.mark.lab, pytest.mark.timeout(180)]

PATIENT = "trap '' TERM; for i in $(seq 600); do sleep 0.1; done"


def test_srun_reaches_every_node_and_a_node_sees_only_itself(lab):
    tell = "echo $(hostname) $(getent hosts $(hostname)) $SLURM_NODEID"
    out = lab.run("srun", "--nodes=3", "--label", "bash", "-c", tell)
    rows = sorted(line.split()[1:] for line in out.splitlines())
    assert rows == [[f"node{i}", f"10.77.0.{10 + i}", f"node{i}", str(i - 1)] for i in (1, 2, 3)]
    seen = lab.run("srun", "--nodelist=node2", "ps", "-A", "-o", "comm=").splitlines()
    assert "slurmd" in seen
    assert "slurmctld" not in seen


def test_nodes_reach_each_other_and_a_cut_cable_is_silence(lab):
    talk = "exec 3<>/dev/tcp/node2/6818"  # slurmd's port
    assert lab.try_run("srun", "--nodelist=node1", "bash", "-c", talk).returncode == 0
    lab.link_down("node2")
    assert lab.try_run("timeout", "0.5", "bash", "-c", talk).returncode == 124
    lab.link_up("node2")
    wait_for(lambda: lab.try_run("timeout", "0.5", "bash", "-c", talk).returncode == 0, 10, "node2 to be back")


def test_exit_codes_and_accounting(lab, tmp_path):
    job = lab.sbatch("--output=/dev/null", "--wrap=exit 7")
    lab.wait_state(job, "FAILED")
    wait_for(lambda: [(r["State"], r["ExitCode"]) for r in lab.sacct(job) if r["JobID"] == job] == [("FAILED", "7:0")],
             20, "accounting to have the end")  # fmt: skip


def test_generic_resources(lab):
    out = lab.run("srun", "--gres=gpu:3", "bash", "-c", "echo $CUDA_VISIBLE_DEVICES")
    assert out.strip() == "0,1,2"
    refused = lab.try_run("srun", "--gres=gpu:5", "true")
    assert refused.returncode != 0


def test_requeue_by_hand_keeps_the_id_and_counts(lab, tmp_path):
    job = lab.sbatch(
        "--open-mode=append", f"--output={tmp_path}/out", f"--wrap=echo run ${{SLURM_RESTART_COUNT:-0}}; {PATIENT}"
    )
    lab.wait_state(job, "RUNNING")
    lab.run("scontrol", "requeue", job)
    lab.wait_state(job, "PENDING", "REQUEUED")
    lab.wait_state(job, "RUNNING")
    wait_for(lambda: (tmp_path / "out").read_text().splitlines()[-1] == "run 1", 10, "the second run's line")
    assert lab.job(job)["Restarts"] == "1"


def test_preemption_warns_the_steps_and_a_requeue_goes_on(lab, tmp_path):
    # Only the steps hear of a preemption. Slurm 22.05 does not requeue a job that leaves within the grace, so the
    # batch script does.
    script, out = tmp_path / "job.sh", tmp_path / "out"
    script.write_text(
        "#!/bin/bash\n"
        '[ -n "$SLURM_RESTART_COUNT" ] && { echo again; exit; }\n'
        'srun bash -c \'trap "echo step TERM; stop=1" TERM; echo up;'
        f"  until [ $stop ] && [ -e {tmp_path}/go ]; do sleep 0.1; done'\n"
        "scontrol requeue $SLURM_JOB_ID; sleep 60\n"
    )
    job = lab.sbatch("--nodes=3", "--exclusive", "--open-mode=append", f"--output={out}", script)
    wait_for(lambda: out.exists() and out.read_text().count("up\n") == 3, 20, "three steps")
    lab.preempt(job)
    wait_for(lambda: out.read_text().count("step TERM") == 3, 20, "the warning")
    assert lab.job(job)["PreemptTime"] != "None"
    (tmp_path / "go").touch()
    lab.wait_state(job, "COMPLETED", timeout=60)
    lines = out.read_text().splitlines()
    assert lines[-1] == "again"
    assert lab.job(job)["Restarts"] == "1"


def test_arrays_run_throttled_and_each_element_has_its_state(lab, tmp_path):
    job = lab.sbatch(
        "--array=0-5%2",
        f"--output={tmp_path}/%a",
        "--wrap=echo $SLURM_ARRAY_TASK_ID; exit $((SLURM_ARRAY_TASK_ID == 4))",
    )
    wait_for(lambda: not lab.queue(), 60, "the array")
    assert sorted(p.read_text().strip() for p in tmp_path.iterdir()) == list("012345")
    states = {i: lab.state(f"{job}_{i}") for i in range(6)}
    assert states == {i: "FAILED" if i == 4 else "COMPLETED" for i in range(6)}


def test_submitit_runs_a_function(lab, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import operator, sys, submitit\n"
        "executor = submitit.SlurmExecutor(sys.argv[1])\n"
        "executor.update_parameters(partition='main', time=2)\n"
        "job = executor.submit(operator.mul, 6, 7)\n"
        "job.wait()\n"
        "print(job.result())\n"
    )
    out = lab.run(sys.executable, "-W", "ignore", program, tmp_path / "folder", cwd=tmp_path)
    assert out.strip() == "42"


def test_a_dead_node_is_silent_and_its_job_starts_elsewhere(lab):
    job = lab.sbatch("--nodes=1", "--output=/dev/null", f"--wrap={PATIENT}")
    node = lab.wait_state(job, "RUNNING")["NodeList"]
    wait_for(lambda: lab.node_processes(node), 10, "the job")
    lab.kill_node(node)
    assert node not in lab.network.hosts()
    assert lab.try_run("timeout", "0.5", "bash", "-c", f"exec 3<>/dev/tcp/{node}/6818").returncode == 124
    # slurmctld takes up to half a minute to see it for itself.
    lab.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=dead")
    again = lab.wait_state(job, "RUNNING", timeout=30)
    assert again["NodeList"] != node
    assert again["Restarts"] == "1"


def test_slurmd_killed_leaves_its_steps_running(lab):
    job = lab.sbatch("--nodelist=node1", "--output=/dev/null", f"--wrap={PATIENT}")
    wait_for(lambda: any("slurm_script" in p.command for p in lab.node_processes("node1")), 10, "the batch script")
    lab.kill_slurmd("node1")
    assert any("slurm_script" in p.command for p in lab.node_processes("node1"))
    assert lab.state(job) == "RUNNING"


def test_controller_and_accounting_come_and_go(lab):
    lab.restart_slurmctld()
    lab.stop_slurmdbd()
    assert lab.try_run("sacct").returncode != 0
    assert lab.run("srun", "hostname").startswith("node")


@pytest.mark.parametrize("lab", [Settings(accounting=False, min_job_age=2)], indirect=True)
def test_without_accounting_jobs_run_and_sacct_says_no(lab):
    job = lab.sbatch("--output=/dev/null", "--wrap=true")
    lab.wait_state(job, "COMPLETED")
    refused = lab.try_run("sacct", "-j", job)
    assert refused.returncode != 0
    assert "accounting" in refused.stderr.lower()


@pytest.mark.parametrize("lab", [Settings(proctrack="cgroup", accounting=False)], indirect=True)
def test_cgroups_hold_a_job_whatever_it_does(lab):
    job = lab.sbatch("--nodes=2", "--output=/dev/null",
                     "--wrap=srun bash -c 'setsid --fork setsid --fork sleep 600; sleep 600'")  # fmt: skip

    def sleepers():
        return [p for n in ("node1", "node2") for p in lab.node_processes(n) if p.command == "sleep 600"]

    wait_for(lambda: len(sleepers()) == 4, 20, "all sleepers")
    lab.run("scancel", job)
    wait_for(lambda: not sleepers(), 20, "their end")


def test_nothing_is_left_and_a_crashed_session_is_cleaned_up(cluster):
    lab = cluster(Settings())
    old = lab.network.hosts()
    assert set(old) == {"head", "login", "node1", "node2", "node3"}
    # As after a crash: the folder is there, hosts run, and nobody remembers them.
    (FOLDER / "settings.json").unlink()
    again = Lab.up(Settings(accounting=False))
    assert not any(host.alive() for host in old.values())
    assert again.run("srun", "hostname").startswith("node")
    again.down()
    assert not again.network.hosts()
    assert not FOLDER.exists()
    assert f"{FOLDER}/" not in Path("/proc/mounts").read_text()
    assert "node1" not in Path("/etc/hosts").read_text()
    links = subprocess.run(["ip", "-o", "link"], capture_output=True, text=True, check=True).stdout
    assert "bridge0" not in links
    assert "node1" not in links
    wait_for(lambda: not [pid for pid in processes() if _mentions(pid)], 5, "the last process")


def _mentions(pid: int) -> bool:
    """Whether a process other than our own family was started with the lab's folder among its words."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
    return any(f"{FOLDER}{end}".encode() in words for end in "/:")


def test_a_wish_that_cannot_be_is_refused_before_anything_starts(lab):
    with pytest.raises(LabError, match="no host 'node9'"):
        lab.node_processes("node9")
