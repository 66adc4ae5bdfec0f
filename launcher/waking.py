"""What wakes a loop that sleeps on descriptors, beside them: a signal has come, or a thread has something for it."""

from __future__ import annotations

import contextlib
import os
import signal
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Waking"]


class Waking:
    """A descriptor to select on. One at a time in a process, made in its main thread.

    signals: those that have come, in order, to be taken out by the loop; nothing else happens in a handler.
    """

    def __init__(self) -> None:
        self.signals: list[int] = []
        self._read, self._write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._old_fd = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._afterwards: dict[int, Callable[..., Any] | int | None] = {}

    def fileno(self) -> int:
        return self._read

    def on(self, number: int, *, note: bool = True, afterwards: signal.Handlers | None = None) -> None:
        """Wake up on a signal from here on. note: also note it; afterwards: its handler from `close` on, if not the one
        that it had.
        """
        old = signal.signal(number, lambda n, _: self.signals.append(n) if note else None)
        self._afterwards.setdefault(number, old if afterwards is None else afterwards)

    def rouse(self) -> None:
        """Wake the loop up, from any thread."""
        with contextlib.suppress(OSError):  # full: it has not even woken up yet
            os.write(self._write, b"\0")

    def heard(self) -> None:
        """The loop is awake."""
        with contextlib.suppress(BlockingIOError):
            while os.read(self._read, 4096):
                pass

    def close(self) -> None:
        signal.set_wakeup_fd(self._old_fd)
        for number, handler in self._afterwards.items():
            signal.signal(number, handler)
        os.close(self._read)
        os.close(self._write)
