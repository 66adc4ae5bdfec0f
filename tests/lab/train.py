"""A training that can be disturbed: slow steps, a checkpoint now and then, and at its end its step count and weights.

train.py [--steps N] [--pause SECONDS] [--every N] [--die-at STEP]
"""

from __future__ import annotations

import argparse
import hashlib
import os
import time
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import trainer as T
from trainer.callbacks import Callback, ModelCheckpoint


class Model(T.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class Pace(Callback):
    def __init__(self, pause: float, die_at: int) -> None:
        self.pause, self.die_at = pause, die_at

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        if trainer.global_step == self.die_at and trainer.global_rank == 1:
            raise ValueError("this step cannot be made")
        time.sleep(self.pause)
        if trainer.is_global_zero:
            print("step", trainer.global_step, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--pause", type=float, default=0.1)
    parser.add_argument("--every", type=int, default=1000)
    parser.add_argument("--die-at", type=int, default=-1)
    args = parser.parse_args()
    T.seed_everything(1, verbose=False)
    data = TensorDataset(torch.randn(8192, 4, generator=torch.Generator().manual_seed(1)))
    trainer = T.Trainer(
        max_steps=args.steps, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[Pace(args.pause, args.die_at), ModelCheckpoint(every_n_train_steps=args.every)],
    )  # fmt: skip
    model = Model()
    trainer.fit(model, DataLoader(data, batch_size=8, shuffle=True))
    if trainer.is_global_zero:
        weights = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()
        Path(os.environ["LAUNCH_RUN_DIR"], "result").write_text(f"{trainer.global_step} {weights}\n")


if __name__ == "__main__":
    main()
