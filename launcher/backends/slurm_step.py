"""One node of a step that somebody else's srun started, with one task per node: `srun --ntasks-per-node=1 launch ...`.

The first task supervises. It binds a port first and then tells it, with a secret, in a file of the run folder, which
all nodes share.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
import socket
import time
from typing import TYPE_CHECKING

from launcher.backends import meeting
from launcher.errors import MeetingError
from launcher.runs import RunFolder, read_json
from launcher.spec import Meeting

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from launcher.spec import LaunchSpec

__all__ = ["first", "host", "join", "name_of_step"]

_COMES_WITHIN_S = 600.0


def name_of_step(environ: Mapping[str, str]) -> str:
    """What tells this step, in this life of its job, from every other."""
    return f"{environ['SLURM_JOB_ID']}.{environ['SLURM_STEP_ID']}-{environ.get('SLURM_RESTART_COUNT', '0')}"


def first(environ: Mapping[str, str]) -> bool:
    """Whether this is the task that supervises."""
    return environ["SLURM_PROCID"] == "0"


def host(
    path: Path, spec: LaunchSpec, work: Callable[[RunFolder, socket.socket], int], environ: Mapping[str, str]
) -> int:
    """Supervise from the step's first task: `work` gets the open run folder and the socket where the others come."""
    where = environ.get("SLURMD_NODENAME") or socket.gethostname()
    with socket.create_server(("", 0), backlog=2048) as listener:
        endpoint = f"{where}:{listener.getsockname()[1]}"
        spec = dataclasses.replace(spec, meeting=Meeting(endpoint, 0, name_of_step(environ), True))
        with RunFolder.open(path, spec) as folder:
            secret = secrets.token_hex(16)
            os.environ["LAUNCH_TOKEN"] = secret
            note = path / f"meeting-{name_of_step(environ)}.json"
            temporary = note.with_suffix(".tmp")
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
                json.dump({"endpoint": endpoint, "secret": secret}, file)
            temporary.replace(note)
            try:
                return work(folder, listener)
            finally:
                with contextlib.suppress(OSError):
                    note.unlink()


def join(path: Path, spec: LaunchSpec, environ: Mapping[str, str]) -> int:
    """Be the agent of this task's node; returns the run's exit code."""
    note = path / f"meeting-{name_of_step(environ)}.json"
    deadline = time.monotonic() + _COMES_WITHIN_S
    while (told := read_json(note)) is None:
        if time.monotonic() > deadline:
            raise MeetingError(
                f"the step's first task did not write {note} within {_COMES_WITHIN_S:g} s: is the run folder on a file "
                "system that all nodes share?"
            )
        time.sleep(0.2)
    os.environ["LAUNCH_TOKEN"] = told["secret"]
    place = Meeting(told["endpoint"], int(environ["SLURM_PROCID"]), name_of_step(environ), False)
    return meeting.join(dataclasses.replace(spec, meeting=place))
