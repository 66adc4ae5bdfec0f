"""`launch stacks`: where the ranks of a run are right now."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import click

from launcher.commands import Runs, options
from launcher.commands.asking import call, running
from launcher.errors import RunError
from launcher.runs import read_json
from launcher.stacks import Group, numbers

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from launcher.standing import Standing

__all__ = ["run"]

_WITHIN_S = 30.0

COMMAND = click.Command(
    "stacks",
    params=[
        Runs(many=False),
        click.Option(["--full"], is_flag=True, help="all threads of one rank of each group"),
        click.Option(["--json", "as_json"], is_flag=True, help="groups: where, ranks, sample, natives"),
    ],
    help="Ask the ranks of a run that runs where they are, without stopping them. Ranks at the same place make one "
    "line; the stacks of all threads of all ranks are in the run folder. Where py-spy is installed, the C and C++ "
    "functions below Python are told too. Exit code: 0; 2 if nobody answers.",
)


def run(argv: Sequence[str]) -> int:
    """Exit code: see the help."""
    o = options(COMMAND, argv)
    found = _ask(running(o["runs"], "has stacks"))
    if o["as_json"]:
        click.echo(json.dumps(found, indent=1))
        return 0
    for group in map(Group.from_json, found["groups"]):
        click.echo(str(group))
        if o["full"]:
            click.echo("".join(f"    {line}\n" for line in group.sample.splitlines()))
    if found["silent_nodes"]:
        click.echo(f"node {numbers(found['silent_nodes'])} did not answer")
    for why, nodes in found["lacking"].items():
        click.echo(f"launch: no native frames of node {numbers(nodes)}: {why}", err=True)
    return 0


def _ask(standing: Standing) -> dict[str, Any]:
    folder = standing.folder / "stacks"
    before = _names(folder)
    call(standing, "launch stacks")
    deadline = time.monotonic() + _WITHIN_S
    while time.monotonic() < deadline:
        for name in sorted(_names(folder) - before):
            if (found := read_json(folder / name / "groups.json")) is not None:
                return found
        time.sleep(0.05)
    raise RunError(
        f"run {standing.name} did not answer within {_WITHIN_S:g} s: its ranks have not begun, or have ended"
    )


def _names(folder: Path) -> set[str]:
    try:
        return {path.name for path in folder.iterdir()}
    except FileNotFoundError:
        return set()
