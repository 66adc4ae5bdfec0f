"""Loggers: where the metrics of a run go."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainer.late import late

if TYPE_CHECKING:
    from trainer.loggers.csv import CSVLogger
    from trainer.loggers.logger import Logger
    from trainer.loggers.mlflow import MLFlowLogger
    from trainer.loggers.tensorboard import TensorBoardLogger
    from trainer.loggers.wandb import WandbLogger

# Where each is; imported when it is first used.
_HOME = {
    "CSVLogger": "csv",
    "Logger": "logger",
    "MLFlowLogger": "mlflow",
    "TensorBoardLogger": "tensorboard",
    "WandbLogger": "wandb",
}

__all__ = ["CSVLogger", "Logger", "MLFlowLogger", "TensorBoardLogger", "WandbLogger"]

__getattr__, __dir__ = late(__name__, _HOME)
