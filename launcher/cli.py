"""argv -> LaunchSpec -> a backend. The only module that prints and exits."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

from launcher import commands, index, runs
from launcher.errors import LaunchError, UsageError
from launcher.request import parse
from launcher.spec import keeps_terminal

if TYPE_CHECKING:
    import socket
    from collections.abc import Sequence

    from launcher.gang import Outcome
    from launcher.spec import LaunchSpec

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Entry of the `launch` command."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if arguments[:1] == ["resume"]:
            code = resume(arguments[1:])
        elif arguments and arguments[0] in commands.NAMES:
            code = commands.run(arguments[0], arguments[1:])
        else:
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


def say(line: str) -> None:
    """One line to the person, apart from the ranks' stdout."""
    _print_err(f"launch: {line}")


def _print_err(text: str) -> None:
    """A reader that left (`2>&1 | head`) or a full disk behind stderr is no reason to end a run."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stderr.write(text + "\n")
        sys.stderr.flush()


def _complain(text: str) -> None:
    say(f"error: {text}")


# ------------------------------------------------------------------------------------------------ commands


def start(argv: Sequence[str]) -> int:
    """`launch [options] program ...`"""
    request = parse(argv)
    spec, name = request.spec, request.name
    cwd = Path(spec.cwd)
    listener = None
    if spec.meeting is not None:
        from launcher.backends import meeting

        listener = meeting.listen(spec.meeting)
        if listener is None:
            say(f"node of run {spec.meeting.run_id!r}, meeting at {spec.meeting.endpoint}")
            return meeting.join(spec)
        if name is None and spec.meeting.run_id != "none":
            name = re.sub(r"[^A-Za-z0-9._-]+", "-", spec.meeting.run_id).strip("-.") or None
    path = runs.resolve(name, cwd) if name is not None else runs.default_root(cwd) / runs.new_name(spec.program)
    with runs.RunFolder.open(path, spec) as folder:
        return _work(folder, listener) if request.where != "job" else _submit(folder, detach=request.detach)


def resume(argv: Sequence[str]) -> int:
    """`launch resume NAME|DIR`"""
    if len(argv) != 1 or argv[0].startswith("-"):
        if argv[:1] in (["-h"], ["--help"]):
            print(
                "Usage: launch resume NAME|DIR\n\nGo on with a run that was stopped or has failed, as it was started."
            )
            return 0
        raise UsageError(f"launch resume takes one run name or folder; given: {shlex.join(argv) or 'nothing'}")
    path = runs.resolve(argv[0], Path.cwd())
    if not path.is_dir():
        known = sorted(
            (p.parent for p in runs.default_root(Path.cwd()).glob("*/run.json")), key=lambda p: p.stat().st_mtime
        )
        there = f"; runs here: {', '.join(p.name for p in known[-8:])}" if known else ""
        raise UsageError(f"there is no run {argv[0]!r} (looked for {path}){there}")
    with runs.RunFolder.open(path, None) as folder:
        folder.spec.program.check(Path(folder.spec.cwd))
        if folder.spec.meeting is not None:
            raise UsageError(
                "this run's nodes were started one by one: start each again with the same --rdzv-id and --run"
            )
        return _work(folder, None)


def _work(folder: runs.RunFolder, listener: socket.socket | None) -> int:
    spec = folder.spec
    state = folder.state()
    if state["status"] == "finished":
        say(f"run {folder.run_id} is finished already (folder {folder.path}); nothing to do")
        return 0
    backend = "local" if listener is None else f"meeting at {spec.meeting.endpoint if spec.meeting else ''}"
    again = f", attempt {state['attempt'] + 1}" if state["attempt"] >= 0 else ""
    say(f"{backend}, run {folder.run_id}{again}: {_size(spec)}, folder {folder.path}")
    if (why_not := index.register(folder.path, folder.created)) is not None:
        say(why_not)
    if listener is None:
        from launcher.backends import local

        outcome = local.run(folder, say)
    else:
        from launcher.backends import meeting

        outcome = meeting.host(folder, listener, say)
    _tell(folder, outcome)
    return outcome.code


def _submit(folder: runs.RunFolder, *, detach: bool) -> int:
    if folder.state()["status"] == "finished":
        say(f"run {folder.run_id} is finished already (folder {folder.path}); nothing to do")
        return 0
    from launcher.backends.slurm import submit_run
    from launcher.backends.slurm_follow import follow

    job_id = submit_run(folder)
    if (why_not := index.register(folder.path, folder.created, job_id)) is not None:
        say(why_not)
    folder.close()  # it is the job's now
    say(f"job {job_id}, run {folder.run_id}: {_size(folder.spec)}, folder {folder.path}")
    if detach:
        print(job_id)
        return 0
    try:
        return follow(folder.path, say)
    except KeyboardInterrupt:
        say(f"job {job_id} goes on; come back with: launch logs -f {job_id}   end it with: launch cancel {job_id}")
        return 0


def _size(spec: LaunchSpec) -> str:
    ranks, nodes = spec.world_size, spec.nodes
    return f"{ranks} rank{'s' if ranks > 1 else ''} on {nodes} node{'s' if nodes > 1 else ''}"


def _tell(folder: runs.RunFolder, outcome: Outcome) -> None:
    from launcher.supervisor import report

    if outcome.status == "finished":
        if not keeps_terminal(folder.spec):
            say(f"run {folder.run_id} finished")
    elif outcome.status == "stopped":
        say(f"run {folder.run_id} stopped ({outcome.cause}); go on with: launch resume {_resume_name(folder)}")
    else:
        say(f"run {folder.run_id} failed with exit code {outcome.code}")
        _print_err(report(outcome, folder))


def _resume_name(folder: runs.RunFolder) -> str:
    if folder.path.parent == runs.default_root(Path.cwd()):
        return shlex.quote(folder.run_id)
    return shlex.quote(str(folder.path))
