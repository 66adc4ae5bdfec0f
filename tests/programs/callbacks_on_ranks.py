"""A fit whose ranks log different values of one name: callbacks and loggers must still act as one.

argv: folder. Prints one JSON line per rank.
"""

from __future__ import annotations

import json
import sys
from datetime import timedelta
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from trainer import Module, Trainer
from trainer.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from trainer.loggers import CSVLogger, TensorBoardLogger

# Per rank, per epoch.
SCORES = {0: [3.0, 1.0, 2.0, 0.0, 0.0], 1: [1.0, 3.0, 2.0, 0.0, 0.0]}
HEALTH = {0: [1.0] * 5, 1: [1.0, 1.0, 1.0, float("nan"), 1.0]}


class Scripted(Module):
    def __init__(self):
        super().__init__()
        self.save_hyperparameters()
        self.layer = nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        loss = self.layer(batch[0]).square().mean()
        self.log("loss", loss, prog_bar=True)
        return loss

    def on_train_epoch_end(self):
        rank, epoch = self.trainer.global_rank, self.trainer.current_epoch
        self.log("score", SCORES[rank][epoch], sync_dist=False)
        self.log("health", HEALTH[rank][epoch], sync_dist=False)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def main() -> None:
    folder = Path(sys.argv[1])
    best = ModelCheckpoint(folder / "best", "{epoch}-{score:.0f}", monitor="score", save_last=True)
    timed = ModelCheckpoint(folder / "timed", "{step}", train_time_interval=timedelta(0), save_top_k=-1)
    stop = EarlyStopping("health", patience=99)
    trainer = Trainer(
        accelerator="cpu", max_epochs=5, default_root_dir=folder, log_every_n_steps=1, enable_model_summary=False,
        logger=[TensorBoardLogger(folder), CSVLogger(folder, name="csv")],
        callbacks=[best, timed, stop, LearningRateMonitor()],
    )  # fmt: skip
    trainer.fit(Scripted(), DataLoader(TensorDataset(torch.ones(4, 2))))
    trainer.loggers[0].experiment.add_scalar("by_hand", 1.0, 0)
    trainer.loggers[0].finalize("success")
    facts = {
        "rank": trainer.global_rank,
        "epochs": trainer.current_epoch,
        "best": best.best_model_path,
        "score": float(best.best_model_score),
        "log_dir": trainer.log_dir,
        "versions": [logger.version for logger in trainer.loggers],
        "reason": stop.stopping_reason.name,
    }
    print("\nFACTS " + json.dumps(facts), flush=True)


main()
