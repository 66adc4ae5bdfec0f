"""argv -> one of the commands, its errors as a line, its exit code. Only what is asked for is imported."""

from __future__ import annotations

import os
import signal
import sys
from typing import TYPE_CHECKING, NoReturn

import click

from launcher import commands
from launcher.errors import LaunchError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Entry of the `launch` command."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if "_LAUNCH_COMPLETE" in os.environ:
            from launcher.commands import completion

            code = completion.answer()
        elif arguments[:1] in (["resume"], ["retry"]):
            from launcher.launching import retry

            code = retry(arguments[0], arguments[1:])
        elif arguments and arguments[0] in commands.NAMES:
            code = commands.run(arguments[0], arguments[1:])
        else:
            if arguments:
                commands.refuse_misspelt(arguments[0])
            from launcher.launching import start

            code = start(arguments)
    except click.exceptions.Exit as done:
        code = done.exit_code
    except click.ClickException as error:
        _complain(error.format_message())
        code = 2
    except LaunchError as error:
        _complain(str(error))
        code = error.exit_code
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        code = 128 + signal.SIGPIPE
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        # `launch logs NAME | head`: the interpreter flushes once more, and would say so.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def bootstrap() -> NoReturn:
    """Entry of an interpreter that `python_command` starts."""
    main()


def _complain(text: str) -> None:
    from launcher.launching import say

    say(f"error: {text}")
