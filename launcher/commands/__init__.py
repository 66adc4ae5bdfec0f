"""`launch ls`, `show`, `logs`, ...: what is said of runs, and done to them, after they were started.

One module per command, imported when it is called: each must answer in a blink, so none imports torch or submitit.
"""

from __future__ import annotations

import difflib
import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from launcher import index
from launcher.errors import UsageError
from launcher.standing import look

if TYPE_CHECKING:
    from collections.abc import Sequence

    from launcher.standing import Standing

__all__ = ["NAMES", "Runs", "look_at", "one_run", "options", "run"]

# name -> one line of help
NAMES = {
    "ls": "list runs",
    "show": "one run: its attempts, why each ended, what was lost",
    "logs": "what its ranks printed; -f follows",
    "report": "one page of HTML: attempts, metrics, ranks, checkpoints, code",
    "wait": "wait for its end, exit as it did",
    "cancel": "ask it to save and leave",
    "config": "which defaults hold, and from which file",
    "ckpt": "look at, check, compare, convert and clean up checkpoints",
    "stacks": "where the ranks of a running run are",
    "top": "watch its ranks: steps, memory, GPUs",
    "doctor": "whether machines are fit for a run, and what to do where not",
    "drill": "prove that a script resumes exactly, or name the state that it loses",
    "completion": "completion for bash, zsh or fish",
}


def refuse_misspelt(word: str) -> None:
    """Raise `UsageError` if a command was probably meant, and there is nothing of that name that could be started."""
    if word.isalpha() and not Path(word).exists():
        nearest = difflib.get_close_matches(word, [*NAMES, "resume", "retry"], n=1)
        if nearest:
            raise UsageError(
                f"there is no command {word!r}, nor a script of that name here; did you mean launch {nearest[0]}?"
            )


def run(name: str, argv: Sequence[str]) -> int:
    """Carry out a command; returns the exit code. Raises `LaunchError` or click's own errors."""
    module = importlib.import_module(f"launcher.commands.{name}")
    code: int = module.run(argv)
    return code


def options(command: click.Command, argv: Sequence[str]) -> dict[str, Any]:
    """The values of a command line, by name."""
    name = command.name or ""
    with command.make_context(f"launch {name}", list(argv)) as ctx:
        return dict(ctx.params)


def _complete_runs(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    """Names of runs and their job ids, for the shell; the newest first, and not more than can be read."""
    found = []
    for entry in index.entries():
        found += [text for text in (entry.folder.name, *entry.jobs) if text.startswith(incomplete)]
        if len(found) >= 50:
            break
    return found


class Runs(click.Argument):
    """The runs that a command is about: names, job ids, folders; completed by the shell."""

    def __init__(self, *, many: bool = True, required: bool = True) -> None:
        super().__init__(
            ["runs"], nargs=-1 if many else 1, required=required, metavar="ID...", shell_complete=_complete_runs
        )


def look_at(texts: Sequence[str]) -> tuple[tuple[Standing, ...], str]:
    """How the runs that texts name stand, and a note on that answer. Raises `UsageError` on what names none."""
    answer = look([index.find(text, Path.cwd()) for text in texts])
    return answer.runs, answer.note


def one_run(text: str) -> index.Found:
    """The one run that a text names, which an array is not. Raises `UsageError`."""
    found = index.find(text, Path.cwd())
    if found.index is None and (found.folder / "array.json").is_file():
        name = found.folder.name
        raise UsageError(f"{name} is an array: name one element, like {name}_0; launch ls {name} lists them")
    return found
