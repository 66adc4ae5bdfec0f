"""Learn to read handwritten digits: the whole path from raw data to a tested model, in under a minute on a laptop.

    launch --procs 4 examples/digits.py            # four processes on this machine's CPUs
    launch --gpus 2 examples/digits.py             # two GPUs
    torchrun --nproc-per-node 4 examples/digits.py
    python examples/digits.py --epochs 5

The data are the 1797 scans of handwritten digits (8 x 8 pixels) that come with scikit-learn, so nothing is downloaded.
Watch it with `tensorboard --logdir .`. Kill it at any time: a restarted `launch --run NAME ...` goes on where it was.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import trainer as T
from trainer.callbacks import LearningRateMonitor, ModelCheckpoint


class DigitsData(T.DataModule):
    """The scans as tensors, split into training, validation and test images in the same way on every rank."""

    def __init__(self, folder: Path, batch_size: int) -> None:
        super().__init__()
        self.file = folder / "digits.npz"
        self.batch_size = batch_size

    def prepare_data(self) -> None:
        """Runs in one process per machine while the others wait: the place to download or convert."""
        if self.file.exists():
            return
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        # Whole or not there at all, even if this process is killed; several machines may share the folder.
        with tempfile.TemporaryDirectory(dir=self.file.parent) as own:
            unfinished = Path(own) / self.file.name
            np.savez(unfinished, images=images.reshape(-1, 1, 8, 8) / 16, labels=labels)
            unfinished.rename(self.file)

    def setup(self, stage: str) -> None:
        """Runs on every rank."""
        with np.load(self.file) as arrays:
            images, labels = torch.from_numpy(arrays["images"]).float(), torch.from_numpy(arrays["labels"]).long()
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1797))
        train, val, test = order.split([1197, 300, 300])
        self.train, self.val, self.test = (TensorDataset(images[part], labels[part]) for part in (train, val, test))

    def train_dataloader(self) -> DataLoader:
        # One loader for any number of ranks: the Trainer gives each rank its own share of the samples.
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, batch_size=100)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.test, batch_size=100)


class DigitsModel(T.Module):
    """A small convolutional network and how it is trained."""

    def __init__(self, lr: float = 3e-3, width: int = 32) -> None:
        super().__init__()
        self.save_hyperparameters()  # self.hparams.lr, kept in checkpoints and shown by TensorBoard
        self.network = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1), nn.GroupNorm(4, width), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(4, width), nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1), nn.GroupNorm(4, 2 * width), nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(), nn.Dropout(0.3), nn.Linear(2 * width * 4, 10),
        )  # fmt: skip
        self.example_input_array = torch.zeros(1, 1, 8, 8)

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self(jitter(images)), labels, label_smoothing=0.05)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.evaluate(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.evaluate(batch, "test")

    def evaluate(self, batch: tuple[Tensor, Tensor], name: str) -> None:
        images, labels = batch
        logits = self(images)
        # Averaged over all samples of all ranks, each counted once.
        self.log(f"{name}_loss", F.cross_entropy(logits, labels))
        self.log(f"{name}_acc", (logits.argmax(1) == labels).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams.lr, weight_decay=0.01)
        steps = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=self.hparams.lr, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def jitter(images: Tensor) -> Tensor:
    """Each image turned, shifted and scaled a little: nobody writes a digit twice in the same way."""
    n = len(images)

    def draw(spread: float, *shape: int) -> Tensor:
        return (2 * torch.rand(*shape, device=images.device) - 1) * spread

    angle, scale, shift = draw(math.radians(12), n), 1 + draw(0.12, n), draw(0.25, n, 2)
    cos, sin = scale * angle.cos(), scale * angle.sin()
    affine = torch.stack([cos, -sin, shift[:, 0], sin, cos, shift[:, 1]], dim=1).view(n, 2, 3)
    grid = F.affine_grid(affine, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=16, help="per process")
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder for the prepared data")
    parser.add_argument("--accelerator", default="auto", help="cpu, cuda, mps or auto")
    parser.add_argument("--strategy", default="auto", help="ddp, fsdp or auto")
    parser.add_argument("--precision", default="32-true", help="32-true, bf16-mixed, 16-mixed, ...")
    args = parser.parse_args()

    T.seed_everything(args.seed, verbose=False)
    best = ModelCheckpoint(filename="{epoch}-{val_acc:.4f}", monitor="val_acc", mode="max")
    trainer = T.Trainer(
        max_epochs=args.epochs,
        accelerator=args.accelerator,
        strategy=args.strategy,
        precision=args.precision,
        log_every_n_steps=5,
        callbacks=[best, LearningRateMonitor()],
    )
    data = DigitsData(args.data, args.batch_size)
    model = DigitsModel(lr=args.lr)
    trainer.fit(model, datamodule=data)

    results = trainer.test(model, datamodule=data, ckpt_path="best", verbose=False)
    if trainer.is_global_zero:
        print(f"test accuracy {results[0]['test_acc']:.2%} with the weights of {best.best_model_path}", flush=True)


if __name__ == "__main__":
    main()
