"""`launch PROGRAM` and `launch retry`: a request is carried out, here, in an allocation, or as a job.

Apart from cli.py because the commands that look at runs, which are to answer in a blink, need none of this.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from launcher import commands, index, runs, snapshot
from launcher.arrays import Array
from launcher.errors import ClusterError, RunError, UsageError
from launcher.request import parse
from launcher.spec import keeps_terminal
from launcher.standing import look
from launcher.starting import launch_apart
from launcher.where import slurm_name

if TYPE_CHECKING:
    import socket
    from collections.abc import Sequence

    from launcher.gang import Outcome
    from launcher.request import Request
    from launcher.spec import LaunchSpec
    from launcher.standing import Standing

__all__ = ["RETRY", "retry", "say", "start"]


def say(line: str) -> None:
    """One line to the person, apart from the ranks' stdout."""
    _print_err(f"launch: {line}")


def _print_err(text: str) -> None:
    """A reader that left (`2>&1 | head`) or a full disk behind stderr is no reason to end a run."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stderr.write(text + "\n")
        sys.stderr.flush()


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
    if name is None and request.where in ("allocation", "step"):
        # A job that is requeued calls launch again from the top, and is to go on with its run.
        name = f"{spec.program.stem[:80]}-{slurm_name(os.environ)}"
    path = runs.resolve(name, cwd) if name is not None else runs.default_root(cwd) / runs.new_name(spec.program)
    if request.dry_run:
        from launcher.backends.slurm import rehearse

        click.echo(rehearse(path, spec, request.elements, request.throttle), nl=False)
        return 0
    if request.where == "step":
        from launcher.backends import slurm_step

        if not slurm_step.first(os.environ):
            return slurm_step.join(path, spec, os.environ)
        return slurm_step.host(path, spec, _work, os.environ)
    code = None
    if request.where == "allocation" and (kept := snapshot.kept(path)) is not None:
        spec = dataclasses.replace(spec, code=kept)  # the job was requeued: not a new start
    elif request.snapshot:
        code = snapshot.survey(spec, say, insist=request.insist)
    if request.elements is not None:
        return _start_many(request, path, code)
    with runs.RunFolder.open(path, spec) as folder:
        if code is not None:
            folder.change_spec(dataclasses.replace(spec, code=code.copy(path)))
        if request.where == "job":
            return _submit(folder, detach=request.detach)
        if request.detach:
            return _go_apart(folder)
        return _work(folder, listener)


def _start_many(request: Request, path: Path, code: snapshot.Survey | None) -> int:
    assert request.elements is not None
    array = Array.create(path, request.spec, request.elements, request.throttle)
    with array.hold():
        if code is not None:
            array = array.with_spec(dataclasses.replace(array.spec, code=code.copy(path)))
        return _run_elements(array, sorted(array.elements))


def _run_elements(array: Array, indices: list[int]) -> int:
    """Run or submit elements of an array that is held; returns the exit code."""
    size = f"{len(indices)} element{'s' if len(indices) > 1 else ''} of {_size(array.spec)}, folder {array.path}"
    if array.spec.slurm is not None:
        from launcher.backends import slurm_array

        job_id = slurm_array.submit(array, indices)
        _register(array.path, array.created, job_id)
        say(f"job {job_id}, array {array.name}: {size}; see: launch ls {job_id}")
        click.echo(job_id)
        return 0
    from launcher.backends import elements

    say(f"local, array {array.name}: {size}")
    _register(array.path, array.created)
    codes = elements.run(array, indices, say, lambda name, folder, outcome: _tell(folder, outcome, name))
    failed = [index for index in indices if codes.get(index, 0)]
    left = len(indices) - len(codes)
    if not failed and not left:
        say(f"array {array.name} finished")
        return 0
    names = ", ".join(f"{array.name}_{index}" for index in failed[:8]) + (", ..." if len(failed) > 8 else "")
    counts = [f"{len(codes) - len(failed)} finished"]
    counts += [f"{len(failed)} did not: {names}"] if failed else []
    counts += [f"{left} never began"] if left else []
    say(f"array {array.name}: {', '.join(counts)}; go on with: launch retry {_resume_name(array.path)}")
    return codes[failed[0]] if failed else 75


RETRY = click.Command(
    "retry",
    params=[
        commands.Runs(many=False),
        click.Option(["--failed"], is_flag=True, help="only what failed or was lost, not what was stopped"),
        click.Option(["-d", "--detach"], is_flag=True, help="submit, print the job's id, do not wait"),
    ],
    help="Go on with a run that is over and has not finished, in the same folder, with its own code and options; of an "
    "array with all such elements, or the one that is named. `launch resume` is the same. Exit code: that of launch; 0 "
    "if there is nothing to do.",
)


def retry(word: str, argv: Sequence[str]) -> int:
    """`launch retry ID` and `launch resume ID`"""
    with RETRY.make_context(f"launch {word}", list(argv)) as ctx:
        o = dict(ctx.params)
    found = index.find(o["runs"], Path.cwd())
    standing = look([found]).runs[0]
    if standing.elements or found.index is not None:
        return _retry_elements(found, standing, only_failed=o["failed"])
    if o["failed"] and standing.status not in ("failed", "lost"):
        say(f"run {standing.name} has not failed ({standing.status}); nothing to do")
        return 0
    if standing.open and standing.job_id is not None:
        raise RunError(f"run {standing.name} is {standing.status} as job {standing.job_id}; wait for it, or cancel it")
    with runs.RunFolder.open(standing.folder, None) as folder:
        spec = folder.spec
        if spec.meeting is not None:
            raise UsageError(
                "this run's nodes were started one by one: start each again with the same --rdzv-id and --run"
            )
        dataclasses.replace(spec.program, target=spec.target).check(Path(spec.cwd))
        if spec.slurm is not None and "SLURM_JOB_ID" not in os.environ:
            return _submit(folder, detach=o["detach"])
        return _work(folder, None)


def _retry_elements(found: index.Found, standing: Standing, *, only_failed: bool) -> int:
    array = Array.read(found.folder)
    wanted = ("failed", "lost") if only_failed else ("failed", "lost", "stopped")
    status = {one.name: one.status for one in (standing, *standing.elements)}
    indices = [i for i in sorted(array.elements) if status.get(f"{array.name}_{i}") in wanted]
    if not indices:
        say(f"{standing.name}: nothing to do ({standing.cause or standing.status})")
        return 0
    dataclasses.replace(array.spec.program, target=array.spec.target).check(Path(array.spec.cwd))
    with array.hold():
        return _run_elements(Array.read(found.folder), indices)


def _work(folder: runs.RunFolder, listener: socket.socket | None) -> int:
    spec = folder.spec
    state = folder.state()
    if state["status"] == "finished":
        say(f"run {folder.run_id} is finished already (folder {folder.path}); nothing to do")
        return 0
    if spec.slurm is not None:
        from launcher.backends import slurm_job

        _register(folder.path, folder.created)
        return slurm_job.run(folder, say)
    backend = "local" if spec.ssh is None else "ssh"
    if spec.meeting is not None:
        backend = f"meeting at {spec.meeting.endpoint}"
    again = f", attempt {state['attempt'] + 1}" if state["attempt"] >= 0 else ""
    say(f"{backend}, run {folder.run_id}{again}: {_size(spec)}, folder {folder.path}")
    _register(folder.path, folder.created)
    from launcher.record import errors_told

    with errors_told(folder, say):
        outcome = _carry_out(folder, listener)
    _tell(folder, outcome)
    return outcome.code


def _carry_out(folder: runs.RunFolder, listener: socket.socket | None) -> Outcome:
    """Run it from this process."""
    spec = folder.spec
    if spec.preflight:
        from launcher.doctor.preflight import preflight

        if (bad := preflight(spec, folder.path, say)) is not None:
            raise ClusterError(f"{bad}; nothing was started")
    if spec.ssh is not None:
        from launcher.backends import ssh

        return ssh.run(folder, say)
    if listener is None:
        from launcher.backends import local

        return local.run(folder, say)
    from launcher.backends import meeting

    return meeting.host(folder, listener, say)


def _submit(folder: runs.RunFolder, *, detach: bool) -> int:
    if folder.state()["status"] == "finished":
        say(f"run {folder.run_id} is finished already (folder {folder.path}); nothing to do")
        return 0
    from launcher.backends.slurm import submit_run
    from launcher.backends.slurm_follow import follow

    job_id = submit_run(folder)
    _register(folder.path, folder.created, job_id)
    folder.close()  # it is the job's now
    say(f"job {job_id}, run {folder.run_id}: {_size(folder.spec)}, folder {folder.path}")
    if detach:
        click.echo(job_id)
        return 0
    try:
        return follow(folder.path, say)
    except KeyboardInterrupt:
        say(f"job {job_id} goes on; come back with: launch logs -f {job_id}   end it with: launch cancel {job_id}")
        return 0


def _go_apart(folder: runs.RunFolder) -> int:
    if folder.state()["status"] == "finished":
        say(f"run {folder.run_id} is finished already (folder {folder.path}); nothing to do")
        return 0
    _register(folder.path, folder.created)
    folder.close()  # it is the other's now
    launch_apart(folder.path)
    say(f"ssh, run {folder.run_id}: {_size(folder.spec)}, folder {folder.path}; see: launch logs -f {folder.run_id}")
    click.echo(folder.run_id)
    return 0


def _register(path: Path, created: float, job_id: str | None = None) -> None:
    if (why_not := index.register(path, created, job_id)) is not None:
        say(why_not)


def _size(spec: LaunchSpec) -> str:
    ranks, nodes = spec.world_size, spec.nodes
    return f"{ranks} rank{'s' if ranks > 1 else ''} on {nodes} node{'s' if nodes > 1 else ''}"


def _tell(folder: runs.RunFolder, outcome: Outcome, name: str | None = None) -> None:
    """How a run ended; name: what a person calls it, if that is not its folder's."""
    from launcher.record import end_told, report

    name = f"run {folder.run_id}" if name is None else name
    if outcome.status == "finished":
        if not keeps_terminal(folder.spec):
            say(f"{name} finished")
    elif outcome.status == "stopped":
        say(f"{name} stopped ({outcome.cause}); go on with: launch resume {_resume_name(folder.path)}")
    else:
        say(f"{name} failed with exit code {outcome.code}")
        _print_err(report(outcome, folder))
    end_told(folder, outcome, say)
    if folder.gaps is not None:
        say(folder.gaps)


def _resume_name(path: Path) -> str:
    return shlex.quote(path.name if path.parent == runs.default_root(Path.cwd()) else str(path))
