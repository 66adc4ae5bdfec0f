"""What ranks do and take right now, while somebody watches: told by agents, gathered by the supervisor into one file.

`launch top` writes `watch.json` into the run folder and signals the supervisor as `launch stacks` does. As long as that
file is renewed, the supervisor asks the agents, one small message each, and writes `top.json`. Where nobody watches,
nobody asks. Both files are written in place: over NFS a reader then sees what is new as soon as it opens them.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from launcher.processes import descendants

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Mapping
    from pathlib import Path

    from launcher.progress import Beat

__all__ = ["ANSWER", "REQUEST", "Audience", "Rate", "gathered", "interesting", "memory_of", "phase_name"]

REQUEST, ANSWER = "watch.json", "top.json"

_MOST_ROWS = 256  # in the file: more than fits a screen
_MOST_TOLD = 4096  # rows that all nodes together tell at a time
_RENEWED_S = 60.0
_PHASES = ("start", "train", "validate", "test", "predict", "save", "done")
_PAGE_SIZE = os.sysconf("SC_PAGE_SIZE")


def phase_name(phase: int) -> str:
    return _PHASES[phase] if phase < len(_PHASES) else str(phase)


def memory_of(pid: int) -> int:
    """Bytes of memory that a process and all below it have (resident; pages that they share count for each)."""
    total = 0
    for each in (pid, *descendants(pid)):
        # One that has just ended has none.
        with contextlib.suppress(OSError, IndexError), open(f"/proc/{each}/statm") as file:
            total += int(file.read().split()[1]) * _PAGE_SIZE
    return total


@dataclass
class Rate:
    """A rank's steps per second between two questions; the last that is known, if it made none in between."""

    _last: Beat | None = None
    _rate: float | None = None

    def look(self, beat: Beat) -> float | None:
        last, self._last = self._last, beat
        if last is None or beat.step < last.step:
            self._rate = None
        elif beat.step > last.step and beat.at > last.at:
            self._rate = (beat.step - last.step) / (beat.at - last.at)
        else:
            self._last = last
        return self._rate


def interesting(row: Mapping[str, Any], slow: Container[int] = ()) -> tuple[float, ...]:
    """Sorts rows: what failed, the slow, who is behind, who has not made a step for long."""
    step = row.get("step")
    return (
        not row.get("exit"),
        row["rank"] not in slow,
        float("inf") if step is None else step,
        -round(row.get("age_s") or 0),
        row["rank"],
    )


def gathered(rows: Iterable[dict[str, Any]], most: int) -> dict[str, Any]:
    """A node's message: the `most` interesting ones of its ranks, and all of them in numbers."""
    found = sorted(rows, key=interesting)
    steps = [r["step"] for r in found if r.get("step") is not None]
    rates = sorted(r["rate"] for r in found if r.get("rate") is not None)
    return {
        "ranks": len(found),
        "rss": sum(r["rss"] for r in found),
        "step": [min(steps), max(steps)] if steps else None,
        "rate": rates[len(rates) // 2] if rates else None,
        "rows": found[:most],
    }


@dataclass
class Audience:
    """On the supervisor's side. Times are seconds of one monotonic clock; due: the next question, or None."""

    folder: Path
    due: float | None = None
    _heeded: set[tuple[str, int]] = field(default_factory=set)  # requests whose signals have come
    _text: bytes = b""
    _renewed: float = 0.0
    _number: int = 0
    _awaited: set[int] = field(default_factory=set)
    _told: dict[int, dict[str, Any]] | None = None  # since the last question; None: written already

    def called(self, now: float) -> bool:
        """A signal has come: whether it is somebody's who wants to watch (and not to know the stacks)."""
        try:
            request = json.loads((self.folder / REQUEST).read_bytes())
            who = str(request["who"]), int(request["signals"])
            fresh = abs(time.time() - request["time"]) < 2 * _RENEWED_S
        except (OSError, ValueError, KeyError, TypeError):
            return False
        if not fresh or who in self._heeded:
            return False
        self._heeded.add(who)
        self._renewed = now
        self.due = now if self.due is None else self.due
        return True

    def ask(self, now: float, nodes: Iterable[int]) -> tuple[set[int], int]:
        """It is due: which nodes to ask, and how many rows each may tell. None are left if nobody watches any more."""
        try:
            text = (self.folder / REQUEST).read_bytes()
        except OSError:
            text = b""
        if text and text != self._text:
            self._text, self._renewed = text, now
        if now - self._renewed > _RENEWED_S:
            self.close()
            return set(), 0
        self._awaited, self._told = set(nodes), {}
        self.due = now + max(1.0, len(self._awaited) / 200)
        return set(self._awaited), max(1, _MOST_TOLD // max(1, len(self._awaited)))

    @property
    def unwritten(self) -> bool:
        """Whether there is something to write: a question was asked, and not all have answered it."""
        return self._told is not None

    def answered(self, node: int, host: str, message: dict[str, Any]) -> bool:
        """A node's answer has come; whether it was the last."""
        if node not in self._awaited or self._told is None:
            return False
        self._awaited.discard(node)
        self._told[node] = message | {"rows": [row | {"host": host} for row in message["rows"]]}
        return not self._awaited

    def write(self, about: dict[str, Any]) -> None:
        """What has been told since the last question. about: of the whole run; among it `slow`, ranks of interest."""
        told = list((self._told or {}).values())
        self._told = None
        self._number += 1
        steps = [step for t in told if t["step"] for step in t["step"]]
        rates = sorted(t["rate"] for t in told if t["rate"] is not None)
        slow = set(about["slow"])
        rows = sorted((row for t in told for row in t["rows"]), key=lambda row: interesting(row, slow))
        answer = about | {
            "time": time.time(),
            "number": self._number,
            "ranks": sum(t["ranks"] for t in told),
            "rss": sum(t["rss"] for t in told),
            "step": [min(steps), max(steps)] if steps else None,
            "rate": rates[len(rates) // 2] if rates else None,
            "silent_nodes": sorted(self._awaited),
            "rows": rows[:_MOST_ROWS],
        }
        (self.folder / ANSWER).write_text(json.dumps(answer))

    def close(self) -> None:
        """Nobody watches any more, or the run is over."""
        self.due = self._told = None
        for name in (REQUEST, ANSWER):
            with contextlib.suppress(OSError):  # a disk that became read-only
                (self.folder / name).unlink(missing_ok=True)
