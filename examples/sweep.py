"""A sweep: the same program once per value of its arguments, and a table of how they ended, the best first.

    launch --backend local --procs 1 --run grid --sweep lr=0.3,0.03 --sweep width=8,32 --array %2 examples/sweep.py
    python examples/sweep.py --table runs/grid             # at any time: what is there so far

    launch --gpus 1 --run grid --sweep-file runs.jsonl -d examples/sweep.py      # on Slurm: an array, nobody waits
    launch ls grid                                                               # which of them run, ended, failed
    launch retry grid --failed                                                   # those again, from where they were

Each element is a run of its own with its own folder (runs/grid/0, runs/grid/1, ...), which holds its logs and
checkpoints, and is started again and resumed like any other. `%2` lets two run at once. What this program adds is one
small file per element, `result.json`, that the table is made of.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import trainer as T
from trainer.callbacks import EarlyStopping, ModelCheckpoint


class Perceptron(T.Module):
    """One hidden layer for scikit-learn's scans of handwritten digits."""

    def __init__(self, lr: float, width: int, dropout: float) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.network = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, 10))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self.network(images), labels)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        logits = self.network(images)
        self.log("val_loss", F.cross_entropy(logits, labels))
        self.log("val_acc", (logits.argmax(1) == labels).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.hparams.lr)


def train(args: argparse.Namespace) -> None:
    """One element of the sweep."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.from_numpy(images / 16).float(), torch.from_numpy(labels).long())
    training, validation = torch.utils.data.random_split(data, [1497, 300], torch.Generator().manual_seed(0))

    T.seed_everything(args.seed, verbose=False)
    best = ModelCheckpoint(filename="{epoch}-{val_loss:.3f}", monitor="val_loss")
    trainer = T.Trainer(
        max_epochs=args.epochs, log_every_n_steps=10, callbacks=[best, EarlyStopping("val_loss", patience=3)]
    )
    model = Perceptron(args.lr, args.width, args.dropout)
    trainer.fit(model, DataLoader(training, 32, shuffle=True), DataLoader(validation, 300))
    if trainer.is_global_zero:
        swept = {"lr": args.lr, "width": args.width, "dropout": args.dropout, "seed": args.seed}
        result = swept | {"val_loss": float(best.best_model_score), "epochs": trainer.current_epoch}
        # The run folder of this element under `launch`, else where we are.
        file = Path(trainer.default_root_dir) / "result.json"
        unfinished = file.with_suffix(".tmp")
        unfinished.write_text(json.dumps(result | {"checkpoint": best.best_model_path}))
        unfinished.replace(file)


def table(sweep: Path) -> str:
    """The results in a sweep's folder, one line each, the best first; the best one's checkpoint below."""
    elements = json.loads((sweep / "array.json").read_text())["elements"]
    found = {}
    for index, element in elements.items():
        file = sweep / element["folder"] / "result.json"
        if file.exists():
            found[index] = json.loads(file.read_text())
    if not found:
        return f"None of the {len(elements)} elements of {sweep} has ended yet."
    ranking = sorted(found.items(), key=lambda item: item[1]["val_loss"])
    names = [name for name in ranking[0][1] if name != "checkpoint"]
    rows = [["run", *names], *([index, *(f"{result[name]:.4g}" for name in names)] for index, result in ranking)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    if len(found) < len(elements):
        lines.append(f"{len(elements) - len(found)} of {len(elements)} have not ended yet")
    return "\n".join([*lines, f"best: run {ranking[0][0]}, {ranking[0][1]['checkpoint']}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, metavar="FOLDER", help="show the results of a sweep, and train nothing")
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    if args.table is None:
        train(args)
    elif (args.table / "array.json").exists():
        print(table(args.table))
    else:
        sys.exit(f"{args.table} is no sweep's folder: there is no array.json in it. `launch ls` shows your sweeps.")


if __name__ == "__main__":
    main()
