"""The elements of an array on this machine: so many at once, each a launch of its own with a run folder of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import selectors
import signal
import socket
import sys
import traceback
from typing import TYPE_CHECKING

from launcher.backends import local
from launcher.errors import LaunchError
from launcher.processes import die_with_parent, start_ticks
from launcher.record import errors_told
from launcher.runs import write_json
from launcher.spec import Output

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import FrameType

    from launcher.arrays import Array
    from launcher.gang import Outcome
    from launcher.runs import RunFolder

__all__ = ["run"]


def run(
    array: Array, indices: Sequence[int], say: Callable[[str], None], tell: Callable[[str, RunFolder, Outcome], None]
) -> dict[int, int]:
    """Run elements, `array.throttle` at once (None: one after another), in a process each; their exit codes.

    A stop signal goes to those that run, once each; no further one begins, and those have no code. To be called while
    the array is held, in a process that may be forked: it has one thread. tell: how an element's end is told.
    """
    state = {"host": socket.gethostname(), "pid": os.getpid(), "pid_start": start_ticks(os.getpid())}
    write_json(array.path / "state.json", {"status": "running", **state})
    waiting = list(indices)
    running: dict[int, int] = {}  # by pid
    codes: dict[int, int] = {}
    signals: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        signals.append(number)

    old = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    old_fd = signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    try:
        with selectors.DefaultSelector() as selector:
            selector.register(wake_read, selectors.EVENT_READ)
            while running or waiting:
                while waiting and len(running) < (array.throttle or 1):
                    index = waiting.pop(0)
                    pid = _fork(array, index, say, tell)
                    running[pid] = index
                    selector.register(os.pidfd_open(pid), selectors.EVENT_READ, pid)
                for key, _ in selector.select():
                    if key.data is None:
                        with contextlib.suppress(BlockingIOError):
                            os.read(wake_read, 4096)
                        continue
                    selector.unregister(key.fileobj)
                    os.close(key.fd)
                    _, status = os.waitpid(key.data, 0)
                    code = os.waitstatus_to_exitcode(status)
                    codes[running.pop(key.data)] = 128 - code if code < 0 else code
                for number in signals:
                    if waiting:
                        say(f"{signal.Signals(number).name}: {len(waiting)} elements do not begin any more")
                        waiting.clear()
                    for pid in running:
                        os.kill(pid, number)  # not reaped yet, so it is this child
                signals.clear()
    finally:
        signal.set_wakeup_fd(old_fd)
        for number, handler in old.items():
            signal.signal(number, handler)
        os.close(wake_read)
        os.close(wake_write)
        write_json(array.path / "state.json", {"status": "ended", **state})
    return codes


def _fork(array: Array, index: int, say: Callable[[str], None], tell: Callable[[str, RunFolder, Outcome], None]) -> int:
    parent = os.getpid()
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        die_with_parent(parent)
        os.setpgid(0, 0)  # the terminal's Ctrl-C comes once, by way of the parent
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)  # several cannot read one terminal
        os.close(null)
        code = _work(array, index, say, tell)
    except LaunchError as error:
        say(f"{array.name}_{index}: error: {error}")
        code = error.exit_code
    except BaseException:
        traceback.print_exc()  # nobody above us in this process will
    finally:
        sys.stdout.flush()
        os._exit(code)


def _work(array: Array, index: int, say: Callable[[str], None], tell: Callable[[str, RunFolder, Outcome], None]) -> int:
    name = f"{array.name}_{index}"
    with array.open(index) as folder:
        if folder.state()["status"] == "finished":
            return 0
        say(f"{name}: {' '.join(array.element(index).args) or 'begins'}")
        output = folder.spec.output
        if output.prefix == Output().prefix:  # the person's own template stays
            prefix = f"[{index}] " if folder.spec.world_size == 1 else f"[{index}:${{rank}}] "
            output = dataclasses.replace(output, prefix=prefix)
        folder.spec = dataclasses.replace(folder.spec, output=output)
        with errors_told(folder, say):
            outcome = local.run(folder, lambda line: say(f"{name}: {line}"))
        tell(name, folder, outcome)
        return outcome.code
