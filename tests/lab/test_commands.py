"""ls, show, logs, wait, cancel, retry beside a real Slurm: with accounting, without it, and after it has forgotten."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from netns import wait_for
from test_arrays import Project

from lab import LabError, Settings

pytestmark = [pytest.mark.lab, pytest.mark.timeout(300)]

TEMPLATES = Path(__file__).parent.parent.parent / "slurm"
NO_ACCOUNTING = pytest.mark.parametrize("lab", [Settings(accounting=False, min_job_age=2)], indirect=True)
SUBMIT = ["-d", "--nodes", "1", "--procs", "1", "--no-preload", "--no-snapshot"]

JOB = """
import os, signal, sys, time
print("attempt", os.environ["LAUNCH_ATTEMPT"], "of", sys.argv[1], flush=True)
if sys.argv[1] == "bad": sys.exit(5)
if sys.argv[1] == "long":
    signal.signal(signal.SIGTERM, lambda *_: os._exit(75))
    while True: time.sleep(60)
"""


@pytest.fixture
def project(lab, tmp_path):
    (tmp_path / "job.py").write_text(JOB)
    return Project(lab, tmp_path)


def four_runs(project: Project) -> dict[str, str]:
    """One that finishes, one that fails, one that runs, one that is cancelled before it begins: name -> job."""
    jobs = {}
    for name in ("ok", "bad", "long", "held"):
        hold = ["--sbatch", "hold"] if name == "held" else []
        jobs[name] = project.launch(*SUBMIT, *hold, "--run", name, "job.py", name).strip()
    assert project.standings("held")["held"]["status"] == "waiting"
    assert project.launch("cancel", "held") == f"held: scancel {jobs['held']}\n"
    project.launch("wait", "ok")
    project.launch("wait", jobs["bad"], code=5)
    wait_for(lambda: "attempt 0 of long" in project.launch("logs", "long", code=None), 60, "the long run's first words")
    return jobs


def check(project: Project, jobs: dict[str, str], held: str) -> None:
    found = project.standings()
    assert {name: one["status"] for name, one in found.items()} == {
        "ok": "finished", "bad": "failed", "long": "running", "held": held,
    }  # fmt: skip
    assert {name: one["job_id"] for name, one in found.items()} == jobs
    assert found["bad"]["code"] == 5
    assert project.launch("logs", jobs["ok"]) == "attempt 0 of ok\n"
    shown = project.launch("show", jobs["bad"])
    assert "exited with code 5" in shown
    assert jobs["bad"] in shown


def test_with_accounting_and_when_slurmdbd_dies(lab, project) -> None:
    jobs = four_runs(project)
    wait_for(lambda: project.standings("held")["held"]["status"] == "stopped", 30, "scancel to be known")
    check(project, jobs, "stopped")
    lab.stop_slurmdbd()
    check(project, jobs, "stopped")
    follower = lab.popen(*follow(project, "long"), cwd=project.folder, environment=project.environment,
                         stdout=subprocess.PIPE, text=True)  # fmt: skip
    try:
        assert follower.stdout.readline() == "attempt 0 of long\n"
        assert "scancel" in project.launch("cancel", "long")
        assert follower.wait(90) == 75
    finally:
        follower.kill()
        follower.communicate()
    assert project.standings("long")["long"]["status"] == "stopped"
    assert "cancelled" in project.launch("show", "long")
    lab.start_slurmdbd()
    again = project.launch("retry", "-d", "long").strip()
    assert again not in jobs.values()
    wait_for(lambda: "attempt 1 of long" in project.launch("logs", again), 60, "the second attempt")
    attempts = json.loads(project.launch("show", "--json", "long"))[0]["history"]["attempts"]
    assert [a["status"] for a in attempts] == ["stopped", "running"]
    assert attempts[1]["waited_s"] > 0


def follow(project: Project, name: str) -> list[str | Path]:
    return [Path(sys.executable).with_name("launch"), "logs", "-f", name]


@NO_ACCOUNTING
def test_without_accounting_long_after_slurm_has_forgotten(lab, project) -> None:
    jobs = four_runs(project)
    forgotten = [jobs[name] for name in ("ok", "bad", "held")]
    wait_for(lambda: {lab.state(job) for job in forgotten} == {"UNKNOWN"}, 150, "slurmctld to forget the jobs")
    check(project, jobs, "lost")  # cancelled before it began, and nobody was there to record it
    project.launch("wait", "held", code=1)
    project.launch("cancel", "long")
    project.launch("wait", "long", code=75)


def test_slurmctld_down_leaves_what_is_recorded(lab, project) -> None:
    job = project.launch(*SUBMIT, "--run", "long", "job.py", "long").strip()
    wait_for(lambda: "attempt 0 of long" in project.launch("logs", job, code=None), 60, "the run's first words")
    lab.kill_slurmctld()
    done = lab.try_run(
        Path(sys.executable).with_name("launch"), "ls", cwd=project.folder, environment=project.environment
    )
    assert "long  running" in done.stdout
    assert "as last recorded: squeue" in done.stderr
    lab.start_slurmctld()


def test_the_code_is_that_of_the_submission_after_a_requeue_too(lab, project) -> None:
    subprocess.run(["git", "init", "-q", project.folder], check=True)
    (project.folder / "helper.py").write_text("VALUE = 'as submitted'")
    (project.folder / "job.py").write_text("import helper; print(helper.VALUE, flush=True)\n" + JOB)
    job = project.launch("-d", "--nodes", "1", "--procs", "1", "--run", "long", "job.py", "long").strip()
    wait_for(lambda: "attempt 0" in project.launch("logs", job, code=None), 60, "the first attempt")
    (project.folder / "helper.py").write_text("VALUE = 'edited since'")
    lab.run("scontrol", "requeue", job)
    wait_for(lambda: "attempt 1" in project.launch("logs", job, code=None), 90, "the second attempt")
    assert project.launch("logs", job) == "as submitted\nattempt 1 of long\n"
    first = json.loads(project.launch("show", "--json", job))[0]["history"]["attempts"][0]
    assert first["cause"].startswith("requeued")


CALLS = """
import os, launcher
def rank(x): return x, int(os.environ["RANK"]), os.environ["SLURM_JOB_PARTITION"]
job = launcher.submit(rank, "a", nodes=2, procs=2, no_snapshot=True, run="called")
jobs = launcher.map_array(rank, [1, 2, 3], array="%2", nodes=1, procs=1, no_snapshot=True, partition="main")
print(job.job_id.isdigit(), sorted({j.job_id.split("_")[0] for j in jobs}) != [job.job_id])
print(job.results())
print([j.result() for j in jobs], {j.state for j in [job, *jobs]})
"""


def test_functions_as_jobs_and_a_site_s_defaults(lab, project) -> None:
    (project.folder / "calls.py").write_text(CALLS)
    (project.folder / "site.toml").write_text("partition = 'urgent'\n")
    environment = project.environment | {"LAUNCH_SITE_CONFIG": str(project.folder / "site.toml")}
    said = lab.run(sys.executable, "-W", "error", "calls.py", cwd=project.folder, timeout=200, environment=environment)
    ids, one, several = said.splitlines()
    assert ids == "True True"
    assert one == str([("a", rank, "urgent") for rank in range(4)])
    assert several == str([(x, 0, "main") for x in (1, 2, 3)]) + " {'COMPLETED'}"


@pytest.mark.parametrize("template", ["nodes", "array", "srun"])
def test_each_template_runs(lab, project, template) -> None:
    (project.folder / "job.py").write_text(
        "import os, sys\nfrom pathlib import Path\n"
        "Path(f\"said-{os.environ['RANK']}-{os.environ.get('SLURM_ARRAY_TASK_ID', '')}\").write_text("
        "os.environ['WORLD_SIZE'] + ' ' + ' '.join(sys.argv[1:]))\n"
    )
    smaller = ["--array=0-2%2"] if template == "array" else []
    job = lab.sbatch(*smaller, "--cpus-per-task=2", TEMPLATES / f"{template}.sbatch", "--procs", "2", "job.py", "--x",
                     cwd=project.folder, environment=project.environment)  # fmt: skip
    try:
        wait_for(lambda: job not in {j.split("_")[0] for j in lab.queue()}, 90, f"the end of {template}.sbatch")
    except LabError as error:
        pytest.fail(f"{error}\n" + "\n".join(p.read_text() for p in project.folder.glob("*.log")))
    said = {p.name: p.read_text() for p in project.folder.glob("said-*")}
    logs = "\n".join(p.read_text() for p in project.folder.glob("*.log"))
    if template == "array":
        assert said == {f"said-{r}-{i}": f"2 --x --seed={i}" for r in range(2) for i in range(3)}, logs
    else:
        assert said == {f"said-{r}-": "4 --x" for r in range(4)}, logs
    assert {one["status"] for one in project.standings().values()} == {"finished"}
