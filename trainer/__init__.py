"""Makes one training script correct on many ranks, and able to stop and go on anywhere.

    import trainer as T

    class Digits(T.Module):
        def training_step(self, batch, batch_idx): ...
        def configure_optimizers(self): ...

    T.Trainer(max_epochs=10).fit(Digits(), loader)

The names that code written for Lightning imports (`LightningModule`, `LightningDataModule`, ...) are here too.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer import callbacks, loggers, profilers
    from trainer.callbacks import Callback
    from trainer.cli import LightningCLI, MusterCLI
    from trainer.combined import CombinedLoader
    from trainer.data import DataModule
    from trainer.data import DataModule as LightningDataModule
    from trainer.guard import Guard
    from trainer.module import Module
    from trainer.module import Module as LightningModule
    from trainer.parallel import DDP, FSDP
    from trainer.prove import prove_resume
    from trainer.seed import seed_everything
    from trainer.trainer import Trainer
    from trainer.tuning import Tuner

# Where each public name lives. They are imported when they are first used: a launcher, a test or a tool that needs
# one of them does not pay for the others.
_HOME = {
    "Callback": "trainer.callbacks",
    "CombinedLoader": "trainer.combined",
    "DDP": "trainer.parallel",
    "DataModule": "trainer.data",
    "FSDP": "trainer.parallel",
    "Guard": "trainer.guard",
    "LightningCLI": "trainer.cli",
    "LightningDataModule": "trainer.data",
    "LightningModule": "trainer.module",
    "Module": "trainer.module",
    "MusterCLI": "trainer.cli",
    "Trainer": "trainer.trainer",
    "Tuner": "trainer.tuning",
    "prove_resume": "trainer.prove",
    "seed_everything": "trainer.seed",
}
_RENAMED = {"LightningModule": "Module", "LightningDataModule": "DataModule"}
_MODULES = ("callbacks", "errors", "loggers", "profilers")

__all__ = [
    "DDP",
    "FSDP",
    "Callback",
    "CombinedLoader",
    "DataModule",
    "Guard",
    "LightningCLI",
    "LightningDataModule",
    "LightningModule",
    "Module",
    "MusterCLI",
    "Trainer",
    "Tuner",
    "callbacks",
    "errors",
    "loggers",
    "profilers",
    "prove_resume",
    "seed_everything",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"trainer.{name}")
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), _RENAMED.get(name, name))
        globals()[name] = value
        return value
    raise AttributeError(f"module 'trainer' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
