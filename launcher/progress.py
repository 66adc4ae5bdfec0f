"""How far a rank is, from the page of 128 bytes that LAUNCH_PROGRESS names and that the program may fill.

Layout, little endian: 0 u64 magic; 8 u64 step; 16 u32 phase (0 start, 1 train, 2 validate,
3 test, 4 predict, 5 save, 6 done); 20 u32 epoch; 24 u64 CLOCK_MONOTONIC ns of the last step;
32 u64 own ns, summed over all steps: what they took without the parts in which ranks wait for each other (0: not told);
40 u64 last saved step; 48 f64 seconds of the last save; 56 f64 loss or NaN; 64 u64 one more than the step that this
attempt began at (0: not told); 72 f64 seconds for which training stood still for that save.
"""

from __future__ import annotations

import math
import struct
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import mmap

__all__ = ["PAGE", "Beat", "Progress"]

PAGE = 128
_MAGIC = 0x4D55535445520002
_LAYOUT = struct.Struct("<QQIIQQQddQd")


@dataclass(frozen=True)
class Beat:
    """What a rank was last seen to do. at: seconds of CLOCK_MONOTONIC, of its last step; 0 before the first.

    own_s: seconds that all its steps took without waiting for other ranks; None: not told.
    """

    step: int
    phase: int
    at: float
    own_s: float | None = None
    loss: float | None = None

    @property
    def works(self) -> bool:
        """It trains, validates, tests or predicts: from step to step."""
        return 1 <= self.phase <= 4 and self.at > 0

    @property
    def done(self) -> bool:
        return self.phase == 6

    @classmethod
    def of_page(cls, page: mmap.mmap | bytes) -> Beat | None:
        """What a rank has filled in; None if it never did."""
        magic, step, phase, _, ns, own_ns, _, _, loss, _, _ = _LAYOUT.unpack_from(page)
        if magic != _MAGIC:
            return None
        return cls(step, phase, ns / 1e9, own_ns / 1e9 if own_ns else None, None if math.isnan(loss) else loss)


@dataclass(frozen=True)
class Progress:
    """What one attempt did. Steps are the program's own count.

    began: the step it went on from; step: its last; saved: the step of its last checkpoint; save_s: how long the
    slowest rank took for that one; stall_s: for how long training stood still for it. None: the program did not say,
    or has not saved.
    """

    step: int
    began: int | None = None
    saved: int | None = None
    save_s: float | None = None
    stall_s: float | None = None

    @classmethod
    def of_page(cls, page: mmap.mmap | bytes) -> Progress | None:
        """What a rank has filled in; None if it never did."""
        magic, step, _, _, _, _, saved, save_s, _, began, stall_s = _LAYOUT.unpack_from(page)
        if magic != _MAGIC:
            return None
        # A save takes some time; a page without one says 0 in 0 s.
        wrote = save_s > 0
        return cls(
            step=step or max(began - 1, 0),
            began=began - 1 if began else None,
            saved=saved if wrote else None,
            save_s=save_s if wrote else None,
            stall_s=stall_s or None if wrote else None,
        )

    def and_of(self, other: Progress | None) -> Progress:
        """Of two ranks: the steps of the one that is further, the longer save."""
        if other is None:
            return self
        return Progress(
            step=max(self.step, other.step),
            began=_most(self.began, other.began),
            saved=_most(self.saved, other.saved),
            save_s=_most(self.save_s, other.save_s),
            stall_s=_most(self.stall_s, other.stall_s),
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def _most(*values: Any) -> Any:
    return max((v for v in values if v is not None), default=None)
