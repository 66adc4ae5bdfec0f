"""Saved in the middle of a validation, while averages stand in for the weights and a window of batches is open.

usage: averages_ranks.py FOLDER      prints a digest of the weights and buffers of the whole run, and of one resumed
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import trainer as T

PLACE = str(Path(sys.argv[1]) / "in-validation.ckpt")


class Model(T.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))

    def training_step(self, batch, batch_idx):
        return self.net(batch[0]).square().mean()

    def validation_step(self, batch, batch_idx):
        if not Path(PLACE).exists() and self.trainer.global_step and not self.trainer.sanity_checking:
            self.trainer.save_checkpoint(PLACE)
        self.log("val", self.net(batch[0]).square().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def train(ckpt_path: str | None) -> str:
    T.seed_everything(1, verbose=False)
    model = Model()
    data = TensorDataset(torch.randn(32, 4, generator=torch.Generator().manual_seed(5)))
    # Three batches of a rank are one window of two and half of the next.
    trainer = T.Trainer(
        accelerator="cpu", max_epochs=2, accumulate_grad_batches=2, val_check_interval=3, num_sanity_val_steps=0,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[T.callbacks.EMAWeightAveraging(decay=0.5)],
    )  # fmt: skip
    trainer.fit(
        model, DataLoader(data, batch_size=4, shuffle=True), DataLoader(data, batch_size=8), ckpt_path=ckpt_path
    )
    digest = hashlib.sha256()
    for value in model.state_dict().values():
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()


print("WHOLE", train(None), flush=True)
print("RESUMED", train(PLACE), flush=True)
