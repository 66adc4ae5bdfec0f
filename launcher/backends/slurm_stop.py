"""Pure: why Slurm stops a job and until when, from what `scontrol show job` says before and during it.

Slurm sends the same SIGTERM whatever the reason. The record of the job tells them apart (measured on 22.05.8):

=============================  ===========  ========  ================  ===================
while the signal arrives       state        restarts  PreemptTime       otherwise
=============================  ===========  ========  ================  ===================
preemption, grace begins       RUNNING      same      set               EndTime = its end, or Unknown
preemption, grace is over      COMPLETING   one more  gone again
scontrol requeue, by anybody   COMPLETING   one more  gone again
one of its nodes went down     COMPLETING   one more  gone again        the node is gone from NodeList
time limit                     COMPLETING   same      none              Reason=TimeLimit
scancel                        COMPLETING   same      none              Reason=None, EndTime = now
the batch script was SIGKILLed COMPLETING   same      none              Reason=JobLaunchFailure, ExitCode=0:9
scancel --signal               RUNNING      same      none
=============================  ===========  ========  ================  ===================
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from launcher.errors import ClusterError

if TYPE_CHECKING:
    from launcher.backends.slurm_records import JobRecord

__all__ = ["Cause", "Stop", "grace_of_partition", "kill_wait_of_config", "lead", "why"]

Cause = Literal["preempted", "time limit", "cancelled", "requeued", "node failure", "killed", "signalled", "unknown"]


@dataclass(frozen=True)
class Stop:
    """Why, and when the first process is killed (seconds since 1970; None: nobody has said so).

    requeued: Slurm has already put the job back into the queue, so asking for that is not ours to do. nodes: those that
    failed, where that is the cause.
    """

    cause: Cause
    deadline: float | None
    requeued: bool = False
    nodes: tuple[str, ...] = ()


def why(before: JobRecord, now: JobRecord | None, *, at: float, grace_s: float, kill_wait_s: float) -> Stop:
    """What a stop signal means that came at the time `at`.

    before: the job's last record that was read while it ran undisturbed, or in a grace; now: its record read after
    the signal, None if the controller does not answer. grace_s: the partition's GraceTime; kill_wait_s: KillWait.
    """
    if now is None:
        return Stop("unknown", None)
    if now.restarts is not None and before.restarts is not None and now.restarts > before.restarts:
        # PreemptTime, StartTime and EndTime are those of the next life by now.
        if before.preempted is not None:
            return Stop("preempted", at + kill_wait_s, requeued=True)
        lost = tuple(node for node in before.nodes if node not in now.nodes) if now.nodes else ()
        return Stop("node failure" if lost else "requeued", at + kill_wait_s, requeued=True, nodes=lost)
    if now.state == "COMPLETING" or now.over:
        if now.state == "PREEMPTED" or (now.preempted is not None and at >= now.preempted + grace_s):
            return Stop("preempted", at + kill_wait_s)  # PreemptMode=CANCEL; before its end a grace is cut by scancel
        if now.state == "NODE_FAIL":
            return Stop("node failure", at + kill_wait_s)
        if now.state in ("TIMEOUT", "DEADLINE") or now.reason == "TimeLimit":
            return Stop("time limit", at + kill_wait_s)
        # A later Slurm calls it RaisedSignal.
        killed = now.reason.startswith(("JobLaunchFailure", "RaisedSignal", "NonZeroExitCode"))
        return Stop("killed" if killed else "cancelled", at + kill_wait_s)
    if now.preempted is not None:
        # A job without a time limit may have no EndTime, or one in a year.
        ends = [now.preempted + grace_s] + ([] if now.end is None else [now.end])
        return Stop("preempted", min(ends))
    return Stop("signalled", now.end if now.limit_s is not None else None)


def lead(limit_s: float, save_s: float | None) -> float:
    """How many seconds before a time limit of `limit_s` the ranks are to be told of it.

    save_s: the slowest save so far; None: none was measured.
    """
    if save_s is None:
        return min(60.0, limit_s / 4)
    # Half as long again as the slowest save, and what it takes to end the step and to requeue.
    return max(min(1.5 * save_s + 10.0, limit_s / 2), min(15.0, limit_s / 4))


def grace_of_partition(text: str) -> float:
    """GraceTime in seconds, of what `scontrol show partition NAME` printed."""
    match = re.search(r"\bGraceTime=(\d+)\b", text)
    if match is None:
        raise ClusterError(f"scontrol show partition answered {text!r}, without GraceTime in seconds")
    return float(match[1])


def kill_wait_of_config(text: str) -> float:
    """KillWait in seconds, of what `scontrol show config` printed."""
    match = re.search(r"^KillWait\s*=\s*(\d+) sec", text, re.MULTILINE)
    if match is None:
        raise ClusterError("scontrol show config answered without KillWait in seconds")
    return float(match[1])
