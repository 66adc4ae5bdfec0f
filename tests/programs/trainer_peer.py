"""The same training by our Trainer and by Lightning's; prints both loss curves as JSON (rank 0)."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import warnings

import torch
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

warnings.filterwarnings("ignore")


def run(package, accumulate: int, folder: str) -> list[float]:
    losses = []

    class Model(package.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 3))

        def training_step(self, batch, batch_idx):
            x, y = batch
            loss = torch.nn.functional.cross_entropy(self.net(x), y)
            losses.append(loss.item())
            self.log("loss", loss)
            return loss

        def validation_step(self, batch, batch_idx):
            x, y = batch
            self.log("val_loss", torch.nn.functional.cross_entropy(self.net(x), y), sync_dist=True)

        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
            by_step = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)
            by_epoch = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)
            return [optimizer], [{"scheduler": by_step, "interval": "step"}, by_epoch]

    torch.manual_seed(1)
    x, y = torch.randn(320, 16), torch.randint(0, 3, (320,))
    torch.manual_seed(2)
    model = Model()
    torch.manual_seed(3 + int(os.environ.get("RANK", "0")))
    trainer = package.Trainer(
        accelerator="cpu", max_epochs=int(os.environ["EPOCHS"]), logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, accumulate_grad_batches=accumulate,
        gradient_clip_val=0.5, default_root_dir=folder,
        use_distributed_sampler=package.__name__ == "trainer",
        **({"devices": int(os.environ["WORLD_SIZE"]), "strategy": "ddp"} if "WORLD_SIZE" in os.environ else
           {"devices": 1}),
    )  # fmt: skip
    data = TensorDataset(x, y)
    train = DataLoader(data, batch_size=8)
    if "WORLD_SIZE" in os.environ:
        # Lightning's own sampler shuffles a training set in DDP whatever the loader says.
        sampler = DistributedSampler(data, int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"]), shuffle=False)
        train = DataLoader(data, batch_size=8, sampler=sampler)
    trainer.fit(model, train, DataLoader(data, batch_size=64))
    return losses


if __name__ == "__main__":
    if not os.environ.get("WORLD_SIZE"):
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK"):
            os.environ.pop(name, None)
    import lightning

    import trainer as ours

    with tempfile.TemporaryDirectory() as folder:
        result = {}
        for accumulate in map(int, sys.argv[1:]):
            # Lightning makes the process group, which ours joins: it leaves it to the process's end to destroy it.
            theirs = run(lightning, accumulate, folder)
            result[accumulate] = [run(ours, accumulate, folder), theirs]
    if os.environ.get("RANK", "0") == "0":
        print("CURVES " + json.dumps(result))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
