"""`launch cancel`: have runs save and leave, wherever they are."""

from __future__ import annotations

import getpass
import json
import os
import signal
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from launcher import index
from launcher.commands import Runs, options
from launcher.errors import ClusterError, RunError
from launcher.runs import read_json, write_json
from launcher.standing import holder, look

if TYPE_CHECKING:
    from collections.abc import Sequence

    from launcher.standing import Standing

__all__ = ["cancel", "run", "send"]

COMMAND = click.Command(
    "cancel",
    params=[Runs(), click.Option(["--json", "as_json"], is_flag=True, help="one JSON array: name, did")],
    help="Ask runs to save and leave: SIGTERM to the launch that works on them here, scancel for Slurm jobs. Of an "
    "array all elements, or the one that is named. Exit code: 0 asked, or over already; 1 if one could not be reached.",
)


def run(argv: Sequence[str]) -> int:
    """Exit code: see the help."""
    o = options(COMMAND, argv)
    runs = [index.find(text, Path.cwd()) for text in o["runs"]]
    did, code = [], 0
    for found, standing in zip(runs, look(runs).runs, strict=True):
        try:
            done = cancel(found, standing)
        except (RunError, ClusterError) as error:
            done, code = f"not cancelled: {error}", 1
        did.append({"name": standing.name, "did": done})
    if o["as_json"]:
        click.echo(json.dumps(did, indent=1))
    else:
        click.echo("\n".join(f"{one['name']}: {one['did']}" for one in did))
    return code


def cancel(found: index.Found, standing: Standing) -> str:
    """Ask one run to leave; returns what was done. Raises `RunError` or `ClusterError` if it cannot be reached."""
    if not standing.open:
        return f"is over already ({standing.status})"
    if standing.job_id is not None:
        return _cancel_job(standing)
    # The elements of an array that runs here are run by one process; theirs is asked, unless one alone is meant.
    state = read_json(standing.folder / "state.json") or {}
    if holder(state) is None:
        if state.get("host") not in (None, socket.gethostname()):
            raise RunError(f"it runs on {state['host']}: say launch cancel there")
        if found.index is not None:
            raise RunError(f"it has not begun; launch cancel {found.folder.name} cancels the whole array")
        raise RunError("no launch works on it any more")
    _note_all(standing)
    return f"asked to save and leave (SIGTERM to pid {send(state, signal.SIGTERM)})"


def _cancel_job(standing: Standing) -> str:
    from launcher.backends.slurm_records import query_environment
    from launcher.backends.slurm_tools import ask

    jobs = [standing.job_id]
    if standing.elements:  # an array that was retried has several jobs
        jobs = list(dict.fromkeys(e.job_id.split("_")[0] for e in standing.elements if e.open and e.job_id is not None))
    ids = [job for job in jobs if job is not None]
    _note_all(standing)
    ask("scancel", *ids, environ=query_environment(os.environ))
    return f"scancel {' '.join(ids)}"


def _note_all(standing: Standing) -> None:
    for one in standing.elements or [standing]:
        if one.status == "running":
            _note(one.folder)


def _note(folder: Path) -> None:
    """Leave word of who asked, before the signal that does not tell."""
    attempt = (read_json(folder / "state.json") or {}).get("attempt", -1)
    word = {"time": time.time(), "user": getpass.getuser(), "host": socket.gethostname(), "attempt": attempt}
    write_json(folder / "cancel.json", word)


def send(state: dict[str, object], number: int) -> int:
    """Signal the launch here that works on a run with this state.json; its pid. Raises `RunError` if there is none."""
    pid = holder(state)
    if pid is None:
        raise RunError("no launch on this host works on it any more")
    descriptor = os.pidfd_open(pid)
    try:
        # Looked at again through the descriptor: the pid cannot come to mean another process any more.
        if holder(state) is None:
            raise RunError("it has just ended")
        signal.pidfd_send_signal(descriptor, number)
        return pid
    except ProcessLookupError as error:
        raise RunError("it has just ended") from error
    finally:
        os.close(descriptor)
