"""Digits, learned on several ranks, that a test can hold at a place; at the end its step count, accuracy and weights.

digits.py [--steps N] [--every N] [--slow-from STEP] [--hold start|validation|save|STEP]

In the run's first attempt `--slow-from` makes the steps after STEP last 0.2 s each, and stop before the last few, and
`--hold` has every rank write `held-<rank>` into the run folder at that place and wait there; both until the file `go`
is in the run folder. `--hold save` is a disk that does not come back from the fsync of the second checkpoint.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import importlib.util
import json
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import trainer as T
from trainer.callbacks import Callback, ModelCheckpoint

FOLDER = Path(os.environ["LAUNCH_RUN_DIR"])
FIRST = os.environ["LAUNCH_ATTEMPT"] == "0"


def hold() -> None:
    """Wait for the file `go`."""
    (FOLDER / f"held-{os.environ['RANK']}").touch()
    while not (FOLDER / "go").exists():
        time.sleep(0.02)


class Model(T.Module):
    def __init__(self, held: bool) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 10))
        self.held = held

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.network(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        if self.held and self.trainer.global_step > 0 and batch_idx == 1:
            self.held = False
            hold()
        right = (self.network(batch[0]).argmax(1) == batch[1]).float().mean()
        self.log("accuracy", right, sync_dist=True, batch_size=len(batch[1]))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=5e-3)


class Pace(Callback):
    """Tells the steps, makes them slow, holds at one."""

    def __init__(self, slow_from: int, hold_at: int) -> None:
        self.slow_from, self.hold_at = slow_from, hold_at

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        if trainer.is_global_zero:
            print("step", trainer.global_step, flush=True)
        if FIRST and trainer.global_step == self.hold_at:
            hold()
        if FIRST and trainer.global_step >= self.slow_from:
            began = time.monotonic()
            while not (FOLDER / "go").exists():
                time.sleep(0.02)
                told = (FOLDER / "stop-0.json").exists()
                if told or (trainer.global_step < trainer.max_steps - 5 and time.monotonic() - began > 0.2):
                    break


def loaders() -> tuple[DataLoader, DataLoader]:
    """scikit-learn's own file; importing that for it takes longer than the training."""
    spec = importlib.util.find_spec("sklearn")
    assert spec is not None
    assert spec.origin is not None
    with gzip.open(Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz", "rt") as file:
        rows = np.loadtxt(file, delimiter=",", dtype=np.float32)
    images, labels = torch.from_numpy(rows[:, :64] / 16), torch.from_numpy(rows[:, 64]).long()
    train, val = TensorDataset(images[:1440], labels[:1440]), TensorDataset(images[1440:], labels[1440:])
    return DataLoader(train, batch_size=12, shuffle=True), DataLoader(val, batch_size=5)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--slow-from", type=int, default=1 << 30)
    parser.add_argument("--hold", default="")
    args = parser.parse_args()
    if FIRST and args.hold == "start":
        hold()
    T.seed_everything(1, verbose=False)
    if FIRST and args.hold == "save":
        synced = os.fsync

        def fsync(descriptor: int) -> None:
            if f"-step={2 * args.every}.ckpt" in str(Path(f"/proc/self/fd/{descriptor}").readlink()):
                hold()
            synced(descriptor)

        os.fsync = fsync
    at_step = int(args.hold) if args.hold.isdigit() else -1
    trainer = T.Trainer(
        max_steps=args.steps, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[Pace(args.slow_from, at_step), ModelCheckpoint(every_n_train_steps=args.every, save_top_k=-1)],
    )  # fmt: skip
    model = Model(FIRST and args.hold == "validation")
    train, val = loaders()
    trainer.fit(model, train, val)
    if trainer.global_rank == 0:
        weights = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()
        accuracy = float(trainer.callback_metrics["accuracy"])
        (FOLDER / "result").write_text(
            json.dumps({"steps": trainer.global_step, "accuracy": accuracy, "weights": weights})
        )


if __name__ == "__main__":
    main()
