"""Processes as the kernel sees them: trees, subreapers, and the end of everything below one process."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import resource
import signal
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection

__all__ = [
    "allow_files",
    "become_subreaper",
    "children_of",
    "descendants",
    "die_with_parent",
    "end_descendants",
    "kill_tree",
    "outlive_parent",
    "reap",
    "schedule_of",
    "start_ticks",
    "threads_of",
    "traced_by",
]

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_PR_SET_PTRACER = 0x59616D61


def _prctl(option: int, argument: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, argument, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl({option}): {os.strerror(number)}")


def become_subreaper() -> None:
    """Orphaned descendants become this process's children, so that none can get out of sight."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent(parent: int, number: int = signal.SIGKILL) -> None:
    """Have the kernel send `number` to this process when its parent dies; leave at once if it already has."""
    _prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        os._exit(128 + number)


def outlive_parent() -> None:
    """Take `die_with_parent` back."""
    _prctl(_PR_SET_PDEATHSIG, 0)


def traced_by(pid: int) -> None:
    """Let a process and those below it look into this one, where else only a process above it may (Yama)."""
    with contextlib.suppress(OSError):  # a kernel without Yama: whoever has the same user may
        _prctl(_PR_SET_PTRACER, pid)


def reap(process: subprocess.Popen[bytes], timeout_s: float) -> int:
    """The exit code of a process that is about to end; one that has not by then is killed."""
    try:
        return process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def allow_files(count: int) -> None:
    """Let this process have so many files open. Raises `OSError` if it may not."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= count:
        return  # what it starts inherits the limit, so it stays as it is where it can
    if hard != resource.RLIM_INFINITY and hard < count:
        raise OSError(errno.EMFILE, f"{count} open files are needed, and {hard} are allowed (ulimit -Hn)")
    resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))


def threads_of(pid: int | str = "self") -> list[str]:
    """The names of a process's threads."""
    names = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError), open(task / "comm") as file:
            names.append(file.read().strip())
    return names


def start_ticks(pid: int) -> int | None:
    """When a process started, in clock ticks since boot: with its pid it is told from every other; None if gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # The name in brackets may hold spaces and brackets; of what follows it the 20th is the start.
            return int(file.read().rpartition(b")")[2].split()[19])
    except (OSError, IndexError):
        return None


def schedule_of(pid: int) -> tuple[float, float] | None:
    """Seconds that a process's main thread was on a processor, and was ready to run but had none; None if not known."""
    try:
        with open(f"/proc/{pid}/schedstat") as file:
            ran, waited, _ = file.read().split()
    except (OSError, ValueError):
        return None
    return int(ran) / 1e9, int(waited) / 1e9


def children_of(pid: int) -> list[int]:
    found: list[int] = []
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            with open(task / "children") as file:
                found += map(int, file.read().split())
    except OSError:
        pass  # it is gone
    return found


def descendants(pid: int, spared: Collection[int] = ()) -> list[int]:
    """All processes below `pid`, whatever session or group they moved to. spared: without these children of it and what
    is below them.
    """
    found = [child for child in children_of(pid) if child not in spared]
    for child in found:  # grows while it is walked
        found += children_of(child)
    return found


def kill_tree(pid: int) -> None:
    """SIGKILL to `pid`, its process group if it leads one, and all below it."""
    below = descendants(pid)
    with contextlib.suppress(OSError):
        if os.getpgid(pid) == pid:
            os.killpg(pid, signal.SIGKILL)
    for victim in (pid, *below):
        with contextlib.suppress(OSError):
            os.kill(victim, signal.SIGKILL)


def end_descendants(timeout_s: float = 5.0, spared: Collection[int] = ()) -> None:
    """SIGKILL everything below this process until nothing is left. spared: but for these children of it and what is
    below them, for which somebody else waits.
    """
    deadline = time.monotonic() + timeout_s
    while (below := descendants(os.getpid(), spared)) and time.monotonic() < deadline:
        for pid in below:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        for pid in below:
            with contextlib.suppress(ChildProcessError):  # of those, the ones that are children of this process
                os.waitpid(pid, os.WNOHANG)
        time.sleep(0.002)
