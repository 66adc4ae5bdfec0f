"""Pure: how far another machine's monotonic clock is from ours, by asking for it and waiting for the answer.

Each machine counts from its own start, and which rank failed first is decided across machines. The answer was given at
some moment between question and answer: taking the middle errs by half of that time at most. The quickest exchange is
kept; clocks drift by some 20 us a second, so that after a while a slower but newer one is better.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Offset"]

# What two clocks may come to differ by in the meantime, as a share of it.
_DRIFT = 50e-6
_ASKED_EVERY_S = 60.0
_AT_ONCE = 3


@dataclass
class Offset:
    """Of one machine. Times are nanoseconds: `now` of our clock, `theirs` of the other one.

    shift_ns: what to add to a time of theirs.
    """

    shift_ns: int = 0
    _error_ns: float | None = None  # None: known by their first word only, whose way here may have taken long
    _at: int = 0
    _asked: int = 0  # in this row
    _last_asked: int | None = None

    def told(self, theirs: int, now: int) -> None:
        """Their first word, of which nobody knows how long it was under way."""
        self.shift_ns = now - theirs

    def wants(self, now: int) -> bool:
        """Whether to ask (again): a few times in a row, then once a minute."""
        if self._last_asked is not None and now - self._last_asked > _ASKED_EVERY_S * 1e9:
            self._asked = 0
        if self._asked >= _AT_ONCE:
            return False
        self._asked += 1
        self._last_asked = now
        return True

    def answered(self, asked: int, theirs: int, now: int) -> None:
        error = (now - asked) / 2
        if self._error_ns is not None and error > self._error_ns + _DRIFT * (now - self._at):
            return
        self.shift_ns = (asked + now) // 2 - theirs
        self._error_ns, self._at = error, now
