"""`launch report`: a run, or the runs of an array, as one page of HTML."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from launcher.commands import Runs, look_at, options
from launcher.errors import RunError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["run"]

COMMAND = click.Command(
    "report",
    params=[
        Runs(many=False),
        click.Option(["-o", "--output"], metavar="FILE", help="where to write it [report.html in the run folder]"),
    ],
    help="Write a run as one page of HTML that needs no network: attempts and why they ended, metrics, throughput, "
    "step times and memory of the ranks, checkpoints, configuration, environment, code. Of an array: its runs, "
    "parameters and results. What looks like a secret is hidden. Prints the file's path. Exit code: 0.",
)


def run(argv: Sequence[str]) -> int:
    """Exit code: 0."""
    from launcher.report import gathering, page

    o = options(COMMAND, argv)
    (standing,), note = look_at([o["runs"]])
    if note:
        click.echo(f"launch: {note}", err=True)
    path = Path(o["output"]) if o["output"] else standing.folder / "report.html"
    if path.is_dir():
        raise UsageError(f"--output {path}: this is a folder; give a file, such as {path / 'report.html'}")
    if standing.elements:
        text = page.of_array(standing, gathering.of_array(standing), time.time())
    else:
        text = page.of_run(gathering.of_run(standing))
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "w", encoding="utf-8", errors="replace") as file:
            file.write(text)
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise RunError(f"{path} cannot be written: {error.strerror}; name another file with --output") from error
    click.echo(path)
    return 0
