"""Everything that `trainer` raises, split by what the reader can do about it.

    TrainerError
    |-- ConfigError        an argument is wrong, or contradicts another: change the call
    |-- RanksError         the environment of the ranks is contradictory: change how the job is started
    |-- ModuleError        the user's Module misses or misuses something: change the module
    |-- LoggingError       `self.log` was used in a way that cannot give one number
    |-- DataError          a loader, sampler or dataset cannot be used as asked: change the data
    |-- CheckpointError    a checkpoint cannot be written, found or read
    |   |-- CheckpointNotFoundError   there is none at this place: look at the path
    |   |-- CheckpointDamagedError    its bytes are not those that were written: take an older one
    |   |-- CheckpointWriteError      the store refused or lost it: look at the disk or the service
    |-- DivergedError      gradients are not finite, or spike, wherever training goes on: change the training
    |-- DistributedError   the ranks did not meet, or one of them is gone: look at the other ranks

A message says what was given, what is allowed, and what to do.
"""

from __future__ import annotations


class TrainerError(Exception):
    """Base of every error that this package raises on purpose."""


class ConfigError(TrainerError, ValueError):
    """An argument has a value that is not allowed, or that contradicts another argument."""


class RanksError(TrainerError):
    """The environment does not describe one consistent set of ranks."""


class ModuleError(TrainerError):
    """A Module or DataModule misses a method, or uses one in a way that is not possible."""


class LoggingError(TrainerError):
    """Values were logged that cannot be reduced to one number per name."""


class DataError(TrainerError):
    """A loader, sampler or dataset cannot be used in the way that was asked for."""


class CheckpointError(TrainerError):
    """A checkpoint cannot be written, found, verified or read."""


class CheckpointNotFoundError(CheckpointError):
    """There is no whole checkpoint at the place that was given."""


class CheckpointDamagedError(CheckpointError):
    """A file of a committed checkpoint is missing, cut off, or holds other bytes than were written."""


class CheckpointWriteError(CheckpointError):
    """A checkpoint could not be made durable. The ones before it are untouched.

    disk_full: the store has no space left; training can go on, and the next save tries again.
    """

    def __init__(self, message: str, *, disk_full: bool = False) -> None:
        super().__init__(message)
        self.disk_full = disk_full


class DivergedError(TrainerError):
    """Gradients were not finite, or far above what they were, also after rollbacks."""


class DistributedError(TrainerError):
    """The ranks did not meet, disagree, or lost one of them."""
