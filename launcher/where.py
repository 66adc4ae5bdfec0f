"""Where a launch runs: what the options and the surroundings imply, from this machine to a job of its own."""

from __future__ import annotations

import re
import shutil
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from launcher.errors import UsageError
from launcher.hosts import parse as parse_hosts
from launcher.options import SBATCH

if TYPE_CHECKING:
    from collections.abc import Mapping

    from launcher.hosts import Host

__all__ = ["Surroundings", "Where", "least_and_most", "many", "slurm_name", "spares_of", "where_to_run"]

# Asking for one of these is asking for a new job.
_SUBMITS = (*SBATCH, "detach", "dry_run", "cpus_per_rank", "sbatch", "setup", "requeue", "max_timeouts", "stop_lead")


@dataclass(frozen=True)
class Surroundings:
    """Where `launch` was called: what decides between running here and submitting.

    sbatch: whether a job can be submitted; job: the allocation that this process has; nodes: how many it has; step:
    whether srun started this process, as one of `tasks` on `step_nodes` nodes.
    """

    sbatch: bool = False
    job: str | None = None
    nodes: int = 1
    step: bool = False
    tasks: int = 1
    step_nodes: int = 1

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> Surroundings:
        """Read from the environment that Slurm gives to what it starts."""
        job = environ.get("SLURM_JOB_ID")
        step = environ.get("SLURM_STEP_ID", "")
        return cls(
            sbatch=shutil.which("sbatch") is not None,
            job=job,
            nodes=int(environ.get("SLURM_JOB_NUM_NODES", "1")),
            # Large numbers are Slurm's own steps: salloc's shell is one where a site wants it on the first node.
            step=job is not None and step.isdecimal() and int(step) < 1 << 31,
            tasks=int(environ.get("SLURM_STEP_NUM_TASKS", "1")),
            step_nodes=int(environ.get("SLURM_STEP_NUM_NODES", "1")),
        )


def slurm_name(environ: Mapping[str, str]) -> str:
    """The job, and element of an array, and step of srun's, that this is in: the same again after a requeue."""
    job = environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_TASK_ID" in environ:
        job = f"{environ['SLURM_ARRAY_JOB_ID']}_{environ['SLURM_ARRAY_TASK_ID']}"
    step = environ.get("SLURM_STEP_ID")
    return job if step is None or not Surroundings.of(environ).step else f"{job}.{step}"


def many(o: Mapping[str, Any]) -> bool:
    """Whether several runs are asked for."""
    return any(o[name] for name in ("array", "sweep", "sweep_file"))


@dataclass(frozen=True)
class Where:
    """Where a run takes place, as `Request.where` says. nodes: how many it has if no option says; sbatch: whether this
    host could submit a job; hosts: those of `--hosts`, spares among them.
    """

    place: Literal["here", "meeting", "hosts", "job", "allocation", "step"]
    nodes: int
    sbatch: bool
    hosts: tuple[Host, ...] = ()


def where_to_run(o: Mapping[str, Any], s: Surroundings) -> Where:
    """Where to run: what `--backend` says, else what the options and the surroundings imply."""
    # A default from a file says how to submit, not that it is to be done.
    asked = [f"--{name.replace('_', '-')}" for name in _SUBMITS if o[name] and name in o["given"]]
    if o["backend"] == "local":
        if asked:
            raise UsageError(f"{asked[0]} is for a Slurm job, --backend local runs here: leave one of them out")
        return Where("here", 1, s.sbatch)
    by_hand = any(o[name] is not None for name in ("rdzv_endpoint", "node_rank", "master_addr")) or o["standalone"]
    if o["backend"] == "ssh" or "hosts" in o["given"]:
        if o["backend"] == "slurm" and "backend" in o["given"]:
            raise UsageError("--hosts runs by ssh, --backend slurm submits a job: leave one of them out")
        asked = [flag for flag in asked if flag != "--detach"]
        return _on_hosts(o, s, [*asked, *(["--rdzv-endpoint and the like"] if by_hand else [])])
    slurm = o["backend"] == "slurm" and ("backend" in o["given"] or not (by_hand or s.job))
    if slurm or (asked and s.job is None):
        if not s.sbatch:
            why = asked[0] if asked else "--backend slurm"
            raise UsageError(
                f"{why} submits a Slurm job, but there is no sbatch on {socket.gethostname()}; "
                "--backend local runs here"
            )
        return Where("job", 1, True)
    if s.job is not None:
        if asked:
            raise UsageError(
                f"{asked[0]} asks for a new job, but this is inside job {s.job}: leave it out to run in this "
                "allocation, or add --backend slurm to submit another job"
            )
        if many(o):
            raise UsageError(
                f"an array or a sweep is a job of its own, and this is inside job {s.job}: add --backend slurm to "
                "submit it, or --backend local to run its elements on this node"
            )
        if s.step and s.tasks > s.step_nodes:
            raise UsageError(
                f"srun started {s.tasks} tasks on {s.step_nodes} node(s), but launch starts the ranks of a node "
                "itself: give srun --ntasks-per-node=1, or leave srun out"
            )
        if not by_hand:
            if s.step and s.step_nodes == 1:
                return Where("here", 1, True)
            return Where("step" if s.step else "allocation", s.step_nodes if s.step else s.nodes, True)
    if (o["nodes"] is not None or many(o)) and s.sbatch and not by_hand:
        return Where("job", 1, True)
    if many(o) and by_hand:
        raise UsageError("an array or a sweep starts its nodes itself: leave --rdzv-endpoint and --node-rank out")
    return Where("here", 1, s.sbatch)


def _on_hosts(o: Mapping[str, Any], s: Surroundings, others: list[str]) -> Where:
    if others:
        raise UsageError(f"{others[0]}: not with --hosts, whose nodes ssh starts at once")
    if many(o):
        raise UsageError("an array or a sweep runs on Slurm or on this machine, not on --hosts")
    if not o["hosts"]:
        raise UsageError("--backend ssh: say where with --hosts a,b or --hosts @FILE")
    hosts = parse_hosts(o["hosts"], Path.cwd())
    spares = spares_of(o)
    if o["nodes"] is None:
        count = len(hosts) - spares
        if count < 1:
            raise UsageError(f"--spares {spares}: --hosts names {len(hosts)}, and at least one of them must work")
    else:
        _, count = least_and_most("--nodes", o["nodes"])
        if count + spares > len(hosts):
            more = f" and --spares {spares}" if spares else ""
            raise UsageError(f"--nodes {o['nodes']}{more}: --hosts names {len(hosts)}")
    return Where("hosts", count, s.sbatch, hosts[: count + spares])


def spares_of(o: Mapping[str, Any]) -> int:
    """The nodes that are to stand by."""
    spares = o["spares"]
    if not isinstance(spares, int) or spares < 0:
        raise UsageError(f"--spares {spares}: give a whole number >= 0")
    return spares


def least_and_most(flag: str, text: str) -> tuple[int, int]:
    """`4` or `2:4`."""
    if not re.fullmatch(r"\d+(:\d+)?", text):
        raise UsageError(f"{flag} {text!r}: give N or MIN:MAX")
    least, _, most = text.partition(":")
    found = int(least), int(most or least)
    if not 1 <= found[0] <= found[1]:
        raise UsageError(f"{flag} {text}: give N >= 1, or MIN:MAX with 1 <= MIN <= MAX")
    return found
