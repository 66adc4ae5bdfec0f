"""Beside a job, on the login node: shows what it says, lifts the hold on it after a requeue, tells its end."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from typing import TYPE_CHECKING, Any

from launcher.backends.slurm_records import OVER, SCONTROL, JobRecord, query_environment, read_scontrol
from launcher.backends.slurm_tools import ask
from launcher.errors import ClusterError
from launcher.runs import read_json

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

__all__ = ["follow"]

_LOOK_S = 0.2  # between two looks at the length of the output file, and at state.json
# Between two questions to the controller: after a change, and when nothing has changed for a while. That a run has
# begun or ended stands in its folder; a queue may be long, and thousands may wait in it.
_QUICK_S, _CALM_S, _SLOWER = 0.3, 15.0, 1.3
# The end of the last life's script may still be on its way to the controller, which would take it for the next life's
# (seen once in 100 requeues that were let go at once: FAILED with the old exit code, in the second of its start).
_SETTLED_S = 1.0
_SILENT_S = 20.0  # from the end that Slurm tells of to when nobody can be expected to record it


class _Output:
    """The job's output as it grows; over a requeue it is the same file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._place = 0

    def show(self) -> None:
        try:
            with open(self._path, "rb") as file:
                file.seek(self._place)
                while data := file.read(1 << 16):
                    self._place += len(data)
                    sys.stdout.buffer.write(data)
                sys.stdout.buffer.flush()
        except FileNotFoundError:
            pass  # the job has not begun, or the file server is slow


def follow(folder: Path, say: Callable[[str], None]) -> int:
    """Show the output of the run's job until the run is over; returns its exit code.

    Slurm holds a requeued job for 120 s (AuthInfo's cred_expire); only from outside the job, and once it is pending,
    can its start time be moved, which is done here.
    """
    job = read_json(folder / "slurm.json") or {}
    output = _Output(job["output"])
    told, before = "", None
    asked, pause, ended, held = float("-inf"), _QUICK_S, None, 0.0
    while True:
        output.show()
        state = read_json(folder / "state.json") or {}
        if _over(state):
            output.show()
            return int(state["exit_code"])
        now = time.monotonic()
        if (stage := (state.get("status"), state.get("attempt"))) != before:
            before, pause = stage, _QUICK_S
        if now - asked >= pause:
            asked, pause = now, min(_CALM_S, pause * _SLOWER)
            if (later := read_json(folder / "slurm.json") or job)["job_id"] != job["job_id"]:
                output.show()
                job, output, told = later, _Output(later["output"]), ""  # --requeue resubmit
                say(f"the run goes on as job {job['job_id']}")
            record = _ask(job["job_id"])
            word = ""
            if record is None or record.reason != "BeginTime":
                held = 0.0
            if record is not None and record.state == "PENDING":
                if record.restarts and record.reason == "BeginTime":
                    held = held or time.monotonic()
                    if time.monotonic() - held >= _SETTLED_S:
                        _lift(job["job_id"])
                word = f"job {job['job_id']} is waiting ({record.reason or 'Slurm has not looked at it yet'})"
            if word != told:
                told, pause = word, _QUICK_S
                if word:
                    say(word)
            if record is None or record.state not in OVER:
                ended = None
            elif ended is None:
                ended, pause = now, _QUICK_S
            elif now - ended > _SILENT_S:
                say(f"job {job['job_id']} is over ({record.state}), and nobody recorded how: see {job['output']}")
                return record.exit_code or 1
        time.sleep(_LOOK_S)


def _over(state: dict[str, Any]) -> bool:
    return state.get("status") in ("finished", "failed", "stopped") and not state.get("goes_on")


def _ask(job_id: str) -> JobRecord | None:
    try:
        return read_scontrol(ask(*SCONTROL, job_id, environ=query_environment(os.environ), timeout_s=10)).get(job_id)
    except ClusterError:
        return None  # it is being restarted, or has forgotten the job; the folder will tell


def _lift(job_id: str) -> None:
    with contextlib.suppress(ClusterError):
        ask("scontrol", "update", f"JobId={job_id}", "StartTime=now", environ=query_environment(os.environ))
