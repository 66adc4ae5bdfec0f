"""A vision job: torchvision's ResNet and augmentation, metrics by torchmetrics, the best checkpoint, a schedule.

    launch --procs 2 examples/cifar_like.py                            # two CPU ranks, 20 seconds, nothing downloaded
    launch --gpus 8 examples/cifar_like.py --data ~/datasets --depth 18 --stem full --epochs 30 --batch-size 256 \\
        --workers 8 --precision bf16-mixed
    python examples/cifar_like.py --epochs 2

With --data the folder holds CIFAR-10 as it is distributed (`cifar-10-batches-py`). Without, the images are made like it
from what comes with scikit-learn: 32 x 32 in colour, each a scan of a handwritten digit on a piece of a photograph.

What it shows: a DataModule that prepares its data once per machine, transforms that are drawn again in the same way
after a restart, torchmetrics objects given to `self.log`, and a test with the best weights. Stop or kill it at any
time: `launch resume NAME` goes on with the next batch.
"""

from __future__ import annotations

import argparse
import pickle
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.transforms import v2

import trainer as T
from trainer.callbacks import LearningRateMonitor, ModelCheckpoint

BLOCKS = {10: [1, 1, 1, 1], 18: [2, 2, 2, 2], 34: [3, 4, 6, 3]}
BATCHES = ([f"data_batch_{i}" for i in range(1, 6)], ["test_batch"])


class Images(Dataset):
    """Images (uint8, n x 3 x 32 x 32) and their classes; each image is changed when it is asked for."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, transform: v2.Transform) -> None:
        self.images, self.labels, self.transform = torch.from_numpy(images), torch.from_numpy(labels), transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.transform(self.images[index]), self.labels[index]


class ImageData(T.DataModule):
    """CIFAR-10 from a folder, or digits on photographs. A tenth of the training images is for validation."""

    def __init__(self, cifar: Path | None, prepared: Path, batch_size: int, workers: int) -> None:
        super().__init__()
        self.cifar = None if cifar is None else cifar / "cifar-10-batches-py"
        self.file = prepared / "digits_on_photos.npz"
        self.batch_size, self.workers = batch_size, workers

    def prepare_data(self) -> None:
        """Runs in one process per machine while the others wait."""
        if self.cifar is not None or self.file.exists():
            return
        made = digits_on_photos(np.random.default_rng(0))
        self.file.parent.mkdir(parents=True, exist_ok=True)
        # Whole or not there at all, even if this process is killed; several machines may share the folder.
        with tempfile.TemporaryDirectory(dir=self.file.parent) as own:
            unfinished = Path(own) / self.file.name
            np.savez(unfinished, **made)
            unfinished.rename(self.file)

    def setup(self, stage: str) -> None:
        """Runs on every rank."""
        if self.cifar is None:
            with np.load(self.file) as made:
                parts = [(made[f"{part}_images"], made[f"{part}_labels"]) for part in ("train", "test")]
        else:
            parts = [read_cifar(self.cifar, names) for names in BATCHES]
        plain = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.25] * 3)])
        # A mirrored digit is none; a mirrored horse is.
        mirror = [] if self.cifar is None else [v2.RandomHorizontalFlip()]
        varied = v2.Compose([v2.RandomCrop(32, padding=4), *mirror, v2.ColorJitter(0.3, 0.3), plain])
        (images, labels), test = parts
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).tolist()
        held_out = len(order) // 10
        self.train = Subset(Images(images, labels, varied), order[held_out:])
        self.val = Subset(Images(images, labels, plain), order[:held_out])
        self.test = Images(*test, plain)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, self.batch_size, shuffle=True, drop_last=True, num_workers=self.workers,
                          pin_memory=torch.cuda.is_available(), persistent_workers=self.workers > 0)  # fmt: skip

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, 4 * self.batch_size, num_workers=self.workers)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.test, 4 * self.batch_size, num_workers=self.workers)


def read_cifar(folder: Path, names: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Images and classes of some of CIFAR-10's files, which are pickles: use your own copy or the authors'."""
    batches = [pickle.loads((folder / name).read_bytes(), encoding="latin1") for name in names]
    images = np.concatenate([batch["data"] for batch in batches]).reshape(-1, 3, 32, 32)
    return images, np.concatenate([np.asarray(batch["labels"], np.int64) for batch in batches])


def digits_on_photos(draw: np.random.Generator) -> dict[str, np.ndarray]:
    """Each of scikit-learn's 1797 scans in a colour of its own, at a place of its own, on a piece of a photograph."""
    from sklearn.datasets import load_digits, load_sample_images

    scans, labels = load_digits(return_X_y=True)
    photos = load_sample_images().images
    images = np.empty((len(scans), 32, 32, 3), np.uint8)
    for image, scan in zip(images, scans.reshape(-1, 8, 8) / 16, strict=True):
        photo = photos[draw.integers(len(photos))]
        top, left = (draw.integers(side - 32) for side in photo.shape[:2])
        ink = np.zeros((32, 32, 1))
        down, right = draw.integers(0, 9, 2)
        ink[down : down + 24, right : right + 24, 0] = np.kron(scan, np.ones((3, 3)))
        ground = photo[top : top + 32, left : left + 32] * 0.5
        image[:] = ground * (1 - ink) + draw.uniform(160, 255, 3) * ink
    order = draw.permutation(len(images))
    images, labels = images[order].transpose(0, 3, 1, 2).copy(), labels[order].astype(np.int64)
    return {"train_images": images[:1497], "train_labels": labels[:1497],
            "test_images": images[1497:], "test_labels": labels[1497:]}  # fmt: skip


class Classifier(T.Module):
    """A ResNet and how it is trained."""

    def __init__(self, depth: int, stem: str, lr: float, weight_decay: float = 5e-4) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.network = ResNet(BasicBlock, BLOCKS[depth], num_classes=10)
        if stem == "full":
            # As usual for 32 x 32: the first layers keep all pixels. It takes eight times as long.
            self.network.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
            self.network.maxpool = nn.Identity()
        scores = MetricCollection({"acc": MulticlassAccuracy(10, average="micro"), "f1": MulticlassF1Score(10)})
        self.val_scores, self.test_scores = scores.clone(prefix="val_"), scores.clone(prefix="test_")

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self(images), labels, label_smoothing=0.1)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        logits = self(images)
        self.val_scores.update(logits, labels)
        self.log("val_loss", F.cross_entropy(logits, labels))
        # A metric object is computed at the end of the epoch, over all batches of all ranks.
        self.log_dict(self.val_scores, prog_bar=True)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.test_scores.update(self(images), labels)
        self.log_dict(self.test_scores)

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.SGD(
            self.parameters(), lr=self.hparams.lr, momentum=0.9, nesterov=True, weight_decay=self.hparams.weight_decay
        )
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=self.hparams.lr, total_steps=self.trainer.estimated_stepping_batches
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder that holds cifar-10-batches-py")
    parser.add_argument("--prepared", type=Path, default=Path("data"), help="folder for the images that are made")
    parser.add_argument("--depth", type=int, choices=BLOCKS, default=10, help="layers of the ResNet")
    parser.add_argument("--stem", choices=["pooled", "full"], default="pooled")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=32, help="per process")
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--workers", type=int, default=0, help="processes that load data, per rank")
    parser.add_argument("--strategy", default="auto")
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    if args.data is not None:
        missing = [n for names in BATCHES for n in names if not (args.data / "cifar-10-batches-py" / n).exists()]
        if missing:
            parser.error(
                f"--data {args.data}: there is no {', '.join(missing)} in its folder cifar-10-batches-py. Unpack "
                "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz there, or leave --data out."
            )

    T.seed_everything(args.seed, verbose=False)
    best = ModelCheckpoint(filename="{epoch}-{val_acc:.3f}", monitor="val_acc", mode="max")
    trainer = T.Trainer(
        max_epochs=args.epochs,
        strategy=args.strategy,
        precision=args.precision,
        log_every_n_steps=10,
        callbacks=[best, LearningRateMonitor()],
    )
    data = ImageData(args.data, args.prepared, args.batch_size, args.workers)
    model = Classifier(args.depth, args.stem, args.lr)
    trainer.fit(model, datamodule=data)
    results = trainer.test(model, datamodule=data, ckpt_path="best", verbose=False)
    if trainer.is_global_zero:
        print(f"test accuracy {results[0]['test_acc']:.2%}, F1 {results[0]['test_f1']:.3f}", flush=True)


if __name__ == "__main__":
    main()
