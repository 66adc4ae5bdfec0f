"""How a run stands now: what its folder says, whether its process lives, and what Slurm knows of its job.

The folder is the first source. Slurm is asked once for all runs that are looked at, and only if one of them may still
be going on; where it does not answer in time, what is recorded stands, and that is said.
"""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from launcher.arrays import Array
from launcher.errors import ClusterError, RunError
from launcher.history import cause_of
from launcher.processes import start_ticks
from launcher.runs import read_json

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from launcher.arrays import Element, Submission
    from launcher.backends.slurm_records import JobRecord
    from launcher.index import Found

__all__ = ["OPEN", "Look", "Standing", "holder", "look"]

# A person waits for the answer, and slurmctld gives it in milliseconds or is in trouble.
_ANSWER_S = 3.0

OPEN = ("waiting", "running")

_WAITING = {"PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT", "CONFIGURING",
            "SUSPENDED", "STOPPED"}  # fmt: skip
_ENDS = {
    "CANCELLED": ("stopped", "cancelled"),
    "COMPLETED": ("finished", ""),
    "PREEMPTED": ("stopped", "preempted"),
    "TIMEOUT": ("failed", "time limit"),
    "DEADLINE": ("failed", "deadline of the job"),
    "NODE_FAIL": ("failed", "node failure"),
    "OUT_OF_MEMORY": ("failed", "out of memory"),
    "BOOT_FAIL": ("failed", "its nodes did not boot"),
    "FAILED": ("failed", "the job failed"),
    "REVOKED": ("stopped", "its job was revoked"),
}


@dataclass(frozen=True)
class Standing:
    """One run as it stands. Times: seconds since 1970.

    status: waiting, running, finished, stopped (goes on with `launch retry`), failed, or lost (it is over, and nobody
    recorded how). cause: why, or what a waiting one waits for. attempt: the last one, from 0; -1: none has begun.
    """

    name: str
    folder: Path
    status: str
    cause: str = ""
    code: int | None = None
    attempt: int = -1
    created: float = 0.0
    updated: float | None = None
    job_id: str | None = None
    host: str | None = None
    program: str = ""
    nodes: int = 1
    procs: int = 1
    elements: tuple[Standing, ...] = ()

    @property
    def open(self) -> bool:
        """Whether it runs or will run without anybody's doing."""
        return self.status in OPEN

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "folder": str(self.folder),
            "status": self.status,
            "cause": self.cause,
            "code": self.code,
            "attempt": self.attempt,
            "created": self.created,
            "updated": self.updated,
            "job_id": self.job_id,
            "host": self.host,
            "program": self.program,
            "nodes": self.nodes,
            "procs": self.procs,
            **({"elements": [e.to_json() for e in self.elements]} if self.elements else {}),
        }


@dataclass(frozen=True)
class Look:
    """The answer for all runs asked about, in their order; note: what a person should know of it, or empty."""

    runs: tuple[Standing, ...]
    note: str = ""


@dataclass(frozen=True)
class _Recorded:
    """A run as its folder says. unsure: Slurm may know better; unended: its end is not recorded."""

    standing: Standing
    unsure: bool = False
    unended: bool = False


def holder(state: Mapping[str, Any]) -> int | None:
    """The process that works on a run here, by its record (state.json); None if it is gone or on another host."""
    pid = state.get("pid")
    if state.get("host") != socket.gethostname() or not isinstance(pid, int):
        return None
    # A pid is used again; with the time of its start it is one process.
    started = start_ticks(pid)
    return pid if started is not None and started == state.get("pid_start") else None


def look(runs: Iterable[Found], *, slurm: bool = True) -> Look:
    """How runs, arrays and elements of arrays stand. slurm: False leaves Slurm unasked. `RunError` on what is none."""
    recorded = [_recorded(run) for run in runs]
    flat = [one for group in recorded for one in group]
    unsure = [one for one in flat if one.unsure]
    answers, note = _ask(unsure) if unsure and slurm else ({}, "")
    found = []
    for group in recorded:
        settled = [_settle(one, answers) for one in group]
        found.append(settled[0] if len(settled) == 1 else _with_elements(settled[0], settled[1:]))
    return Look(tuple(found), note)


# ------------------------------------------------------------------------------------------------ the folder


def _recorded(run: Found) -> list[_Recorded]:
    """The run; or the array, and behind it its elements."""
    folder = run.folder
    if run.index is None and not (folder / "array.json").is_file():
        record = read_json(folder / "run.json")
        if record is None:
            raise RunError(f"there is no run in {folder}")
        standing = Standing(folder.name, folder, "", created=record["created"], **_what(record["spec"]))
        return [_of_state(standing, read_json(folder / "slurm.json"))]
    array = Array.read(folder)
    state = read_json(folder / "state.json") or {}
    works = state.get("status") == "running" and (holder(state) is not None or state["host"] != socket.gethostname())
    jobs, what = array.job_of(), _what(array.spec.to_json())
    if run.index is not None:
        return [_of_element(array, array.element(run.index), jobs.get(run.index), what, works=works)]
    whole = Standing(array.name, folder, "", created=array.created, host=state.get("host"),
                     job_id=array.jobs[-1].job_id if array.jobs else None, **what)  # fmt: skip
    elements = [array.elements[index] for index in sorted(array.elements)]
    return [_Recorded(whole), *(_of_element(array, e, jobs.get(e.index), what, works=works) for e in elements)]


def _of_element(
    array: Array, element: Element, job: Submission | None, what: dict[str, Any], *, works: bool
) -> _Recorded:
    name, folder = f"{array.name}_{element.index}", element.folder
    job_id = None if job is None else f"{job.job_id}_{element.index}"
    slurm = None if job is None else {"job_id": job_id, "submitted": job.time}
    what = what | {"program": " ".join((what["program"], *element.args))}
    if (folder / "run.json").is_file():
        own = read_json(folder / "slurm.json")  # --requeue=resubmit: it went on as a job by itself
        if slurm is not None and own is not None and own["submitted"] > slurm["submitted"]:
            slurm = own
        return _of_state(Standing(name, folder, "", created=array.created, **what), slurm)
    status, cause = ("waiting", "") if works or slurm else ("stopped", "never began")
    standing = Standing(name, folder, status, cause, created=array.created,
                        job_id=job_id, **what)  # fmt: skip
    return _Recorded(standing, unsure=slurm is not None, unended=True)


def _what(spec: dict[str, Any]) -> dict[str, Any]:
    program = spec["program"]
    words = [*(["-m"] if program["kind"] == "module" else []), program["target"], *program["args"]]
    return {"program": " ".join(words), "nodes": spec["nodes"], "procs": spec["procs"]}


def _of_state(standing: Standing, job: dict[str, Any] | None) -> _Recorded:
    """With what state.json says; job: the Slurm job that the run was submitted as last."""
    state = read_json(standing.folder / "state.json") or {}
    status = state.get("status", "new")
    over = status not in ("new", "running")
    cause = ""
    if over and status != "finished":
        cause = cause_of(standing.folder, state.get("cause", ""), state["attempt"])
    standing = replace(
        standing,
        status=status,
        cause=cause,
        code=state.get("exit_code") if over else None,
        attempt=state.get("attempt", -1),
        updated=state.get("updated"),
        job_id=None if job is None else job["job_id"],
        host=state.get("host"),
    )
    if job is not None:
        # What was recorded before the job was submitted is of an earlier one.
        stale = standing.updated is None or standing.updated < job.get("submitted", 0.0)
        unended = stale or not over
        if stale:
            standing = replace(standing, status="waiting", cause="", code=None)
        elif over and state.get("goes_on"):
            # Back in the queue, as it was left; Slurm knows whether somebody has cancelled it since.
            unended, standing = True, replace(standing, status="waiting", cause=f"{cause}; waits to go on", code=None)
        return _Recorded(standing, unsure=unended or status == "stopped", unended=unended)
    if not over and holder(state) is None:
        if standing.host not in (None, socket.gethostname()):
            return _Recorded(replace(standing, cause=f"as {standing.host} recorded it"))
        gone = "its launch was killed, or the machine went down" if status == "running" else "it never began"
        standing = replace(standing, status="lost" if status == "running" else "stopped", cause=gone)
    return _Recorded(standing)


# ------------------------------------------------------------------------------------------------ Slurm


def _ask(unsure: Sequence[_Recorded]) -> tuple[dict[str, JobRecord], str]:
    """What Slurm knows of the jobs: one squeue, and one sacct if the controller has forgotten one without an end."""
    from launcher.backends.slurm_records import SACCT, SQUEUE, merge, query_environment, read_sacct, read_squeue
    from launcher.backends.slurm_tools import ask

    environ = query_environment(os.environ)
    controller = accounting = None
    note = ""
    until = time.monotonic() + _ANSWER_S
    try:
        text = ask(*SQUEUE, "--user", str(os.getuid()), environ=environ, timeout_s=_ANSWER_S)
        controller = read_squeue(text)
    except ClusterError as error:
        note = f"as last recorded: {error}"
    ids = {one.standing.job_id: one.unended for one in unsure if one.standing.job_id is not None}
    forgotten = [job for job, unended in ids.items() if unended and controller is not None and job not in controller]
    if forgotten:
        mains = ",".join(dict.fromkeys(job.split("_")[0] for job in forgotten))
        try:
            left = max(0.5, until - time.monotonic())
            accounting = read_sacct(ask(*SACCT, "-j", mains, environ=environ, timeout_s=left))
        except ClusterError:
            pass  # none is kept, or slurmdbd is down: the records remain
    if controller is None and accounting is None:
        return {}, note
    return {job: merge(job, controller=controller, accounting=accounting) for job in ids}, note


def _settle(one: _Recorded, answers: Mapping[str, JobRecord]) -> Standing:
    standing = one.standing
    job = answers.get(standing.job_id or "")
    if not one.unsure or job is None:
        return replace(standing, status="waiting") if standing.status == "new" else standing
    if job.state in _WAITING:
        cause = standing.cause or job.reason
        return replace(standing, status="waiting", cause=cause, code=None)
    if job.state in ("UNKNOWN", "LOST"):
        if not one.unended:
            return standing  # it ended, and the record says how
        return replace(standing, status="lost", cause="Slurm no longer knows its job, and nobody recorded its end")
    if not job.over:
        return replace(standing, status="running", cause="", code=None)
    if not one.unended:
        return standing
    status, cause = _ENDS.get(job.state, ("failed", job.state))
    return replace(standing, status=status, cause=cause, code=job.exit_code)


def _with_elements(whole: Standing, elements: Sequence[Standing]) -> Standing:
    """The array as the sum of its elements: what is worst of them, or going on."""
    for status in ("running", "waiting", "lost", "failed", "stopped", "finished"):
        count = sum(e.status == status for e in elements)
        if count:
            break
    counts = {s: n for s in ("finished", "running", "waiting", "stopped", "failed", "lost")
              if (n := sum(e.status == s for e in elements))}  # fmt: skip
    cause = ", ".join(f"{n} {s}" for s, n in counts.items())
    updated = max((e.updated for e in elements if e.updated is not None), default=None)
    return replace(whole, status=status, cause=cause, updated=updated, elements=tuple(elements))
