from __future__ import annotations

from dataclasses import replace

import pytest

from launcher.backends.slurm_records import JobRecord
from launcher.backends.slurm_stop import Stop, grace_of_partition, kill_wait_of_config, lead, why
from launcher.errors import ClusterError

RUNS = JobRecord(
    job_id="9", raw_id="9", state="RUNNING", source="controller", start=1000.0, end=1600.0, limit_s=600.0, restarts=0,
    nodes=("node1", "node2"),
)  # fmt: skip
LIMITLESS = replace(RUNS, end=None, limit_s=None)
GRACE = replace(RUNS, preempted=1099.0, end=1119.0)
NEXT_LIFE = replace(RUNS, state="COMPLETING", restarts=1, start=1100.0, end=1700.0)


@pytest.mark.parametrize(
    ("before", "now", "stop"),
    [
        (RUNS, GRACE, Stop("preempted", 1119.0)),
        (LIMITLESS, replace(LIMITLESS, preempted=1099.0), Stop("preempted", 1119.0)),
        (LIMITLESS, replace(LIMITLESS, preempted=1099.0, end=9e8, limit_s=9e7), Stop("preempted", 1119.0)),
        (RUNS, replace(GRACE, end=1105.0), Stop("preempted", 1105.0)),  # its time limit is nearer than the grace
        (GRACE, NEXT_LIFE, Stop("preempted", 1105.0, requeued=True)),
        (GRACE, replace(GRACE, state="COMPLETING", preempted=1080.0), Stop("preempted", 1105.0)),  # PreemptMode=CANCEL
        (GRACE, replace(GRACE, state="COMPLETING"), Stop("cancelled", 1105.0)),  # by scancel, in the grace
        (RUNS, NEXT_LIFE, Stop("requeued", 1105.0, requeued=True)),
        (RUNS, replace(NEXT_LIFE, state="PENDING", nodes=()), Stop("requeued", 1105.0, requeued=True)),
        (RUNS, replace(NEXT_LIFE, nodes=("node2",)), Stop("node failure", 1105.0, requeued=True, nodes=("node1",))),
        (RUNS, replace(RUNS, state="NODE_FAIL"), Stop("node failure", 1105.0)),
        (RUNS, replace(RUNS, state="COMPLETING", reason="TimeLimit"), Stop("time limit", 1105.0)),
        (RUNS, replace(RUNS, state="TIMEOUT"), Stop("time limit", 1105.0)),
        (RUNS, replace(RUNS, state="COMPLETING", end=1100.0), Stop("cancelled", 1105.0)),
        (RUNS, replace(RUNS, state="CANCELLED"), Stop("cancelled", 1105.0)),
        (RUNS, RUNS, Stop("signalled", 1600.0)),
        (LIMITLESS, LIMITLESS, Stop("signalled", None)),
        (RUNS, None, Stop("unknown", None)),
    ],
)
def test_cause_and_deadline(before, now, stop):
    assert why(before, now, at=1100.0, grace_s=20.0, kill_wait_s=5.0) == stop


@pytest.mark.parametrize(
    ("limit_s", "save_s", "told"),
    [
        (86400, None, 60),
        (120, None, 30),  # a quarter of a short limit
        (86400, 0.5, 15),
        (86400, 100, 160),
        (300, 1000, 150),  # it cannot save in time: half of the limit is for training all the same
        (40, 0.5, 10.75),
    ],
)
def test_the_time_before_a_limit_is_learned_from_saves(limit_s, save_s, told):
    assert lead(limit_s, save_s) == told


def test_the_times_of_a_cluster():
    assert grace_of_partition("   DefaultTime=NONE DisableRootJobs=NO GraceTime=20 Hidden=NO\n") == 20.0
    assert kill_wait_of_config("KeepAliveTime           = SYSTEM_DEFAULT\nKillWait                = 5 sec\n") == 5.0
    for read in (grace_of_partition, kill_wait_of_config):
        with pytest.raises(ClusterError, match="without"):
            read("slurm_load error")
