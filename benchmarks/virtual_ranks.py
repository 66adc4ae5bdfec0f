"""What `virtual_ranks` costs: a training step with it and without, on the same ranks and the same samples per step.

    launch --procs 2 benchmarks/virtual_ranks.py [--virtual 4] [--json FILE]

Without: DDP where there are several ranks. The runs take turns; a figure is the least of their medians.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

import torch
from facts import facts, tell
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import trainer as T

SHARE, ROUNDS, STEPS = 32, 5, 40


class Net(T.Module):
    """An MLP of `width`; some millions of weights where it is wide, next to none where it is narrow."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 8)
        )

    def training_step(self, batch, index):  # noqa: ARG002 - as the Trainer calls it
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Clock(T.Callback):
    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_end(self, *_: object) -> None:
        self.times.append(time.perf_counter())


def milliseconds(width: int, count: int, ranks: int, virtual: int | None) -> float:
    """A step's median over one run."""
    torch.manual_seed(1)
    size = SHARE * count * STEPS
    data = TensorDataset(torch.randn(size, 64), torch.randint(0, 8, (size,)))
    clock = Clock()
    batch = SHARE if virtual else SHARE * count // ranks
    trainer = T.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, virtual_ranks=virtual, callbacks=[clock],
    )  # fmt: skip
    trainer.fit(Net(width), DataLoader(data, batch, shuffle=True))
    return 1000 * statistics.median(b - a for a, b in zip(clock.times[5:], clock.times[6:], strict=False))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--virtual", type=int, default=4)
    parser.add_argument("--json")
    given = parser.parse_args()
    ranks = T.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False).world_size
    if given.virtual % ranks:
        parser.error(f"--virtual {given.virtual} must divide by the {ranks} ranks, for steps of the same samples")
    report = facts() | {"ranks": ranks, "virtual ranks": given.virtual, "samples per step": SHARE * given.virtual}
    for width in (64, 1024):
        with_them, without = [], []
        for _ in range(ROUNDS):
            without.append(milliseconds(width, given.virtual, ranks, None))
            with_them.append(milliseconds(width, given.virtual, ranks, given.virtual))
        report[f"width {width}"] = {
            "ms per step": round(min(without), 2), "ms with virtual ranks": round(min(with_them), 2),
            "ratio": round(min(with_them) / min(without), 2),
        }  # fmt: skip
    if os.environ.get("RANK", "0") == "0":
        tell(report, given.json)


if __name__ == "__main__":
    main()
