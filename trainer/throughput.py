"""How fast a fit is: samples or tokens per second, waiting for data, memory, and how much of the device that uses.

Nothing here is called in a step: a Meter is looked at after a batch at which something else is due anyway.
"""

from __future__ import annotations

import re
import resource
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from trainer.errors import LoggingError
from trainer.hooks import overridden
from trainer.metrics import batch_size_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from trainer.module import Module

__all__ = ["Meter", "Peak", "communication_share", "compute_dtype", "peak_memory", "peak_of"]


@dataclass(frozen=True)
class Peak:
    """Dense matrix products of one device, in TFLOP/s, by format (None: not in hardware), and where that is written."""

    pattern: str  # a regular expression on the name that the driver gives
    fp16: float
    bf16: float | None
    tf32: float | None
    fp32: float
    source: str


_NVIDIA = "https://www.nvidia.com/en-us/data-center/"
# The first that fits. Data sheets of newer devices give twice as much: that is with sparsity.
PEAKS = (
    Peak(r"\bB200\b", 2250, 2250, 1125, 75, "https://resources.nvidia.com/en-us-blackwell-architecture/datasheet"),
    Peak(r"\bH200 NVL\b", 835.5, 835.5, 417.5, 60, _NVIDIA + "h200/"),
    Peak(r"\bG?H200\b", 989.5, 989.5, 494.7, 67, _NVIDIA + "h200/"),
    Peak(r"\bH100 PCIe\b", 756, 756, 378, 51, _NVIDIA + "h100/"),
    Peak(r"\bH100 NVL\b", 835.5, 835.5, 417.5, 60, _NVIDIA + "h100/"),
    Peak(r"\bH100\b", 989.5, 989.5, 494.7, 67, _NVIDIA + "h100/"),
    Peak(r"\bA100\b", 312, 312, 156, 19.5, _NVIDIA + "a100/"),
    Peak(r"\bL40S\b", 362, 362, 183, 91.6, _NVIDIA + "l40s/"),
    Peak(r"\bL40\b", 181, 181, 90.5, 90.5, _NVIDIA + "l40/"),
    Peak(r"\bL4\b", 121, 121, 60, 30.3, _NVIDIA + "l4/"),
    Peak(r"\bA10\b", 125, 125, 62.5, 31.2, _NVIDIA + "products/a10-gpu/"),
    Peak(r"\bV100-PCIE\b", 112, None, None, 14, _NVIDIA + "v100/"),
    Peak(r"\bV100\b", 125, None, None, 15.7, _NVIDIA + "v100/"),
    Peak(r"\bT4\b", 65, None, None, 8.1, _NVIDIA + "tesla-t4/"),
    Peak(r"\bMI325X\b", 1307.4, 1307.4, 653.7, 163.4, "https://www.amd.com/en/products/accelerators/instinct/mi300/mi325x.html"),
    Peak(r"\bMI300X\b", 1307.4, 1307.4, 653.7, 163.4, "https://www.amd.com/en/products/accelerators/instinct/mi300/mi300x.html"),
    # Per die, which is what a process sees.
    Peak(r"\bMI250X\b", 191.5, 191.5, None, 47.9, "https://www.amd.com/en/products/accelerators/instinct/mi200/mi250x.html"),
)  # fmt: skip


def peak_of(name: str, dtype: str) -> float | None:
    """FLOP/s of the device of this name in a format ("fp16", "bf16", "tf32", "fp32"); None if that is not known."""
    for peak in PEAKS:
        if re.search(peak.pattern, name):
            found: float | None = getattr(peak, dtype, None)
            return None if found is None else found * 1e12
    return None


def compute_dtype(precision: str) -> str:
    """In which format matrices are multiplied under a Trainer's precision."""
    if "16" in precision:
        return "bf16" if "bf16" in precision else "fp16"
    if "64" in precision:
        return "fp64"
    return "fp32" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def device_name(device: torch.device) -> str:
    """As the driver calls it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()


def peak_memory(device: torch.device) -> int:
    """Bytes that tensors of this process took at most on the GPU; on the CPU, the process as a whole."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def communication_share(events: Iterable[Any], seconds: float) -> float:
    """The share of a profiled time in which at least one collective was under way on this rank.

    events: of torch.profiler. Computing may go on meanwhile; with gloo the wait for other ranks is part of it.
    """
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in events
        if event.name.startswith("gloo:") or (event.device_type.name != "CPU" and "nccl" in event.name.lower())
    )
    total, until = 0.0, float("-inf")
    for begin, end in spans:
        total += max(0.0, end - max(begin, until))
        until = max(until, end)
    return min(1.0, total / 1e6 / seconds)


class Meter:
    """What a fit has done since it began. Validations are left out, and the first batch counts by itself.

    tensor_parallel: how many ranks take the same batches. items: samples (or tokens, if the module has
    `tokens_in_batch`) per batch on all ranks; every rank is taken to have as many. Batches between two looks are taken
    to be as the newest one; only the last of an epoch, which may be shorter, stands for nothing but itself.
    flops: of one batch on this rank, forward and backward. communication: the share of a sampled step, None if that was
    not measured.
    """

    def __init__(
        self, module: Module, device: torch.device, world_size: int, precision: str, *, tensor_parallel: int = 1
    ) -> None:
        self.device, self.world_size, self.dtype = device, world_size, compute_dtype(precision)
        self.tensor_parallel = tensor_parallel
        self.items: float | None = None
        # Whether a batch was seen that others may be taken to be like.
        self.knows_batches = False
        self.unit = "tokens" if _counts_tokens(module) else "samples"
        self.batches, self.seconds, self.waited = 0, 0.0, 0.0
        self.first_s: float | None = None
        self.communication: float | None = None
        self.peak = peak_of(device_name(device), self.dtype)
        self.flops: float | None = None
        # How they are known: "given", "counted", or "6ND".
        self.flops_by = ""
        self._module = module
        self._usual: int | None = None  # items of a batch on this rank
        self._trained = 0  # items in `batches` on this rank
        self._mark: float | None = None
        self._last = 0
        self._feeds: Any = None
        self._waited_ns = 0

    def begin(self, batches: int, feed: Any) -> None:
        """Training begins after so many batches of earlier processes."""
        self._last, self._mark = batches, time.monotonic()
        self._feeds, self._waited_ns = feed, feed.waited_ns

    def look(self, batches: int, feed: Any, batch: Any, *, is_last: bool) -> None:
        """After a batch, the newest of `batches`. is_last: of its epoch."""
        if self._mark is None or batches == self._last:
            return
        if batches < self._last or batch is None:  # rolled back, or all left out: what was done is no use
            self.begin(batches, feed)
            return
        now = time.monotonic()
        waited_ns = feed.waited_ns
        waited = (waited_ns - (self._waited_ns if feed is self._feeds else 0)) / 1e9
        if self.first_s is None:
            self.first_s = now - self._mark
        else:
            self.seconds += now - self._mark
            self.batches += batches - self._last
            self.waited += waited
        self._measure(batch, batches - self._last, is_last=is_last)
        self._mark, self._last, self._feeds, self._waited_ns = now, batches, feed, waited_ns

    def pause(self) -> None:
        """Something that is no training begins, right after a look."""
        self._mark = None

    def resume(self) -> None:
        """It is over."""
        self._mark = time.monotonic()

    def _measure(self, batch: Any, batches: int, *, is_last: bool) -> None:
        try:
            own = self._module.tokens_in_batch(batch) if self.unit == "tokens" else batch_size_of(batch)
        except LoggingError:
            own = None  # nobody knows what a sample is
        if not is_last or not self.knows_batches:
            self._usual, self.knows_batches = own, not is_last
        if own is None or self._usual is None:
            self.items = mean = None
        else:
            if self.batches:
                self._trained += own + self._usual * (batches - 1)
            mean = self._trained / self.batches if self.batches else own
            self.items = mean * (self.world_size // self.tensor_parallel)
        given = getattr(self._module, "flops_per_batch", None)
        if given:
            self.flops, self.flops_by = float(given), "given"
        elif self.flops_by in ("", "6ND") and self.unit == "tokens" and mean is not None:
            # Forward and backward of a transformer, without attention's products (arXiv:2001.08361, 2.1).
            self.flops = 6.0 * mean * sum(p.numel() for p in self._module.parameters()) / self.tensor_parallel
            self.flops_by = "6ND"

    # ------------------------------------------------------------------------------------------------ what is told

    @property
    def mfu(self) -> float | None:
        """Model FLOP utilisation: the share of the device's peak; None where FLOPs or peak are not known."""
        if self.flops is None or self.peak is None or not self.batches:
            return None
        return self.flops * self.batches / self.seconds / self.peak

    def rate(self, batches_per_second: float) -> str:
        """For the progress bar: samples or tokens per second at this many batches per second, and the MFU."""
        parts = [] if self.items is None else [f"{short(batches_per_second * self.items)} {self.unit}/s"]
        if self.flops is not None and self.peak is not None:
            parts.append(f"MFU {self.flops * batches_per_second / self.peak:.1%}")
        return "  ".join(parts)

    def told(self) -> str | None:
        """One line for the end of a fit; None if too little was seen."""
        if not self.batches:
            return None
        per_second = self.batches / self.seconds
        parts = [] if self.items is None else [f"{short(per_second * self.items)} {self.unit}/s"]
        parts.append(f"{_duration(1 / per_second)} per batch (the first {_duration(self.first_s or 0.0)})")
        parts.append(f"{self.waited / self.seconds:.1%} of it waiting for data")
        if self.world_size > 1:
            known = self.communication is not None
            parts.append(f"communication in {self.communication:.0%} of a sampled step" if known else
                         "communication not measured (ThroughputMonitor does)")  # fmt: skip
        what = "GPU memory" if self.device.type == "cuda" else "memory"
        parts.append(f"peak {what} {peak_memory(self.device) / 2**30:.2f} GiB")
        if self.mfu is not None and self.peak is not None:
            parts.append(f"MFU {self.mfu:.1%} of {self.peak / 1e12:.4g} TFLOP/s ({self.dtype}; FLOPs {self.flops_by})")
        elif self.flops is not None:
            device = f"{device_name(self.device)} in {self.dtype}"
            parts.append(f"MFU not known: no peak of {device} is known, ThroughputMonitor(peak_flops=...) takes one")
        return f"speed: {', '.join(parts)}."


def _counts_tokens(module: Module) -> bool:
    from trainer.module import Module

    return overridden(module, "tokens_in_batch", Module)


def _duration(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def short(number: float) -> str:
    """1234567 as 1.23M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"
