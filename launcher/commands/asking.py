"""The supervisor of a run that runs, asked by a signal: what is wanted, and the answer, are in the run folder."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING

from launcher import index
from launcher.commands.cancel import send
from launcher.errors import RunError
from launcher.runs import read_json
from launcher.stacks import SIGNAL
from launcher.standing import look

if TYPE_CHECKING:
    from launcher.standing import Standing

__all__ = ["call", "running"]


def running(text: str, only: str) -> Standing:
    """The run that a text names. Raises `RunError` if it does not run; only: what a run that runs alone can do."""
    standing = look([index.find(text, Path.cwd())]).runs[0]
    if standing.status != "running":
        raise RunError(f"run {standing.name} is {standing.status}: only a run that runs {only}")
    return standing


def call(standing: Standing, command: str) -> None:
    """Signal its supervisor, here or on Slurm. Raises `RunError` that says where else to say `command`."""
    if standing.job_id is not None:
        from launcher.backends.slurm_records import query_environment
        from launcher.backends.slurm_tools import ask

        ask("scancel", "--batch", f"--signal={int(SIGNAL)}", standing.job_id, environ=query_environment(os.environ))
        return
    state = read_json(standing.folder / "state.json") or {}
    if state.get("host") != socket.gethostname():
        raise RunError(f"run {standing.name} was launched on {state.get('host')}: say {command} there")
    send(state, SIGNAL)
