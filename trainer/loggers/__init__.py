"""Loggers: where the metrics of a run go."""

from __future__ import annotations

from trainer.loggers.csv import CSVLogger
from trainer.loggers.logger import Logger
from trainer.loggers.mlflow import MLFlowLogger
from trainer.loggers.tensorboard import TensorBoardLogger
from trainer.loggers.wandb import WandbLogger

__all__ = ["CSVLogger", "Logger", "MLFlowLogger", "TensorBoardLogger", "WandbLogger"]
