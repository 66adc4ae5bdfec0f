"""What a run's ranks did over time, in one file of its folder: for `launch report`.

A line of samples.jsonl covers 5 s at first, and twice as long after every 128 lines; more than 256 ranks are told in
groups of neighbours, each by its worst. So a month of any number of ranks is 1,500 lines, 10 MB at most.
"""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from launcher.pace import every_s

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["NAMES", "Recorder", "Sample", "read"]

_FILE = "samples.jsonl"
_ROWS = 256
_DOUBLED_AFTER = 128
_EARLY = 0.9  # messages that come every so many seconds come a little sooner, too
# Seconds of a step without and with waiting for other ranks; MiB of memory, of a process tree and on its GPU.
NAMES = ("own_s", "step_s", "rss", "gpu")


@dataclass(frozen=True)
class Sample:
    """One line. at, seconds: when it ends (since 1970), and how long it is; each: ranks of a row; rows: by name, one
    value of each row, None where nothing was told; step: the furthest; save: of the newest checkpoint, its step, the
    seconds until it was durable and those for which training stood still.
    """

    attempt: int
    at: float
    seconds: float
    each: int
    step: int | None
    save: tuple[int, float, float] | None
    rows: dict[str, list[float | None]]


@dataclass
class Recorder:
    """Of one run, in its supervisor. ranks: the most that it can have; nodes: those that tell of them.

    Times are seconds of a monotonic clock. A folder that cannot be written ends the record, not the run.
    """

    folder: Path
    ranks: int
    nodes: int
    _attempt: int = -1
    _began: float = 0.0
    _lines: int = 0
    _step: int | None = None
    _save: tuple[int, float, float] | None = None
    _rows: dict[str, list[float | None]] = field(default_factory=dict)
    _broken: bool = False

    def __post_init__(self) -> None:
        with contextlib.suppress(OSError), open(self.folder / _FILE, "rb") as file:
            self._lines = sum(1 for _ in file)  # of the run's earlier launches

    @property
    def _each(self) -> int:
        return -(-self.ranks // _ROWS)

    def take(self, attempt: int, told: dict[str, Any], now: float) -> None:
        """A node's message has come (see pace.summary)."""
        if attempt != self._attempt:
            self.close(now)
            self._attempt, self._began = attempt, now
        elif now - self._began >= _EARLY * every_s(self.nodes) * 2 ** (self._lines // _DOUBLED_AFTER):
            self._write(now)
        for ranks, names in ((told["ranks"], NAMES[:2]), (told["alive"], NAMES[2:])):
            for name in names:
                self._worst(name, ranks, told[name])
        if told["step"] is not None:
            self._step = max(told["step"], self._step or 0)
        if told["save"] is not None and (self._save is None or told["save"][0] >= self._save[0]):
            self._save = tuple(told["save"])

    def _worst(self, name: str, ranks: list[int], values: list[float | None]) -> None:
        row = self._rows.setdefault(name, [None] * -(-self.ranks // self._each))
        for rank, value in zip(ranks, values, strict=True):
            at = rank // self._each
            if value is not None and 0 <= at < len(row):
                before = row[at]
                row[at] = value if before is None else max(before, value)

    def _write(self, now: float) -> None:
        line = {
            "attempt": self._attempt, "at": round(time.time(), 2), "seconds": round(now - self._began, 2),
            "each": self._each, "step": self._step, "save": self._save,
            "rows": {name: row for name, row in self._rows.items() if any(v is not None for v in row)},
        }  # fmt: skip
        self._began, self._step, self._save, self._rows = now, None, None, {}
        self._lines += 1
        if not self._broken:
            try:
                with open(self.folder / _FILE, "a") as file:
                    file.write(json.dumps(line, separators=(",", ":")) + "\n")
            except OSError:
                self._broken = True

    def close(self, now: float) -> None:
        """Write what has come since the last line."""
        if self._rows:
            self._write(now)


def read(folder: Path) -> Iterator[Sample]:
    """The lines of a run, as they were written; one that was cut off is passed over."""
    try:
        lines = (folder / _FILE).read_text(errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        with contextlib.suppress(ValueError, TypeError, KeyError):
            told = json.loads(line)
            save = told["save"]
            yield Sample(**(told | {"save": None if save is None else tuple(save)}))
