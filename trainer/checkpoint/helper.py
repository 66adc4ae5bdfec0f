"""The program of a rank's writer process: it writes what lies in shared memory, outside the trainer's interpreter.

It never imports torch, starts in a tenth of a second, and ends with the process that started it: on its death, seen by
a pidfd (a connection alone is not enough: forked workers of a DataLoader hold copies of the other end), or when the
connection is closed. Signals meant for the rank, which Slurm sends to all processes of a step, do not reach it.
"""

from __future__ import annotations

import mmap
import os
import queue
import signal
import socket
import sys
import threading
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING

from trainer.checkpoint import job
from trainer.checkpoint.writing import Content, blocks_of

if TYPE_CHECKING:
    from trainer.checkpoint.job import Job


def main(descriptor: int, parent: int) -> None:
    """Serve jobs until the parent is gone."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    try:
        watch = os.pidfd_open(parent)
    except ProcessLookupError:
        os._exit(1)
    if os.getppid() != parent:
        os._exit(1)
    connection = Connection(descriptor)
    channel = socket.socket(fileno=os.dup(descriptor))
    jobs: queue.SimpleQueue[tuple[Job, int]] = queue.SimpleQueue()
    threading.Thread(target=_work, args=(jobs, connection), daemon=True).start()
    while connection in wait([connection, watch]):
        try:
            task = connection.recv()
            _, descriptors, _, _ = socket.recv_fds(channel, 1, 1)
        except (EOFError, ConnectionError):
            break
        jobs.put((task, descriptors[0]))
    # At once, in whatever the working thread is: nobody is left to whom it matters.
    os._exit(0)


def _work(jobs: queue.SimpleQueue[tuple[Job, int]], connection: Connection) -> None:
    mapped = _Mapped()
    while True:
        task, descriptor = jobs.get()
        try:
            content = Content(blocks_of(mapped.view(descriptor, task.bytes)), descriptor)
            for outcome in job.run(task, content):
                connection.send(outcome)
        finally:
            os.close(descriptor)


class _Mapped:
    """The snapshot's memory, mapped once for as long as it is the same: 1 GiB takes 0.1 s of page faults."""

    def __init__(self) -> None:
        self._map: mmap.mmap | None = None
        self._inode = 0

    def view(self, descriptor: int, size: int) -> memoryview:
        """The first `size` bytes of a memory file."""
        inode = os.fstat(descriptor).st_ino
        # States differ by a few bytes from save to save; the file is cut to each, within the memory that was taken.
        if self._map is None or self._inode != inode or len(self._map) < size:
            # No close: views of the map before it may still be alive, and with the last of them it goes.
            self._map = mmap.mmap(descriptor, size, prot=mmap.PROT_READ)
            self._inode = inode
        return memoryview(self._map)[:size]


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
