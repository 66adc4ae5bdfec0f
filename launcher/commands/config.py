"""`launch config`: which defaults hold here, and which file says so."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from launcher.commands import options
from launcher.commands.table import lines, width
from launcher.config import files, load
from launcher.options import PARAMETERS

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["run"]

COMMAND = click.Command(
    "config",
    params=[click.Option(["--json", "as_json"], is_flag=True, help="one JSON object")],
    help="Show which defaults hold in this folder, and which file each came from. The command line and PET_ variables "
    "win over all of them.",
)


def run(argv: Sequence[str]) -> int:
    """Exit code: 0; 2 if a file says what it may not."""
    o = options(COMMAND, argv)
    cwd = Path.cwd()
    found = load(PARAMETERS, cwd, os.environ)
    places = files(cwd, os.environ)
    if o["as_json"]:
        values = {_key(name): {"value": d.value, "file": str(d.file)} for name, d in sorted(found.items())}
        click.echo(json.dumps({"defaults": values, "files": [str(place) for place in places]}, indent=1))
        return 0
    rows = [(_key(name), _text(d.value), str(d.file)) for name, d in sorted(found.items())]
    if rows:
        click.echo("\n".join(lines(("OPTION", "VALUE", "FROM"), rows, columns=width())) + "\n")
    click.echo("files, the nearest first:")
    for place in places:
        click.echo(f"  {place}{'' if place.is_file() else ' (not there)'}")
    return 0


def _key(name: str) -> str:
    return next(p.opts[0].removeprefix("--") for p in PARAMETERS if p.name == name)


def _text(value: Any) -> str:
    return (
        ", ".join(map(str, value)) if isinstance(value, tuple) else str(value).lower() if value is True else str(value)
    )
