"""A training with everything that has state, hurt at the places that $HURT names, one per attempt.

HURT is JSON: a list, one item per attempt, of null or [signal, rank, where, number, seconds]; `where` is one of
PLACES, and the signal comes that many seconds after the rank was there for that time, wherever it is then.
WORKERS: loader workers. VIRTUAL: virtual ranks, 0 for none. EPOCHS: 3. Rank 0 writes what has come out to end.json.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import threading
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics import MeanMetric

import trainer as T

PLACES = ("train", "validation", "save", "epoch_end")
FOLDER = Path(os.environ["LAUNCH_RUN_DIR"])
OPTIMIZER = FOLDER / "optimizer.txt"
ATTEMPT, RANK = int(os.environ["LAUNCH_ATTEMPT"]), int(os.environ.get("RANK", "0"))
VIRTUAL = int(os.environ.get("VIRTUAL", "0"))
HURT = dict(enumerate(json.loads(os.environ.get("HURT", "[]")))).get(ATTEMPT)
COUNTS = dict.fromkeys(PLACES, 0)
# Whether an earlier attempt left something to go on from; if not, this one is the first again.
RESUMES = (FOLDER / "checkpoints" / "saved.json").exists()


def place(where: str) -> None:
    COUNTS[where] += 1
    if HURT is not None and (where, COUNTS[where], RANK) == (HURT[2], HURT[3], HURT[1]):
        timer = threading.Timer(HURT[4], os.kill, (os.getpid(), getattr(signal, HURT[0])))
        timer.daemon = True
        timer.start()


class Data(Dataset):
    """Samples with random augmentation, by all three generators."""

    def __init__(self, n: int, noise: float) -> None:
        self.x = torch.randn(n, 8, generator=torch.Generator().manual_seed(5))
        self.noise = noise

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int):
        x = self.x[i] + self.noise * (torch.randn(8) + random.random() + np.random.rand())
        return x.float(), self.x[i].sum().unsqueeze(0)


class Scale(T.Callback):
    """Like a loss scaler: grows with good steps, shrinks with bad ones, and changes what is learnt."""

    def __init__(self) -> None:
        self.scale, self.good = 1.0, 0

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        self.good += 1
        if self.good == 5:
            self.scale, self.good = self.scale * 1.25 if self.scale < 2 else 0.75, 0
        module.scale = self.scale

    def on_train_start(self, trainer, module):
        module.scale = self.scale

    def state_dict(self):
        return {"scale": self.scale, "good": self.good}

    def load_state_dict(self, state):
        self.scale, self.good = state["scale"], state["good"]


class Model(T.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(8, 32), nn.BatchNorm1d(32), nn.Tanh(), nn.Dropout(0.2), nn.Linear(32, 16), nn.ReLU(),
            nn.Dropout(0.1), nn.Linear(16, 1),
        )  # fmt: skip
        self.scale = 1.0
        self.train_mean, self.val_mean = MeanMetric(), MeanMetric()

    def forward(self, x):
        if len(x) > 1 or not self.training:
            return self.net(x)
        norm = self.net[1].eval()  # one sample has no variance
        found = self.net(x)
        norm.train()
        return found

    def training_step(self, batch, batch_idx):
        place("train")
        loss = nn.functional.mse_loss(self(batch[0]), batch[1]) * self.scale
        self.log("loss", loss, on_step=True, on_epoch=True)
        if not VIRTUAL:  # torchmetrics adds up in 32 bits, in an order that depends on the ranks
            self.train_mean(loss.detach())
            self.log("train_mean", self.train_mean, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        if not self.trainer.sanity_checking:
            place("validation")
        loss = nn.functional.mse_loss(self(batch[0]), batch[1]) + 0.01 * torch.randn(())
        self.log("val", loss)
        if not VIRTUAL:
            self.val_mean(loss)
            self.log("val_mean", self.val_mean)

    def on_train_epoch_end(self):
        place("epoch_end")

    def on_save_checkpoint(self, checkpoint) -> None:
        place("save")

    def on_train_end(self) -> None:
        # An attempt may die between the end of the training and that of the script: the next one has nothing to do.
        if RANK == 0:
            states = self.trainer.optimizers[0].state_dict()["state"]
            OPTIMIZER.write_text(digest(value for state in states.values() for value in state.values()))

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.7)
        return [optimizer], [
            {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 7, 0.9), "interval": "step"},
            {"scheduler": plateau, "monitor": "val"},
        ]


class Rows(T.loggers.Logger):
    """A file of rows that forgets, on resume, what comes after the checkpoint."""

    name, version, path = "rows", 0, FOLDER / "rows.json"

    def __init__(self) -> None:
        self.rows = json.loads(self.path.read_text()) if RESUMES and self.path.exists() else []

    def resume(self, step: int) -> None:
        self.rows = [r for r in self.rows if r[0] < step]

    def log_metrics(self, metrics, step=None) -> None:
        if RANK == 0:
            self.rows.append([step, sorted(metrics.items())])
            temporary = self.path.with_suffix(".tmp")
            temporary.write_text(json.dumps(self.rows))
            temporary.replace(self.path)

    def log_hyperparams(self, params, *args, **kwargs) -> None:
        pass


def digest(values) -> str:
    found = hashlib.sha256()
    for value in values:
        found.update(value.detach().numpy().tobytes() if isinstance(value, torch.Tensor) else repr(value).encode())
    return found.hexdigest()


def main() -> None:
    warnings.filterwarnings("ignore", message=".*isn't be used.*")
    # A restart must not depend on how it was seeded.
    T.seed_everything(99 if RESUMES else 1, verbose=False)
    model = Model()
    T.seed_everything(2 + ATTEMPT * 10 * RESUMES + (0 if VIRTUAL else RANK), verbose=False)
    os.environ["PL_GLOBAL_SEED"] = "3"
    average = T.callbacks.EMAWeightAveraging(decay=0.9)
    rows, workers = Rows(), int(os.environ.get("WORKERS", "0"))
    trainer = T.Trainer(
        accelerator="cpu", max_epochs=int(os.environ.get("EPOCHS", "3")), accumulate_grad_batches=2,
        gradient_clip_val=1.0, val_check_interval=0.4,
        log_every_n_steps=2, logger=rows, enable_progress_bar=False, enable_model_summary=False,
        virtual_ranks=VIRTUAL or None,
        callbacks=[Scale(), average, T.callbacks.EarlyStopping("val", patience=50),
                   T.callbacks.ModelCheckpoint(every_n_train_steps=3, save_top_k=2, monitor="val")],
    )  # fmt: skip
    samples = 109  # one is left for the last batch of 2, 3 and 4 ranks: the others run copies, which do not count
    trainer.fit(model, DataLoader(Data(samples, 0.1), batch_size=3, shuffle=True, num_workers=workers),
                DataLoader(Data(23, 0.01), batch_size=4))  # fmt: skip
    if RANK == 0:
        end = {
            "weights": digest(model.state_dict().values()),
            "optimizer": OPTIMIZER.read_text(),
            "rows": digest([json.dumps(rows.rows)]), "count": len(rows.rows),
            "place": [trainer.current_epoch, trainer.global_step],
        }  # fmt: skip
        (FOLDER / "end.json").write_text(json.dumps(end))


if __name__ == "__main__":
    main()
