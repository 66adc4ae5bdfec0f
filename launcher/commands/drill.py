"""`launch drill`: the trainer's proof of exact resume, as a process of its own: the launcher imports nothing of it."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["run"]


def run(argv: Sequence[str]) -> int:
    """Exit code: 0 if every resumed run was the undisturbed one, 1 if not, 2 for wrong usage."""
    return subprocess.run([sys.executable, "-m", "trainer.prove", *argv], check=False).returncode
