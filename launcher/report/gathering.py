"""What a run's folder tells, gathered for its report. Secrets are hidden here; nothing of the page is known."""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from launcher import samples, scrub, surroundings
from launcher.arrays import Array
from launcher.commands.show import failure_text, past
from launcher.report import curves
from launcher.runs import read_json

if TYPE_CHECKING:
    from pathlib import Path

    from launcher.history import History
    from launcher.report.curves import Curve
    from launcher.samples import Sample
    from launcher.standing import Standing

__all__ = ["Checkpoint", "Part", "Story", "of_array", "of_run"]

_MOST_CHECKPOINTS = 2000


@dataclass(frozen=True)
class Checkpoint:
    """One on disk, or one without a name whose save was only told of. at: when it was durable, or had been, in seconds
    since 1970; took_s: since it began; stall_s: for how long training stood still for it; size: bytes.
    """

    step: int
    name: str = ""
    at: float | None = None
    took_s: float | None = None
    stall_s: float | None = None
    size: int | None = None


@dataclass(frozen=True)
class Story:
    """Of one run."""

    standing: Standing
    history: History
    events: list[dict[str, Any]]
    samples: list[Sample]
    curves: list[Curve]
    checkpoints: list[Checkpoint]
    failure: str
    arguments: list[str]
    spec: dict[str, Any]
    here: dict[str, Any] | None
    made: float = field(default_factory=time.time)

    @property
    def begin(self) -> float:
        first = self.history.attempts[0] if self.history.attempts else None
        return self.standing.created if first is None else first.started - first.waited_s


@dataclass(frozen=True)
class Part:
    """One element of an array: what is its own among the arguments, and its metrics."""

    standing: Standing
    arguments: dict[str, str]
    curves: list[Curve]
    ran_s: float


def of_run(standing: Standing) -> Story:
    """Everything that is known of one run."""
    folder = standing.folder
    record = read_json(folder / "run.json") or {}
    spec = record.get("spec", {})
    found = list(samples.read(folder))
    return Story(
        standing=standing,
        history=past(standing),
        events=_events(folder),
        samples=found,
        curves=curves.read(folder),
        checkpoints=_checkpoints(folder, found),
        failure=scrub.scrubbed(failure_text(standing)) if standing.status == "failed" else "",
        arguments=scrub.arguments(spec.get("program", {}).get("args", [])),
        spec=_hidden(spec),
        here=surroundings.read(folder),
    )


def of_array(standing: Standing) -> list[Part]:
    """Its elements, in order."""
    own = {element.folder: element.args for element in Array.read(standing.folder).elements.values()}
    return [
        Part(one, _named(scrub.arguments(own.get(one.folder, ()))), curves.read(one.folder), past(one).ran_s)
        for one in standing.elements
    ]


def _named(words: list[str]) -> dict[str, str]:
    """`--lr=0.1 --seed 3 name=x` as names and values; what has no name is called by its place."""
    found: dict[str, str] = {}
    name = ""
    for at, word in enumerate(words):
        key, equals, value = word.partition("=")
        if equals:
            found[key.lstrip("-")] = value
        elif word.startswith("-") and not re.fullmatch(r"-\d.*", word):
            found[name := key.lstrip("-")] = "yes"
            continue
        elif name:
            found[name] = word
        else:
            found[f"argument {at + 1}"] = word
        name = ""
    return found


def _hidden(value: Any, name: str = "") -> Any:
    """A spec without secrets, and without what is empty: what was not said."""
    if isinstance(value, dict):
        hidden = {k: _hidden(v, k) for k, v in value.items()}
        return {k: v for k, v in hidden.items() if v not in (None, {}, [], "")}
    if isinstance(value, list):
        return scrub.arguments(value) if all(isinstance(v, str) for v in value) else [_hidden(v) for v in value]
    if isinstance(value, str):
        return scrub.of_name(name, value)
    return value


def _events(folder: Path) -> list[dict[str, Any]]:
    found = []
    try:
        lines = (folder / "events.jsonl").read_text(errors="replace").splitlines()
    except OSError:
        return []
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict):
            found.append(event)
    return found


def _checkpoints(folder: Path, told: list[Sample]) -> list[Checkpoint]:
    """Those that are there, and saves that were told of whose checkpoint has gone since."""
    stalls = {s.save[0]: (*s.save[1:], s.at) for s in reversed(told) if s.save is not None}
    found: dict[tuple[int, str], Checkpoint] = {}
    for path in sorted(folder.rglob("*/manifest.json"))[:_MOST_CHECKPOINTS]:
        try:
            manifest = json.loads(path.read_text())["manifest"]
            step, at = int(manifest["step"]), float(manifest["created"])
            began = int(str(manifest["attempt"])[:14], 16) / 1e6  # its name begins with the time at which it was begun
            size = sum(f["shard_bytes"] + f["record_bytes"] for f in manifest["files"])
            one = Checkpoint(step, str(manifest["name"]), at, max(0.0, at - began), size=size)
        except (OSError, ValueError, KeyError, TypeError):
            continue
        found[step, one.name] = one
    newest = {key[0]: key for key, _ in sorted(found.items(), key=lambda item: item[1].at or 0)}
    for step, (took_s, stall_s, by) in stalls.items():
        if step not in newest:
            found[step, ""] = Checkpoint(step, "", by, took_s, stall_s)
        else:
            found[newest[step]] = replace(found[newest[step]], stall_s=stall_s)
    return sorted(found.values(), key=lambda c: (c.step, c.at or 0))
