"""Which rank failed first, why, and how that is told to a person.

Every exit carries the time it was noticed (CLOCK_MONOTONIC of its node, in nanoseconds) and, for a Python exception,
the record that the rank itself wrote at the moment of the exception. A rank that only reports a lost peer is a
follower: it may die first on the clock, yet it is never the cause while there is another candidate.
"""

from __future__ import annotations

import json
import re
import signal
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

__all__ = [
    "RankExit",
    "RootCause",
    "exception_in",
    "exception_line",
    "find_root",
    "how_it_ended",
    "read_error_file",
    "render",
    "signal_name",
]

# What gloo, NCCL, the TCP store and DDP say when somebody else went away. Read from torch 2.11 to 2.15's sources and
# from runs in which a peer was killed.
_LOST_PEER = re.compile(
    r"Connection closed by peer|Connection reset by peer|Broken pipe|Connection refused|Socket is closed|"
    r"connection was closed|remote process exited|ncclRemoteError|NCCL communicator was aborted|ncclInternalError|"
    r"Timed out waiting \d+ms for (?:send|recv) operation|Socket Timeout|failed to recv, got 0 bytes|"
    r"wait timeout after|Application timeout caused pair closure|DistNetworkError|DistStoreError|"
    r"connectFullMesh failed|Read error|Failed to (?:connect|recv|send)|Connection was likely closed|"
    r"lost (?:its|a) peer|watchdog (?:thread terminated|caught|got stuck|hang)|collective operation timeout|"
    r"Socket (?:unexpectedly )?closed|Remote peer closed|remote error detected from rank|collective timeout|"
    r"NCCL communicator encountered error|NCCL (?:operations have failed or )?timed? ?out|NCCL operation timed out|"
    r"client socket has timed out|TCP client failed to connect|monitoredBarrier|Aborting all communicators|"
    r"(?:Connect|Read) timeout \[|did not complete during reconfigure",
    re.IGNORECASE,
)  # fmt: skip
# NCCL's watchdog also passes on what the rank's own kernels did; object stores close connections too.
_OWN = re.compile(r"CUDA error: |CUDA out of memory|device-side assert|uncorrectable|endpoint URL", re.IGNORECASE)

_HEAD = "Traceback (most recent call last):"
_EXCEPTION = re.compile(r"(?P<type>[A-Za-z_][\w.]*)(?:: (?P<message>.*))?")


@dataclass(frozen=True)
class RankExit:
    """How one rank ended. `code`: exit status, or minus the signal's number; `asked`: after we told it to stop.

    log: where its output is; empty if it kept the terminal.
    """

    rank: int
    local_rank: int
    node: int
    host: str
    pid: int
    code: int
    ended_ns: int
    asked: bool
    log: str
    error: dict[str, Any] | None = None
    tail: tuple[str, ...] = field(default=())
    killed_for_memory: bool = False

    @property
    def failed_ns(self) -> int:
        """The moment of the exception if the rank told it, else when its end was noticed."""
        told = (self.error or {}).get("monotonic_ns")
        return told if isinstance(told, int) else self.ended_ns

    @property
    def raised(self) -> str | None:
        """Its exception, as the last line of a traceback has it; None if it told none."""
        if self.error is None:
            return None
        kind, message = self.error.get("type", ""), str(self.error.get("message", ""))
        return f"{kind}: {message}" if kind and message else kind or message

    @property
    def failed(self) -> bool:
        """Ended on its own account with something other than success or "run me again"."""
        return self.code not in (0, 75) and not (self.asked and self.error is None)

    @property
    def ended_while_leaving(self) -> bool:
        """It had raised an exception, and was still on its way out when the others were stopped, and it with them."""
        return self.error is not None and self.code in (-signal.SIGTERM, -signal.SIGKILL)

    @property
    def lost_peer(self) -> bool:
        """Only says that another rank went away."""
        if self.raised is not None:
            said = self.raised
        elif self.code > 0 or self.code == -signal.SIGABRT:
            # A C++ abort or a program of another kind: its last words decide.
            said = "\n".join(self.tail[-15:])
        else:
            return False
        return bool(_LOST_PEER.search(said)) and not _OWN.search(said)

    def on_clock(self, shift_ns: int) -> RankExit:
        """The same exit, its times moved to another node's monotonic clock."""
        error = self.error
        if error is not None and isinstance(error.get("monotonic_ns"), int):
            error = {**error, "monotonic_ns": error["monotonic_ns"] + shift_ns}
        return replace(self, ended_ns=self.ended_ns + shift_ns, error=error)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> RankExit:
        return cls(**{**data, "tail": tuple(data["tail"])})


@dataclass(frozen=True)
class RootCause:
    """The exit that explains the others; `followers` are those that only noticed."""

    exit: RankExit
    followers: tuple[int, ...]
    left_early: bool = False

    @property
    def follows_a_lost_node(self) -> bool:
        """Whether a lost node, if there is one, explains it: its peers were lost, or it was merely done."""
        return self.left_early or self.exit.lost_peer

    @property
    def exit_code(self) -> int:
        """What `launch` exits with: the rank's code, 128+n for a signal, 1 for a rank that left with 0."""
        if self.exit.ended_while_leaving:
            return 1
        if self.exit.code < 0:
            return 128 - self.exit.code
        return self.exit.code or 1


def signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def find_root(exits: Iterable[RankExit]) -> RootCause | None:
    """The first failure, or None if nothing failed.

    Order: failures that are no lost-peer reports, by time; else, if only followers failed, a rank that had left
    before with success (it is the peer they lost); else the earliest follower. What broke after the ranks were asked
    to leave counts only if nothing broke before.
    """
    ended = sorted(exits, key=lambda e: (e.failed_ns, e.rank))
    failed = [e for e in ended if e.failed]
    if not failed:
        return None
    failed = [e for e in failed if not e.asked] or failed
    own = [e for e in failed if not e.lost_peer]
    if own:
        first = own[0]
        return RootCause(first, tuple(e.rank for e in failed if e is not first))
    # Before anybody was asked to leave. Its peers' exceptions may be older than its end: connections close first.
    left = [e for e in ended if e.code in (0, 75) and not e.asked]
    if left:
        return RootCause(left[0], tuple(e.rank for e in failed), left_early=True)
    return RootCause(failed[0], tuple(e.rank for e in failed[1:]))


def read_error_file(path: Path) -> dict[str, Any] | None:
    """The record of an exception: ours, or the one that torch's `@record` writes."""
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    message = data.get("message") if isinstance(data, dict) else None
    if isinstance(message, str):
        return {"type": "", "message": message, "traceback": message}
    if not isinstance(message, dict):
        return None
    extra = message.get("extraInfo") or {}
    text = str(message.get("message", ""))
    kind, _, said = text.partition(": ")
    record: dict[str, Any] = {"type": kind, "message": said, "traceback": extra.get("py_callstack", "")}
    if isinstance(extra.get("monotonic_ns"), int):
        record["monotonic_ns"] = extra["monotonic_ns"]
    return record


def exception_in(lines: Iterable[str]) -> dict[str, Any] | None:
    """The record of an exception by the traceback that ends what a program printed, where an interpreter of its own ran
    it and left no record. None if there is none.
    """
    lines = list(lines)
    start = next((i for i in range(len(lines) - 1, -1, -1) if lines[i] == _HEAD), None)
    if start is None:
        return None
    end = next((i for i in range(start + 1, len(lines)) if lines[i] and not lines[i].startswith(" ")), None)
    if end is None or (found := _EXCEPTION.fullmatch(lines[end])) is None:
        return None
    trace = "\n".join(lines[start : end + 1])
    return {"type": found["type"], "message": found["message"] or "", "traceback": trace}


def exception_line(trace: str) -> str:
    """The first line of the exception in a traceback: with its module, as the interpreter prints it."""
    lines = trace.rstrip().splitlines()
    start = max((i for i, line in enumerate(lines) if line == _HEAD), default=-1)
    return next((line for line in lines[start + 1 :] if line and not line.startswith(" ")), "") if start >= 0 else ""


def how_it_ended(ended: RankExit) -> str:
    said = "" if ended.raised is None else ended.raised.partition("\n")[0][:200]
    if ended.ended_while_leaving:
        return f"raised {said}"
    if ended.code < 0:
        text = f"was killed by {signal_name(-ended.code)}"
        if ended.killed_for_memory:
            text += " (out of memory: the kernel's OOM killer was at work)"
        return text
    return f"exited with code {ended.code}{f' ({said})' if said else ''}"


def render(cause: RootCause, world_size: int, fault: str = "") -> str:
    """The report that stands last on the screen: rank, host, how, traceback or last lines, path of the log.

    fault: of which class it is, by which evidence.
    """
    ended = cause.exit
    lines = [f"rank {ended.rank} of {world_size} on {ended.host} (local rank {ended.local_rank}, pid {ended.pid}) "]
    if cause.left_early:
        lines[0] += "left with exit code 0 while its peers still needed it"
    else:
        lines[0] += ("failed first: it " if cause.followers else "failed: it ") + how_it_ended(ended)
    if cause.followers:
        shown = ", ".join(map(str, cause.followers[:16])) + (", ..." if len(cause.followers) > 16 else "")
        lines.append(f"after it failed: rank{'s' if len(cause.followers) > 1 else ''} {shown}")
    if fault and ended.code != -signal.SIGINT:  # whoever pressed Ctrl-C knows
        lines.append(f"class of fault: {fault}")
    if not ended.log:
        return "\n".join(lines)  # the program had the terminal, and what it said stands there
    trace = (ended.error or {}).get("traceback") or ""
    if trace.strip():
        lines += ["", *trace.rstrip().splitlines()]
    elif ended.tail:
        lines += ["", "its last lines:", *(f"  {line}" for line in ended.tail[-20:])]
    lines += ["", f"log: {ended.log}"]
    return "\n".join(lines)
