"""`launch doctor` on machines that are ill, by ssh, and as a Slurm job."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from job import LAUNCH, Job
from netns import wait_for

pytestmark = [pytest.mark.lab, pytest.mark.timeout(180)]


@pytest.mark.ssh
def test_ill_machines_are_named_and_what_is_well_is_green(machines, tmp_path):
    bob, cyd = machines.host("bob"), machines.host("cyd")
    (daemon,) = (p for p in bob.processes() if "sshd" in p.command)
    bob.run("mount", "-o", "remount,size=64M", "/dev/shm")
    subprocess.run(["prlimit", "--pid", str(daemon.pid), "--nofile=1024:1024"], check=True)  # there is no way back
    cyd.run("ip", "route", "add", "blackhole", "10.77.0.11/32")
    (tmp_path / "requirements.txt").write_text("click\nno-such-package\n")
    try:
        done = machines.popen(LAUNCH, "doctor", "--hosts", "ada,bob,cyd,nowhere", "--json", cwd=tmp_path,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip
        out, err = done.communicate(timeout=150)
    finally:
        cyd.run("ip", "route", "del", "blackhole", "10.77.0.11/32")
        bob.run("mount", "-o", "remount,size=1G", "/dev/shm")
    assert done.returncode == 1, err
    found = {f["check"]: f for f in json.loads(out)}
    told = {name: f["found"] for name, f in found.items() if f["status"] == "bad"}
    assert set(told) == {"machines", "packages", "/dev/shm", "open files", "ports"}, found
    assert "1 of 4 could not be examined: nowhere: ssh: Could not resolve hostname" in told["machines"]
    assert "no-such-package is absent" in told["packages"]
    assert told["/dev/shm"].startswith("bob: 64 MiB of 64 MiB free")
    assert "bob: 1024 (up to 1024)" in told["open files"]
    assert "ada does not reach cyd (10.77.0.13 port" in told["ports"]
    assert "cyd does not reach ada (10.77.0.11 port" in told["ports"]
    assert "bob" not in told["ports"]
    assert all(found[check]["status"] == "ok" for check in ("interpreter", "shared folder", "clocks", "TMPDIR"))
    assert found["all-reduce"]["found"] == "not tried: not all reach each other: ada, cyd"
    assert [p.name for p in tmp_path.iterdir()] == ["requirements.txt"]
    assert not machines.left("launcher")


MANY = """
from pathlib import Path
from launcher.doctor.examination import Machine, Report, _Ward
from launcher.doctor.ways import by_ssh
names = [f"far-{i}" for i in range(40)]
report = Report({}, [Machine(name) for name in names])
with by_ssh(names, "/tmp") as ways, _Ward(ways, report) as ward:
    ward.gather()
    print(len(ward.present), [m.gone for m in report.machines if m.gone])
"""


@pytest.mark.ssh
def test_forty_logins_at_once_through_a_jump_host_that_drops_some(machines, tmp_path):
    (tmp_path / "many.py").write_text(MANY)
    done = machines.popen(sys.executable, "many.py", cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert done.communicate(timeout=150)[0] == "40 []\n"
    assert "past MaxStartups" in (machines.folder / "sshd-ada.log").read_text()
    machines.wait_empty("launcher", 30, "the end of all hands")


def test_nodes_of_a_partition_are_examined_by_a_job_and_preemption_is_explained(lab, tmp_path):
    words = (LAUNCH, "doctor", "--partition", "main", "--nodes", "2", "--json")
    found = {f["check"]: f for f in json.loads(lab.run(*words, cwd=tmp_path))}
    assert {f["status"] for name, f in found.items() if name != "GPUs"} <= {"ok", "poor"}, found
    assert found["machines"]["found"].count("node") == 2
    assert "each reaches each on a free port: 2 pairs" in found["ports"]["found"]
    assert "gloo, 2 ranks" in found["all-reduce"]["found"]
    assert "a job in urgent may preempt it: SIGTERM, then 20 s to save" in found["preemption"]["found"]
    assert "5 s (KillWait)" in found["time limits"]["found"]
    assert not list(tmp_path.iterdir())


@pytest.mark.soak
def test_a_job_that_is_preempted_while_its_nodes_are_looked_at_goes_on(lab, tmp_path):
    job = Job.submit(lab, tmp_path, "--preflight")
    wait_for(lambda: "reaching 2 machines" in job.output, 60, "the preflight")
    lab.preempt(job.id, 5)
    assert job.wait_over(120)["status"] == "finished", job.story()
    assert len(job.of("requeued")) == 1
    assert "while the nodes were looked at" in str(job.of("end")[0])
