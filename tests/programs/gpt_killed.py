"""examples/gpt.py, in which rank 1 is killed in the 26th batch of the first attempt. Its arguments are gpt.py's."""

from __future__ import annotations

import os
import signal

from examples_with import run

import trainer as T


class Fault(T.Callback):
    """A SIGKILL between two checkpoints."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if os.environ["LAUNCH_ATTEMPT"] == "0" and trainer.global_rank == 1 and batch_idx == 25:
            os.kill(os.getpid(), signal.SIGKILL)


run("gpt.py", Fault())
