"""Tables and lengths of time for people, in 80 columns."""

from __future__ import annotations

import shutil
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["duration", "lines", "width"]


def width() -> int | None:
    """Columns of the terminal; None where nobody looks, and nothing needs to be cut."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def duration(seconds: float | None) -> str:
    """Two units at most: 5s, 3m12s, 2h05m, 3d04h; `-` for None."""
    if seconds is None:
        return "-"
    whole = max(0, int(seconds))
    if whole < 60:
        return f"{whole}s"
    minutes, second = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes}m{second:02d}s"
    hours, minute = divmod(minutes, 60)
    if hours < 48:
        return f"{hours}h{minute:02d}m"
    days, hour = divmod(hours, 24)
    return f"{days}d{hour:02d}h"


def lines(
    head: Sequence[str], rows: Sequence[Sequence[str]], *, columns: int | None, right: Sequence[str] = ()
) -> list[str]:
    """A table without rules; the last column alone is cut to fit, `right` names those that are numbers."""
    table = [list(head), *(list(row) for row in rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(head))]
    found = []
    for row in table:
        cells = [
            cell.rjust(size) if name in right else cell.ljust(size)
            for cell, size, name in zip(row, widths, head, strict=True)
        ]
        line = "  ".join(cells).rstrip()
        if columns is not None and len(line) > columns:
            line = line[: columns - 1] + "…"
        found.append(line)
    return found
