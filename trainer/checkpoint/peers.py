"""Whether another rank's process on this machine has ended: nothing that it had still to write will come then.

Torch-free: the writer's process imports it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class Peer:
    """A process: the machine (or container) that its number is valid on, its number, and when it began."""

    machine: str
    pid: int
    began: str

    @classmethod
    def own(cls) -> Peer:
        """The process that asks."""
        return cls(_machine(), os.getpid(), _stat(os.getpid())[1])

    @property
    def here(self) -> bool:
        """Whether it can be looked at from this process."""
        return bool(self.machine) and self.machine == _machine()

    @property
    def ended(self) -> bool:
        """Whether it runs no more. Only of one that is `here`."""
        state, began = _stat(self.pid)
        return state in "ZX" or began != self.began


@cache
def _machine() -> str:
    """Empty where a container does not tell: then nobody is looked at."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _stat(pid: int) -> tuple[str, str]:
    """State and start of a process, in the kernel's letters and ticks (proc(5)); of one that is gone, X."""
    try:
        # The name, in brackets, may hold anything.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "X", ""
    return fields[0], fields[19]
