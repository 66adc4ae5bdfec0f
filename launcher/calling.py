"""`launch(fn, procs=2)`: a function on several ranks of this machine, waited for: for notebooks, and scripts alike."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

from launcher.errors import UsageError
from launcher.jobs import Job, submit

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["launch"]

R = TypeVar("R")

_LOOK_S = 0.1


def launch(function: Callable[..., R], /, *args: Any, **options: Any) -> list[R]:
    """Run `function(*args)` on every rank of a new run here, show what `launch` would, and return what each returned.

    options: as of `submit`: procs=2, gpus=4, run="name", max_restarts=3. The ranks are processes of their own: what the
    function uses travels to them, functions and classes of a notebook's cells too, and they change nothing here. An
    interrupt (Ctrl-C, a notebook's stop button) has them save and leave, as it has `launch`.

    Raises `UsageError` before anything is started, and as `Job.results` does when the ranks have left.
    """
    if options.setdefault("backend", "local") != "local":
        raise UsageError(
            f"launch: backend={options['backend']!r} does not run here; launcher.submit({_name(function)}, ...) does "
            "not wait for it."
        )
    job = submit(function, *args, **options)
    with open(job.folder / "launch.log", errors="replace") as log:
        try:
            _show(job, log)
        except KeyboardInterrupt:
            job.cancel(check=False)
            _show(job, log)
            raise
    return job.results()


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", "function")


def _show(job: Job[Any], log: TextIO) -> None:
    """Print what the run says until it is done."""
    done = False
    while not done:
        done = job.done()  # before the look at what it said last
        if text := log.read():
            sys.stdout.write(text)
            sys.stdout.flush()
        elif not done:
            time.sleep(_LOOK_S)
