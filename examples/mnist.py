"""MNIST with torchvision, on one process or many.

    launch --gpus 2 examples/mnist.py
    launch --procs 4 examples/mnist.py --epochs 1
    python examples/mnist.py --data /datasets/mnist

MNIST is downloaded into `--data` if it is not there. Without a network, put its four files there yourself: they may
lie in the folder itself or in MNIST/raw, packed (.gz) or not.
"""

from __future__ import annotations

import argparse
import gzip
import shutil
import sys
import tempfile
from pathlib import Path
from urllib.error import URLError

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, random_split
from torchvision import transforms
from torchvision.datasets import MNIST

import trainer as T
from trainer.callbacks import EarlyStopping, ModelCheckpoint

FILES = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]


class MNISTMissingError(Exception):
    """MNIST is neither here nor to be had; the message says what to do."""


class MNISTData(T.DataModule):
    def __init__(self, folder: Path, batch_size: int, workers: int) -> None:
        super().__init__()
        self.folder = folder
        self.batch_size = batch_size
        self.workers = workers
        self.transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))])

    def prepare_data(self) -> None:
        take_local_files(self.folder)
        if all((self.folder / "MNIST" / "raw" / name).exists() for name in FILES):
            return
        try:
            for train in (True, False):
                MNIST(self.folder, train=train, download=True)
        except (RuntimeError, URLError, OSError) as error:
            raise MNISTMissingError(
                f"MNIST is not in {self.folder.resolve()} and cannot be downloaded ({error}).\n"
                f"Copy these files there, packed (.gz) or not, and start again:\n  "
                + "\n  ".join(FILES)
                + "\nor pass --data FOLDER with a folder that holds them. examples/digits.py needs no download."
            ) from None

    def setup(self, stage: str) -> None:
        everything = MNIST(self.folder, train=True, transform=self.transform)
        tenth = len(everything) // 10
        split = torch.Generator().manual_seed(42)
        self.train, self.val = random_split(everything, [len(everything) - tenth, tenth], generator=split)
        self.test = MNIST(self.folder, train=False, transform=self.transform)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True, num_workers=self.workers)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, batch_size=1000)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.test, batch_size=1000)


def take_local_files(folder: Path) -> None:
    """Unpack or copy files that lie in the folder itself to where torchvision reads them."""
    raw = folder / "MNIST" / "raw"
    for name in FILES:
        target = raw / name
        for source in (folder / name, folder / f"{name}.gz", raw / f"{name}.gz"):
            if target.exists() or not source.exists():
                continue
            raw.mkdir(parents=True, exist_ok=True)
            # Several machines may share the folder.
            with tempfile.TemporaryDirectory(dir=raw) as own:
                unfinished = Path(own) / name
                with (
                    (gzip.open if source.suffix == ".gz" else open)(source, "rb") as packed,
                    open(unfinished, "wb") as out,
                ):
                    shutil.copyfileobj(packed, out)
                unfinished.rename(target)


class MNISTModel(T.Module):
    def __init__(self, lr: float = 1e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.network = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Dropout(0.25), nn.Linear(64 * 7 * 7, 128), nn.ReLU(), nn.Linear(128, 10),
        )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.evaluate(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.evaluate(batch, "test")

    def evaluate(self, batch: tuple[Tensor, Tensor], name: str) -> None:
        images, labels = batch
        logits = self(images)
        self.log(f"{name}_loss", F.cross_entropy(logits, labels))
        self.log(f"{name}_acc", (logits.argmax(1) == labels).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.hparams.lr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder that holds MNIST, or will")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=64, help="per process")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--workers", type=int, default=2, help="processes that load data, per rank")
    parser.add_argument("--strategy", default="auto")
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()

    T.seed_everything(args.seed, verbose=False)
    best = ModelCheckpoint(filename="{epoch}-{val_acc:.4f}", monitor="val_acc", mode="max")
    trainer = T.Trainer(
        max_epochs=args.epochs,
        strategy=args.strategy,
        precision=args.precision,
        callbacks=[best, EarlyStopping("val_loss", patience=3)],
    )
    data = MNISTData(args.data, args.batch_size, args.workers)
    model = MNISTModel(args.lr)
    try:
        trainer.fit(model, datamodule=data)
    except MNISTMissingError as missing:
        sys.exit(str(missing))
    results = trainer.test(model, datamodule=data, ckpt_path="best", verbose=False)
    if trainer.is_global_zero:
        print(f"test accuracy {results[0]['test_acc']:.2%}", flush=True)


if __name__ == "__main__":
    main()
