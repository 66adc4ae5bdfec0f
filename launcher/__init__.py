"""Start a program or a function on many ranks, keep it running, and say what happened.

Importing this imports nothing heavy: the names below are looked up when they are used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from launcher.calling import launch
    from launcher.errors import FailedJobError, LaunchError, UncompletedJobError
    from launcher.jobs import Job, map_array, submit

__all__ = ["FailedJobError", "Job", "LaunchError", "UncompletedJobError", "launch", "map_array", "submit"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from launcher import calling, errors, jobs

    home = errors if name.endswith("Error") else calling if name == "launch" else jobs
    return getattr(home, name)
