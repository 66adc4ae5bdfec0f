"""One rank of a script under proof: it runs as it is, what can be seen is written down, and it is hurt on time."""

# ruff: noqa: ARG002 - hooks take what the interface gives them

from __future__ import annotations

import json
import os
import runpy
import signal
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from trainer.callbacks.callback import Callback
from trainer.fingerprint import fingerprint
from trainer.seed import seed_everything

if TYPE_CHECKING:
    from trainer.module import Module
    from trainer.trainer import Trainer


def run(plan: dict[str, Any], script: str, args: list[str]) -> None:
    """Run a script as python would, with a Recorder in each of its Trainers.

    plan: record, a path; seed, of a script that does not seed itself; hurt, None or [signal, event, seconds]: at the
    event of that number, from 1, the process gets that signal so many seconds later.
    """
    from trainer import trainer as module

    record = open(plan["record"], "w", buffering=1)  # noqa: SIM115 - open as long as the process lives
    recorders: list[Recorder] = []
    arrange = module.arrange  # type: ignore[attr-defined] # for this process alone

    def with_recorder(*given: Any) -> list[Any]:
        recorders.append(Recorder(record, len(recorders), plan["hurt"]))
        return [*arrange(*given), recorders[-1]]

    # The script's own Trainers shall have it without a word in the script.
    module.arrange = with_recorder  # type: ignore[assignment, attr-defined]
    seed_everything(plan["seed"], verbose=False)
    sys.argv = [script, *args]
    sys.path[0] = str(Path(script).resolve().parent)
    runpy.run_path(script, run_name="__main__")


class Recorder(Callback):
    """Writes a line of JSON per training batch, before it is trained, and one at the end of a fit.

    at: numbers of the Trainer and its fit, batches trained so far. set, gone: what has changed since the last line.
    """

    _events = 0

    def __init__(self, record: TextIO, number: int, hurt: list[Any] | None) -> None:
        self._record, self._number, self._hurt = record, number, hurt
        self._fit = -1
        self._before: dict[str, str] = {}

    def setup(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        """Count the fits; one that has nothing left to do has no other hook."""
        self._fit += stage == "fit"

    def on_train_batch_start(self, trainer: Trainer, pl_module: Module, batch: Any, batch_idx: int) -> None:
        """What there is before a batch, and the batch."""
        self._write(trainer, batch, end=False)
        Recorder._events += 1
        if self._hurt is not None and self._hurt[1] == Recorder._events:
            timer = threading.Timer(self._hurt[2], os.kill, (os.getpid(), getattr(signal, self._hurt[0])))
            timer.daemon = True
            timer.start()

    def on_fit_end(self, trainer: Trainer, pl_module: Module) -> None:
        """What has come out."""
        self._write(trainer, None, end=True)

    def _write(self, trainer: Trainer, batch: Any, *, end: bool) -> None:
        now, before = fingerprint(trainer, batch), self._before
        line = {
            "at": [self._number, self._fit, trainer.train_state.batches, end],
            "epoch": trainer.train_state.epoch, "time": time.monotonic(),
            "set": {name: found for name, found in now.items() if before.get(name) != found},
            "gone": [name for name in before if name not in now],
        }  # fmt: skip
        self._before = now
        self._record.write(json.dumps(line) + "\n")
