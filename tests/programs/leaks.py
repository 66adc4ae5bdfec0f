"""A small training with one leak, by name: state that a checkpoint does not hold and that changes what is learnt.

argv: "none" or the leak's name; loader workers.
"""

from __future__ import annotations

import itertools
import os
import random
import sys
import time

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import trainer as T

LEAK = sys.argv[1]
WORKERS = int(sys.argv[2]) if len(sys.argv) > 2 else 0
jitter = random.Random(7)
table = {"calls": 0}


class Data(Dataset):
    def __init__(self) -> None:
        self.x = torch.randn(40, 4, generator=torch.Generator().manual_seed(1))
        self.drawn = 0
        self.hidden = itertools.cycle(range(1, 1000))  # longer than the training: no place in it is like another
        self.generator = torch.Generator().manual_seed(3)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int):
        x = self.x[i]
        if LEAK == "dataset attribute":
            self.drawn += 1
            x = x * (1 + 0.001 * self.drawn)
        elif LEAK == "dataset generator":
            x = x + 0.1 * torch.randn(4, generator=self.generator)
        elif LEAK == "global random in a transform":
            x = x * (1 + 0.1 * jitter.random())
        elif LEAK == "hidden iterator":
            x = x * (1 + 0.001 * next(self.hidden))
        return x, x.sum().unsqueeze(0)


class Warmup(T.Callback):
    """Without a state_dict."""

    def __init__(self) -> None:
        self.count = 0

    def on_train_batch_start(self, trainer, module, batch, index):
        if LEAK == "callback":
            self.count += 1
            for group in trainer.optimizers[0].param_groups:
                group["lr"] = 0.01 * min(1.0, self.count / 8)


class Model(T.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1), nn.Linear(8, 1))
        self.factor = 1.0
        self.register_buffer("running", torch.ones(()), persistent=False)

    def training_step(self, batch, index):
        x, y = batch
        loss = nn.functional.mse_loss(self.net(x), y)
        if LEAK == "buffer that is not saved":
            self.running.mul_(0.95).add_(0.05 * loss.detach())
            loss = loss / self.running
        elif LEAK == "attribute of the module":
            self.factor *= 0.9
            loss = loss * self.factor
        elif LEAK == "global variable":
            table["calls"] += 1
            loss = loss / table["calls"]
        elif LEAK == "time":
            loss = loss * (1 + 0.01 * (time.monotonic() % 1))
        elif LEAK == "attempt":
            loss = loss * (1 + int(os.environ["LAUNCH_ATTEMPT"]))
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=0.01)
        if LEAK == "scheduler that is not returned":
            self.mine = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return optimizer

    def on_train_epoch_end(self):
        if LEAK == "scheduler that is not returned":
            self.mine.step()
            self.mine.optimizer.param_groups[0]["lr"] = 0.01 * 0.9**self.mine.last_epoch


def main() -> None:
    T.seed_everything(1, verbose=False)
    trainer = T.Trainer(
        accelerator="cpu", max_epochs=3, logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[Warmup(), T.callbacks.ModelCheckpoint(every_n_train_steps=3)],
    )  # fmt: skip
    trainer.fit(Model(), DataLoader(Data(), 4, shuffle=True, num_workers=WORKERS))


if __name__ == "__main__":
    main()
