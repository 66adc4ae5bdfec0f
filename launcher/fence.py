"""Ends what is left on a host of an agent that was given up: run there, over a way of its own."""

from __future__ import annotations

import sys

from launcher.processes import kill_tree, start_ticks

__all__ = ["bootstrap"]


def bootstrap() -> None:
    """argv: the agent's pid, and when it started (in clock ticks since boot), which tells it from any later process."""
    pid, started = map(int, sys.argv[1:])
    if start_ticks(pid) == started:
        kill_tree(pid)
