"""Pure: of which class a failure is, by which evidence, and whether another try can go better.

user code       an exception, an exit code or a crash of the program's own
out of memory   of the host (the kernel killed it, an allocation failed) or of a GPU
storage         no space, quota, I/O errors, an object store that refuses; a full /dev/shm
gpu             a device that is broken or gone
lost node       its agent, or the machine, went away
lost peer       the ranks only say that others are gone, and nobody knows who
hang            no rank got anywhere
killed          a signal from outside

A failure is tried again unless what was run is wrong as it stands, and that is certain: code that cannot be compiled,
an import that finds nothing, arguments that the trainer or argparse refuses, each in the first attempt of a launch and
before the first step. A missing shared library is no such case: it may be missing on one host only.
"""

from __future__ import annotations

import re
import signal
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from launcher.failure import RankExit, exception_line, signal_name

if TYPE_CHECKING:
    from launcher.failure import RootCause

__all__ = ["Fault", "classify"]

_HOST_MEMORY = re.compile(
    r"MemoryError|can't allocate memory|Cannot allocate memory|std::bad_alloc|oom-kill|Out Of Memory|Detected \d+ oom"
)
_GPU_MEMORY = re.compile(
    r"(?:CUDA|HIP) (?:error: )?out of memory|torch\.(?:cuda\.)?OutOfMemoryError|_STATUS_ALLOC_FAILED"
)
_SHARED_MEMORY = re.compile(
    r"insufficient shared memory|[Bb]us error|unable to (?:open|write|mmap|allocate) .*shared memory"
)
_STORAGE = re.compile(
    r"No space left on device|Disk quota exceeded|Input/output error|Read-only file system|Stale file handle|"
    r"Transport endpoint is not connected|File too large|CheckpointWriteError|SlowDown|NoSuchBucket|"
    r"EndpointConnectionError|endpoint URL|NoCredentialsError|"
    r"when calling the \w*(?:Object|Upload|Part|Bucket)\w* operation"
)
_GPU = re.compile(
    r"uncorrectable (?:ECC|NVLink)|GPU is lost|fallen off the bus|CUDA-capable device\(s\) is/are busy|"
    r"CUDA driver initialization failed|no CUDA-capable device|CUDA error: (?:unknown error|system not yet initialized|"
    r"hardware stack error|unspecified launch failure)|NVML_ERROR|CUDA_ERROR_(?:SYSTEM|ECC)"
)  # fmt: skip
_WRONG = re.compile(
    r"^(?:SyntaxError|IndentationError|TabError|ModuleNotFoundError): |^ImportError: cannot import name |"
    r"^trainer\.errors\.(?:ConfigError|ModuleError|LoggingError): "
)
_USAGE = re.compile(r"^[\w./-]+: error: ", re.MULTILINE)

_ADVICE = {
    "host memory": "give the job more memory, or let it take less (DataLoader workers hold copies)",
    "gpu memory": "a smaller batch, activation checkpointing or sharding takes less",
    "shared memory": "/dev/shm is full: fewer DataLoader workers or prefetched batches, or a larger /dev/shm",
    "storage": "look at space, quota and health of where it wrote; what was saved before is whole",
    "gpu": "look at the device (nvidia-smi -q, dmesg | grep Xid), and take the host out of use",
    "killed": "somebody or something sent the signal: a person, a scheduler, a memory watchdog",
}


@dataclass(frozen=True)
class Fault:
    """kind: as above; evidence: what says so; again: whether another try may go better; advice: what to do, if any."""

    kind: str
    evidence: str
    again: bool = True
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.kind} ({self.evidence})" + (f": {self.advice}" if self.advice else "")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def classify(root: RootCause | None, *, gone: str = "", hung: str | None = None, early: bool = False) -> Fault:
    """gone: nodes that were lost, and how; hung: why it is held to hang; early: in the first attempt, before a step."""
    if hung is not None:
        return Fault("hang", hung)
    if root is None or (gone and root.follows_a_lost_node):
        return Fault("lost node", gone)
    ended = root.exit
    if root.left_early:
        return Fault("user code", f"rank {ended.rank} left before its peers were done")
    if ended.killed_for_memory:
        evidence = f"rank {ended.rank} got SIGKILL, and the kernel has killed for want of memory on {ended.host}"
        return Fault("out of memory", evidence, advice=_ADVICE["host memory"])
    said = _said(ended)
    for pattern, kind, advice in (
        (_GPU_MEMORY, "out of memory", "gpu memory"),
        (_SHARED_MEMORY, "storage", "shared memory"),
        (_HOST_MEMORY, "out of memory", "host memory"),
        (_STORAGE, "storage", "storage"),
        (_GPU, "gpu", "gpu"),
    ):
        if line := next((line for line in said if pattern.search(line)), None):
            return Fault(kind, f"rank {ended.rank} said: {_cut(line)}", advice=_ADVICE[advice])
    if ended.code == -signal.SIGBUS:
        return Fault("storage", f"rank {ended.rank} got SIGBUS", advice=_ADVICE["shared memory"])
    if ended.lost_peer:
        return Fault("lost peer", f"rank {ended.rank} said: {_cut(said[0])}" if said else f"rank {ended.rank}")
    outside = (-signal.SIGKILL, -signal.SIGTERM, -signal.SIGHUP)
    if ended.code == -signal.SIGINT or (ended.raised is None and ended.code in outside):
        return Fault("killed", f"rank {ended.rank} got {signal_name(-ended.code)}", advice=_ADVICE["killed"])
    if ended.code < 0 and ended.raised is None:
        return Fault("user code", f"rank {ended.rank} crashed in native code: {signal_name(-ended.code)}")
    wrong = early and (
        (ended.error is not None and bool(said and _WRONG.search(said[0])))
        or (ended.code == 2 and bool(_USAGE.search("\n".join(ended.tail))))
    )
    evidence = (
        f"rank {ended.rank} said: {_cut(said[0])}" if said else f"rank {ended.rank} exited with code {ended.code}"
    )
    return Fault("user code", evidence, again=not wrong)


def _said(ended: RankExit) -> list[str]:
    """The lines that can tell why a rank failed: its exception's; without one its last, the newest first."""
    if ended.error is not None:
        lines = [exception_line(ended.error.get("traceback") or "") or ended.raised or ""]
        lines += [line for line in (ended.raised or "").splitlines() if line]
        return [line for line in lines if line]
    return [line for line in reversed(ended.tail[-15:]) if line.strip()]


def _cut(line: str, most: int = 200) -> str:
    return line if len(line) <= most else line[: most - 1] + "…"
