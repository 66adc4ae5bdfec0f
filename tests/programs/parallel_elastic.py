"""Stops in the middle of an epoch, or goes on from there on another number of ranks; prints the ids that it saw.

argv: "stop", the optimizer step (without such a step it ends), where to save, and what to go on from, if anything; or
"end" and what to go on from.
Environment: SIZE of the dataset (53), BATCH (2), EPOCHS (1). An id of epoch e is printed as 1000 * e more.
"""

from __future__ import annotations

import os
import sys

import torch
from torch import nn
from torchmetrics import SumMetric

from trainer import Module, Trainer
from trainer.callbacks import Callback

SIZE, BATCH, EPOCHS = (int(os.environ.get(n, d)) for n, d in (("SIZE", "53"), ("BATCH", "2"), ("EPOCHS", "1")))


class Net(Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.seen = []
        self.summed = SumMetric()

    def training_step(self, batch, index):
        if self.trainer.train_dataloader is not None and self.trainer.fit_run.feed.weight:
            self.seen += (batch.flatten() + 1000 * self.current_epoch).tolist()
        counted = len(batch) if self.trainer.fit_run.feed.weight else 0
        self.summed.update(float(counted))
        self.log("count", float(counted), reduce_fx="sum", on_step=False, on_epoch=True)
        self.log("summed", self.summed, on_step=False, on_epoch=True)
        return self.layer(batch).square().mean()

    def on_validation_start(self):
        print("validated", flush=True)

    def validation_step(self, batch, index):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.arange(float(SIZE)).reshape(-1, 1), BATCH, shuffle=True)

    def val_dataloader(self):
        return torch.utils.data.DataLoader(torch.zeros(8, 1), 2)


class Stop(Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        if trainer.global_step == int(sys.argv[2]):
            trainer.save_checkpoint(sys.argv[3])
            print("seen", *map(int, module.seen), flush=True)
            sys.stdout.flush()
            raise KeyboardInterrupt


if __name__ == "__main__":
    torch.manual_seed(1)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "max_epochs": EPOCHS,
             "enable_model_summary": False, "num_sanity_val_steps": 0, "accelerator": "cpu"}  # fmt: skip
    module = Net()
    if sys.argv[1] == "stop":
        try:
            Trainer(callbacks=[Stop()], **quiet).fit(module, ckpt_path=sys.argv[4] if len(sys.argv) > 4 else None)
            print("seen", *map(int, module.seen), flush=True)
        except KeyboardInterrupt:
            pass
    else:
        trainer = Trainer(**quiet)
        trainer.fit(module, ckpt_path=sys.argv[2])
        assert trainer.current_epoch == EPOCHS
        # Half-finished sums of ranks that are no more were taken over by those that are.
        assert trainer.callback_metrics["count"] == trainer.callback_metrics["summed"] == SIZE
        print("seen", *map(int, module.seen), flush=True)
