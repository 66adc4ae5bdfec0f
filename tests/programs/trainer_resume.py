"""A training with everything that has state. At the places in $HURT it is killed or told to stop, once per attempt.

HURT is JSON: a list, one item per attempt, of null or [signal, rank, where, number]; where is "train" (in the
training step of that batch), "validation" (in that validation batch), "save" (when that checkpoint begins).
Rank 0 prints `END <hash of weights, optimizer and what was logged>` when it has finished.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import warnings
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset

import trainer as T

warnings.filterwarnings("ignore", message=".*isn't be used.*")
ATTEMPT = int(os.environ["LAUNCH_ATTEMPT"])
HURT = json.loads(os.environ.get("HURT", "[]"))
RANK = int(os.environ.get("RANK", "0"))
COUNTS = {"train": 0, "validation": 0, "save": 0}


def place(where: str) -> None:
    COUNTS[where] += 1
    hurt = HURT[ATTEMPT] if len(HURT) > ATTEMPT else None
    if hurt is not None and where == hurt[2] and (COUNTS[where], RANK) == (hurt[3], hurt[1]):
        os.kill(os.getpid(), getattr(signal, hurt[0]))


class Data(Dataset):
    def __init__(self, n: int, noise: float) -> None:
        generator = torch.Generator().manual_seed(5)
        self.x = torch.randn(n, 8, generator=generator)
        self.noise = noise

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int):
        x = self.x[i]
        return x + self.noise * torch.randn(8), x.sum().unsqueeze(0)


class Model(T.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(
            torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Dropout(0.1), torch.nn.Linear(32, 1)
        )

    def training_step(self, batch, batch_idx):
        place("train")
        loss = torch.nn.functional.mse_loss(self.net(batch[0]), batch[1])
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        if not self.trainer.sanity_checking:
            place("validation")
        self.log("val_loss", torch.nn.functional.mse_loss(self.net(batch[0]), batch[1]))

    def on_save_checkpoint(self, checkpoint) -> None:
        place("save")

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=3e-3)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.7)
        return [optimizer], [
            {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 7, 0.9), "interval": "step"},
            {"scheduler": plateau, "monitor": "val_loss"},
        ]


class Rows(T.loggers.Logger):
    """What was logged, in memory, restored with the checkpoint by being asked to resume."""

    name = "rows"
    version = 0
    path = Path(os.environ["LAUNCH_RUN_DIR"]) / "rows.json"

    def __init__(self) -> None:
        self.rows = json.loads(self.path.read_text()) if ATTEMPT and self.path.exists() else []

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


def main() -> None:
    T.seed_everything(1, verbose=False)
    if ATTEMPT:
        torch.manual_seed(99)  # a restart must not depend on how it was seeded
    model = Model()
    T.seed_everything(2 + RANK, verbose=False)
    os.environ["PL_GLOBAL_SEED"] = "3"
    rows = Rows()
    workers = int(os.environ.get("WORKERS", "0"))
    trainer = T.Trainer(
        accelerator="cpu", max_epochs=3, accumulate_grad_batches=2, gradient_clip_val=1.0, val_check_interval=0.5,
        log_every_n_steps=2, logger=rows, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[T.callbacks.ModelCheckpoint(every_n_train_steps=3, save_top_k=2, monitor="val_loss"),
                   T.callbacks.EarlyStopping("val_loss", patience=20)],
    )  # fmt: skip
    trainer.fit(model, DataLoader(Data(84, 0.1), batch_size=4, shuffle=True, num_workers=workers),
                DataLoader(Data(20, 0.0), batch_size=4))  # fmt: skip
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.numpy().tobytes())
    for state in trainer.optimizers[0].state_dict()["state"].values() if trainer.optimizers else ():
        for value in state.values():
            digest.update(value.numpy().tobytes())
    if RANK == 0:
        print("END", digest.hexdigest()[:16], hashlib.sha256(json.dumps(rows.rows).encode()).hexdigest()[:16],
              trainer.current_epoch, trainer.global_step, len(rows.rows))  # fmt: skip
    sys.stdout.flush()


if __name__ == "__main__":
    main()
