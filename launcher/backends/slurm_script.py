"""Pure: the text of a batch script, in which every value arrives byte for byte, and the environment of its submission.

Three readers see the text, each with rules of its own: sbatch takes the `#SBATCH` lines apart, bash the rest, and
slurmctld refuses a script with DOS line ends or NUL bytes anywhere.
"""

from __future__ import annotations

import os
import re
import shlex
from typing import TYPE_CHECKING

from launcher.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["Value", "batch_script", "directive", "quote", "submission_environment"]

Value = str | int | bool

_OPTION = re.compile(r"[a-z][a-z0-9]*(?:-[a-z0-9]+)*")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_PLAIN = re.compile(r"[A-Za-z0-9_./:,@%+=~^*-]+")

# What sbatch itself reads; the rest of SLURM_* describes an outer job, which the new one must not take for its own
# (an inherited SLURM_CPU_BIND pins every rank to the outer job's cores).
_KEPT = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_DEBUG_FLAGS", "SLURM_UMASK", "SLURM_TIME_FORMAT")
# Options whose variable is not simply SBATCH_<OPTION>.
_VARIABLES = {"time": "SBATCH_TIMELIMIT", "mem": "SBATCH_MEM_PER_NODE", "array": "SBATCH_ARRAY_INX"}
# Asking for one of a group must silence the variables of all: sbatch refuses --mem beside SBATCH_MEM_PER_CPU.
_GROUPS = (
    {"mem", "mem-per-cpu", "mem-per-gpu"},
    {"requeue", "no-requeue"},
    {"gres", "gpus", "gpus-per-node", "gpus-per-task"},
)


def directive(option: str, value: Value) -> str:
    """One `#SBATCH` line; `True` stands for an option without a value. Raises `UsageError` on what no line can hold."""
    if _OPTION.fullmatch(option) is None:
        raise UsageError(f"--sbatch {option!r}: give the long name of an option of sbatch, like gres or cpus-per-task")
    if value is True:
        return f"#SBATCH --{option}"
    text = str(value)
    if any((ord(c) < 32 and c != "\t") or ord(c) == 127 for c in text):
        raise UsageError(f"--{option} {text!r}: a batch script cannot hold line ends or control characters there")
    if _PLAIN.fullmatch(text):
        return f"#SBATCH --{option}={text}"
    # Unlike a shell's, these quotes let backslashes work in single quotes too, and $ and ` mean nothing.
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'#SBATCH --{option}="{escaped}"'


def quote(word: str) -> str:
    """`word` for bash, on one line of valid UTF-8 whatever bytes it has (as Python's surrogates, if need be)."""
    if word.isprintable():
        return shlex.quote(word)
    parts = []
    for char in word:
        if char.isprintable() and char not in "\\'":
            parts.append(char)
        else:
            # Three digits, so that a digit behind is not taken for one of them.
            parts += [f"\\{byte:03o}" for byte in os.fsencode(char)]
    return "$'" + "".join(parts) + "'"


def batch_script(
    options: Mapping[str, Value],
    command: Sequence[str],
    *,
    environment: Mapping[str, str] | None = None,
    setup: Sequence[str] = (),
) -> str:
    """The script of a job that becomes `command` after `setup`; an option that is False is left out.

    environment: exported before `setup`. setup: shell lines of the person's own (`module load cuda`), taken as they
    are; the first to fail ends the job with its code, before anything starts. `command` takes the place of bash: bash
    would die of Slurm's SIGTERM and leave it behind unheard.
    """
    lines = ["#!/bin/bash"]
    lines += [directive(name, value) for name, value in options.items() if value is not False]
    for name, text in (environment or {}).items():
        if _VARIABLE.fullmatch(name) is None:
            raise UsageError(f"--env {name!r} is no name of a variable")
        lines.append(f"export {name}={quote(_without_nul(text))}")
    for line in setup:
        text = _without_nul(line).replace("\r\n", "\n")
        failed = quote(f"launch: --setup failed: {line}")
        lines += ["{", text, f"}} || {{ code=$?; echo {failed} >&2; exit $code; }}"]
    lines.append("exec " + " ".join(quote(_without_nul(word)) for word in command))
    return "\n".join(lines) + "\n"


def _without_nul(text: str) -> str:
    if "\0" in text:
        raise UsageError(f"{text!r} has a NUL byte, which no argument or variable of a program can hold")
    return text


def submission_environment(environ: Mapping[str, str], options: Mapping[str, Value]) -> dict[str, str]:
    """The environment for sbatch, and by its default for the job: nothing of an outer job, nothing that outvotes us.

    A variable like SBATCH_PARTITION is a person's default. sbatch lets it win over the script's own line, so where
    `options` says something of the same matter it is left out; inside a job all of them are, being that job's.
    """
    inside = "SLURM_JOB_ID" in environ
    asked = {name for name, value in options.items() if value is not False}
    for group in _GROUPS:
        asked |= group if group & asked else set()
    outvoting = {_VARIABLES.get(name, "SBATCH_" + name.upper().replace("-", "_")) for name in asked}
    return {
        name: value
        for name, value in environ.items()
        if name in _KEPT
        or not (name.startswith(("SLURM_", "SRUN_")) or name in outvoting or (inside and name.startswith("SBATCH_")))
    }
