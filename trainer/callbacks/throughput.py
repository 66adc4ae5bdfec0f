"""`ThroughputMonitor`: samples, tokens and operations per second, and the share of the device's peak that they are."""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING, Any

import torch

from trainer.callbacks.callback import Callback
from trainer.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from trainer.module import Module
    from trainer.trainer import Trainer

# Peak of dense matrix products in FLOP/s, from NVIDIA's data sheets: bf16 and fp16 tensor cores, and fp32 (TF32 off).
PEAK_FLOPS: dict[str, tuple[float, float]] = {
    "H200": (989e12, 67e12), "H100 PCIe": (756e12, 51e12), "H100": (989e12, 67e12), "A100": (312e12, 19.5e12),
    "L40": (181e12, 90.5e12), "L4": (121e12, 30.3e12), "A10": (125e12, 31.2e12), "V100": (125e12, 15.7e12),
    "T4": (65e12, 8.1e12),
}  # fmt: skip


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """The device's peak for matrix products of this type, or None if it is not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    for known, (half, single) in PEAK_FLOPS.items():
        if known in name:
            return half if dtype in (torch.float16, torch.bfloat16) else single
    return None


class ThroughputMonitor(Callback):
    """Logs rates over a sliding window of training batches, with the steps that loggers get.

    Names: `train/time`, `train/batches`, `train/samples`, and per device (`train/device/...`) and for all ranks
    `batches_per_sec`, `samples_per_sec`; with `length_fn` also `items_per_sec` (tokens); with `module.flops_per_batch`
    also `flops_per_sec` and, on a known GPU, `mfu` (model FLOP utilisation: the share of the device's peak). Ranks
    are taken to do equal work, so nothing is exchanged.

    Args:
        batch_size_fn: number of samples in a batch.
        length_fn: number of items (tokens) in a batch.
        window_size: number of batches that a rate is taken over.

    Raises:
        ConfigError: the window is too small, or (during `fit`) the trainer has no logger.
    """

    def __init__(
        self,
        batch_size_fn: Callable[[Any], int],
        length_fn: Callable[[Any], int] | None = None,
        window_size: int = 100,
    ) -> None:
        if window_size < 2:
            raise ConfigError(f"ThroughputMonitor(window_size={window_size}). Allowed: 2 or more.")
        self.batch_size_fn = batch_size_fn
        self.length_fn = length_fn
        # After each batch: seconds, batches, samples, items so far.
        self._window: deque[tuple[float, int, int, int]] = deque(maxlen=window_size + 1)
        self._totals = (0.0, 0, 0, 0)
        self._mark: float | None = None
        self._logged_step = -1

    def on_train_start(self, trainer: Trainer, pl_module: Module) -> None:
        if not trainer.loggers:
            raise ConfigError("ThroughputMonitor needs a logger: Trainer(logger=...) is switched off.")
        self._window.clear()
        self._window.append(self._totals)
        self._mark = time.perf_counter()

    def on_validation_start(self, trainer: Trainer, pl_module: Module) -> None:
        if not trainer.sanity_checking and self._mark is not None:
            self._mark -= time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: Module) -> None:
        # The time in between counts as if it had not passed.
        if not trainer.sanity_checking and self._mark is not None:
            self._mark += time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Module, outputs: Any, batch: Any, batch_idx: int) -> None:
        step, every = trainer.train_state.logger_step, trainer.log_every_n_steps
        due = bool(every) and (step + 1) % every == 0 and step != self._logged_step
        if due and trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize()  # else the time is that of launching kernels
        now = time.perf_counter()
        seconds, batches, samples, items = self._totals
        assert self._mark is not None
        self._totals = (
            seconds + now - self._mark,
            batches + 1,
            samples + self.batch_size_fn(batch),
            items + (self.length_fn(batch) if self.length_fn is not None else 0),
        )
        self._mark = now
        self._window.append(self._totals)
        if due:
            self._logged_step = step
            values = self.compute(trainer, pl_module)
            trainer.reports.log({f"train/{name}": value for name, value in values.items()}, step, epoch=False)

    def compute(self, trainer: Trainer, pl_module: Module) -> dict[str, float]:
        """The totals so far and the rates over the window."""
        first, last = self._window[0], self._window[-1]
        seconds, batches, samples, items = (b - a for a, b in zip(first, last, strict=True))
        rates = {"batches_per_sec": batches / seconds, "samples_per_sec": samples / seconds}
        if self.length_fn is not None:
            rates["items_per_sec"] = items / seconds
        flops = getattr(pl_module, "flops_per_batch", None)
        if flops:
            rates["flops_per_sec"] = batches * float(flops) / seconds
        values: dict[str, float] = {"time": last[0], "batches": last[1], "samples": last[2]}
        if self.length_fn is not None:
            values["items"] = last[3]
        values |= {f"device/{name}": rate for name, rate in rates.items()}
        values |= {name: rate * trainer.world_size for name, rate in rates.items()}
        device = trainer.strategy.root_device
        dtype = torch.bfloat16 if "16" in str(trainer.precision) else torch.float32
        if flops and (peak := peak_flops(device, dtype)) is not None:
            values["device/mfu"] = rates["flops_per_sec"] / peak
        return values

    def state_dict(self) -> dict[str, Any]:
        return {"totals": list(self._totals)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        seconds, batches, samples, items = state_dict["totals"]
        self._totals = (float(seconds), int(batches), int(samples), int(items))
