"""Stop signals set a flag; nothing else happens in a handler.

Saving inside a handler hangs or tears what the main thread was doing (Lightning #21406); the loop looks at the flag
between two batches.
"""

from __future__ import annotations

import signal
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import FrameType, TracebackType

__all__ = ["StopSignals"]

# SIGTERM is the launcher's and Slurm's request; SIGUSR1 and SIGUSR2 are what sbatch --signal is usually told to send.
STOP = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class StopSignals:
    """While entered, the signals set `requested` and `signum`. On leaving, the old handlers are back.

    Outside the main thread Python allows no handlers: then nothing is installed and `requested` stays False.
    """

    def __init__(self, signals: tuple[signal.Signals, ...] = STOP) -> None:
        self.requested = False
        self.signum: int | None = None
        self._signals = signals
        self._old: dict[signal.Signals, Any] = {}

    def _note(self, signum: int, frame: FrameType | None) -> None:  # noqa: ARG002
        self.signum = signum
        self.requested = True

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in self._signals:
                # What the script handles or ignores stays so; but SIGTERM is the request to save and leave.
                if number == signal.SIGTERM or signal.getsignal(number) == signal.SIG_DFL:
                    self._old[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._old.items():
            if handler is not None:  # None: installed from C, and not ours to put back
                signal.signal(number, handler)
        self._old.clear()
