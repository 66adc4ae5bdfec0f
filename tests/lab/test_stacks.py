"""Where the ranks of a Slurm job are, and what they do, asked from the login node."""

from __future__ import annotations

import pytest
from job import LAUNCH, Job

pytestmark = [pytest.mark.lab, pytest.mark.timeout(180)]


def test_a_job_tells_its_stacks_and_what_its_ranks_do_and_goes_on(lab, tmp_path):
    job = Job.submit(lab, tmp_path)
    job.wait_step(5)
    here = {"cwd": tmp_path, "environment": {"XDG_STATE_HOME": str(tmp_path / "state")}}
    told = lab.run(LAUNCH, "stacks", job.id, **here)
    ranks = {
        n
        for line in told.splitlines()
        for n in line.partition(" ")[2].partition(" in ")[0].replace("-", ", ").split(", ")
    }
    assert ranks <= {"0", "1", "2", "3"}
    assert {"0", "3"} <= ranks, told
    assert "train.py" in told
    first, *_, last = lab.run(LAUNCH, "top", job.id, "--once", **here).splitlines()
    assert "running, 4 ranks on 2 nodes" in first
    assert "steps/s" in first
    assert last.split()[2] == "train"
    assert job.wait_over()["status"] == "finished", job.story()
