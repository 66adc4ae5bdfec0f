"""The page on which a rank shows its launcher how far it is.

`LAUNCH_PROGRESS` names a file that is mapped once; after that a step writes a few numbers into memory, with no
system call. Layout, little endian: 0 u64 magic; 8 u64 step; 16 u32 phase; 20 u32 epoch; 24 u64 CLOCK_MONOTONIC ns of
the last step; 32 u64 own ns; 40 u64 last saved step; 48 f64 seconds of the last save; 56 f64 loss or NaN; 64 u64 one
more than the step that this attempt began at (0: not told); 72 f64 seconds that training stood still for that save.

Own ns is the sum over all steps of the time from the end of one backward to the begin of the next: optimizer, hooks,
data and forward. Ranks that exchange gradients all take as long as the slowest of them, since they wait for it in the
backward; of their own time only the slow one takes more.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from typing import TYPE_CHECKING

from trainer.ranks import rank_zero_warn

if TYPE_CHECKING:
    from typing_extensions import Self

MAGIC = 0x4D55535445520002
SIZE = 128
START, TRAIN, VALIDATE, TEST, PREDICT, SAVE, DONE = range(7)

_STEP = struct.Struct("<QIIQQ")  # at 8: step, phase, epoch, nanoseconds, own nanoseconds
_PHASE = struct.Struct("<I")  # at 16
_SAVED = struct.Struct("<Qd")  # at 40: step, seconds
_LOSS = struct.Struct("<d")  # at 56
_STALL = struct.Struct("<d")  # at 72
_BEGAN = struct.Struct("<Q")  # at 64


class ProgressPage:
    """The mapped page. `pack_step(page.buffer, 8, step, phase, epoch, ns, own_ns)` is what the step loop calls.

    own_ns: see above; since_ns: the end of the last backward, or when the loop was entered again. The loop sets both.
    """

    pack_step = _STEP.pack_into
    pack_loss = _LOSS.pack_into

    def __init__(self, path: str) -> None:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            if os.fstat(descriptor).st_size < SIZE:
                os.ftruncate(descriptor, SIZE)
            self.buffer = mmap.mmap(descriptor, SIZE)
        finally:
            os.close(descriptor)
        self.own_ns = self.since_ns = 0
        _LOSS.pack_into(self.buffer, 56, float("nan"))
        struct.pack_into("<Q", self.buffer, 0, MAGIC)

    @classmethod
    def open(cls, path: str | None) -> Self | None:
        """The page, or None if there is none or it cannot be mapped: training goes on without it."""
        if path is None:
            return None
        try:
            return cls(path)
        except OSError as error:
            rank_zero_warn(f"LAUNCH_PROGRESS={path} cannot be mapped ({error}); the launcher will not see progress.")
            return None

    def began(self, step: int) -> None:
        """Training goes on from here."""
        _BEGAN.pack_into(self.buffer, 64, step + 1)

    def phase(self, phase: int) -> None:
        """What the rank is doing now."""
        _PHASE.pack_into(self.buffer, 16, phase)

    def step(self, step: int, phase: int, epoch: int) -> None:
        """A step is done."""
        _STEP.pack_into(self.buffer, 8, step, phase, epoch, time.monotonic_ns(), self.own_ns)

    def saved(self, step: int, seconds: float, stall_s: float) -> None:
        """A checkpoint of `step` is durable; writing it took `seconds`, and training stood still for `stall_s`."""
        _STALL.pack_into(self.buffer, 72, stall_s)
        _SAVED.pack_into(self.buffer, 40, step, seconds)

    def close(self) -> None:
        """Unmap it."""
        self.buffer.close()
