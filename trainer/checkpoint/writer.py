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
from trainer.checkpoint.writing import blocks_of

if TYPE_CHECKING:
    from trainer.checkpoint.job import Job
    from trainer.checkpoint.snapshot import Snapshot

# At the end of the process, rank 0's writer waits so long for records of other ranks, which may be dead.
_PATIENCE_AT_EXIT_S = 60.0

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


class ThreadWriter:
    """Writes in a thread of this process: for file systems that live in it, such as memory://."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._stages: list[Outcome] = []

    def start(self, task: Job, snapshot: Snapshot) -> None:
        """Begin a job; the one before it must be over."""
        self._stages = []
        self._thread = threading.Thread(target=self._run, args=(task, snapshot), name="checkpoint-writer")
        self._thread.start()

    def start_written(self, task: Job, written: Outcome) -> None:
        """Begin the second stage of a job whose first is over."""
        self._stages = [written]
        rest = job.finish if written.failure is None else lambda _: written
        self._thread = threading.Thread(target=lambda: self._stages.append(rest(task)), name="checkpoint-writer")
        self._thread.start()

    def _run(self, task: Job, snapshot: Snapshot) -> None:
        for outcome in job.run(task, blocks_of(snapshot.view())):
            self._stages.append(outcome)

    def stage(self, number: int, timeout_s: float | None) -> Outcome | None:
        """How writing (0) and committing (1) went; None if both are not over within the timeout (None: no limit)."""
        if self._thread is not None and len(self._stages) <= number:
            self._thread.join(timeout_s)
        return self._stages[number] if len(self._stages) > number else None

    def abandon(self) -> None:
        """Nothing: this process is the only rank, so it is the one that failed, and its thread is over."""

    def close(self) -> None:
        """Wait for the job in hand."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None


class ProcessWriter:
    """Writes in a process of its own, which is started at the first job and serves all of them.

    The job's bytes are not sent: the process maps the snapshot's memory.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._channel: socket.socket | None = None
        self._stages: list[Outcome] = []
        self._attempt = ""
        self._owner = os.getpid()

    def start(self, task: Job, snapshot: Snapshot) -> None:
        """Begin a job; the one before it must be over."""
        if self._process is None or self._process.poll() is not None:
            self._stop()
            self._launch()
        assert self._connection is not None
        assert self._channel is not None
        self._stages, self._attempt = [], task.folder.name
        try:
            self._connection.send(task)
            socket.send_fds(self._channel, [b"m"], [snapshot.descriptor])
        except ConnectionError:
            self._stages = [self._lost()]

    def stage(self, number: int, timeout_s: float | None) -> Outcome | None:
        """How writing (0) or committing (1) went; None if it is not over within the timeout (None: no limit)."""
        while len(self._stages) <= number:
            if self._stages and self._stages[-1].failure is not None and self._connection is None:
                return self._stages[-1]
            assert self._connection is not None
            try:
                if not self._connection.poll(timeout_s):
                    return None
                attempt, outcome = self._connection.recv()
                # A rank that need not commit does not wait for that stage: it may come after the next job began.
                if attempt == self._attempt:
                    self._stages.append(outcome)
            except (EOFError, ConnectionError):
                self._stages.append(self._lost())
        return self._stages[number]

    def abandon(self) -> None:
        """Give the job in hand up: another rank has failed, so there is nothing to commit."""
        self._stop()

    def close(self) -> None:
        """Wait for the job in hand, and end the process. In a forked child, which does not own it, nothing."""
        if self._owner != os.getpid() or self._process is None:
            return
        try:
            if self._started_unfinished() and self.stage(0, None) is not None:
                self.stage(1, _PATIENCE_AT_EXIT_S)
        finally:
            self._stop()

    def _started_unfinished(self) -> bool:
        return self._connection is not None and len(self._stages) < 2

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
        self._stop()
        code = self._process.returncode
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return Outcome(f"The writer's process ended in the middle of its work, with {how}.")

    def _stop(self) -> None:
        if self._process is None:
            return
        for end in (self._connection, self._channel):
            if end is not None:
                end.close()
        self._connection = self._channel = None
        if self._process.returncode is None:
            # Closing our end lets it leave; it may hang in a system call of the store, and its files are not whole.
            try:
                self._process.wait(5)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        atexit.unregister(self.close)
