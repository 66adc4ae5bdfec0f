"""What most trainer tests need: a small module, data, and a Trainer that writes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import trainer as T


class Boring(T.Module):
    """A linear regression that logs its losses."""

    def __init__(self, lr: float = 0.1) -> None:
        super().__init__()
        self.lr = lr
        self.layer = torch.nn.Linear(4, 1)

    def forward(self, x):
        return self.layer(x)

    def loss(self, batch):
        return torch.nn.functional.mse_loss(self(batch[0]), batch[1])

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch))

    def test_step(self, batch, batch_idx):
        self.log("test_loss", self.loss(batch))

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


@pytest.fixture
def boring() -> type[Boring]:
    """The small module's class."""
    return Boring


@pytest.fixture
def data():
    """`data(n, batch_size)` gives a loader over n samples of a linear relation, in order."""

    def make(n: int = 32, batch_size: int = 4, **arguments: Any) -> DataLoader:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(n, 4, generator=generator)
        return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=batch_size, **arguments)

    return make


@pytest.fixture
def quiet(tmp_path):
    """`quiet(**arguments)` gives a Trainer without logger, bar, summary and checkpoints."""

    def make(**arguments: Any) -> T.Trainer:
        defaults: dict[str, Any] = {
            "accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
            "enable_model_summary": False, "default_root_dir": tmp_path,
        }  # fmt: skip
        return T.Trainer(**(defaults | arguments))

    return make
