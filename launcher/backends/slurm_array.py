"""Arrays of runs as arrays of Slurm's. Importing this module imports submitit (0.06 s)."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

from launcher.backends.slurm import submit as submit_job
from launcher.backends.slurm_records import query_environment
from launcher.backends.slurm_tools import ask
from launcher.errors import ClusterError, UsageError
from launcher.sweep import array_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from launcher.arrays import Array

__all__ = ["submit"]


def submit(array: Array, indices: Sequence[int]) -> str:
    """Submit elements of an array, which is held, as one job; returns its id. Raises `UsageError`, `ClusterError`."""
    limit = _max_array_size(ask("scontrol", "show", "config", environ=query_environment(os.environ)))
    if max(indices) >= limit:
        raise UsageError(
            f"element {max(indices)}: this cluster takes indices up to {limit - 1} (MaxArraySize={limit}); split the "
            "array or sweep into several"
        )
    for index in indices:
        if array.elements[index].folder.is_dir():  # it ran before: with budgets as at first
            with array.open(index) as folder:
                folder.set_state(ledger={}, goes_on=True)
    text = array_text(indices, array.throttle)
    job_id = submit_job(array.path, array.spec, array=text)
    array.submitted(job_id, text)
    return job_id


def _max_array_size(config: str) -> int:
    match = re.search(r"^MaxArraySize\s*=\s*(\d+)", config, re.MULTILINE)
    if match is None:
        raise ClusterError("scontrol show config answered without MaxArraySize")
    return int(match[1])
