"""Where the ranks of a Slurm job are, asked from the login node."""

from __future__ import annotations

import pytest
from job import LAUNCH, Job

pytestmark = [pytest.mark.lab, pytest.mark.timeout(180)]


def test_stacks_of_a_job_are_told_and_it_goes_on(lab, tmp_path):
    job = Job.submit(lab, tmp_path)
    job.wait_step(5)
    told = lab.run(LAUNCH, "stacks", job.id, cwd=tmp_path, environment={"XDG_STATE_HOME": str(tmp_path / "state")})
    ranks = {
        n
        for line in told.splitlines()
        for n in line.partition(" ")[2].partition(" in ")[0].replace("-", ", ").split(", ")
    }
    assert ranks <= {"0", "1", "2", "3"}
    assert {"0", "3"} <= ranks, told
    assert "train.py" in told
    assert job.wait_over()["status"] == "finished", job.story()
