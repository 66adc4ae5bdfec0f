"""The metrics that a run has logged, from the files that loggers leave in its folder: TensorBoard's, or metrics.csv."""

from __future__ import annotations

import contextlib
import csv
import math
import os
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Curve", "read"]

_MOST_BYTES = 256 << 20  # of one file: minutes of reading beyond
_HEAD = struct.Struct("<QI")  # length and its checksum, before each record; after it four bytes of checksum
_NOT_METRICS = ("epoch", "hp_metric", "step")


@dataclass
class Curve:
    """One metric. points: (step, value), by step; walls: when (seconds since 1970), if that is known."""

    name: str
    points: list[tuple[float, float]] = field(default_factory=list)
    walls: list[float] = field(default_factory=list)

    @property
    def last(self) -> float:
        return self.points[-1][1]

    def cut(self, step: float) -> None:
        """Forget everything from a step on: a later attempt went on before it."""
        keep = next((i for i, (s, _) in enumerate(self.points) if s >= step), len(self.points))
        del self.points[keep:], self.walls[keep:]


def read(folder: Path) -> list[Curve]:
    """All metrics in a run folder, by name; event files where there are some, else metrics.csv."""
    events, tables = [], []
    for place, folders, names in os.walk(folder):
        folders[:] = [
            f for f in folders if f not in ("checkpoints", "logs", "code", "stacks") and not f.endswith(".ckpt")
        ]
        events += [Path(place, name) for name in names if ".tfevents." in name]
        tables += [Path(place, name) for name in names if name == "metrics.csv"]
    found = _of_events(sorted(events, key=lambda p: (p.name, str(p)))) or _of_tables(sorted(tables))
    return sorted((c for c in found.values() if c.points and c.name not in _NOT_METRICS), key=lambda c: c.name)


def _of_events(paths: list[Path]) -> dict[str, Curve]:
    found: dict[str, Curve] = {}
    if not paths:
        return found
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # 0.1 s, and nothing of TensorFlow

    for path in paths:
        # Of add_scalars(name, {part: value}) each part is a file in a folder of its own.
        part = path.parent.name if any(p.parent == path.parent.parent for p in paths) else ""
        mine: dict[str, Curve] = {}
        for record in _records(path):
            with contextlib.suppress(Exception):  # of protobuf's, which of them depends on its version
                event = Event.FromString(record)
                if event.session_log.status == SessionLog.START:
                    for curve in found.values():
                        curve.cut(event.step)
                for value in event.summary.value:
                    if value.HasField("simple_value"):
                        number = value.simple_value
                    elif value.HasField("tensor") and len(value.tensor.float_val) == 1:
                        number = value.tensor.float_val[0]
                    else:
                        continue
                    name = f"{value.tag}/{part}" if part and not value.tag.endswith(part) else value.tag
                    curve = found.setdefault(name, Curve(name))
                    if name not in mine:
                        curve.cut(event.step)  # a new file begins where its attempt did
                    mine[name] = curve
                    curve.points.append((float(event.step), float(number)))
                    curve.walls.append(event.wall_time)
    return found


def _records(path: Path) -> Iterator[bytes]:
    """The records of an event file, up to one that is being written or is damaged."""
    try:
        if path.stat().st_size > _MOST_BYTES:
            return
        data = path.read_bytes()
    except OSError:
        return
    at = 0
    while at + _HEAD.size <= len(data):
        length, _ = _HEAD.unpack_from(data, at)
        begin = at + _HEAD.size
        if begin + length + 4 > len(data):
            return
        yield data[begin : begin + length]
        at = begin + length + 4


def _of_tables(paths: list[Path]) -> dict[str, Curve]:
    found: dict[str, Curve] = {}
    for path in paths:
        with contextlib.suppress(OSError, csv.Error), open(path, newline="", errors="replace") as file:
            for number, row in enumerate(csv.DictReader(file)):
                step = _float(row.get("step"))
                for name, text in row.items():
                    if isinstance(name, str) and (value := _float(text)) is not None:
                        curve = found.setdefault(name, Curve(name))
                        curve.points.append((number if step is None else step, value))
    for curve in found.values():
        curve.points.sort(key=lambda p: p[0])
    return found


def _float(text: object) -> float | None:
    try:
        value = float(str(text))
    except ValueError:
        return None
    return value if math.isfinite(value) else None
