"""The training process's side of a writer: hands one job over, and learns how it went."""

from __future__ import annotations

import atexit
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.checkpoint import job
from trainer.checkpoint.job import Outcome
from trainer.checkpoint.writing import Content, blocks_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from trainer.checkpoint.job import Job
    from trainer.checkpoint.snapshot import Snapshot

# At the end of the process, rank 0's writer waits so long for records of ranks on other machines, which may be dead.
_PATIENCE_AT_EXIT_S = 60.0
# A process whose connection is closed leaves at once, unless it hangs in a system call.
_ENDS_WITHIN_S = 5.0

# Runs `trainer.checkpoint.helper` without running `trainer/__init__.py`, which imports torch (1.3 s, 300 MB).
_BOOT = """
import json, sys, types
path, root = json.loads(sys.argv[3]), sys.argv[4]
sys.path[:] = path
for name in ("trainer", "trainer.checkpoint"):
    module = sys.modules[name] = types.ModuleType(name)
    module.__path__ = [root + "/" + name.replace(".", "/")]
from trainer.checkpoint.helper import main
main(int(sys.argv[1]), int(sys.argv[2]))
"""


class Writer:
    """Does one job at a time beside the training, and tells of its two stages: written, committed.

    told: called in a thread of the writer's when a job is over.
    """

    def __init__(self, told: Callable[[Outcome], object]) -> None:
        self._told = told
        self._changed = threading.Condition()
        self._stages: list[Outcome] = []
        self._thread: threading.Thread | None = None

    def stage(self, number: int, timeout_s: float | None) -> Outcome | None:
        """How writing (0) or committing (1) went; None if it is not over within the timeout (None: no limit)."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._stages) > number, timeout_s)
            return self._stages[number] if len(self._stages) > number else None

    def _end(self) -> Outcome | None:
        """Wait for the job in hand, but not for ever for what other ranks have to do; how it went, if there was one."""
        if self._thread is None or self.stage(0, None) is None:
            return None
        late = Outcome(f"other ranks had not written their parts {_PATIENCE_AT_EXIT_S:.0f} s later.")
        return self.stage(1, _PATIENCE_AT_EXIT_S) or late

    def _watch(self, outcomes: Callable[[], Iterator[Outcome]]) -> None:
        """Take in the two outcomes of a job, in a thread."""

        def run() -> None:
            for outcome in outcomes():
                with self._changed:
                    self._stages.append(outcome)
                    self._changed.notify_all()
            self._told(self._stages[1])

        self._join()
        self._stages = []
        # A daemon: the interpreter joins others before it calls what is registered for its exit.
        self._thread = threading.Thread(target=run, name="checkpoint-writer", daemon=True)
        self._thread.start()

    def _join(self) -> None:
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
            self._thread = None


class ThreadWriter(Writer):
    """Writes in a thread of this process: what is small, and file systems that live in it, such as memory://."""

    def start(self, task: Job, snapshot: Snapshot) -> None:
        """Begin a job; the one before it must be over."""
        self._watch(lambda: job.run(task, Content(blocks_of(snapshot.view()), snapshot.descriptor)))

    def start_written(self, task: Job, written: Outcome) -> None:
        """Begin the second stage of a job whose first is over."""
        self._watch(lambda: iter((written, Outcome.of(task.finish) if written.failure is None else written)))

    def abandon(self) -> None:
        """Nothing: it writes what it has, and does not commit. A thread cannot be stopped."""

    def close(self) -> Outcome | None:
        """Wait for the job in hand; how it went. A thread that still waits for other ranks is left behind."""
        outcome = self._end()
        if len(self._stages) > 1:
            self._join()
        return outcome


class ProcessWriter(Writer):
    """Writes in a process of its own, which is started at the first job and serves all of them.

    The job's bytes are not sent: the process maps the snapshot's memory.
    """

    def __init__(self, told: Callable[[Outcome], object]) -> None:
        super().__init__(told)
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._channel: socket.socket | None = None
        self._owner = os.getpid()

    def start(self, task: Job, snapshot: Snapshot) -> None:
        """Begin a job; the one before it must be over."""
        if self._process is None or self._process.poll() is not None:
            self._stop()
            self._launch()
        assert self._connection is not None
        assert self._channel is not None
        try:
            self._connection.send(task)
            socket.send_fds(self._channel, [b"m"], [snapshot.descriptor])
        except ConnectionError:
            pass  # told by the end of the connection
        connection = self._connection
        self._watch(lambda: self._received(connection))

    def _received(self, connection: Connection) -> Iterator[Outcome]:
        try:
            yield connection.recv()
            yield connection.recv()
        except (EOFError, OSError):
            lost = self._lost()
            yield from (lost, lost)

    def abandon(self) -> None:
        """Give the job in hand up: another rank has failed, so there is nothing to commit."""
        self._stop()

    def close(self) -> Outcome | None:
        """Wait for the job in hand, and end the process; how it went. In a forked child, not its owner, nothing."""
        if self._owner != os.getpid() or self._process is None:
            return None
        try:
            return self._end()
        finally:
            self._stop()

    def _launch(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            # -S and -E are not given: the file system may come from the user's site or PYTHONPATH.
            root = str(Path(__file__).parent.parent.parent)
            arguments = [str(theirs.fileno()), str(os.getpid()), json.dumps(sys.path), root]
            self._process = subprocess.Popen(
                [sys.executable, "-c", _BOOT, *arguments], pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL
            )
        self._channel = ours
        self._connection = Connection(os.dup(ours.fileno()))
        atexit.register(self.close)

    def _lost(self) -> Outcome:
        assert self._process is not None
        try:
            code = self._process.wait(_ENDS_WITHIN_S)
        except subprocess.TimeoutExpired:
            return Outcome("The writer's process closed its connection in the middle of its work.")
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return Outcome(f"The writer's process ended in the middle of its work, with {how}.")

    def _stop(self) -> None:
        if self._process is None:
            return
        if self._channel is not None:
            # Ends the reading of our thread, and lets the process leave.
            self._channel.shutdown(socket.SHUT_RDWR)
        if self._process.returncode is None:
            # It may hang in a system call of the store, and its files are not whole.
            try:
                self._process.wait(_ENDS_WITHIN_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._join()
        for end in (self._connection, self._channel):
            if end is not None:
                end.close()
        self._connection = self._channel = None
        atexit.unregister(self.close)
