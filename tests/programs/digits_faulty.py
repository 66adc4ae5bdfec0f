"""examples/digits.py, in which one rank dies in mid-training, in another way in every attempt.

usage: digits_faulty.py WAY,WAY,... [arguments of digits.py]      the n-th way in attempt n, then undisturbed
ways: raise exit3 kill segv oom:FOLDER (FOLDER: a memory cgroup with a small limit, else the rank limits itself)
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
from pathlib import Path

from examples_with import run

import trainer as T

ways = sys.argv.pop(1).split(",")
attempt = int(os.environ["LAUNCH_ATTEMPT"])
victim = attempt % int(os.environ["WORLD_SIZE"])


def die(way: str) -> None:
    name, _, where = way.partition(":")
    if name == "raise":
        raise ValueError("a bad label in shard 17")
    if name == "exit3":
        sys.exit(3)
    if name == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if name == "segv":
        ctypes.string_at(0)
    if name == "oom":
        if where:
            Path(where, "cgroup.procs").write_text(str(os.getpid()))
        else:
            resource.setrlimit(resource.RLIMIT_AS, (1 << 33, 1 << 33))
        hoard = []
        while True:
            hoard.append(bytearray(os.urandom(1 << 20)) * 64)


class Fault(T.Callback):
    """Fails in the second epoch that this attempt trains, a few batches after the checkpoint."""

    epochs = 0

    def on_train_epoch_start(self, trainer: T.Trainer, pl_module: T.Module) -> None:
        self.epochs += 1

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if attempt < len(ways) and self.epochs == 2 and batch_idx == 3 and trainer.global_rank == victim:
            die(ways[attempt])


run("digits.py", Fault())
