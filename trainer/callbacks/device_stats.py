"""`DeviceStatsMonitor`: what the device and this machine's CPUs have to do, in the loggers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from trainer.callbacks.callback import Callback
from trainer.errors import ConfigError

if TYPE_CHECKING:
    from trainer.module import Module
    from trainer.trainer import Trainer


class DeviceStatsMonitor(Callback):
    """Logs rank 0's device memory (and, with psutil installed, CPU and memory use) with the steps that loggers get.

    Names are `DeviceStatsMonitor.on_train_batch_end/<statistic>`.

    Args:
        cpu_stats: log CPU statistics too; None does on a CPU only. Needs the psutil package.

    Raises:
        ConfigError: psutil is needed and not installed, or (during `fit`) the trainer has no logger.
    """

    def __init__(self, cpu_stats: bool | None = None) -> None:
        self._cpu_stats = cpu_stats
        self._logged_step = -1

    def setup(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        if stage != "fit":
            return
        if not trainer.loggers:
            raise ConfigError("DeviceStatsMonitor needs a logger: Trainer(logger=...) is switched off.")
        if self._wants_cpu(trainer):
            try:
                import psutil  # noqa: F401 - only whether it is there
            except ImportError as error:
                raise ConfigError("DeviceStatsMonitor needs psutil for CPU statistics: pip install psutil.") from error

    def _wants_cpu(self, trainer: Trainer) -> bool:
        return self._cpu_stats if self._cpu_stats is not None else trainer.strategy.root_device.type == "cpu"

    def on_train_batch_end(self, trainer: Trainer, pl_module: Module, outputs: Any, batch: Any, batch_idx: int) -> None:
        step, every = trainer.train_state.logger_step, trainer.log_every_n_steps
        if not every or (step + 1) % every or step == self._logged_step or not trainer.is_global_zero:
            return
        self._logged_step = step
        values = device_stats(trainer.strategy.root_device)
        if self._wants_cpu(trainer):
            values |= cpu_stats()
        named = {f"{type(self).__name__}.on_train_batch_end/{name}": value for name, value in values.items()}
        trainer.reports.log(named, step, epoch=False)


def device_stats(device: torch.device) -> dict[str, float]:
    """Memory of an accelerator, in bytes, by torch's names; nothing for a CPU."""
    if device.type == "cuda":
        return {k: float(v) for k, v in torch.cuda.memory_stats(device).items()}
    if device.type == "mps":
        return {
            "mps_current_allocated_bytes": float(torch.mps.current_allocated_memory()),
            "mps_driver_allocated_bytes": float(torch.mps.driver_allocated_memory()),
        }
    return {}


def cpu_stats() -> dict[str, float]:
    """Load of this machine: CPU and memory use in percent, and of this process its memory in bytes."""
    import psutil

    return {
        "cpu_percent": psutil.cpu_percent(),
        "cpu_vm_percent": psutil.virtual_memory().percent,
        "cpu_swap_percent": psutil.swap_memory().percent,
        "process_rss_bytes": float(psutil.Process().memory_info().rss),
    }
