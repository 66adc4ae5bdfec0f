"""Finetuning: a backbone from somebody else's file, frozen at first, then trained slowly; averaged weights (EMA).

    launch --procs 2 examples/finetune.py                    # two CPU ranks, 15 seconds
    launch --gpus 2 examples/finetune.py --epochs 30 --unfreeze-at 10
    python examples/finetune.py --pretrained none            # the same from scratch, to compare with

The task: is a handwritten digit even or odd, learnt from four labelled scans of each. The pretrained file comes from a
network that tells digits apart; it is made first if it is not there, on other scans, by a plain torch loop that knows
nothing of this package, with names of its own.

What it shows: `load_weights(path, only=..., rename=...)` takes the part of a foreign file that fits;
`BackboneFinetuning` freezes `self.backbone`, and lets it learn from a later epoch on, with parameters added to the
optimizer meanwhile; `EMAWeightAveraging` keeps an average that validation and checkpoints use. All of it survives a
restart at any time: `launch resume NAME`.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import trainer as T
from trainer.callbacks import BackboneFinetuning, EMAWeightAveraging, LearningRateMonitor, ModelCheckpoint

PRETRAINING = 900  # the first so many of scikit-learn's 1797 scans


def scans() -> tuple[Tensor, Tensor]:
    """scikit-learn's scans of handwritten digits (n x 1 x 8 x 8), and which digit each is."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return torch.from_numpy(digits.images / 16).float().unsqueeze(1), torch.from_numpy(digits.target).long()


def encoder(width: int = 32) -> nn.Sequential:
    """What both tasks share: from 1 x 8 x 8 to 4 x width features."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(2 * width, 4 * width, 3, padding=1), nn.BatchNorm2d(4 * width), nn.ReLU(),
        nn.AdaptiveMaxPool2d(1), nn.Flatten(),
    )  # fmt: skip


def pretrain(file: Path) -> None:
    """Somebody else's training: plain torch, another task, other names. Leaves {"model": {"encoder.0.weight": ...}}."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"encoder": encoder(), "classifier": nn.Linear(128, 10)})
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    images, labels = (part[:PRETRAINING] for part in scans())
    for _ in range(6):
        for part in torch.randperm(len(labels)).split(32):
            loss = F.cross_entropy(model["classifier"](model["encoder"](images[part])), labels[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    file.parent.mkdir(parents=True, exist_ok=True)
    # Whole or not there at all, even if this process is killed; several machines may share the folder.
    with tempfile.TemporaryDirectory(dir=file.parent) as own:
        unfinished = Path(own) / file.name
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, unfinished)
        unfinished.rename(file)


class EvenOrOdd(T.DataModule):
    """Few labelled scans of each digit to learn from; the others tell how good the model is."""

    def __init__(self, pretrained: Path | None, shots: int, batch_size: int) -> None:
        super().__init__()
        self.pretrained, self.shots, self.batch_size = pretrained, shots, batch_size

    def prepare_data(self) -> None:
        """Runs in one process per machine while the others wait."""
        if self.pretrained is not None and not self.pretrained.exists():
            pretrain(self.pretrained)

    def setup(self, stage: str) -> None:
        """Runs on every rank."""
        images, digits = (part[PRETRAINING:] for part in scans())
        few = torch.cat([torch.nonzero(digits == digit)[: self.shots, 0] for digit in range(10)])
        rest = torch.ones(len(digits), dtype=torch.bool)
        rest[few] = False
        few = few.repeat(8)  # seen often in an epoch, so that an epoch is worth its validation
        self.train = TensorDataset(images[few], digits[few] % 2)
        self.val = TensorDataset(images[rest], digits[rest] % 2)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, 200)


class Finetuned(T.Module):
    """A pretrained backbone under a new head."""

    def __init__(self, pretrained: str | None, lr: float) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.backbone = encoder()  # BackboneFinetuning wants this name
        self.head = nn.Linear(128, 2)

    def setup(self, stage: str) -> None:
        """Before the model is wrapped, and before a checkpoint is loaded, which wins."""
        if stage == "fit" and self.hparams.pretrained is not None:
            names = self.load_weights(
                self.hparams.pretrained, only="model.encoder.*", rename={r"^model\.encoder\.": "backbone."}
            )
            self.print(f"{len(names)} of {len(self.state_dict())} tensors come from {self.hparams.pretrained}")

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        noisy = images + 0.1 * torch.randn_like(images)
        loss = F.cross_entropy(self(noisy), labels, label_smoothing=0.1)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.log("val_acc", (self(images).argmax(1) == labels).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # What is frozen now is added later, by the callback.
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.hparams.lr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained", default="data/pretrained.pt", help="a torch file, or none")
    parser.add_argument("--shots", type=int, default=4, help="labelled scans of each digit")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--unfreeze-at", type=int, default=4, help="the backbone learns from this epoch on")
    parser.add_argument("--batch-size", type=int, default=16, help="per process")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    pretrained = None if args.pretrained == "none" else args.pretrained

    T.seed_everything(args.seed, verbose=False)
    callbacks = [
        EMAWeightAveraging(decay=0.9),
        ModelCheckpoint(filename="{epoch}-{val_acc:.3f}", monitor="val_acc", mode="max"),
        LearningRateMonitor(),
    ]
    if pretrained is not None:
        # Batch norm keeps the statistics of its own data until the backbone is let go.
        callbacks.append(BackboneFinetuning(args.unfreeze_at, lambda _: 1.2, backbone_initial_ratio_lr=0.02,
                                            train_bn=False, verbose=True))  # fmt: skip
    trainer = T.Trainer(max_epochs=args.epochs, log_every_n_steps=5, callbacks=callbacks)
    trainer.fit(Finetuned(pretrained, args.lr), datamodule=EvenOrOdd(
        None if pretrained is None else Path(pretrained), args.shots, args.batch_size
    ))  # fmt: skip
    if trainer.is_global_zero:
        print(f"validation accuracy {float(trainer.callback_metrics['val_acc']):.2%}", flush=True)


if __name__ == "__main__":
    main()
