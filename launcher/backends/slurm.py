"""On the login node: a run becomes a job. Importing this module imports submitit (0.06 s)."""

from __future__ import annotations

import os
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.backends import slurm_job
from launcher.backends.slurm_records import SCONTROL, query_environment, read_scontrol
from launcher.backends.slurm_submission import BatchExecutor
from launcher.backends.slurm_tools import ask
from launcher.errors import ClusterError, RunError, UsageError
from launcher.runs import read_json, write_json
from launcher.sweep import array_text
from launcher.topology import World, places, rank_environment

if TYPE_CHECKING:
    from collections.abc import Mapping

    from launcher.runs import RunFolder
    from launcher.spec import LaunchSpec

__all__ = ["check_shared", "executor", "rehearse", "submit", "submit_run"]

# What only one host sees, wherever it is mounted.
_IN_MEMORY = {"tmpfs", "ramfs", "devtmpfs"}


def executor(folder: Path, spec: LaunchSpec, environ: Mapping[str, str] | None = None) -> BatchExecutor:
    """What submits `spec` with `folder` (a run's, or an array's) as the place of its files. Raises `UsageError`."""
    assert spec.slurm is not None
    options = dict(spec.slurm.options)
    options.setdefault("job-name", folder.name)
    options["chdir"] = spec.cwd
    options["no-requeue" if spec.slurm.requeue == "no" else "requeue"] = True
    return BatchExecutor(
        folder, slurm_job.command(folder), options=options, setup=spec.slurm.setup, environ=environ or os.environ
    )


def check_shared(folder: Path) -> None:
    """Raise `UsageError` if no other host can see the folder. Whether all nodes do is known only on the nodes."""
    kind = _file_system(folder)
    if kind in _IN_MEMORY:
        raise UsageError(
            f"{folder} is on a {kind}, which only this host sees; put the run on a file system that the nodes share "
            "with --run DIR"
        )


def _file_system(folder: Path) -> str:
    """The type of the file system that holds a path, or its nearest parent that exists."""
    here, best, kind = str(folder.resolve()), "", ""
    for line in Path("/proc/mounts").read_text(errors="replace").splitlines():
        _, where, type_, *_ = line.split()
        point = where.replace("\\040", " ")
        if len(point) >= len(best) and (here == point or here.startswith(point.rstrip("/") + "/")):
            best, kind = point, type_
    return kind


def submit(
    folder: Path, spec: LaunchSpec, *, array: str | None = None, environ: Mapping[str, str] | None = None
) -> str:
    """Submit one job, or with `array` (like `0-9%4`) one per index, after Slurm was asked whether it would take it.

    folder: of the run, or of the array. Returns the job's id, which slurm.json in the folder has as well. Raises
    `UsageError` and, in Slurm's own words, `ClusterError`.
    """
    assert spec.slurm is not None
    check_shared(folder)
    sender = executor(folder, spec, environ)
    sender.test(array)
    submitted = time.time()
    jobs = sender.submit_batch(array)
    job_id = str(jobs[0].job_id).partition("_")[0]
    name = "%j" if array is None else "%A_%a"
    write_json(
        folder / "slurm.json",
        {
            "job_id": job_id,
            "submitted": submitted,
            "array": array,
            "script": str(folder / f"{job_id}_submission.sh"),
            "output": str(folder / f"{name}_0_log.out").replace("%j", job_id).replace("%A", job_id),
            "options": spec.slurm.options,
        },
    )
    return job_id


def submit_run(folder: RunFolder) -> str:
    """Submit a run, which starts with fresh budgets; returns the job's id. Raises `RunError` if it has one."""
    _check_free(folder)
    folder.set_state(ledger={}, goes_on=True)
    job_id = submit(folder.path, folder.spec)
    folder.event("submitted", job_id=job_id)
    return job_id


def _check_free(folder: RunFolder) -> None:
    known = read_json(folder.path / "slurm.json")
    if known is None:
        return
    job_id = known["job_id"]
    try:
        text = ask(*SCONTROL, job_id, environ=query_environment(os.environ))
    except ClusterError:
        return  # forgotten, so over
    record = read_scontrol(text).get(job_id)
    # A number that a slurmctld without its state gave out again is another job's.
    if record is not None and not record.over and f"{folder.path}/" in text:
        raise RunError(
            f"run {folder.run_id} is job {job_id} already ({record.state}); wait for it (launch logs -f {job_id}), "
            f"or end it (launch cancel {job_id})"
        )


def rehearse(
    path: Path, spec: LaunchSpec, elements: Mapping[int, tuple[str, ...]] | None = None, throttle: int | None = None
) -> str:
    """What would be submitted for a run in the folder `path`, and the environment of each rank; nothing is done.

    elements: of an array, by index, each with its arguments; throttle: how many of them at once.
    """
    check_shared(path)
    sender = executor(path, spec)
    array = None if elements is None else array_text(elements, throttle)
    lines = [f"# run folder: {path}", f"# Slurm says: {sender.test(array)}", "", sender.script(array)]
    lines += [f"# element {index}: {shlex.join(args)}" for index, args in (elements or {}).items()]
    world = World(0, 0, (spec.procs,) * spec.nodes, "<address of the first node>", 0)
    environments = [
        rank_environment({}, spec, world, place, run_id=path.name, run_dir=str(path),
                         error_file=f"{path}/logs/attempt-0/rank-{place.rank}.error.json", progress="<memfd>")
        | {"MASTER_PORT": "<free port>"}
        for node in range(spec.nodes) for place in places(world, node)
    ]  # fmt: skip
    common = {k: v for k, v in environments[0].items() if all(e.get(k) == v for e in environments)}
    lines += ["# environment of every rank, beside the job's own"]
    lines += [f"#   {name}={value}" for name, value in sorted(common.items())]
    for environment in environments:
        own = " ".join(f"{name}={value}" for name, value in environment.items() if name not in common)
        lines.append(f"# rank {environment['RANK']}: {own}")
    return "\n".join(lines) + "\n"
