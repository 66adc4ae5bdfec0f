"""Loggers: where the metrics of a run go."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

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


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'trainer.loggers' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"trainer.loggers.{_HOME[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
