"""The GPUs of this machine, counted without torch: asking CUDA would initialise it, which no fork survives."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Gpus", "find_gpus"]


class Gpus:
    """How many GPUs ranks started here would see, and where that number comes from."""

    def __init__(self, count: int, source: str) -> None:
        self.count = count
        self.source = source

    def __str__(self) -> str:
        what = f"{self.count} GPU{'' if self.count == 1 else 's'}"
        return f"{what} on {socket.gethostname()} ({self.source})"


def find_gpus(environ: Mapping[str, str] = os.environ) -> Gpus:
    """What Slurm granted, else what CUDA_VISIBLE_DEVICES leaves, else the NVIDIA devices of the machine."""
    granted = environ.get("SLURM_GPUS_ON_NODE", "")
    if "SLURM_JOB_ID" in environ and granted.isdigit():
        return Gpus(int(granted), f"SLURM_GPUS_ON_NODE={granted}")
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        devices = [d for d in visible.split(",") if d.strip()]
        if "-1" in devices:  # CUDA ignores what stands behind an invalid number
            devices = devices[: devices.index("-1")]
        return Gpus(len(devices), f"CUDA_VISIBLE_DEVICES={visible!r}")
    listed = Path("/proc/driver/nvidia/gpus")
    if listed.is_dir():
        return Gpus(len(list(listed.iterdir())), str(listed))
    nodes = [p for p in Path("/dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", p.name)]
    return Gpus(len(nodes), "/dev/nvidia*")
