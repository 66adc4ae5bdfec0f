"""A short fit that logs to MLflow. argv: tracking URI, or "" for a store on disk; folder. Prints the run's id."""

from __future__ import annotations

import sys

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from trainer import Module, Trainer
from trainer.callbacks import ModelCheckpoint
from trainer.loggers import MLFlowLogger


class Tiny(Module):
    def __init__(self, lr=0.1, name="tiny"):
        super().__init__()
        self.save_hyperparameters()
        self.layer = nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        loss = self.layer(batch[0]).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.hparams.lr)


def main() -> None:
    uri, folder = sys.argv[1:]
    logger = MLFlowLogger(
        "digits", "first", tracking_uri=uri or None, save_dir=f"{folder}/mlruns", tags={"team": "a"}, prefix="p",
        log_model=True,
    )  # fmt: skip
    trainer = Trainer(
        accelerator="cpu", max_epochs=1, logger=logger, log_every_n_steps=2, default_root_dir=folder,
        enable_progress_bar=False, enable_model_summary=False, callbacks=ModelCheckpoint(f"{folder}/kept", "best"),
    )  # fmt: skip
    trainer.fit(Tiny(), DataLoader(TensorDataset(torch.ones(4, 2))))
    print(f"ID {logger.version}", flush=True)


main()
