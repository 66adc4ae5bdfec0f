"""Callbacks: code that acts at points of a run without being part of the model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainer.late import late

if TYPE_CHECKING:
    from trainer.callbacks.accumulation import GradientAccumulationScheduler
    from trainer.callbacks.averaging import EMAWeightAveraging, StochasticWeightAveraging, WeightAveraging
    from trainer.callbacks.callback import Callback
    from trainer.callbacks.checkpoint import Checkpoint, ModelCheckpoint, OnExceptionCheckpoint
    from trainer.callbacks.device_stats import DeviceStatsMonitor
    from trainer.callbacks.early_stopping import EarlyStopping
    from trainer.callbacks.finders import BatchSizeFinder, LearningRateFinder
    from trainer.callbacks.finetuning import BackboneFinetuning, BaseFinetuning
    from trainer.callbacks.lambda_function import LambdaCallback
    from trainer.callbacks.lr_monitor import LearningRateMonitor
    from trainer.callbacks.prediction_writer import BasePredictionWriter
    from trainer.callbacks.progress import ProgressBar, RichProgressBar, RichProgressBarTheme, TQDMProgressBar
    from trainer.callbacks.pruning import ModelPruning
    from trainer.callbacks.summary import ModelSummary, RichModelSummary
    from trainer.callbacks.throughput import ThroughputMonitor
    from trainer.callbacks.timer import Timer

# Where each is. Most runs use a few of them; all together take as long to import as half of the rest.
_HOME = {
    "BackboneFinetuning": "finetuning",
    "BaseFinetuning": "finetuning",
    "BasePredictionWriter": "prediction_writer",
    "BatchSizeFinder": "finders",
    "Callback": "callback",
    "Checkpoint": "checkpoint",
    "DeviceStatsMonitor": "device_stats",
    "EMAWeightAveraging": "averaging",
    "EarlyStopping": "early_stopping",
    "GradientAccumulationScheduler": "accumulation",
    "LambdaCallback": "lambda_function",
    "LearningRateFinder": "finders",
    "LearningRateMonitor": "lr_monitor",
    "ModelCheckpoint": "checkpoint",
    "ModelPruning": "pruning",
    "ModelSummary": "summary",
    "OnExceptionCheckpoint": "checkpoint",
    "ProgressBar": "progress",
    "RichModelSummary": "summary",
    "RichProgressBar": "progress",
    "RichProgressBarTheme": "progress",
    "StochasticWeightAveraging": "averaging",
    "TQDMProgressBar": "progress",
    "ThroughputMonitor": "throughput",
    "Timer": "timer",
    "WeightAveraging": "averaging",
}

__all__ = [
    "BackboneFinetuning",
    "BaseFinetuning",
    "BasePredictionWriter",
    "BatchSizeFinder",
    "Callback",
    "Checkpoint",
    "DeviceStatsMonitor",
    "EMAWeightAveraging",
    "EarlyStopping",
    "GradientAccumulationScheduler",
    "LambdaCallback",
    "LearningRateFinder",
    "LearningRateMonitor",
    "ModelCheckpoint",
    "ModelPruning",
    "ModelSummary",
    "OnExceptionCheckpoint",
    "ProgressBar",
    "RichModelSummary",
    "RichProgressBar",
    "RichProgressBarTheme",
    "StochasticWeightAveraging",
    "TQDMProgressBar",
    "ThroughputMonitor",
    "Timer",
    "WeightAveraging",
]

__getattr__, __dir__ = late(__name__, _HOME)
