"""Slurm's own tools, run with a deadline; what they refuse is told in their words."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

from launcher.errors import ClusterError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["AwayError", "ask", "call"]

# slurmctld answers in milliseconds or is in trouble; its own tools give up after MessageTimeout (10 s by default),
# several times over when there is a backup controller.
_ANSWER_S = 60.0


class AwayError(ClusterError):
    """The controller did not answer: it is being restarted, or another one takes its place."""


def ask(*command: str, environ: Mapping[str, str], stdin: bytes = b"", timeout_s: float = _ANSWER_S) -> str:
    """What one of Slurm's tools printed; `ClusterError` in the tool's own words if it fails, `AwayError` if nobody
    answers it.
    """
    return call(command, environ, stdin, timeout_s).stdout.decode(errors="replace")


def call(
    command: Sequence[str], environ: Mapping[str, str], stdin: bytes = b"", timeout_s: float = _ANSWER_S
) -> subprocess.CompletedProcess[bytes]:
    """Run one of the tools to its end; `ClusterError` as in `ask`."""
    tool = command[0]
    try:
        done = subprocess.run(
            command, env=dict(environ), input=stdin, capture_output=True, timeout=timeout_s, check=False
        )
    except FileNotFoundError as error:
        raise ClusterError(f"there is no {tool} on PATH: Slurm cannot be reached from this host") from error
    except subprocess.TimeoutExpired as error:
        raise AwayError(f"{tool} gave no answer within {timeout_s:g} s: slurmctld may be down") from error
    if done.returncode:
        words = (done.stderr.strip() or done.stdout.strip()).decode(errors="replace") or "no word of why"
        kind = AwayError if "Unable to contact slurm controller" in words else ClusterError
        raise kind(f"{tool} failed with code {done.returncode}: {words}")
    return done
