"""What can go wrong in launching, split by what the reader can do about it.

LaunchError
├── UsageError       the command or the call is wrong: mend it (exit code 2)
├── RunError         the run folder is in use, finished, or not what was asked for
├── MeetingError     nodes that should meet did not: names who is missing and where they were awaited
├── ClusterError     the scheduler refused, or gave an answer that cannot be read: ask who runs the cluster
├── UncompletedJobError  a job from Python has no result: it was stopped
│   └── FailedJobError   it failed: the traceback of its function is in it
└── InternalError    our own invariant broke: please report it
"""

from __future__ import annotations

__all__ = [
    "ClusterError",
    "FailedJobError",
    "InternalError",
    "LaunchError",
    "MeetingError",
    "RunError",
    "UncompletedJobError",
    "UsageError",
]


class LaunchError(Exception):
    """Base of every error that the launcher raises on purpose; `exit_code` is what `launch` exits with."""

    exit_code = 1


class UsageError(LaunchError, ValueError):
    """The request is wrong: the message says what was given, what is allowed and what to do."""

    exit_code = 2


class RunError(LaunchError):
    """The run folder cannot be used as asked."""

    exit_code = 2


class MeetingError(LaunchError):
    """Not all nodes came: the message names those missing, the address and the time waited."""


class ClusterError(LaunchError):
    """The scheduler refused what was asked of it, or its answer cannot be read: the message quotes it."""


class UncompletedJobError(LaunchError):
    """A job from Python is over and has no result."""


class FailedJobError(UncompletedJobError):
    """It failed: the message has the traceback of each rank whose function raised."""


class InternalError(LaunchError):
    """A state that cannot be: a defect of the launcher."""
