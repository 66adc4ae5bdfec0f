"""examples/gpt.py, in which rank 1 is killed in the 26th batch of the first attempt. Its arguments are gpt.py's."""

from __future__ import annotations

import os
import runpy
import signal
from pathlib import Path

import trainer as T


class Fault(T.Callback):
    """A SIGKILL between two checkpoints."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if os.environ["LAUNCH_ATTEMPT"] == "0" and trainer.global_rank == 1 and batch_idx == 25:
            os.kill(os.getpid(), signal.SIGKILL)


made = T.Trainer.__init__


def with_fault(self: T.Trainer, *args: object, **kwargs: object) -> None:
    made(self, *args, **(kwargs | {"callbacks": [*kwargs.get("callbacks", []), Fault()]}))


T.Trainer.__init__ = with_fault
runpy.run_path(str(Path(__file__).parent.parent.parent / "examples" / "gpt.py"), run_name="__main__")
