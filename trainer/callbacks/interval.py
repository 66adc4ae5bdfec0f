"""Wall-clock intervals on which all ranks agree, without a collective in every step."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainer.trainer import Trainer


class AgreedInterval:
    """Says, at the same batch on every rank, that `seconds` of rank 0's clock have passed.

    Ranks' clocks differ, so one of them must decide and the others must ask at the same batch. Asking costs a
    broadcast; so each answer carries the number of batches until the next question: half of what the rate so far
    would need to fill the interval, and at most twice as many as the last time, since a rate may mislead. That is
    about 2 log2(batches per interval) broadcasts per interval.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.begin()

    def begin(self, elapsed: float = 0.0) -> None:
        """A new interval starts now; `elapsed` seconds of it have already passed."""
        self._since = time.monotonic() - elapsed
        self._asked = time.monotonic()
        self._batches = 0
        self._next = 1

    def elapsed(self) -> float:
        """Seconds of this interval that have passed on this rank's clock."""
        return time.monotonic() - self._since

    def passed_already(self, trainer: Trainer) -> bool:
        """Whether the interval is over before any batch; to be called on every rank."""
        return bool(trainer.strategy.broadcast(self.elapsed() >= self.seconds))

    def passed(self, trainer: Trainer) -> bool:
        """To be called once per batch on every rank; True once the interval is over, until `begin` is called."""
        self._batches += 1
        if self._batches < self._next:
            return False
        over, wait = trainer.strategy.broadcast(self._look() if trainer.is_global_zero else None)
        self._asked, self._batches, self._next = time.monotonic(), 0, wait
        return bool(over)

    def _look(self) -> tuple[bool, int]:
        left = self.seconds - self.elapsed()
        per_batch = max((time.monotonic() - self._asked) / self._batches, 1e-6)
        return left <= 0, max(1, min(int(left / per_batch / 2), 2 * self._next))
