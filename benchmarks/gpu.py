"""A GPU at work under the Trainer: beside a loop written by hand and Lightning Fabric, in one process.

    python benchmarks/gpu.py [--size 350M] [--context 1024] [--batch-size 16] [--steps 30] [--state-gib 8] [--json FILE]

speed    tokens per second and MFU of examples/gpt.py's model in bf16, compiled: by hand, ours, Fabric. They take turns,
         each `--rounds` times, and the best of each counts.
amp      the same without torch.compile, ours alone, in 32-true, bf16-mixed and 16-mixed.
syncs    calls in ten steps, clipped and logged, in which the host waits for the GPU, by the profiler: by hand and ours.
stall    seconds for which training stands still when a state of so many GiB is saved beside it, and the time that its
         copy to pinned memory takes by itself, chunk by chunk into buffers that are there.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import sys
import tempfile
import time
from pathlib import Path

import torch
from facts import facts, tell
from torch import nn
from torch.profiler import ProfilerActivity, profile

import trainer as T
from trainer.materialize import materialize
from trainer.throughput import device_name, peak_of

_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "aten::_local_scalar_dense")


def _gpt():
    """examples/gpt.py as a module: it is a script, and no package."""
    path = Path(__file__).parent.parent / "examples" / "gpt.py"
    spec = importlib.util.spec_from_file_location("gpt_example", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


def model_of(size: str, context: int, batch_size: int, device: torch.device):
    """A GPT of examples/gpt.py with an optimizer that needs no Trainer, and weights on the device."""
    example = _gpt()

    class Model(example.GPT):
        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-4, fused=True)

    torch.manual_seed(1)
    model = Model(size, context, batch_size, 1e-4, 1)
    model.configure_model()
    materialize(model, device, seed=1)
    return model


class Batches:
    """The same batch on the device again and again; times all but the first `warm` steps. `during` surrounds those."""

    def __init__(self, context: int, batch_size: int, steps: int, device: torch.device, during=None, warm: int = 8):
        tokens = torch.randint(0, 256, (batch_size, context + 1), device=device)
        self.batch = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        self.tokens, self.steps, self.warm, self.device = batch_size * context, steps, warm, device
        self.during = during or contextlib.nullcontext()
        self.seconds = 0.0

    def __len__(self) -> int:
        return self.warm + self.steps + 1  # the last one only ends the time of the one before

    def __iter__(self):
        for number in range(len(self)):
            if number == self.warm:
                self._wait()
                self.during.__enter__()
                began = time.perf_counter()
            if number == self.warm + self.steps:
                self._wait()
                self.seconds = time.perf_counter() - began
                self.during.__exit__(None, None, None)
            yield self.batch

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def by_hand(model, data: Batches, *, compiled: bool) -> None:
    loss_of = torch.compile(model.loss, dynamic=False) if compiled else model.loss
    optimizer = model.configure_optimizers()
    for batch in data:
        with torch.autocast(data.device.type, torch.bfloat16):
            loss = loss_of(batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def ours(model, data: Batches, *, compiled: bool, precision: str = "bf16-mixed") -> T.Trainer:
    trainer = T.Trainer(
        accelerator="gpu" if data.device.type == "cuda" else "cpu", precision=precision, compile=compiled, max_epochs=1,
        gradient_clip_val=1.0, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, data)
    return trainer


def fabric(model, data: Batches, *, compiled: bool) -> None:
    import lightning

    made = lightning.Fabric(accelerator="gpu" if data.device.type == "cuda" else "cpu", devices=1,
                            precision="bf16-mixed")  # fmt: skip
    optimizer = model.configure_optimizers()

    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, batch):
            return self.inner.loss(batch)

    wrapped, optimizer = made.setup(torch.compile(Loss(), dynamic=False) if compiled else Loss(), optimizer)
    for batch in data:
        loss = wrapped(batch)
        optimizer.zero_grad()
        made.backward(loss)
        made.clip_gradients(wrapped, optimizer, max_norm=1.0)
        optimizer.step()


def speed(options, device: torch.device, ways: dict, rounds: int) -> dict:
    """Tokens per second and MFU of each way of training, by name; the best of the rounds."""
    best: dict[str, float] = dict.fromkeys(ways, 0.0)
    flops = 0.0
    for _ in range(rounds):
        for name, way in ways.items():
            torch._dynamo.reset()
            model = model_of(options.size, options.context, options.batch_size, device)
            data = Batches(options.context, options.batch_size, options.steps, device)
            way(model, data)
            best[name] = max(best[name], data.tokens * data.steps / data.seconds)
            flops = model.flops_per_batch / data.tokens
            del model
    peak = peak_of(device_name(device), "bf16")
    return {
        name: {"tokens/s": round(rate), "MFU": None if peak is None else round(rate * flops / peak, 4)}
        for name, rate in best.items()
    }


def syncs(options, device: torch.device) -> dict[str, dict[str, int]]:
    """How often the host waited for the GPU in ten steps, by the name of the call."""
    found = {}
    for name, way in (("by hand", by_hand), ("ours", ours)):
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
        seen = profile(activities=activities)
        data = Batches(options.context, options.batch_size, 10, device, seen)
        way(model_of(options.size, options.context, options.batch_size, device), data, compiled=False)
        names = [event.name for event in seen.events()]
        # Batches waits itself, once, at the end of what is profiled; the profiler does so too where it stops.
        found[name] = {wait: names.count(wait) for wait in _WAITS if wait in names}
    return found


def stall(gib: float, device: torch.device, folder: str) -> dict[str, float]:
    """Seconds of one save beside the training of a state of so many GiB, and of its copy alone; second of two each."""
    count = max(1, int(gib * 4))
    size = int(gib * 2**30 / count / 4)

    class Big(T.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ParameterList(nn.Parameter(torch.zeros(size, device=device)) for _ in range(count))
            self.stalls = []

        def training_step(self, batch, batch_idx):  # noqa: ARG002 - the usual signature
            return sum(part[:1].sum() for part in self.parts) + 0.0 * batch.sum()

        def on_train_batch_end(self, outputs, batch, batch_idx):  # noqa: ARG002
            if device.type == "cuda":
                torch.cuda.synchronize()
            began = time.perf_counter()
            self.trainer.save_checkpoint(f"{folder}/{batch_idx}.ckpt", wait=False)
            self.stalls.append(time.perf_counter() - began)
            self.trainer.saves.settle()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    model = Big()
    loader = torch.utils.data.DataLoader(torch.zeros(2, 1), batch_size=1)
    T.Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu", max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    ).fit(model, loader)  # fmt: skip
    buffer = torch.empty(size, pin_memory=device.type == "cuda")
    source = torch.zeros(size, device=device)
    copies = []
    for _ in range(2):
        began = time.perf_counter()
        for _ in range(count):
            buffer.copy_(source, non_blocking=True)
        if device.type == "cuda":
            torch.cuda.synchronize()
        copies.append(time.perf_counter() - began)
    return {"GiB": gib, "stall s": round(model.stalls[-1], 4), "copy s": round(copies[-1], 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="350M")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--state-gib", type=float, default=8.0)
    parser.add_argument("--json")
    parser.add_argument("--cpu", action="store_true", help="try the benchmark itself; the figures say nothing")
    options = parser.parse_args()
    device = torch.device("cpu" if options.cpu else "cuda")
    if not options.cpu:
        torch.set_float32_matmul_precision("high")
    compiled = {"by hand": lambda m, d: by_hand(m, d, compiled=True), "ours": lambda m, d: ours(m, d, compiled=True)}
    if importlib.util.find_spec("lightning") is not None:
        compiled["Fabric"] = lambda m, d: fabric(m, d, compiled=True)
    formats = {
        name: lambda m, d, name=name: ours(m, d, compiled=False, precision=name)
        for name in ("32-true", "bf16-mixed", "16-mixed")
    }
    report = facts() | {"device": device_name(device)} | {k: v for k, v in vars(options).items() if k != "json"}
    report["speed"] = speed(options, device, compiled, options.rounds)
    report["amp"] = speed(options, device, formats, 1)
    report["syncs in 10 steps"] = syncs(options, device)
    with tempfile.TemporaryDirectory() as folder:
        report["stall"] = stall(options.state_gib, device, folder)
    tell(report, options.json)


if __name__ == "__main__":
    main()
