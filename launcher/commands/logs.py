"""`launch logs`: what the ranks printed, from the files of the run folder, as they grow if asked."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import click

from launcher.commands import Runs, one_run, options
from launcher.commands.wait import exit_code
from launcher.errors import UsageError
from launcher.runs import read_json
from launcher.standing import look

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from launcher import index

__all__ = ["Reader", "follow", "run"]

# Files are looked at by their length: on a shared file system nobody is told that another host has written. The more
# files are followed, the more rarely each is looked at: a thousand ranks cost the file server as much as 25.
_LOOK_S = 0.25
_FILES_PER_S = 100.0
_SLURM_S = 20.0  # between two questions to the controller
_LONGEST = 1 << 20

_FILE = re.compile(r"rank-(\d+)\.log")
_ATTEMPT = re.compile(r"attempt-(\d+)")

COMMAND = click.Command(
    "logs",
    params=[
        Runs(many=False),
        click.Option(["-r", "--rank"], type=click.IntRange(0), metavar="R", help="one global rank [all, each named]"),
        click.Option(["--attempt"], type=click.IntRange(0), metavar="N", help="which start, from 0 [the last]"),
        click.Option(["-f", "--follow"], is_flag=True, help="go on over restarts until the run ends"),
        click.Option(["-n", "--tail"], type=click.IntRange(0), metavar="N", help="only the last lines of each rank"),
        click.Option(["--json", "as_json"], is_flag=True, help="one JSON object per line: attempt, rank, line"),
    ],
    help="Show what the ranks of a run printed.",
)


def run(argv: Sequence[str]) -> int:
    """Exit code: 0; with --follow, once the run is over, that of `launch wait`."""
    o = options(COMMAND, argv)
    found = one_run(o["runs"])
    folder = look([found], slurm=False).runs[0].folder
    reader = Reader(folder, o["rank"], o["attempt"], o["tail"], as_json=o["as_json"])
    if o["follow"]:
        return follow(found, reader)
    if not reader.take(last=True):
        raise UsageError(_nothing(folder, o["rank"], o["attempt"]))
    reader.close()
    return 0


def _nothing(folder: Path, rank: int | None, attempt: int | None) -> str:
    attempts = attempts_of(folder)
    if not attempts:
        job = read_json(folder / "slurm.json") or {}
        said = f"; what its job said is in {job['output']}" if "output" in job and Path(job["output"]).is_file() else ""
        return f"{folder.name} has no logs yet (looked in {folder / 'logs'}){said}"
    if attempt is not None and attempt not in attempts:
        return f"{folder.name} has no attempt {attempt}; it has {', '.join(map(str, attempts))}"
    place = folder / "logs" / f"attempt-{attempts[-1] if attempt is None else attempt}"
    ranks = ranks_of(place)
    if not ranks:
        return f"nothing was kept of {folder.name}: its one rank had the terminal"
    return f"{place} has no log of rank {rank}; it has those of ranks {ranks[0]} to {ranks[-1]}"


@dataclass
class _Tail:
    """One file that is read as it grows."""

    file: BinaryIO
    partial: bytes = b""

    def lines(self, *, last: bool = False) -> Iterator[bytes]:
        """Whole lines that are new; `last`: also what is left without an end of line."""
        while chunk := self.file.read(_LONGEST):
            *whole, self.partial = (self.partial + chunk).split(b"\n")
            yield from whole
            if len(self.partial) > _LONGEST:
                yield self.partial
                self.partial = b""
        if last and self.partial:
            yield self.partial
            self.partial = b""


class Reader:
    """Prints what one attempt's ranks have written since the last look; `newest` moves on to later attempts.

    rank: only that one's, without its number before each line. tail: so many last lines of each file at first.
    """

    def __init__(self, folder: Path, rank: int | None, attempt: int | None, tail: int | None, *, as_json: bool) -> None:
        self.folder = folder
        self.attempt = attempt
        self.rank = rank
        self._fixed = attempt is not None
        self._tail = tail
        self._as_json = as_json
        self._open: dict[int, _Tail] = {}

    def take(self, *, last: bool = False) -> bool:
        """Print what is new; `last`: nothing comes any more. Returns whether there is any file."""
        newest = max(attempts_of(self.folder), default=None)
        if self.attempt is None:
            self.attempt = newest
        if self.attempt is None:
            return False
        moves_on = not self._fixed and newest is not None and newest > self.attempt
        self._open_new()
        self._print(last=last or moves_on)
        if moves_on:
            self.close()
            self.attempt, self._tail = newest, None
            return self.take(last=last)
        return bool(self._open)

    @property
    def pause_s(self) -> float:
        return max(_LOOK_S, len(self._open) / _FILES_PER_S)

    def _open_new(self) -> None:
        place = self.folder / "logs" / f"attempt-{self.attempt}"
        wanted = ranks_of(place) if self.rank is None else [self.rank]
        for rank in wanted:
            if rank in self._open:
                continue
            try:
                file = open(place / f"rank-{rank}.log", "rb")  # noqa: SIM115
            except FileNotFoundError:
                continue
            if self._tail is not None:
                _seek_to_last(file, self._tail)
            self._open[rank] = _Tail(file)

    def _print(self, *, last: bool) -> None:
        out = sys.stdout.buffer
        alone = self.rank is not None or len(self._open) == 1
        for rank, tail in sorted(self._open.items()):
            prefix = b"" if alone else f"[{rank}] ".encode()
            for line in tail.lines(last=last):
                if self._as_json:
                    text = line.decode(errors="replace")
                    out.write(json.dumps({"attempt": self.attempt, "rank": rank, "line": text}).encode() + b"\n")
                else:
                    out.write(prefix + line + b"\n")
        out.flush()

    def close(self) -> None:
        for tail in self._open.values():
            tail.file.close()
        self._open.clear()


def attempts_of(folder: Path) -> list[int]:
    """The attempts that have logs, in order."""
    return _numbers(folder / "logs", _ATTEMPT)


def ranks_of(attempt: Path) -> list[int]:
    """The ranks that have a log in an attempt's folder, in order."""
    return _numbers(attempt, _FILE)


def _numbers(folder: Path, pattern: re.Pattern[str]) -> list[int]:
    try:
        names = os.listdir(folder)  # noqa: PTH208
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(int(match[1]) for name in names if (match := pattern.fullmatch(name)))


def _seek_to_last(file: BinaryIO, count: int) -> None:
    """To the start of the last `count` lines, read from the end: a log may have gigabytes."""
    end = file.seek(0, os.SEEK_END)
    block, data = 1 << 16, b""
    while end and data.count(b"\n") <= count:
        start = max(0, end - block)
        file.seek(start)
        data = file.read(end - start) + data
        end = start
    kept = data.splitlines(keepends=True)[-count:] if count else []
    file.seek(-sum(map(len, kept)), os.SEEK_END)


def follow(run: index.Found, reader: Reader) -> int:
    """Print until the run is over, over restarts and requeues; returns the code that `launch wait` would exit with."""
    asked = -_SLURM_S
    while True:
        reader.take()
        standing = look([run], slurm=False).runs[0]
        now = time.monotonic()
        # Only Slurm knows whether a stopped job will run again, and of one that died without a word.
        if standing.job_id is not None and standing.status != "finished" and now - asked >= _SLURM_S:
            asked, standing = now, look([run]).runs[0]
            if not standing.open:
                break
        elif not standing.open and (standing.job_id is None or standing.status == "finished"):
            break
        time.sleep(reader.pause_s)
    reader.take(last=True)
    reader.close()
    return exit_code(standing)
