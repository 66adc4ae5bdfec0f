"""`example_killed.py EXAMPLE EPOCH:BATCH ARGUMENTS...`: an example; its last rank is killed once, after a batch."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from examples_with import run

import trainer as T

example, place = sys.argv[1:3]
del sys.argv[1:3]
epoch, batch = map(int, place.split(":"))
saved = Path(os.environ["LAUNCH_RUN_DIR"]) / "checkpoints" / "saved.json"


class Fault(T.Callback):
    """A SIGKILL in the run's first attempt, when there is a checkpoint to go on from."""

    def on_train_batch_end(self, trainer, pl_module, outputs, data, batch_idx) -> None:
        first, last = os.environ["LAUNCH_ATTEMPT"] == "0", trainer.global_rank == trainer.world_size - 1
        if first and last and (trainer.current_epoch, batch_idx) == (epoch, batch):
            deadline = time.monotonic() + 60
            while not saved.exists() and time.monotonic() < deadline:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)


run(example, Fault())
