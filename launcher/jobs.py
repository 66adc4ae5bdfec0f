"""Functions as jobs: `submit` and `map_array`, and the `Job` that stands for what was started, in submitit's shape."""

from __future__ import annotations

import dataclasses
import pickle
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import click

from launcher import index, runs, snapshot
from launcher.arrays import Array
from launcher.call import result_file
from launcher.commands.cancel import cancel
from launcher.commands.logs import attempts_of
from launcher.commands.wait import until_over
from launcher.errors import FailedJobError, LaunchError, RunError, UncompletedJobError, UsageError
from launcher.options import PARAMETERS
from launcher.request import parse
from launcher.spec import Program
from launcher.standing import look
from launcher.starting import launch_apart

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Iterable

    from launcher.request import Request
    from launcher.standing import Standing

__all__ = ["Job", "map_array", "submit"]

R = TypeVar("R")

# Which launch process this interpreter has started for which folder: until it has written its first record, nobody
# else knows that the run begins.
_started: dict[Path, subprocess.Popen[bytes]] = {}

# What says how a command behaves on a terminal, or what to run.
_NOT_HERE = {"detach", "dry_run", "module", "no_python", "sweep", "sweep_file"}


class Job(Generic[R]):
    """One call of a function on every rank of a run; or whatever runs in a run folder.

    folder: of the run, or of an array of which `element` is one. It may be made anew, in another process too, from the
    folder alone.
    """

    def __init__(self, folder: Path | str, element: int | None = None) -> None:
        self._found = index.Found(Path(folder).resolve(), element)
        self._cancels = False

    def __repr__(self) -> str:
        return f"Job(job_id={self.job_id!r}, state={self.state!r}, folder={str(self.folder)!r})"

    def __del__(self) -> None:
        if getattr(self, "_cancels", False) and not self.done():
            self.cancel(check=False)

    @property
    def standing(self) -> Standing:
        """How the run stands, asked anew."""
        return look([self._found]).runs[0]

    @property
    def folder(self) -> Path:
        """The run folder."""
        found = self._found
        return found.folder if found.index is None else Array.read(found.folder).element(found.index).folder

    @property
    def job_id(self) -> str:
        """Slurm's number (`12`, `12_3`), or the run's name if it runs without Slurm: what `launch show` takes."""
        standing = look([self._found], slurm=False).runs[0]
        return standing.job_id or standing.name

    @property
    def state(self) -> str:
        """PENDING, RUNNING, COMPLETED, FAILED, CANCELLED (stopped; `launch retry` goes on) or UNKNOWN (lost)."""
        words = {"waiting": "PENDING", "running": "RUNNING", "finished": "COMPLETED", "failed": "FAILED",
                 "stopped": "CANCELLED", "lost": "UNKNOWN"}  # fmt: skip
        return "PENDING" if self._begins else words[self.standing.status]

    @property
    def _begins(self) -> bool:
        """Whether this interpreter's launch for it is on its way, and has not left a record yet."""
        process = _started.get(self._found.folder)
        return process is not None and process.poll() is None and self.standing.attempt < 0

    def done(self, force_check: bool = False) -> bool:  # noqa: ARG002  # submitit's; every look is a fresh one
        """Whether it neither runs nor will run by itself."""
        return not self._begins and not self.standing.open

    @property
    def num_tasks(self) -> int:
        """How many ranks call the function."""
        standing = look([self._found], slurm=False).runs[0]
        return standing.nodes * standing.procs

    def wait(self) -> None:
        """Return when it is done."""
        while not self.done():
            if self._begins:
                time.sleep(0.05)
            else:
                until_over([self._found])

    def results(self) -> list[R]:
        """What the function returned on each rank, in the order of ranks, once it is done.

        Raises `FailedJobError` if it raised or its run failed, `UncompletedJobError` if it was stopped.
        """
        error = self.exception()
        if error is not None:
            raise error
        return [self._outcome(rank)[1] for rank in range(self.num_tasks)]

    def result(self) -> R:
        """What the function returned on rank 0. Raises as `results` does."""
        return self.results()[0]

    def exception(self) -> LaunchError | None:
        """Why there are no results; None if there are. Waits until it is done."""
        self.wait()
        standing = self.standing
        outcomes = [self._outcome(rank) for rank in range(self.num_tasks)]
        where = f"job {standing.job_id or standing.name} (logs: {self.folder / 'logs'})"
        if standing.status in ("failed", "lost"):
            raised = [(rank, text) for rank, (kind, text) in enumerate(outcomes) if kind == "error"]
            story = "".join(f"\n\nrank {rank}:\n{text}" for rank, text in raised)
            return FailedJobError(f"{where} failed: {standing.cause}{story}")
        if standing.status != "finished" or any(kind != "success" for kind, _ in outcomes):
            return UncompletedJobError(f"{where} was {standing.status} ({standing.cause}) and has no result")
        return None

    def _outcome(self, rank: int) -> tuple[str, Any]:
        try:
            kind, value = pickle.loads(result_file(self.folder, rank).read_bytes())
        except FileNotFoundError:
            return "none", None
        return kind, value

    def stdout(self, rank: int = 0) -> str | None:
        """What a rank has printed in its last attempt, on stdout and stderr in order; None before it has begun."""
        attempts = attempts_of(self.folder)
        if not attempts:
            return None
        try:
            return (self.folder / "logs" / f"attempt-{attempts[-1]}" / f"rank-{rank}.log").read_text(errors="replace")
        except FileNotFoundError:
            return None

    def stderr(self, rank: int = 0) -> str | None:
        """The same as `stdout`: both streams go to one file, in the order in which they were written."""
        return self.stdout(rank)

    def cancel(self, check: bool = True) -> None:
        """Ask it to save and leave. check: raise `LaunchError` if it cannot be reached."""
        while self._begins and not self.standing.open:
            time.sleep(0.02)  # its launch cannot be asked before it has said who it is
        try:
            cancel(self._found, self.standing)
        except LaunchError:
            if check:
                raise

    def cancel_at_deletion(self, value: bool = True) -> Job[R]:
        """Cancel it when this object goes, if it is not done by then."""
        self._cancels = value
        return self


def submit(function: Callable[..., R], /, *args: Any, **options: Any) -> Job[R]:
    """Start `function(*args)` on every rank of a new run; returns at once.

    options: those of the `launch` command by their names: nodes=2, gpus=4, procs=4, time="1:00:00", run="name",
    sbatch=["nice=5"], backend="local" or "slurm". As there, `nodes` or a Slurm option submits a job where there is
    sbatch, and it runs here otherwise. For keyword arguments of the function use functools.partial. What is returned
    must pickle; modules are found as in this process.

    Raises `UsageError` before anything is started, `ClusterError` with Slurm's words.
    """
    request = _request(options)
    path = _path(request, function)
    program = dataclasses.replace(request.spec.program, args=(str(path / "call.pkl"),))
    with runs.RunFolder.open(path, dataclasses.replace(request.spec, program=program)) as folder:
        _write_call(path / "call.pkl", function, args)
        if (code := _snapshot(request)) is not None:
            folder.change_spec(dataclasses.replace(folder.spec, code=code.copy(path)))
        job_id = None
        if request.where == "job":
            from launcher.backends.slurm import submit_run

            job_id = submit_run(folder)
        _register(path, folder.created, job_id)
    if job_id is None:
        _start(path)
    return Job(path)


def map_array(function: Callable[..., R], /, *iterables: Iterable[Any], **options: Any) -> list[Job[R]]:
    """Start `function(*args)` for each args of `zip(*iterables)`, as one array; returns its jobs, in that order.

    options: as of `submit`; `array="%4"` has at most 4 of them run at once. Raises as `submit` does, and `UsageError`
    if there is nothing to call or the iterables are of different lengths.
    """
    try:
        calls = list(zip(*iterables, strict=True))
    except ValueError as error:
        raise UsageError(f"map_array: the iterables must have the same length ({error})") from error
    if not calls:
        raise UsageError("map_array: nothing to call; give at least one iterable, and not an empty one")
    throttle = str(options.pop("array", ""))
    if throttle and not throttle.startswith("%"):
        raise UsageError(f'map_array: array={throttle!r}; give array="%N" for at most N at once')
    request = _request(options | {"array": f"0-{len(calls) - 1}{throttle}"})
    path = _path(request, function)
    files = [path / "calls" / f"{number}.pkl" for number in range(len(calls))]
    arguments = {number: (str(file),) for number, file in enumerate(files)}
    array = Array.create(path, request.spec, arguments, request.throttle)
    with array.hold():
        (path / "calls").mkdir()
        for file, args in zip(files, calls, strict=True):
            _write_call(file, function, args)
        if (code := _snapshot(request)) is not None:
            array = array.with_spec(dataclasses.replace(array.spec, code=code.copy(path)))
        job_id = None
        if request.where == "job":
            from launcher.backends import slurm_array

            job_id = slurm_array.submit(array, sorted(array.elements))
        _register(path, array.created, job_id)
    if job_id is None:
        _start(path)
    return [Job(path, element) for element in sorted(array.elements)]


def _request(options: dict[str, Any]) -> Request:
    """What the options ask for, as if they stood on a command line. Raises `UsageError`."""
    known = {p.name: p for p in PARAMETERS if isinstance(p, click.Option)}
    by_flag = {opt.lstrip("-").replace("-", "_"): p for p in known.values() for opt in p.opts if opt.startswith("--")}
    words: list[str] = []
    for name, value in options.items():
        option = by_flag.get(name)
        if option is None or name in _NOT_HERE:
            allowed = ", ".join(sorted(n for n, p in by_flag.items() if not p.hidden and n not in _NOT_HERE))
            raise UsageError(f"submit: there is no option {name!r}; there are {allowed}, and sbatch's of their own")
        flag = "--" + name.replace("_", "-")
        if option.is_flag:
            words += [flag] if value else []
        elif value is not None:
            several = value if option.multiple and not isinstance(value, str) else [value]
            words += [f"{flag}={one}" for one in several]
    request = parse([*words, "-m", "launcher.call"])
    if request.where in ("meeting", "step"):
        raise UsageError("submit starts all nodes itself; call it outside of srun, without rendezvous options")
    return request


def _path(request: Request, function: Callable[..., Any]) -> Path:
    """The folder of the new run. Raises `RunError` if there is one already."""
    cwd = Path(request.spec.cwd)
    if request.name is None:
        name = getattr(function, "__name__", type(function).__name__)
        return runs.default_root(cwd) / runs.new_name(Program("module", name.strip("<>")))
    path = runs.resolve(request.name, cwd)
    if index.is_run(path):
        raise RunError(f"{path} is a run already; Job({str(path)!r}) stands for it, another run= is a new one")
    return path


def _snapshot(request: Request) -> snapshot.Survey | None:
    def warn(text: str) -> None:
        warnings.warn(text, stacklevel=4)

    return snapshot.survey(request.spec, warn, insist=request.insist) if request.snapshot else None


def _register(path: Path, created: float, job_id: str | None) -> None:
    if (why_not := index.register(path, created, job_id)) is not None:
        warnings.warn(why_not, stacklevel=3)


def _write_call(path: Path, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    import cloudpickle

    # In two layers: what the inner one needs may be found only on the search path that the outer one brings.
    path.write_bytes(pickle.dumps((sys.path, cloudpickle.dumps((function, args)))))


def _start(path: Path) -> None:
    _started[path] = launch_apart(path)
