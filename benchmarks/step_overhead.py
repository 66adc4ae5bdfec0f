"""Microseconds per training step above the hand-written loop: ours beside Lightning's, in one process.

    python benchmarks/step_overhead.py [--windows 400] [--steps 20] [--json FILE]

nothing  training_step returns the loss.
log      one `self.log` per step.
all      a CSV logger, a progress bar, ModelCheckpoint and EarlyStopping on, one logged value on the bar.

A small MLP on the CPU, one thread. Windows are short, so that some fall between two time slices of a busy machine.
Before each window of a Trainer the same module and optimizer take the same number of steps in a hand-written loop, so
that both see the same memory and the same moment of the machine. Quoted are minima over the windows; `hand` is the
spread of the hand-written loop against itself: the difference between the minima of its even and its odd windows.

Also: collectives per step of 2 gloo ranks, ours and hand-written DDP's, counted; and the time of `import trainer` above
that of `import torch`, minima of fresh interpreters in turn.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import subprocess
import sys
import tempfile
import time
import warnings

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from facts import facts, tell
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

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


# ------------------------------------------------------------------------------------------ collectives per step


class Counted:
    """A loader that counts the collectives of its steps 5 to 25."""

    def __init__(self) -> None:
        self.batch = torch.randn(32, 32), torch.randn(32, 1)
        self.per_step = 0.0

    def __len__(self) -> int:
        return 30

    def __iter__(self):
        for number in range(30):
            if number == 5:
                found = profile(activities=[ProfilerActivity.CPU])
                found.start()
            if number == 25:
                found.stop()
                self.per_step = sum(e.name.startswith(("c10d::", "gloo:")) for e in found.events()) / 20
            yield self.batch


def count_collectives() -> None:
    """On each of several ranks: print how many collectives a step has, by hand and ours."""
    torch.distributed.init_process_group("gloo")
    net = torch.nn.Linear(32, 1)
    ddp, optimizer, by_hand = DistributedDataParallel(net), torch.optim.SGD(net.parameters(), lr=0.01), Counted()
    for x, y in by_hand:
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(ddp(x), y).backward()
        optimizer.step()

    class Model(trainer.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Linear(32, 1)

        def training_step(self, batch, batch_idx):  # noqa: ARG002 - the usual signature
            loss = torch.nn.functional.mse_loss(self.net(batch[0]), batch[1])
            self.log("loss", loss, on_epoch=True, sync_dist=True)
            return loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    ours = Counted()
    trainer.Trainer(
        accelerator="cpu", strategy="ddp", max_epochs=1, logger=False, enable_progress_bar=False,
        enable_checkpointing=False, enable_model_summary=False,
    ).fit(Model(), ours)  # fmt: skip
    if torch.distributed.get_rank() == 0:
        print(f"COLLECTIVES {by_hand.per_step} {ours.per_step}")
    torch.distributed.destroy_process_group()


def collectives() -> dict[str, float]:
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__, "--count-collectives"]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=True)
    [line] = (line for line in done.stdout.splitlines() if line.startswith("COLLECTIVES"))
    by_hand, ours = map(float, line.split()[1:])
    return {"by hand": by_hand, "ours": ours}


# ------------------------------------------------------------------------------------------------------ imports


def imports(rounds: int) -> dict[str, float]:
    """Seconds from the start of a fresh interpreter to its end."""
    found: dict[str, list[float]] = {
        "import torch": [],
        "import trainer": [],
        "from trainer import Trainer, Module": [],
    }
    for _ in range(rounds):
        for line, seconds in found.items():
            began = time.perf_counter()
            subprocess.run([sys.executable, "-c", f"import torch; {line}"], check=True)
            seconds.append(time.perf_counter() - began)
    return {line: round(min(seconds), 3) for line, seconds in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=400)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--json")
    parser.add_argument("--count-collectives", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    if options.count_collectives:
        count_collectives()
        return
    packages = {"ours": trainer}
    try:
        import lightning

        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        packages["lightning"] = lightning
    except ImportError:
        print("Lightning is not installed: measuring ours alone.")
    report = facts() | {"windows": options.windows, "steps per window": options.steps, "us per step": []}
    print(f"us per step, minima of {options.windows} windows of {options.steps} steps")
    print(f"{'':10} {'case':8} {'hand':>8} {'above it':>9} {'spread of hand':>15}")
    for case in CASES:
        for name, package in packages.items():
            with tempfile.TemporaryDirectory() as folder:
                row = measure(package, case, options.windows, options.steps, folder)
            report["us per step"].append({"package": name, "case": case} | {k: round(v, 1) for k, v in row.items()})
            print(
                f"{name:10} {case:8} {row['hand_us']:8.1f} {row['above_us']:+9.1f} {row['spread_us']:15.1f}", flush=True
            )
    report["collectives per step of 2 ranks"] = collectives()
    report["seconds of a process"] = imports(7)
    tell(report, options.json)


if __name__ == "__main__":
    main()
