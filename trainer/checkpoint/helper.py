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
from trainer.checkpoint.writing import blocks_of

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
    while True:
        task, descriptor = jobs.get()
        size = task.record.shard_bytes
        try:
            with mmap.mmap(descriptor, max(size, 1), prot=mmap.PROT_READ) as content:
                for outcome in job.run(task, blocks_of(memoryview(content)[:size])):
                    connection.send((task.folder.name, outcome))
        finally:
            os.close(descriptor)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
