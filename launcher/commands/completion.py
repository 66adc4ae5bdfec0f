"""`launch completion`: the script that has a shell complete options, commands, and the names and ids of runs."""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING

import click
from click.shell_completion import CompletionItem, get_completion_class

from launcher.commands import NAMES, options
from launcher.options import PARAMETERS

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["VARIABLE", "answer", "run"]

# Set by the script when the shell asks; its value is the shell and what it wants.
VARIABLE = "_LAUNCH_COMPLETE"

_SHELLS = ("bash", "zsh", "fish")

COMMAND = click.Command(
    "completion",
    params=[click.Argument(["shell"], type=click.Choice(_SHELLS))],
    help='Print what a shell must read to complete launch. bash: eval "$(launch completion bash)" in ~/.bashrc; zsh: '
    'eval "$(launch completion zsh)" in ~/.zshrc; fish: launch completion fish > '
    "~/.config/fish/completions/launch.fish",
)


class _Launch(click.Group):
    """The whole command line, for completion alone: options, then a command or a program and its arguments."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return sorted([*NAMES, "resume", "retry"])

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:  # noqa: ARG002
        if name in ("resume", "retry"):
            return importlib.import_module("launcher.launching").RETRY  # type: ignore[no-any-return]
        if name not in NAMES:
            return None
        return getattr(importlib.import_module(f"launcher.commands.{name}"), "COMMAND", click.Command(name))

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        # Where click keeps the first word that is no option; named without the underscore before 8.2.
        program = vars(ctx).get("_protected_args") or vars(ctx).get("protected_args")
        found = [] if program else super().shell_complete(ctx, incomplete)
        # bash shows files or words, not both. A program's own arguments are most often files.
        return found or [CompletionItem(incomplete, type="file")]


def _whole() -> click.Group:
    return _Launch(
        "launch",
        params=[p for p in PARAMETERS if isinstance(p, click.Option)],
        context_settings={"allow_interspersed_args": False},
    )


def run(argv: Sequence[str]) -> int:
    """Exit code: 0."""
    shell = options(COMMAND, argv)["shell"]
    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(_whole(), {}, "launch", VARIABLE).source())
    return 0


def answer() -> int:
    """Tell the shell that asks by way of VARIABLE what could stand there."""
    shell, _, what = os.environ[VARIABLE].partition("_")
    kind = get_completion_class(shell)
    if kind is None or what != "complete":
        return 1
    click.echo(kind(_whole(), {}, "launch", VARIABLE).complete())
    return 0
