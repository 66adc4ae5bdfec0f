"""What a run folder tells of a run: its attempts, why each ended, what was waited for and what was lost.

Only records are read here, so it is true of a run on any host, of any age, with or without a scheduler.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from launcher.progress import Progress
from launcher.runs import read_json

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

__all__ = ["Attempt", "History", "cause_of", "read"]


@dataclass(frozen=True)
class Attempt:
    """One start of all ranks. Times: seconds since 1970. waited_s: from when it could have begun until it did.

    status: running (or its end is not recorded), finished, stopped, failed, lost (its end is not recorded, and another
    one followed); code: what launch would exit with.
    lost_steps: steps that had to be, or will have to be, made again; None where the program does not tell its steps.
    slow: of the ranks and nodes that held up the others and did not catch up again, what was said of each.
    """

    number: int
    started: float
    hosts: tuple[str, ...]
    world_size: int
    waited_s: float = 0.0
    ended: float | None = None
    status: str = "running"
    cause: str = ""
    code: int | None = None
    progress: Progress | None = None
    lost_steps: int | None = None
    slow: dict[str, str] = field(default_factory=dict)

    @property
    def ran_s(self) -> float | None:
        """Seconds from its start to its end; None as long as that is not recorded."""
        return None if self.ended is None else max(0.0, self.ended - self.started)

    def to_json(self) -> dict[str, Any]:
        step = self.progress
        return {
            "attempt": self.number,
            "status": self.status,
            "cause": self.cause,
            "code": self.code,
            "hosts": list(self.hosts),
            "world_size": self.world_size,
            "started": self.started,
            "ended": self.ended,
            "waited_s": self.waited_s,
            "ran_s": self.ran_s,
            "resumed_step": None if step is None else step.began,
            "last_step": None if step is None else step.step,
            "saved_step": None if step is None else step.saved,
            "lost_steps": self.lost_steps,
            "slow": list(self.slow.values()),
        }


@dataclass(frozen=True)
class History:
    """The attempts of a run, and what they add up to."""

    attempts: tuple[Attempt, ...] = ()

    @property
    def waited_s(self) -> float:
        return sum(a.waited_s for a in self.attempts)

    @property
    def ran_s(self) -> float:
        """Of the attempts that have ended."""
        return sum(a.ran_s or 0.0 for a in self.attempts)

    @property
    def lost_steps(self) -> int | None:
        known = [a.lost_steps for a in self.attempts if a.lost_steps is not None]
        return sum(known) if known else None

    @property
    def goodput(self) -> float | None:
        """The share of the time spent, waiting and running, that went into steps that count; None if nobody tells."""
        useful = spent = 0.0
        for attempt in self.attempts:
            ran = attempt.ran_s
            spent += (ran or 0.0) + attempt.waited_s
            if ran is None:
                continue  # nobody knows how long a lost one ran
            step = attempt.progress
            if step is None or attempt.lost_steps is None:
                if attempt.progress is None and attempt.status == "failed":
                    continue  # it died before its first step
                return None
            made = step.step - (step.began or 0)
            useful += ran * max(0, made - attempt.lost_steps) / made if made > 0 else 0.0
        return useful / spent if spent > 0 and any(a.progress is not None for a in self.attempts) else None

    def to_json(self) -> dict[str, Any]:
        return {
            "attempts": [a.to_json() for a in self.attempts],
            "waited_s": self.waited_s,
            "ran_s": self.ran_s,
            "lost_steps": self.lost_steps,
            "goodput": self.goodput,
        }


def read(folder: Path) -> History:
    """The history of the run in `folder`; empty if it has not begun."""
    attempts: list[Attempt] = []
    ready: float | None = None  # since when the next attempt could have begun; None: nobody had asked for it
    before = 0  # attempts of the jobs before this one
    for event in _events(folder):
        what, at = event.get("event"), float(event.get("time", 0.0))
        number = event.get("attempt")
        if what == "job":
            before = len(attempts)
        if what in ("submitted", "requeued", "resubmitted"):
            ready = at
        elif what == "job" and ready is None and not attempts:
            ready = event.get("submitted")  # an element of an array has no word of its submission
        elif what == "attempt":
            attempts.append(
                Attempt(
                    number=int(event["attempt"]),
                    started=at,
                    hosts=tuple(event.get("hosts", ())),
                    world_size=int(event["world_size"]),
                    waited_s=max(0.0, at - ready) if ready is not None else 0.0,
                )
            )
            ready = None
        elif what == "slow" and attempts and attempts[-1].number == number:
            attempts[-1] = replace(attempts[-1], slow=_slow(attempts[-1].slow, event))
        elif what in ("attempt-failed", "attempt-left", "end") and attempts and attempts[-1].number == number:
            attempts[-1] = replace(
                attempts[-1],
                ended=at,
                status=event.get("status", "failed"),
                cause=cause_of(folder, str(event.get("cause", "")), attempts[-1].number),
                code=event.get("code"),
                progress=_progress(event),
            )
            ready = None if what == "end" else at
        elif what == "job-end" and len(attempts) > before:
            attempts[-1] = replace(attempts[-1], cause=_settled(attempts[-1].cause, event.get("cause")))
    return History(tuple(_with_losses(attempts)))


def _slow(before: dict[str, str], event: dict[str, Any]) -> dict[str, str]:
    """Who holds up the others after one more word; a node that does speaks for its ranks."""
    node = event.get("node")
    who = f"rank {event['rank']}" if node is None else f"node {node}"
    covered = {who, *(f"rank {rank}" for rank in event.get("ranks", ()))}
    left = {name: told for name, told in before.items() if name not in covered}
    return left if event["over"] else left | {who: event["told"]}


def cause_of(folder: Path, cause: str, attempt: int) -> str:
    """Why an attempt ended, with who is behind a SIGTERM: `launch cancel` leaves its word in cancel.json."""
    if not cause.startswith("SIGTERM"):
        return cause
    word = read_json(folder / "cancel.json")
    if word is None or word["attempt"] != attempt:
        return cause
    return f"cancelled by {word['user']}" + cause.removeprefix("SIGTERM")


def _settled(told: str, cause: str | None) -> str:
    """A cause with what Slurm says of it afterwards: it may not have answered when the signal came."""
    if cause in (None, "signalled") or not told.startswith("SIGTERM"):
        return told
    known = "SIGTERM while Slurm's controller was away" if cause == "unknown" else cause
    return f"{known}{told.removeprefix('SIGTERM')}"


def _progress(event: dict[str, Any]) -> Progress | None:
    values = event.get("progress")
    return Progress(**values) if isinstance(values, dict) else None


def _with_losses(attempts: list[Attempt]) -> Iterable[Attempt]:
    for attempt, after in itertools.zip_longest(attempts, attempts[1:]):
        if attempt.ended is None and after is not None:
            yield replace(attempt, status="lost", cause="nobody was left to record its end")
        else:
            yield replace(attempt, lost_steps=_lost(attempt, after))


def _lost(attempt: Attempt, after: Attempt | None) -> int | None:
    step = attempt.progress
    if step is None:
        return None
    if attempt.status == "finished" or (attempt.code == 75 and after is None):
        return 0  # 75 is the program's word that it saved where it stopped
    # Where the next attempt really began is better than where it could have.
    began = None if after is None or after.progress is None else after.progress.began
    kept = began if began is not None else step.saved
    if kept is None:
        kept = step.began or 0
    return max(0, step.step - kept)


def _events(folder: Path) -> Iterable[dict[str, Any]]:
    """The lines of events.jsonl; one that was cut by a full disk or a power cut is passed over."""
    try:
        lines = (folder / "events.jsonl").read_bytes().splitlines()
    except FileNotFoundError:
        return
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict):
            yield event
