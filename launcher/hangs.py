"""Pure: when a rank that does nothing has done nothing for too long."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from launcher.progress import Beat

__all__ = ["EVERY_S", "Patience"]

EVERY_S = 5.0  # between two looks at a rank
# What is learned from the run itself must never end one that is only slow: a first validation, a file server's pause.
_LEAST_S = 300.0
_TIMES_THE_LONGEST = 30
_AFTER_LOOKS = 20


@dataclass
class Patience:
    """With one rank in one attempt. Times are seconds of one monotonic clock.

    limit_s: what the person gave: so long without a step (or output, of a program that tells no steps), at any time
    between start and end. None: learned from the longest pause between two steps, of programs that tell them, and only
    while they train or evaluate. 0: for ever.
    """

    limit_s: float | None
    since: float
    _longest: float = 0.0  # of the pauses that have ended
    _quiet: float = 0.0
    _moved: int = 0
    _last: float = 0.0

    def look(self, now: float, beat: Beat | None, output: float | None) -> float | None:
        """Seconds without anything if that is too long, else None. beat: the rank's page; output: when it last
        printed anything.
        """
        if self.limit_s == 0:
            return None
        if beat is not None and beat.at != self._last:
            if self._last and beat.works:
                self._moved += 1
                self._longest = max(self._longest, self._quiet)
            self._last = beat.at
        told = [self.since, *([] if beat is None else [beat.at])]
        if beat is None and output is not None:
            told.append(output)
        quiet = self._quiet = now - max(told)
        if self.limit_s is not None:
            return quiet if quiet >= self.limit_s and (beat is None or not beat.done) else None
        if beat is None or not beat.works:
            return None
        enough = self._moved >= _AFTER_LOOKS and quiet >= max(_LEAST_S, _TIMES_THE_LONGEST * self._longest)
        return quiet if enough else None
