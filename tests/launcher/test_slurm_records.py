from __future__ import annotations

import dataclasses

import pytest

from launcher.backends.slurm_records import (
    OVER,
    SACCT,
    SQUEUE,
    JobRecord,
    merge,
    query_environment,
    read_sacct,
    read_scontrol,
    read_squeue,
)
from launcher.errors import ClusterError

# Every text below was printed by Slurm 22.05.8.
QUEUE = """\
1_[2-3%2]|1|PENDING|1795252660|N/A|N/A|UNLIMITED||JobArrayTaskLimit
3|3|PENDING|1795252660|N/A|N/A|UNLIMITED||JobHeldUser
1_0|5|RUNNING|1795252660|1795252660|1826788660|365-00:00:00|node1|None
16|16|RUNNING|1795252799|1795252799|1795253399|10:00|node[1-2]|None
4|4|FAILED|1795252660|1795252660|1795252660|365-00:00:00|node1|JobLaunchFailure
"""

ACCOUNTS = """\
16|16|REQUEUED|1795252799|1795252799|1795252800|00:10:00|node[1-2]|0:0|None
14_[0-8:4]|14|CANCELLED by 0|1795252799|1795252800|1795252800|Partition_Limit|None assigned|0:0|JobHeldUser
4|4|FAILED|1795252660|1795252660|1795252660|365-00:00:00|node1|0:9|None
16|16|CANCELLED by 0|1795252801|1795252807|1795252808|00:10:00|node[1-2]|3:0|BeginTime
1_2|7|RUNNING|1795252660|1795252700|Unknown|UNLIMITED|node1|0:0|None
"""

SHOWN = """\
JobId=16 JobName=a b|c=d JobState=FAILED
   UserId=root(0) GroupId=root(0) MCS_label=N/A
   Priority=4294901756 Nice=0 Account=root QOS=normal
   JobState=RUNNING Reason=None Dependency=(null)
   Requeue=1 Restarts=2 BatchFlag=1 Reboot=0 ExitCode=0:0
   RunTime=00:00:00 TimeLimit=00:10:00 TimeMin=N/A
   SubmitTime=1795252799 EligibleTime=1795252799
   AccrueTime=1795252799
   StartTime=1795252799 EndTime=1795253399 Deadline=N/A
   PreemptEligibleTime=1795252799 PreemptTime=1795253000
   SuspendTime=None SecsPreSuspend=0 LastSchedEval=1795252799 Scheduler=Main
   Partition=main AllocNode:Sid=head:25940
   ReqNodeList=(null) ExcNodeList=(null)
   NodeList=node[1-2]
   BatchHost=node1
   NumNodes=2 NumCPUs=2 NumTasks=2 CPUs/Task=1 ReqB:S:C:T=0:0:*:*
   WorkDir=/tmp/JobState=CANCELLED
   Comment=JobState=FAILED Restarts=9 x 
   Power=
   

JobId=5 ArrayJobId=1 ArrayTaskId=0 ArrayTaskThrottle=2 JobName=wrap
   JobState=RUNNING Reason=None Dependency=(null)
   Requeue=1 Restarts=0 BatchFlag=1 Reboot=0 ExitCode=0:0
   RunTime=00:00:03 TimeLimit=365-00:00:00 TimeMin=N/A
   NodeList=node1

JobId=1 ArrayJobId=1 ArrayTaskId=2-4%2 ArrayTaskThrottle=2 JobName=wrap
   JobState=PENDING Reason=JobArrayTaskLimit Dependency=(null)
   Requeue=1 Restarts=0 BatchFlag=1 Reboot=0 ExitCode=0:0
   RunTime=00:00:00 TimeLimit=UNLIMITED TimeMin=N/A
   StartTime=Unknown EndTime=Unknown Deadline=N/A
   NodeList=

"""  # noqa: W291, W293  # as printed


def test_squeue():
    jobs = read_squeue(QUEUE)
    assert list(jobs) == ["1_2", "1_3", "3", "1_0", "16", "4"]
    assert jobs["16"] == JobRecord(
        job_id="16", raw_id="16", state="RUNNING", source="controller", submit=1795252799.0, start=1795252799.0,
        end=1795253399.0, limit_s=600.0, nodes=("node1", "node2"),
    )  # fmt: skip
    assert (jobs["1_2"].raw_id, jobs["1_2"].reason, jobs["1_2"].limit_s) == ("1", "JobArrayTaskLimit", None)
    assert [job for job, record in jobs.items() if record.over] == ["4"]
    assert read_squeue("") == {}


def test_sacct_tells_every_life_of_a_job():
    jobs = read_sacct(ACCOUNTS)
    assert [(r.state, r.exit_code, r.over) for r in jobs["16"]] == [("REQUEUED", 0, False), ("CANCELLED", 3, True)]
    assert [(r.exit_code, r.signal, r.nodes) for r in jobs["4"]] == [(0, 9, ("node1",))]
    # A range that was cancelled before it started stays one row.
    assert [(job, jobs[job][0].state) for job in jobs if job.startswith("14_")] == [
        ("14_0", "CANCELLED"), ("14_4", "CANCELLED"), ("14_8", "CANCELLED"),
    ]  # fmt: skip
    assert jobs["14_4"][0].nodes == ()


def test_the_latest_life_is_last_whatever_order_sacct_lists_them_in():
    backwards = "\n".join(reversed(ACCOUNTS.splitlines()))
    assert [r.state for r in read_sacct(backwards)["16"]] == ["REQUEUED", "CANCELLED"]


def test_scontrol_reads_no_free_text():
    jobs = read_scontrol(SHOWN)
    assert list(jobs) == ["16", "1_0", "1_2", "1_3", "1_4"]
    assert jobs["16"] == JobRecord(
        job_id="16", raw_id="16", state="RUNNING", source="controller", submit=1795252799.0, start=1795252799.0,
        end=1795253399.0, preempted=1795253000.0, limit_s=600.0, restarts=2, nodes=("node1", "node2"),
        partition="main", exit_code=0, signal=0,
    )  # fmt: skip
    assert (jobs["1_0"].raw_id, jobs["1_3"].raw_id) == ("5", "1")
    assert (jobs["1_3"].state, jobs["1_3"].start, jobs["1_3"].limit_s) == ("PENDING", None, None)


@pytest.mark.parametrize(
    ("read", "text", "says"),
    [
        (read_squeue, "1|2|RUNNING", "3 columns where 9"),
        (read_squeue, QUEUE.replace("1795252799", "2026-11-21T09:17:40"), "SLURM_TIME_FORMAT"),
        (read_squeue, "slurm_load_jobs error: Unable to contact slurm controller", "1 columns"),
        (read_sacct, "15_[0-1,3...|15|PENDING|1|1|1|1||0:0|", r"15_\[0-1,3\.\.\."),
        (read_sacct, "15|15||1|1|1|1||0:0|", "cannot read"),
        (read_scontrol, "JobId=7 JobName=x\n   Requeue=1 Restarts=0\n", "without JobState"),
    ],
)
def test_an_answer_in_another_format_is_an_error_that_quotes_it(read, text, says):
    with pytest.raises(ClusterError, match=says):
        read(text)


def test_a_person_s_own_formats_do_not_reach_the_tools():
    environment = query_environment(
        {"PATH": "/bin", "SQUEUE_FORMAT": "%i", "SACCT_FORMAT": "jobid", "SLURM_TIME_FORMAT": "relative",
         "SLURM_CONF": "/x", "SQUEUE_STATES": "PENDING"}
    )  # fmt: skip
    assert environment == {
        "PATH": "/bin", "SLURM_CONF": "/x", "SLURM_TIME_FORMAT": "%s", "SLURM_BITSTR_LEN": "0", "LC_ALL": "C.UTF-8",
    }  # fmt: skip
    assert all("json" not in word for word in (*SQUEUE, *SACCT))


def record(state: str, source: str, code: int | None = None) -> JobRecord:
    return JobRecord(job_id="9", raw_id="9", state=state, source=source, exit_code=code, signal=None)


ALIVE = record("RUNNING", "accounting")
DONE = record("COMPLETED", "accounting", 0)
FAILED = record("FAILED", "accounting", 7)
OWN_DONE = record("COMPLETED", "run folder", 0)
OWN_ALIVE = record("RUNNING", "run folder")


@pytest.mark.parametrize(
    ("controller", "accounting", "own", "state", "source", "code"),
    [
        # The controller knows best: accounting lags behind, and its last row may be of an earlier life.
        (record("RUNNING", "controller"), [record("PENDING", "accounting")], None, "RUNNING", "controller", None),
        (record("PENDING", "controller"), [record("PREEMPTED", "accounting", 0)], None, "PENDING", "controller", None),
        (record("RUNNING", "controller"), [], OWN_DONE, "RUNNING", "controller", None),
        # squeue has no exit codes; they come from whoever tells the same end.
        (record("FAILED", "controller"), [FAILED], None, "FAILED", "controller", 7),
        (record("FAILED", "controller"), [DONE], record("FAILED", "run folder", 3), "FAILED", "controller", 3),
        (record("FAILED", "controller"), [record("REQUEUED", "accounting", 0)], None, "FAILED", "controller", None),
        # Older than MinJobAge: accounting, else our own record.
        ("silent", [record("PREEMPTED", "accounting", 0), FAILED], OWN_ALIVE, "FAILED", "accounting", 7),
        ("silent", None, OWN_DONE, "COMPLETED", "run folder", 0),
        # slurmdbd was down when the job ended.
        ("silent", [ALIVE], OWN_DONE, "COMPLETED", "run folder", 0),
        ("silent", [ALIVE], OWN_ALIVE, "LOST", "accounting", None),
        ("silent", None, OWN_ALIVE, "LOST", "run folder", None),
        # The controller does not answer: what was last known.
        (None, [ALIVE], None, "RUNNING", "accounting", None),
        (None, [DONE], None, "COMPLETED", "accounting", 0),
        (None, None, OWN_ALIVE, "RUNNING", "run folder", None),
        (None, None, None, "UNKNOWN", "", None),
        ("silent", [], None, "UNKNOWN", "", None),
    ],
)  # fmt: skip
def test_merge(controller, accounting, own, state, source, code):
    answers = None if controller is None else {} if controller == "silent" else {"9": controller}
    merged = merge("9", controller=answers, accounting=None if accounting is None else {"9": accounting}, own=own)
    assert (merged.state, merged.source, merged.exit_code) == (state, source, code)


def test_elements_cancelled_before_their_start_are_one_row_of_the_controller():
    shown = read_scontrol("JobId=6 ArrayJobId=6 ArrayTaskId=4294967294 JobName=x\n   JobState=CANCELLED Reason=None\n")
    queue = read_squeue("6|6|CANCELLED|1|N/A|N/A|UNLIMITED||None\n6_0|7|RUNNING|1|1|N/A|UNLIMITED|node1|None\n")
    for controller in (shown, queue):
        assert merge("6_3", controller=controller, accounting=None) == dataclasses.replace(
            controller["6"], job_id="6_3"
        )
    assert merge("6_0", controller=queue, accounting=None).state == "RUNNING"
    # An element that ran, and that the controller has forgotten, is not one of them.
    ran = {"6_1": [dataclasses.replace(FAILED, job_id="6_1")]}
    assert merge("6_1", controller=queue, accounting=ran).exit_code == 7


def test_no_unknown_state_is_taken_for_an_end():
    for state in ("COMPLETING", "REQUEUED", "SIGNALING", "A_WORD_OF_SLURM_30"):
        assert state not in OVER
        assert not dataclasses.replace(ALIVE, state=state).over


def test_a_failure_without_a_code_is_accountings_passing_word():
    ended = JobRecord(job_id="5", raw_id="5", state="FAILED", source="accounting", exit_code=0, signal=0)
    assert merge("5", controller=None, accounting={"5": (ended,)}).state == "COMPLETING"
    assert merge("5", controller={}, accounting={"5": (ended,)}).state == "FAILED"
    real = dataclasses.replace(ended, exit_code=3)
    assert merge("5", controller=None, accounting={"5": (real,)}).state == "FAILED"


def test_an_element_that_left_the_queue_without_a_trace_was_cancelled():
    other = JobRecord(job_id="6_0", raw_id="6", state="COMPLETED", source="accounting")
    own = JobRecord(job_id="6_1", raw_id="6_1", state="PENDING", source="submission")
    record = merge("6_1", controller={}, accounting={"6_0": (other,)}, own=own)
    assert (record.job_id, record.state, record.reason) == ("6_1", "CANCELLED", "cancelled before it started")
    assert merge("6_1", controller=None, accounting={"6_0": (other,)}, own=own).state == "PENDING"
    assert merge("6_1", controller={}, accounting=None, own=own).state == "LOST"
    assert merge("61_1", controller={}, accounting={"6_0": (other,)}, own=own).state == "LOST"
