"""Where a launch runs on a cluster: submitted and followed, in an allocation, under srun, together with others."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import signal
import subprocess
import time
from pathlib import Path

import pytest
from job import LAUNCH, Job
from netns import wait_for

from lab import Settings

pytestmark = [pytest.mark.lab, pytest.mark.timeout(240)]

WHO = """
import json, os, socket, sys
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "LAUNCH_ATTEMPT")
facts = {n: os.environ[n] for n in names} | {"host": socket.gethostname(), "args": sys.argv[1:], "cwd": os.getcwd()}
print(json.dumps(facts | {"token": os.environ.get("LAUNCH_TOKEN"), "cpus": os.environ.get("SLURM_CPUS_PER_TASK")}))
"""


@pytest.fixture
def who(tmp_path):
    """A program that prints who it is, without torch."""
    path = tmp_path / "who.py"
    path.write_text(WHO)
    return path


def facts_of(folder: Path) -> list[dict]:
    logs = sorted((folder / "logs" / "attempt-0").glob("rank-*.log"))
    return [json.loads(path.read_text()) for path in logs]


def environment(tmp_path: Path) -> dict[str, str]:
    return {"OMP_NUM_THREADS": "1", "XDG_STATE_HOME": str(tmp_path / "state")}


def test_ranks_stand_in_slurms_order_and_get_their_words_byte_for_byte(lab, tmp_path, who):
    words = ["a b", "it's", '"q"', "$HOME", "`id`", "a\nb", "é", "*", "\\", ";", "--nodes", ""]
    job = Job.submit(
        lab, tmp_path, "--nodelist", "node2,node3", "--cpus-per-rank", "2", "--preload", "json", program=(who, *words)
    )
    assert job.wait_over()["status"] == "finished", job.story()
    facts = facts_of(job.folder)
    assert [(f["RANK"], f["LOCAL_RANK"], f["GROUP_RANK"], f["host"]) for f in facts] == [
        ("0", "0", "0", "node2"), ("1", "1", "0", "node2"), ("2", "0", "1", "node3"), ("3", "1", "1", "node3"),
    ]  # fmt: skip
    assert all(f["args"] == words and f["cwd"] == str(tmp_path) and f["token"] is None for f in facts)
    assert {f["cpus"] for f in facts} == {"4"}
    again = lab.run(LAUNCH, "-d", "--nodes", "2", "--procs", "2", "--run", "job", who, cwd=tmp_path)
    assert again.strip() == ""  # finished: nothing was submitted


def test_digits_end_as_they_do_here_and_a_second_terminal_sees_it(lab, tmp_path):
    digits = Path(__file__).parent.parent.parent / "examples" / "digits.py"
    words = (digits, "--epochs", "2", "--data", str(tmp_path / "data"))
    job = Job.submit(lab, tmp_path, program=words)
    code, seen = on_a_terminal(lab.words(LAUNCH, "logs", "-f", "job", cwd=tmp_path, environment=environment(tmp_path)))
    assert code == 0, seen
    assert job.wait_over()["status"] == "finished", job.story()
    here = subprocess.run(
        [LAUNCH, "--procs", "4", "--run", "here", *words], cwd=tmp_path, capture_output=True, text=True, timeout=120,
        env=lab.environment(environment(tmp_path)),
    )  # fmt: skip
    accuracy = re.compile(r"test accuracy (\S+)")
    assert accuracy.search(job.output)[1] == accuracy.search(here.stdout)[1] == accuracy.search(seen)[1]


def on_a_terminal(words: list[str], timeout: float = 120) -> tuple[int, str]:
    """Run a command on a terminal of its own; its exit code, and what the terminal showed."""
    ours, theirs = pty.openpty()
    seen = b""
    with subprocess.Popen(words, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True) as process:
        os.close(theirs)
        until = time.monotonic() + timeout
        try:
            while select.select([ours], [], [], max(0.0, until - time.monotonic()))[0]:
                seen += os.read(ours, 65536)
        except OSError:
            pass  # the last one has closed it
        finally:
            os.close(ours)
            if time.monotonic() >= until:
                process.kill()
    return process.returncode, seen.decode(errors="replace")


def test_followed_to_the_end_with_its_exit_code(lab, tmp_path):
    script = tmp_path / "fail.py"
    script.write_text("print('working', flush=True)\nraise SystemExit(7)\n")
    done = lab.try_run(
        LAUNCH, "--nodes", "1", "--procs", "1", "--preload", "json", script, cwd=tmp_path,
        environment=environment(tmp_path), timeout=120,
    )  # fmt: skip
    assert done.returncode == 7, done.stdout + done.stderr
    assert "[0] working" in done.stdout
    assert "rank 0 of 1 on node1" in done.stdout


def test_ctrl_c_detaches(lab, tmp_path, who):
    who.write_text("import time\nprint('up', flush=True)\ntime.sleep(600)\n")
    process = lab.popen(
        LAUNCH, "--nodes", "1", "--preload", "json", who, cwd=tmp_path, environment=environment(tmp_path),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        wait_for(lambda: "up" in process.stdout.readline(), 60, "the program's output")
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0
    (job_id,) = lab.queue()
    assert f"launch logs -f {job_id}" in said
    assert f"launch cancel {job_id}" in said
    assert lab.state(job_id) == "RUNNING"


def test_in_an_allocation_without_ceremony(lab, tmp_path, who):
    done = lab.try_run(
        "salloc", "--nodes=2", "--ntasks-per-node=1", LAUNCH, "--procs", "2", "--preload", "json", "--run", "mine", who,
        cwd=tmp_path, environment=environment(tmp_path), timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    hosts = [f["host"] for f in facts_of(tmp_path / "runs" / "mine")]
    assert hosts == sorted(hosts)
    assert len(set(hosts)) == 2


def test_under_srun_each_task_is_a_node(lab, tmp_path, who):
    words = [
        "srun",
        "--nodes=2",
        "--ntasks-per-node=1",
        LAUNCH,
        "--procs",
        "2",
        "--preload",
        "json",
        "--run",
        "mine",
        who,
    ]
    done = lab.try_run(*words, cwd=tmp_path, environment=environment(tmp_path), timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    facts = facts_of(tmp_path / "runs" / "mine")
    assert [(f["RANK"], f["GROUP_RANK"]) for f in facts] == [("0", "0"), ("1", "0"), ("2", "1"), ("3", "1")]
    assert facts[0]["host"] == facts[1]["host"] < facts[2]["host"] == facts[3]["host"]
    assert not any(f["MASTER_ADDR"].startswith("127.") for f in facts)
    words[2] = "--ntasks-per-node=2"
    refused = lab.try_run(*words, cwd=tmp_path, environment=environment(tmp_path))
    assert refused.returncode != 0
    assert "srun --ntasks-per-node=1" in refused.stderr


def test_a_dry_run_says_everything_and_does_nothing(lab, tmp_path, who):
    said = lab.run(
        LAUNCH, "--dry-run", "--nodes", "2", "--procs", "2", "--time", "5", "--setup", "module load x", who,
        cwd=tmp_path, environment=environment(tmp_path),
    )  # fmt: skip
    assert "#SBATCH --nodes=2" in said
    assert "#SBATCH --time=5" in said
    assert "module load x" in said
    assert "to start at" in said
    assert re.search(r"# rank 3: .*RANK=3 .*GROUP_RANK=1", said)
    assert not (tmp_path / "runs").exists()
    assert not lab.queue()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--partition", "nowhere"], "invalid partition"),
        (["--gpus", "9", "--nodes", "1"], "sbatch failed"),
        (["--nodes", "1", "--run", "/dev/shm/x"], "only this host sees"),
    ],
)
def test_what_cannot_be_is_said_at_once(lab, tmp_path, who, options, says):
    done = lab.try_run(LAUNCH, *options, who, cwd=tmp_path, environment=environment(tmp_path))
    assert done.returncode != 0
    assert says in done.stderr
    assert not lab.queue()


def test_eight_jobs_share_two_nodes(lab, tmp_path):
    program = tmp_path / "meet.py"
    program.write_text(
        "import os\nfrom torch.distributed import TCPStore\n"
        "e = os.environ\nstore = TCPStore(e['MASTER_ADDR'], int(e['MASTER_PORT']), None, False)\n"
        "store.add('n', 1)\nstore.set(e['LAUNCH_RUN_ID'] + e['RANK'], 'here')\n"
        "store.wait([e['LAUNCH_RUN_ID'] + r for r in '01'])\nprint('met')\n"
    )
    jobs = []
    for number in range(8):
        (cwd := tmp_path / str(number)).mkdir()
        jobs.append(Job.submit(lab, cwd, "--procs", "1", "--nodelist", "node1,node2", "--sbatch", "oversubscribe",
                               program=(program,)))  # fmt: skip
    for job in jobs:
        assert job.wait_over(timeout=180)["status"] == "finished", job.story()


def test_the_same_exception_at_the_same_step_ends_the_run(lab, tmp_path):
    program = ("train.py", "--every", "5", "--die-at", "7")
    job = Job.submit(lab, tmp_path, "--max-failures", "5", program=program)
    assert job.wait_over()["status"] == "failed", job.story()
    assert "the same exception at the same step, with no newer checkpoint" in job.state["cause"]
    assert [a.progress.began for a in job.history.attempts] == [0, 5]
    assert "ValueError: this step cannot be made" in job.output
    assert not job.markers


@contextlib.contextmanager
def followed(lab, tmp_path, *options):
    """A training that `launch` follows, in its fifth step: the process, the job."""
    words = [LAUNCH, "--nodes", "2", "--procs", "2", "--run", "job", *options, Path(__file__).with_name("train.py")]
    with open(tmp_path / "said", "wb") as said:
        process = lab.popen(*words, cwd=tmp_path, environment=environment(tmp_path), stdout=said, stderr=said)
    try:
        folder = tmp_path / "runs" / "job"
        wait_for(lambda: (folder / "slurm.json").exists(), 60, "the submission")
        job = Job(lab, folder, json.loads((folder / "slurm.json").read_text())["job_id"])
        job.wait_step(5)
        yield process, job
    finally:
        process.kill()
        process.wait()


def test_resubmitted_it_goes_on_as_another_job(lab, tmp_path):
    with followed(lab, tmp_path, "--requeue", "resubmit") as (process, job):
        lab.preempt(job.id)
        assert process.wait(120) == 0, job.story()
    assert job.wait_over()["status"] == "finished", job.story()
    first, second = (e["job_id"] for e in job.of("job"))
    assert (first, second) == (job.id, job.of("resubmitted")[0]["job_id"])
    assert job.history.attempts[1].progress.began == job.step(0)
    said = (tmp_path / "said").read_text()
    assert f"the run goes on as job {second}" in said
    assert "[0] step 60" in said


@pytest.mark.parametrize("lab", [Settings(cred_expire=120)], indirect=True)
def test_who_follows_lifts_the_hold_after_a_requeue(lab, tmp_path):
    with followed(lab, tmp_path) as (process, job):
        lab.preempt(job.id)
        # Alone it would wait for 120 s.
        job.wait(lambda: len(job.of("job")) == 2, "the next life", timeout=60)
        assert process.wait(120) == 0
