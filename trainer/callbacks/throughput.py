"""`ThroughputMonitor`: samples, tokens and operations per second in the log, and what takes the time."""

from __future__ import annotations

import math
import time
from collections import deque
from typing import TYPE_CHECKING, Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from trainer.callbacks.callback import Callback
from trainer.errors import ConfigError
from trainer.metrics import batch_size_of
from trainer.profilers import PassThroughProfiler
from trainer.throughput import communication_share, peak_memory

if TYPE_CHECKING:
    from collections.abc import Callable

    from trainer.module import Module
    from trainer.trainer import Trainer


# Batches that are profiled at most, where nobody tells that an optimizer stepped.
_SAMPLED_AT_MOST = 8


class ThroughputMonitor(Callback):
    """Logs rates over a sliding window of training batches, with the steps that loggers get.

    Names: `train/time`, `train/batches`, `train/samples`, and per device (`train/device/...`) and for all ranks
    `batches_per_sec`, `samples_per_sec`; with `length_fn` also `items_per_sec` (tokens); where FLOPs are known
    `flops_per_sec` and, where the device's peak is, `device/mfu` (model FLOP utilisation). Also `device/data_wait` (the
    share of the time that the loop waited for batches, since training began), `device/peak_memory` in bytes, and on
    several ranks `device/communication`: the share of one sampled step in which a collective was under way. Ranks are
    taken to do equal work, so nothing is exchanged. What is found here is in the progress bar and in the line at the
    end of `fit`, too.

    Args:
        batch_size_fn: number of samples in a batch; default: the first dimension of its first tensor.
        length_fn: number of items (tokens) in a batch; default: the module's `tokens_in_batch`, if it has one.
        window_size: number of batches that a rate is taken over.
        count_flops: count the FLOPs of matrix products and attention in the first batch of a run, which takes longer
            for that, unless the module tells them: `flops_per_batch`, of one batch on one rank, forward and backward.
            They are not counted where ranks share layers. Without any, a module with `tokens_in_batch` is taken to need
            6 per parameter and token ("6ND").
        peak_flops: of the device in FLOP/s, in the format that is used, where the table in trainer.throughput lacks it.
        communication: profile one step on several ranks. It is left out under a profiler, the Trainer's or one that is
            already on.

    Raises:
        ConfigError: the window is too small, or (during `fit`) the trainer has no logger.
    """

    def __init__(
        self,
        batch_size_fn: Callable[[Any], int] | None = None,
        length_fn: Callable[[Any], int] | None = None,
        window_size: int = 100,
        *,
        count_flops: bool = True,
        peak_flops: float | None = None,
        communication: bool = True,
    ) -> None:
        if window_size < 2:
            raise ConfigError(f"ThroughputMonitor(window_size={window_size}). Allowed: 2 or more.")
        if peak_flops is not None and not 0 < peak_flops < math.inf:
            raise ConfigError(f"ThroughputMonitor(peak_flops={peak_flops}). Allowed: FLOP/s, more than 0.")
        self.batch_size_fn = batch_size_fn or batch_size_of
        self.length_fn = length_fn
        self._peak_flops, self._communication, self._count_flops = peak_flops, communication, count_flops
        self._flops: float | None = None  # of one batch, counted
        self._counter: Any = None
        self._profile: Any = None
        self._began = 0.0
        # Batches until the step that is profiled; the first ones are not like the others.
        self._until_profile = 0
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
        assert trainer.fit_run is not None
        self._meter = meter = trainer.fit_run.meter
        if self.length_fn is None and meter.unit == "tokens":
            self.length_fn = pl_module.tokens_in_batch
        meter.peak = self._peak_flops or meter.peak
        if not getattr(pl_module, "flops_per_batch", None):
            if self._flops is not None:
                meter.flops, meter.flops_by = self._flops, "counted"
            elif self._count_flops and trainer.train_state.batches == 0 and meter.tensor_parallel == 1:
                # Not after a resume: what is counted is not compiled, and a resumed run computes as one that went on.
                self._counter = FlopCounterMode(display=False)
                self._counter.__enter__()
        profiles = self._communication and trainer.world_size > 1 and type(trainer.profiler) is PassThroughProfiler
        self._until_profile = 2 * trainer.accumulate_grad_batches + 2 if profiles else 0
        self._mark = time.perf_counter()

    def on_validation_start(self, trainer: Trainer, pl_module: Module) -> None:
        self._leave()
        if not trainer.sanity_checking and self._mark is not None:
            self._mark -= time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: Module) -> None:
        # The time in between counts as if it had not passed.
        if not trainer.sanity_checking and self._mark is not None:
            self._mark += time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Module, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._counter is not None:
            self._counted()
        if self._until_profile or self._profile is not None:
            self._sample(trainer)
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
            trainer.reports.log({f"train/{name}": value for name, value in values.items()}, None, epoch=False)

    def compute(self, trainer: Trainer, pl_module: Module) -> dict[str, float]:
        """The totals so far and the rates over the window."""
        first, last = self._window[0], self._window[-1]
        seconds, batches, samples, items = (b - a for a, b in zip(first, last, strict=True))
        rates = {"batches_per_sec": batches / seconds, "samples_per_sec": samples / seconds}
        if self.length_fn is not None:
            rates["items_per_sec"] = items / seconds
        meter = self._meter
        flops = getattr(pl_module, "flops_per_batch", None) or meter.flops
        if flops:
            rates["flops_per_sec"] = batches * float(flops) / seconds
        values: dict[str, float] = {"time": last[0], "batches": last[1], "samples": last[2]}
        if self.length_fn is not None:
            values["items"] = last[3]
        values |= {f"device/{name}": rate for name, rate in rates.items()}
        apart = trainer.world_size // meter.tensor_parallel
        values |= {
            name: rate * (trainer.world_size if name == "flops_per_sec" else apart) for name, rate in rates.items()
        }
        if flops and meter.peak is not None:
            values["device/mfu"] = rates["flops_per_sec"] / meter.peak
        if meter.batches:
            values["device/data_wait"] = meter.waited / meter.seconds
        if meter.communication is not None:
            values["device/communication"] = meter.communication
        return values | {"device/peak_memory": peak_memory(meter.device)}

    def _counted(self) -> None:
        """The first batch is over."""
        self._counter.__exit__(None, None, None)
        flops, self._counter = self._counter.get_total_flops(), None
        if flops:  # else there was nothing that it knows
            self._flops = self._meter.flops = float(flops)
            self._meter.flops_by = "counted"

    def _sample(self, trainer: Trainer) -> None:
        """Profile one step, from the end of a batch to the end of that after which the optimizer stepped."""
        device = self._meter.device
        if self._profile is None:
            self._until_profile -= 1
            # To end a profile ends that around it, too.
            if self._until_profile == 0 and not torch.autograd.profiler._is_profiler_enabled:
                activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
                self._profile = profile(activities=activities, acc_events=True)
                self._profile.start()
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                self._began = time.perf_counter()
                self._profiled_from = trainer.global_step
                self._profile_left = max(trainer.accumulate_grad_batches, _SAMPLED_AT_MOST)
            return
        self._profile_left -= 1
        # Optimizers that are not those of `self.optimizers()` step without global_step.
        if trainer.global_step > self._profiled_from or self._profile_left == 0:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds = time.perf_counter() - self._began
            found, self._profile = self._profile, None
            found.stop()
            self._meter.communication = communication_share(found.events(), seconds)

    def _leave(self) -> None:
        """End what is under way around a batch, which has not come to its end."""
        if self._counter is not None:
            self._counter.__exit__(None, None, None)
            self._counter = None
        if self._profile is not None:
            self._profile.stop()
            self._profile, self._until_profile = None, 2

    def on_train_end(self, trainer: Trainer, pl_module: Module) -> None:
        self._leave()

    def on_exception(self, trainer: Trainer, pl_module: Module, exception: BaseException) -> None:
        self._leave()

    def teardown(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        self._leave()  # also after a stop

    def state_dict(self) -> dict[str, Any]:
        return {"totals": list(self._totals), "flops": self._flops}

    def snapshot_state(self) -> dict[str, Any]:
        return {}  # time that a step took is spent, also if it is undone

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        seconds, batches, samples, items = state_dict["totals"]
        self._totals = (float(seconds), int(batches), int(samples), int(items))
        self._flops = state_dict.get("flops")
