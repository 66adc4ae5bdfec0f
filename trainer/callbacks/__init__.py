"""Callbacks: code that acts at points of a run without being part of the model."""

from __future__ import annotations

from trainer.callbacks.callback import Callback
from trainer.callbacks.checkpoint import Checkpoint, ModelCheckpoint, OnExceptionCheckpoint
from trainer.callbacks.early_stopping import EarlyStopping
from trainer.callbacks.lr_monitor import LearningRateMonitor
from trainer.callbacks.progress import ProgressBar, RichProgressBar, RichProgressBarTheme, TQDMProgressBar
from trainer.callbacks.selection import arrange, ordered
from trainer.callbacks.summary import ModelSummary, RichModelSummary
from trainer.callbacks.timer import Timer

__all__ = [
    "Callback",
    "Checkpoint",
    "EarlyStopping",
    "LearningRateMonitor",
    "ModelCheckpoint",
    "ModelSummary",
    "OnExceptionCheckpoint",
    "ProgressBar",
    "RichModelSummary",
    "RichProgressBar",
    "RichProgressBarTheme",
    "TQDMProgressBar",
    "Timer",
    "arrange",
    "ordered",
]
