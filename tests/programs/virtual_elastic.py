"""Train on virtual ranks for any number of nodes, held at some steps until the test has done its worst to a node.

At each step of HOLDS every rank writes `held-<step>-<rank>` into the run folder and waits for `go-<step>` there, or for
the word that this attempt is to stop. At the end rank 0 writes the step count and what the weights hash to: `result`.
"""

import hashlib
import os
import time
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import trainer as T
from trainer.callbacks import Callback, ModelCheckpoint

FOLDER = Path(os.environ["LAUNCH_RUN_DIR"])
STOP = FOLDER / f"stop-{os.environ['LAUNCH_ATTEMPT']}.json"
HOLDS = (6, 14, 22)


class Model(T.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 1))

    def training_step(self, batch, batch_idx):
        return (self.layers(batch[0]) - batch[0].sum(1, keepdim=True)).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class Held(Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        step = trainer.global_step
        if step in HOLDS:
            (FOLDER / f"held-{step}-{trainer.global_rank}-of-{trainer.world_size}").touch()
            while not (FOLDER / f"go-{step}").exists() and not STOP.exists():
                time.sleep(0.02)


def main():
    T.seed_everything(3, verbose=False)
    data = TensorDataset(torch.randn(1000, 5, generator=torch.Generator().manual_seed(1)))
    trainer = T.Trainer(
        max_steps=28, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        virtual_ranks=4, callbacks=[Held(), ModelCheckpoint(every_n_train_steps=4)],
    )  # fmt: skip
    model = Model()
    trainer.fit(model, DataLoader(data, batch_size=8, shuffle=True))
    if trainer.is_global_zero:
        weights = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()
        (FOLDER / "result").write_text(f"{trainer.global_step} {weights}\n")


main()
