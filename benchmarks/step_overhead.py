"""Microseconds per training step above the hand-written loop: ours beside Lightning's, in one process.

    python benchmarks/step_overhead.py [--windows 400] [--steps 25] [--json FILE]

nothing  training_step returns the loss.
log      one `self.log` per step.
all      a CSV logger, a progress bar, ModelCheckpoint and EarlyStopping on, one logged value on the bar.

A small MLP on the CPU, one thread. Windows are short, so that some fall between two time slices of a busy machine.
Each Trainer is measured in windows of steps; before each window the same module
and optimizer take the same number of steps in a hand-written loop, so that both see the same memory and the same
moment of the machine. Quoted are minima over the windows; `hand` is the spread of the hand-written loop against itself:
the difference between the minima of its even and its odd windows.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

import trainer

CASES = ("nothing", "log", "all")


class Windows:
    """A loader that times its own windows, and the hand-written loop before each of them."""

    def __init__(self, windows: int, steps: int) -> None:
        self.windows, self.steps = windows, steps
        self.batch = torch.randn(32, 32), torch.randn(32, 1)
        self.by_hand, self.ours = [], []
        self.module = None

    def __len__(self) -> int:
        return (self.windows + 1) * self.steps

    def hand(self) -> None:
        net, optimizer = self.module.net, self.module.made
        began = time.perf_counter()
        for _ in range(self.steps):
            x, y = self.batch
            loss = torch.nn.functional.mse_loss(net(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        self.by_hand.append((time.perf_counter() - began) / self.steps)

    def __iter__(self):
        for window in range(self.windows + 1):  # the first one warms up
            self.hand()
            began = time.perf_counter()
            for _ in range(self.steps):
                yield self.batch
            self.ours.append((time.perf_counter() - began) / self.steps)
            if window == 0:
                self.by_hand.clear()
                self.ours.clear()


def measure(package, case: str, windows: int, steps: int, folder: str) -> dict[str, float]:
    logs = case != "nothing"

    class Model(package.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1))

        def training_step(self, batch, batch_idx):  # noqa: ARG002 - the usual signature
            x, y = batch
            loss = torch.nn.functional.mse_loss(self.net(x), y)
            if logs:
                self.log("loss", loss, prog_bar=case == "all")
            return loss

        def configure_optimizers(self):
            self.made = torch.optim.SGD(self.parameters(), lr=0.01)
            return self.made

    arguments = {
        "accelerator": "cpu", "devices": 1, "max_epochs": 1, "default_root_dir": folder, "enable_model_summary": False,
        "logger": False, "enable_progress_bar": False, "enable_checkpointing": False,
    }  # fmt: skip
    if case == "all":
        home = "trainer" if package is trainer else "lightning.pytorch"
        callbacks = importlib.import_module(f"{home}.callbacks")
        loggers = importlib.import_module(f"{home}.loggers")
        arguments |= {
            "logger": loggers.CSVLogger(folder), "enable_progress_bar": True, "enable_checkpointing": True,
            "callbacks": [callbacks.EarlyStopping("loss", patience=10)],
        }  # fmt: skip
    data = Windows(windows, steps)
    data.module = model = Model()
    with open(os.devnull, "w") as null:
        out, error, sys.stdout, sys.stderr = sys.stdout, sys.stderr, null, null
        try:
            package.Trainer(**arguments).fit(model, data)
        finally:
            sys.stdout, sys.stderr = out, error
    hand = min(data.by_hand)
    return {
        "hand_us": hand * 1e6,
        "above_us": (min(data.ours) - hand) * 1e6,
        "spread_us": abs(min(data.by_hand[::2]) - min(data.by_hand[1::2])) * 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=400)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    packages = {"ours": trainer}
    try:
        import lightning

        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        packages["lightning"] = lightning
    except ImportError:
        print("Lightning is not installed: measuring ours alone.")
    rows = []
    print(f"us per step, minima of {options.windows} windows of {options.steps} steps")
    print(f"{'':10} {'case':8} {'hand':>8} {'above it':>9} {'spread of hand':>15}")
    for case in CASES:
        for name, package in packages.items():
            with tempfile.TemporaryDirectory() as folder:
                row = measure(package, case, options.windows, options.steps, folder)
            rows.append({"package": name, "case": case, **row})
            print(
                f"{name:10} {case:8} {row['hand_us']:8.1f} {row['above_us']:+9.1f} {row['spread_us']:15.1f}", flush=True
            )
    if options.json is not None:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip()
        facts = {"commit": commit, "machine": platform.processor() or platform.machine(), "cpus": os.cpu_count(),
                 "python": platform.python_version(), "torch": torch.__version__, "rows": rows}  # fmt: skip
        options.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
