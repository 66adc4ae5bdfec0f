"""The Trainer's arguments, checked once into one frozen value."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from trainer.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

# Arguments that Lightning had once, and what says the same today.
REMOVED = {
    "gpus": "accelerator='gpu', devices=N",
    "auto_select_gpus": "devices=N (the launcher gives each rank its own)",
    "tpu_cores": "nothing: TPUs are not supported",
    "ipus": "nothing: IPUs are not supported",
    "num_processes": "`launch --procs N script.py`",
    "distributed_backend": "strategy='ddp'",
    "accelerators": "accelerator='cpu' | 'gpu' | 'mps' | 'auto'",
    "progress_bar_refresh_rate": "callbacks=[RichProgressBar(refresh_rate=N)] or enable_progress_bar=False",
    "process_position": "callbacks=[TQDMProgressBar(process_position=N)]",
    "weights_summary": "callbacks=[ModelSummary(max_depth=N)] or enable_model_summary=False",
    "checkpoint_callback": "enable_checkpointing=True | False, and callbacks=[ModelCheckpoint(...)]",
    "early_stop_callback": "callbacks=[EarlyStopping(monitor='val_loss')]",
    "resume_from_checkpoint": "trainer.fit(model, ckpt_path=path)",
    "weights_save_path": "callbacks=[ModelCheckpoint(dirpath=path)]",
    "stochastic_weight_avg": "callbacks=[StochasticWeightAveraging(swa_lrs=0.01)]",
    "terminate_on_nan": "detect_anomaly=True, or callbacks=[EarlyStopping(..., check_finite=True)]",
    "track_grad_norm": "log the norm in on_before_optimizer_step",
    "log_gpu_memory": "callbacks=[DeviceStatsMonitor()]",
    "flush_logs_every_n_steps": "the logger's own argument",
    "row_log_interval": "log_every_n_steps=N",
    "log_save_interval": "log_every_n_steps=N",
    "val_percent_check": "limit_val_batches=fraction",
    "train_percent_check": "limit_train_batches=fraction",
    "test_percent_check": "limit_test_batches=fraction",
    "overfit_pct": "overfit_batches=fraction",
    "max_nb_epochs": "max_epochs=N",
    "min_nb_epochs": "min_epochs=N",
    "nb_gpu_nodes": "num_nodes=N",
    "num_gpu_nodes": "num_nodes=N",
    "use_amp": "precision='16-mixed'",
    "amp_level": "precision='16-mixed' (torch's own mixed precision; apex is gone)",
    "amp_backend": "precision='16-mixed' (torch's own mixed precision; apex is gone)",
    "native_amp": "precision='16-mixed'",
    "auto_lr_find": "LearningRateFinder() in callbacks",
    "auto_scale_batch_size": "BatchSizeFinder() in callbacks",
    "replace_sampler_ddp": "use_distributed_sampler=True | False",
    "reload_dataloaders_every_epoch": "reload_dataloaders_every_n_epochs=1",
    "multiple_trainloader_mode": "CombinedLoader(loaders, mode) as the training loader",
    "truncated_bptt_steps": "a loop of your own in training_step, with automatic_optimization = False",
    "move_metrics_to_cpu": "nothing: values are moved when they are reported",
    "prepare_data_per_node": "self.prepare_data_per_node in the Module or DataModule",
    "sync_batchnorm_": "sync_batchnorm=True",
    "plugins": "precision=..., strategy=...; an environment is read from what started the ranks",
}


@dataclass(frozen=True)
class Config:
    """What the Trainer was told. Every combination that exists is allowed; the others end in a ConfigError."""

    accelerator: str
    strategy: Any
    devices: Any
    num_nodes: int
    precision: Any
    logger: Any
    callbacks: Any
    fast_dev_run: int
    max_epochs: int | None
    min_epochs: int | None
    max_steps: int
    min_steps: int | None
    max_time: Any
    limit_train_batches: float
    limit_val_batches: float
    limit_test_batches: float
    limit_predict_batches: float
    overfit_batches: float
    val_check_interval: float
    val_check_seconds: float | None
    check_val_every_n_epoch: int | None
    num_sanity_val_steps: float
    log_every_n_steps: int
    enable_checkpointing: bool
    enable_progress_bar: bool
    enable_model_summary: bool
    accumulate_grad_batches: int
    gradient_clip_val: float | None
    gradient_clip_algorithm: str | None
    deterministic: bool | str | None
    benchmark: bool | None
    inference_mode: bool
    use_distributed_sampler: bool
    profiler: Any
    detect_anomaly: bool
    barebones: bool
    sync_batchnorm: bool
    reload_dataloaders_every_n_epochs: int
    default_root_dir: str | None
    enable_autolog_hparams: bool


def check(
    *,
    accelerator: str = "auto",
    strategy: Any = "auto",
    devices: Any = "auto",
    num_nodes: int = 1,
    precision: Any = None,
    logger: Any = None,
    callbacks: Any = None,
    fast_dev_run: int | bool = False,
    max_epochs: int | None = None,
    min_epochs: int | None = None,
    max_steps: int = -1,
    min_steps: int | None = None,
    max_time: Any = None,
    limit_train_batches: float | None = None,
    limit_val_batches: float | None = None,
    limit_test_batches: float | None = None,
    limit_predict_batches: float | None = None,
    overfit_batches: float = 0.0,
    val_check_interval: Any = None,
    check_val_every_n_epoch: int | None = 1,
    num_sanity_val_steps: int | None = None,
    log_every_n_steps: int | None = None,
    enable_checkpointing: bool | None = None,
    enable_progress_bar: bool | None = None,
    enable_model_summary: bool | None = None,
    accumulate_grad_batches: int = 1,
    gradient_clip_val: float | None = None,
    gradient_clip_algorithm: str | None = None,
    deterministic: bool | str | None = None,
    benchmark: bool | None = None,
    inference_mode: bool = True,
    use_distributed_sampler: bool = True,
    profiler: Any = None,
    detect_anomaly: bool = False,
    barebones: bool = False,
    sync_batchnorm: bool = False,
    reload_dataloaders_every_n_epochs: int = 0,
    default_root_dir: str | Path | None = None,
    enable_autolog_hparams: bool = True,
    **unknown: Any,
) -> Config:
    """Turn the arguments of `Trainer(...)` into a Config.

    Raises:
        ConfigError: a value is not allowed, contradicts another, or the argument does not exist (any more).
    """
    for name in unknown:
        if name in REMOVED:
            raise ConfigError(f"Trainer({name}=...) does not exist any more. Today: {REMOVED[name]}.")
        raise ConfigError(f"Trainer has no argument {name!r}. Allowed: {', '.join(Config.__dataclass_fields__)}.")

    if barebones:
        asked = {
            "enable_checkpointing": enable_checkpointing, "logger": logger,
            "enable_progress_bar": enable_progress_bar, "log_every_n_steps": log_every_n_steps,
            "enable_model_summary": enable_model_summary, "num_sanity_val_steps": num_sanity_val_steps,
            "fast_dev_run": fast_dev_run, "detect_anomaly": detect_anomaly, "profiler": profiler,
        }  # fmt: skip
        for name, value in asked.items():
            if value:
                raise ConfigError(f"Trainer(barebones=True, {name}={value!r}): barebones switches {name} off.")
        enable_checkpointing = logger = enable_progress_bar = enable_model_summary = False
        log_every_n_steps = num_sanity_val_steps = 0

    runs = int(fast_dev_run)
    _require(runs >= 0, "fast_dev_run", fast_dev_run, "True, False or a number of batches")
    if runs:
        limit_train_batches = limit_val_batches = limit_test_batches = limit_predict_batches = runs
        max_epochs, max_steps, num_sanity_val_steps, val_check_interval = 1, runs, 0, 1.0
        check_val_every_n_epoch, enable_checkpointing, overfit_batches = 1, False, 0.0
    _require_fraction("overfit_batches", overfit_batches)
    if overfit_batches:
        limit_train_batches = limit_val_batches = overfit_batches
    limits = {}
    for name, value in (
        ("limit_train_batches", limit_train_batches), ("limit_val_batches", limit_val_batches),
        ("limit_test_batches", limit_test_batches), ("limit_predict_batches", limit_predict_batches),
    ):  # fmt: skip
        limits[name] = 1.0 if value is None else value
        _require_fraction(name, limits[name])

    _require_count("max_epochs", max_epochs, minimum=-1, optional=True)
    _require_count("min_epochs", min_epochs, minimum=0, optional=True)
    _require_count("max_steps", max_steps, minimum=-1)
    _require_count("min_steps", min_steps, minimum=0, optional=True)
    if max_epochs is None:
        max_epochs = -1 if max_steps != -1 or max_time is not None else 1000
    _require_count("num_nodes", num_nodes, minimum=1)
    _require_count("accumulate_grad_batches", accumulate_grad_batches, minimum=1)
    _require_count("reload_dataloaders_every_n_epochs", reload_dataloaders_every_n_epochs, minimum=0)
    _require_count("check_val_every_n_epoch", check_val_every_n_epoch, minimum=1, optional=True)
    log_every_n_steps = 50 if log_every_n_steps is None else log_every_n_steps
    _require_count("log_every_n_steps", log_every_n_steps, minimum=0)
    sanity = 2 if num_sanity_val_steps is None else num_sanity_val_steps
    _require_count("num_sanity_val_steps", sanity, minimum=-1)

    seconds = None
    if isinstance(val_check_interval, (str, timedelta, Mapping)):
        seconds, val_check_interval = parse_duration("val_check_interval", val_check_interval), 1.0
    elif val_check_interval is None:
        val_check_interval = 1.0
        if check_val_every_n_epoch is None:
            raise ConfigError("check_val_every_n_epoch=None needs val_check_interval: a number of batches or a time.")
    elif isinstance(val_check_interval, float):
        _require(0.0 <= val_check_interval <= 1.0, "val_check_interval", val_check_interval,
                 "a fraction of an epoch in [0.0, 1.0], an int (batches) or a duration")  # fmt: skip
        if check_val_every_n_epoch is None and not runs:
            raise ConfigError(
                f"val_check_interval={val_check_interval} is a fraction of an epoch, but check_val_every_n_epoch=None "
                "counts batches across epochs: pass an int or a duration."
            )
    else:
        _require_count("val_check_interval", val_check_interval, minimum=1)

    if gradient_clip_val is not None and (
        isinstance(gradient_clip_val, bool) or not isinstance(gradient_clip_val, (int, float))
    ):
        raise ConfigError(f"gradient_clip_val={gradient_clip_val!r} must be a number or None.")
    algorithm = gradient_clip_algorithm.lower() if isinstance(gradient_clip_algorithm, str) else gradient_clip_algorithm
    _require(algorithm in (None, "norm", "value"), "gradient_clip_algorithm", gradient_clip_algorithm,
             "'norm' (default), 'value'")  # fmt: skip
    _require(deterministic in (None, True, False, "warn"), "deterministic", deterministic, "True, False, 'warn', None")
    _require(isinstance(accelerator, str), "accelerator", accelerator, "'auto', 'cpu', 'gpu', 'cuda', 'mps'")

    checkpointing = True if enable_checkpointing is None else enable_checkpointing
    return Config(
        accelerator=accelerator,
        strategy=strategy,
        devices=devices,
        num_nodes=num_nodes,
        precision="32-true" if precision is None else precision,
        logger=True if logger is None else logger,
        callbacks=callbacks,
        fast_dev_run=runs,
        max_epochs=max_epochs,
        min_epochs=min_epochs,
        max_steps=max_steps,
        min_steps=min_steps,
        max_time=max_time,
        overfit_batches=overfit_batches,
        val_check_interval=val_check_interval,
        val_check_seconds=seconds,
        check_val_every_n_epoch=check_val_every_n_epoch,
        num_sanity_val_steps=math.inf if sanity == -1 else sanity,
        log_every_n_steps=log_every_n_steps,
        enable_checkpointing=checkpointing,
        enable_progress_bar=True if enable_progress_bar is None else enable_progress_bar,
        enable_model_summary=True if enable_model_summary is None else enable_model_summary,
        accumulate_grad_batches=accumulate_grad_batches,
        gradient_clip_val=None if not gradient_clip_val or gradient_clip_val <= 0 else float(gradient_clip_val),
        gradient_clip_algorithm=algorithm,
        deterministic=deterministic,
        benchmark=benchmark,
        inference_mode=inference_mode,
        use_distributed_sampler=use_distributed_sampler,
        profiler=profiler,
        detect_anomaly=detect_anomaly,
        barebones=barebones,
        sync_batchnorm=sync_batchnorm,
        reload_dataloaders_every_n_epochs=reload_dataloaders_every_n_epochs,
        default_root_dir=None if default_root_dir is None else str(default_root_dir),
        enable_autolog_hparams=enable_autolog_hparams,
        **limits,
    )


def _require(allowed: bool, name: str, value: Any, what: str) -> None:
    if not allowed:
        raise ConfigError(f"{name}={value!r} is not allowed. Allowed: {what}.")


def _require_fraction(name: str, value: Any) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    part = isinstance(value, float) and 0.0 <= value <= 1.0
    _require(whole or part, name, value, "an int >= 0 (batches) or a float in [0.0, 1.0] (part of the loader)")


def _require_count(name: str, value: Any, *, minimum: int, optional: bool = False) -> None:
    if optional and value is None:
        return
    good = isinstance(value, int) and not isinstance(value, bool) and value >= minimum
    _require(good, name, value, f"an int >= {minimum}{' or None' if optional else ''}")


def parse_duration(name: str, value: str | timedelta | Mapping[str, float]) -> float:
    """Seconds in "DD:HH:MM:SS", a timedelta, or keyword arguments of one."""
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, Mapping):
        return timedelta(**value).total_seconds()
    parts = value.split(":")
    if len(parts) != 4 or not all(p.isdigit() for p in parts):
        raise ConfigError(f"{name}={value!r} must be 'DD:HH:MM:SS', a timedelta, or a dict like {{'minutes': 30}}.")
    days, hours, minutes, seconds = (int(p) for p in parts)
    return timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds).total_seconds()
