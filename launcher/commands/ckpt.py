"""`launch ckpt`: the trainer's checkpoint command, as a process of its own: the launcher imports nothing of it."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["run"]


def run(argv: Sequence[str]) -> int:
    """Exit code: the command's own; 1 if what was looked at is damaged or differs, 2 for wrong usage."""
    return subprocess.run([sys.executable, "-m", "trainer.checkpoint", *argv], check=False).returncode
