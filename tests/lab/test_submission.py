"""Submission through submitit on a real cluster: one job, arrays, calls; with sacct, without it, and inside a job."""

from __future__ import annotations

import sys

import pytest
from netns import wait_for

from lab import Settings

pytestmark = [pytest.mark.lab, pytest.mark.timeout(180)]

NO_ACCOUNTING = pytest.mark.parametrize("lab", [Settings(accounting=False, min_job_age=2)], indirect=True)

# The command of a job that runs a pickled call, as `launcher.submit` will have one.
BODY = """
import os, pathlib, sys, time
from submitit.core.utils import DelayedSubmission, JobPaths, cloudpickle_dump, temporary_save_path
e = os.environ
job = f"{e['SLURM_ARRAY_JOB_ID']}_{e['SLURM_ARRAY_TASK_ID']}" if "SLURM_ARRAY_JOB_ID" in e else e["SLURM_JOB_ID"]
paths = JobPaths(sys.argv[1], job)
while not paths.submitted_pickle.exists(): time.sleep(0.01)
with temporary_save_path(paths.result_pickle) as path:
    cloudpickle_dump(("success", DelayedSubmission.load(paths.submitted_pickle).result()), path)
"""


@pytest.fixture
def on_login(lab, tmp_path):
    """Run Python lines on the login node; what they print is returned, one item per line."""

    def run(lines, **variables):
        program = tmp_path / "program.py"
        (tmp_path / "body.py").write_text(BODY)
        program.write_text(
            "import operator, os, sys, time\n"
            "from pathlib import Path\n"
            "from launcher.backends.slurm_submission import BatchExecutor, BatchJob\n"
            "from launcher.errors import LaunchError\n"
            f"folder, body = Path({str(tmp_path / 'a folder')!r}), {str(tmp_path / 'body.py')!r}\n" + lines
        )
        done = lab.try_run(sys.executable, "-W", "error", program, cwd=tmp_path, environment=variables)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    return run


CALL = """
executor = BatchExecutor(folder, [sys.executable, body, str(folder)], options={"job-name": "a 'b' \\"c\\"", "time": 2},
                         throttle=2)
"""
CALLS = (
    CALL
    + """
job = executor.submit(operator.mul, 6, 7)
jobs = executor.map_array(operator.add, [1, 2, 3], [10, 20, 30])
print(job.result(), [j.result() for j in jobs])
states = job.watcher
while not all(states.is_done(j.job_id, mode="force") for j in [job, *jobs]): time.sleep(0.1)
print([j.state for j in [job, *jobs]], states.record(job.job_id).exit_code)
print(sorted(p.name.partition("_")[2] for p in folder.iterdir() if p.name.startswith(jobs[0].job_id.split("_")[0])))
"""
)


def test_calls_return_their_results(on_login):
    results, states, files = on_login(CALLS)
    assert results == "42 [11, 22, 33]"
    assert states == "['COMPLETED', 'COMPLETED', 'COMPLETED', 'COMPLETED'] 0"
    per_element = [f"{i}_{name}" for i in range(3) for name in ("0_log.out", "0_result.pkl", "submitted.pkl")]
    assert files == str(sorted([*per_element, "submission.sh"]))


@NO_ACCOUNTING
def test_calls_without_accounting(on_login):
    assert on_login(CALLS)[0] == "42 [11, 22, 33]"


@NO_ACCOUNTING
def test_a_job_that_nobody_knows_any_more_is_lost_and_awaited_no_longer(lab, on_login):
    job_id = on_login(
        "executor = BatchExecutor(folder, ['/bin/false'], options={})\nprint(executor.submit_batch()[0].job_id)\n"
    )[0]
    wait_for(lambda: lab.state(job_id) == "UNKNOWN", 100, "slurmctld to forget the job")
    assert on_login(f"job = BatchJob(folder, {job_id!r})\nprint(job.done(), job.state)\n") == ["True LOST"]


def test_states_of_an_array_in_every_stage(lab, on_login):
    ids, states = on_login(
        "body = 'test $SLURM_ARRAY_TASK_ID != 6 || sleep 60; exit $SLURM_ARRAY_TASK_ID'\n"
        "executor = BatchExecutor(folder, ['/bin/bash', '-c', body], options={'hold': True})\n"
        "jobs = executor.submit_batch('0-6:3%1')\n"
        "print([j.job_id.split('_')[1] for j in jobs])\n"
        "first = [j.state for j in jobs]\n"
        "os.system('scontrol release ' + jobs[0].job_id.split('_')[0])\n"
        "while jobs[2].state != 'RUNNING': jobs[0].watcher.update(); time.sleep(0.1)\n"
        "jobs[2].cancel()\n"
        "while not all(j.done(force_check=True) for j in jobs): time.sleep(0.1)\n"
        "print(first, [j.state for j in jobs])\n"
    )
    assert ids == "['0', '3', '6']"
    assert states == "['PENDING', 'PENDING', 'PENDING'] ['COMPLETED', 'FAILED', 'CANCELLED']"


def test_states_stand_while_slurmctld_is_away(lab, on_login, tmp_path):
    process = lab.popen(
        sys.executable, "-c",
        "import pathlib, time\n"
        "from launcher.backends.slurm_submission import BatchExecutor\n"
        f"here = pathlib.Path({str(tmp_path)!r})\n"
        "job = BatchExecutor(here / 'f', ['/bin/sleep', '60'], options={}).submit_batch()[0]\n"
        "while job.state != 'RUNNING': job.watcher.update(); time.sleep(0.1)\n"
        "(here / 'running').touch()\n"
        "while not (here / 'away').exists(): time.sleep(0.05)\n"
        "assert not job.done(force_check=True)\n"
        "assert job.state == 'RUNNING', job.state\n",
    )  # fmt: skip
    try:
        wait_for(lambda: (tmp_path / "running").exists() or process.poll() is not None, 30, "the job to run")
        lab.kill_slurmctld()
        lab.stop_slurmdbd()
        (tmp_path / "away").touch()
        assert process.wait(90) == 0
    finally:
        process.kill()
        process.wait()


def test_a_job_submits_a_job_that_knows_nothing_of_it(lab, on_login, tmp_path):
    inner = "import os; print(sorted(n for n in os.environ if n.startswith('SLURM_') and 'OUTER' in os.environ[n]))"
    program = tmp_path / "outer.py"
    program.write_text(
        "import pathlib, sys\n"
        "from launcher.backends.slurm_submission import BatchExecutor\n"
        f"folder, command = pathlib.Path({str(tmp_path / 'inner')!r}), [sys.executable, '-c', {inner!r}]\n"
        "executor = BatchExecutor(folder, command, options={})\n"
        "print(executor.submit_batch()[0].job_id, flush=True)\n"
    )
    job = lab.sbatch(f"--output={tmp_path}/outer.out",
                     f"--wrap=SLURM_CPU_BIND=OUTER SLURM_NTASKS=OUTER {sys.executable} {program}")  # fmt: skip
    lab.wait_state(job, "COMPLETED")
    inner_id = (tmp_path / "outer.out").read_text().strip()
    lab.wait_state(inner_id, "COMPLETED")
    assert (tmp_path / "inner" / f"{inner_id}_0_log.out").read_text().strip() == "[]"


def test_what_slurm_refuses_is_told_in_its_words_and_leaves_nothing(on_login):
    tested, refused, left, good = on_login(
        "executor = BatchExecutor(folder, ['/bin/true'], options={'partition': 'nowhere'})\n"
        "for attempt in (executor.test, lambda: executor.submit(print)):\n"
        "    try: attempt()\n"
        "    except LaunchError as error: print(str(error).replace(chr(10), ' '))\n"
        "print([p.name for p in folder.iterdir()])\n"
        "print(BatchExecutor(folder, ['/bin/true'], options={'nodes': 2}).test())\n"
    )
    for words in (tested, refused):
        assert "sbatch failed with code 1" in words
        assert "invalid partition" in words
    assert left == "[]"
    assert "to start at" in good


def test_a_folder_that_would_be_taken_for_a_pattern(on_login):
    said, output = on_login(
        "try: BatchExecutor(Path('/tmp/a%jb'), ['/bin/true'], options={})\n"
        "except LaunchError as error: print(error)\n"
        "odd = folder / '100%'\n"
        "job = BatchExecutor(odd, ['/bin/echo', 'here'], options={}).submit_batch()[0]\n"
        "while not (job.stdout() or ''): time.sleep(0.05)\n"
        "print(job.stdout().strip())\n"
    )
    assert "/tmp/a%jb" in said
    assert output == "here"
