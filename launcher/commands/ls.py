"""`launch ls`: a person's runs, or the elements of an array."""

from __future__ import annotations

import itertools
import json
import time
from typing import TYPE_CHECKING

import click

from launcher import index
from launcher.commands import Runs, look_at, options
from launcher.commands.table import duration, lines, width
from launcher.standing import Standing, look

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["rows", "run"]

COMMAND = click.Command(
    "ls",
    params=[
        Runs(required=False),
        click.Option(["-n", "--number"], type=click.IntRange(1), default=20, help="how many, the newest first [20]"),
        click.Option(["-a", "--all", "everything"], is_flag=True, help="all that there are"),
        click.Option(["-o", "--open", "only_open"], is_flag=True, help="only those that run or wait"),
        click.Option(["--json", "as_json"], is_flag=True, help="one JSON array"),
    ],
    help="List your runs, the newest first; with IDs those, and the elements of arrays.",
)


def run(argv: Sequence[str]) -> int:
    """Exit code: 0."""
    o = options(COMMAND, argv)
    if o["runs"]:
        named, note = look_at(o["runs"])
        found = [one for standing in named for one in (standing.elements or [standing])]
    else:
        most = None if o["everything"] or o["only_open"] else o["number"]
        answer = look(index.Found(entry.folder) for entry in itertools.islice(index.entries(), most))
        found, note = list(answer.runs), answer.note
    if o["only_open"]:
        found = [standing for standing in found if standing.open]
    if o["as_json"]:
        click.echo(json.dumps([standing.to_json() for standing in found], indent=1))
        return 0
    if note:
        click.echo(f"launch: {note}", err=True)
    if not found:
        click.echo("nothing runs or waits" if o["only_open"] else "no runs", err=True)
        return 0
    click.echo("\n".join(rows(found, width())))
    return 0


def rows(found: Sequence[Standing], columns: int | None) -> list[str]:
    """Runs as a table."""
    head = ("NAME", "STATE", "JOB", "AGE", "RANKS", "TRY", "WHY")
    return lines(head, [_row(standing) for standing in found], columns=columns, right=("AGE", "TRY"))


def _row(s: Standing) -> tuple[str, ...]:
    why = s.cause
    if s.status == "failed" and s.code is not None and str(s.code) not in s.cause:
        why = f"exit {s.code}: {why}"
    count = f"{len(s.elements)} of {s.nodes}x{s.procs}" if s.elements else f"{s.nodes}x{s.procs}"
    # From 1, as one counts tries; the attempt in file names counts from 0.
    tries = "" if s.elements else str(s.attempt + 1)
    return s.name, s.status, s.job_id or "", duration(time.time() - s.created), count, tries, why.replace("\n", " ")
