"""`launch wait`: until runs are over, to leave as they did."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from launcher import index
from launcher.commands import Runs, options
from launcher.standing import look

if TYPE_CHECKING:
    from collections.abc import Sequence

    from launcher.standing import Standing

__all__ = ["exit_code", "run"]

# From here on the records are looked at more and more rarely, as a person becomes more and more patient.
_FIRST_S, _LAST_S = 0.1, 5.0
_SLURM_S = 20.0

COMMAND = click.Command(
    "wait",
    params=[
        Runs(),
        click.Option(["--timeout"], type=click.FloatRange(0), metavar="S", help="seconds, then exit with 124"),
        click.Option(["--json", "as_json"], is_flag=True, help="print how they stand, as launch ls --json does"),
    ],
    help="Wait until runs are over. Exit code: 0 all finished; else that of the first that did not: its ranks' code, "
    "75 stopped cleanly, 1 lost or failed without a code; 124 after --timeout.",
)


def run(argv: Sequence[str]) -> int:
    """Exit code: see the help."""
    o = options(COMMAND, argv)
    runs = [index.find(text, Path.cwd()) for text in o["runs"]]
    standings = until_over(runs, o["timeout"])
    if o["as_json"]:
        click.echo(json.dumps([standing.to_json() for standing in standings], indent=1))
    if any(standing.open for standing in standings):
        return 124
    return next((code for standing in standings if (code := exit_code(standing))), 0)


def exit_code(standing: Standing) -> int:
    """What `launch` would have exited with; of an array, the first code that is not 0."""
    if standing.elements:
        return next((code for element in standing.elements if (code := exit_code(element))), 0)
    if standing.status == "finished":
        return 0
    return standing.code or (75 if standing.status == "stopped" else 1)


def until_over(runs: Sequence[index.Found], timeout_s: float | None = None) -> tuple[Standing, ...]:
    """Wait until no run runs or will run by itself, or the time is over; how they stand then."""
    until = None if timeout_s is None else time.monotonic() + timeout_s
    pause, asked = _FIRST_S, time.monotonic()
    found = look(runs).runs
    while any(standing.open for standing in found):
        left = pause if until is None else min(pause, until - time.monotonic())
        if left <= 0:
            break
        time.sleep(left)
        pause = min(_LAST_S, pause * 1.2)
        # The records say when something ended; only Slurm knows that it will not go on, or never recorded its end.
        found = look(runs, slurm=False).runs
        with_jobs = any(standing.job_id is not None for standing in found)
        if with_jobs and (time.monotonic() - asked >= _SLURM_S or not any(standing.open for standing in found)):
            found, asked = look(runs).runs, time.monotonic()
    return found
