"""A fit that logs to W&B offline. argv: folder. Prints the id of the W&B run."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from trainer import Module, Trainer
from trainer.loggers import WandbLogger


class Tiny(Module):
    def __init__(self, lr=0.1):
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
    logger = WandbLogger("tiny", save_dir=sys.argv[1], offline=True, project="test", prefix="p", log_model=True)
    trainer = Trainer(
        accelerator="cpu", max_epochs=1, logger=logger, log_every_n_steps=2, default_root_dir=sys.argv[1],
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Tiny(), DataLoader(TensorDataset(torch.ones(4, 2))))
    logger.log_table("table", columns=["a"], data=[[1]])
    clip = Path(sys.argv[1], "clip.gif")
    clip.write_bytes(b"GIF89a")  # sent as it is
    logger.log_video("clip", [str(clip)], caption=["nothing moves"])
    print(f"ID {logger.version}", flush=True)


main()
