"""The Trainer's arguments: named, documented and checked once, here."""

from __future__ import annotations

import ast
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from datetime import timedelta
from inspect import Parameter, signature
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from trainer.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from trainer.callbacks import Callback
    from trainer.guard import Guard
    from trainer.loggers import Logger
    from trainer.parallel import Parallel
    from trainer.profilers import Profiler

P = ParamSpec("P")
T = TypeVar("T")

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


@dataclass(frozen=True, kw_only=True)
class Config:
    """What the Trainer was told, checked. Every combination that exists is allowed; the others end in a ConfigError.

    Its fields are the arguments of `Trainer(...)`. None stands for an argument's default; afterwards only those
    whose default is None are None.

    accelerator: "auto", "cpu", "gpu" or "cuda", "mps".
    strategy: "auto", "ddp", "fsdp", ..., or an object of `trainer.parallel`.
    devices: per node: a number, a list or "0,2" of indices, -1 or "auto". Ranks are started by `launch` or another
        launcher; here it says what is expected of it.
    num_nodes: how many nodes are expected.
    precision: "32-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true", "64-true".
    logger: a logger or several, True (TensorBoard's) or False.
    callbacks: a callback or several.
    fast_dev_run: so many batches of everything (True: 1), without loggers and checkpoints.
    max_epochs: 1000 unless max_steps or max_time says otherwise; -1: no limit. min_epochs, min_steps: early stopping
        waits for them. max_steps: optimizer steps; -1: no limit.
    max_time: "DD:HH:MM:SS", a timedelta, or its keyword arguments.
    limit_*_batches: an int (batches) or a float (part of the loader), per rank, from its start.
    overfit_batches: the same for training and validation, unshuffled, the same batches in every epoch.
    val_check_interval: a float (part of an epoch), an int (batches) or a duration (as max_time).
    check_val_every_n_epoch: None: val_check_interval counts batches across epochs.
    num_sanity_val_steps: batches of validation before training, 2 by default; -1: all.
    log_every_n_steps: 50 by default; 0: never.
    enable_checkpointing, enable_progress_bar, enable_model_summary: whether the callbacks for it are there by default.
    save_every: when to save what the run can go on from, besides ModelCheckpoints: a number of optimizer steps, a time
        ("10min", a timedelta), or "auto": as often as the measured cost of a save and the rate of failures make best.
        In a run folder the end of every epoch is saved anyway.
    accumulate_grad_batches: batches per optimizer step.
    gradient_clip_val: None or 0: no clipping. gradient_clip_algorithm: "norm" (default) or "value".
    deterministic: True, False, "warn"; None leaves torch's setting. benchmark: cuDNN's.
    inference_mode: evaluate under torch.inference_mode rather than no_grad.
    use_distributed_sampler: whether the ranks share the samples among them; False: each takes all its loader gives.
    profiler: "simple", "advanced", "pytorch", or a Profiler.
    detect_anomaly: torch's anomaly detection in training.
    barebones: nothing but the loop, for measuring.
    sync_batchnorm: BatchNorm over all ranks.
    reload_dataloaders_every_n_epochs: 0: never.
    default_root_dir: where logs and checkpoints go: the run folder, else the current one, by default.
    enable_autolog_hparams: whether loggers get what save_hyperparameters kept.
    resume: "exact": a run goes on at the batch where it was. "epoch": an epoch that was broken off begins anew, with
        the weights as they are, for training data that cannot say where it was.
    compile: whether torch.compile compiles the steps (with FSDP2: each sharded unit), or a dict of its backend, mode,
        options, dynamic (False by default: every shape for itself) and fullgraph, and of blocks: a class of layers (or
        several) of which each is compiled for itself, which takes less time at the start.
    guard: whether steps whose gradients are not finite, or many times what they were, are undone and their batches left
        out, or a `trainer.Guard` that says when and how often.
    virtual_ranks: so many fixed shares per batch, whose weights come out the same to the bit on any number of ranks up
        to that; batch sizes are per share. See `trainer.virtual`.
    """

    accelerator: str = "auto"
    strategy: str | Parallel = "auto"
    devices: int | str | list[int] = "auto"
    num_nodes: int = 1
    precision: str | int | None = None
    logger: Logger | Iterable[Logger] | bool | None = None
    callbacks: list[Callback] | Callback | None = None
    fast_dev_run: int | bool = False
    max_epochs: int | None = None
    min_epochs: int | None = None
    max_steps: int = -1
    min_steps: int | None = None
    max_time: str | timedelta | dict[str, int] | None = None
    limit_train_batches: int | float | None = None
    limit_val_batches: int | float | None = None
    limit_test_batches: int | float | None = None
    limit_predict_batches: int | float | None = None
    overfit_batches: int | float = 0.0
    val_check_interval: int | float | str | timedelta | dict[str, int] | None = None
    check_val_every_n_epoch: int | None = 1
    num_sanity_val_steps: int | None = None
    log_every_n_steps: int | None = None
    enable_checkpointing: bool | None = None
    save_every: int | str | timedelta | None = None
    enable_progress_bar: bool | None = None
    enable_model_summary: bool | None = None
    accumulate_grad_batches: int = 1
    gradient_clip_val: int | float | None = None
    gradient_clip_algorithm: str | None = None
    deterministic: bool | str | None = None
    benchmark: bool | None = None
    inference_mode: bool = True
    use_distributed_sampler: bool = True
    profiler: Profiler | str | None = None
    detect_anomaly: bool = False
    barebones: bool = False
    sync_batchnorm: bool = False
    reload_dataloaders_every_n_epochs: int = 0
    default_root_dir: str | Path | None = None
    enable_autolog_hparams: bool = True
    resume: str = "exact"
    compile: bool | dict[str, Any] = False
    guard: bool | Guard = False
    virtual_ranks: int | None = None

    # Seconds between validations where val_check_interval is a duration.
    val_check_seconds: float | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.barebones:
            self._set(**_barebones(self))
        _require(int(self.fast_dev_run) >= 0, "fast_dev_run", self.fast_dev_run, "True, False or a number of batches")
        self._set(fast_dev_run=int(self.fast_dev_run))
        if runs := self.fast_dev_run:
            self._set(limit_train_batches=runs, limit_val_batches=runs, limit_test_batches=runs,
                      limit_predict_batches=runs, max_epochs=1, max_steps=runs, num_sanity_val_steps=0,
                      val_check_interval=1.0, check_val_every_n_epoch=1, overfit_batches=0.0)  # fmt: skip
        _require_fraction("overfit_batches", self.overfit_batches)
        if self.overfit_batches:
            self._set(limit_train_batches=self.overfit_batches, limit_val_batches=self.overfit_batches)
        if self.max_epochs is None:
            self._set(max_epochs=-1 if self.max_steps != -1 or self.max_time is not None else 1000)
        for name, default in _WHERE_NONE.items():
            if getattr(self, name) is None:
                self._set(**{name: default})
        for name in ("limit_train_batches", "limit_val_batches", "limit_test_batches", "limit_predict_batches"):
            _require_fraction(name, getattr(self, name))
        for name, minimum in _COUNTS.items():
            _require_count(name, getattr(self, name), minimum=minimum, optional=name in _OPTIONAL)
        if self.num_sanity_val_steps == -1:
            self._set(num_sanity_val_steps=math.inf)
        self._check_val_interval()
        self._check_clipping()
        self._set(devices=_devices(self.devices))
        _require(self.deterministic in (None, True, False, "warn"), "deterministic", self.deterministic,
                 "True, False, 'warn', None")  # fmt: skip
        _require(
            isinstance(self.accelerator, str), "accelerator", self.accelerator, "'auto', 'cpu', 'gpu', 'cuda', 'mps'"
        )
        _require(isinstance(self.strategy, str) or hasattr(self.strategy, "wrap"), "strategy", self.strategy,
                 "a name such as 'auto', 'ddp', 'fsdp', or a DDP or FSDP object")  # fmt: skip
        _require(not isinstance(self.logger, str), "logger", self.logger,
                 "True (TensorBoard), False, a Logger object such as CSVLogger('logs'), or several")  # fmt: skip
        _require(isinstance(self.default_root_dir, (str, os.PathLike, type(None))), "default_root_dir",
                 self.default_root_dir, "a path or a URL")  # fmt: skip
        _require(self.resume in ("exact", "epoch"), "resume", self.resume, "'exact', 'epoch'")
        if self.compile is not False:
            from trainer.compiling import check_compile  # imports torch's compiler

            self._set(compile=check_compile(self.compile) or False)
        if self.guard is not False:
            from trainer.guard import Guard

            good = self.guard is None or self.guard is True or isinstance(self.guard, Guard)
            _require(good, "guard", self.guard, "True, False, or a trainer.Guard(...)")
            self._set(guard=Guard() if self.guard is True else self.guard or False)
        if self.virtual_ranks is not None:
            self._check_virtual_ranks()
        if self.default_root_dir is not None:
            self._set(default_root_dir=str(self.default_root_dir))

    def _set(self, **values: Any) -> None:
        """Write a field while the value is made."""
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def _check_val_interval(self) -> None:
        interval, every = self.val_check_interval, self.check_val_every_n_epoch
        if isinstance(interval, (str, timedelta, Mapping)):
            self._set(val_check_seconds=parse_duration("val_check_interval", interval), val_check_interval=1.0)
        elif interval is None:
            if every is None:
                raise ConfigError(
                    "check_val_every_n_epoch=None needs val_check_interval: a number of batches or a time."
                )
            self._set(val_check_interval=1.0)
        elif isinstance(interval, float):
            _require(0.0 <= interval <= 1.0, "val_check_interval", interval,
                     "a fraction of an epoch in [0.0, 1.0], an int (batches) or a duration")  # fmt: skip
            if every is None:
                raise ConfigError(
                    f"val_check_interval={interval} is a fraction of an epoch, but check_val_every_n_epoch=None "
                    "counts batches across epochs: pass an int or a duration."
                )
        else:
            _require_count("val_check_interval", interval, minimum=1)

    def _check_virtual_ranks(self) -> None:
        for name, allowed in _WITH_VIRTUAL_RANKS.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(
                    f"virtual_ranks={self.virtual_ranks} and {name}={getattr(self, name)!r} contradict each other. "
                    f"Allowed with virtual_ranks: {', '.join(map(repr, allowed))}."
                )
        if self.deterministic is None:
            self._set(deterministic=True)

    def _check_clipping(self) -> None:
        value, algorithm = self.gradient_clip_val, self.gradient_clip_algorithm
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise ConfigError(f"gradient_clip_val={value!r} must be a number or None.")
        if isinstance(algorithm, str):
            algorithm = algorithm.lower()
        _require(algorithm in (None, "norm", "value"), "gradient_clip_algorithm", self.gradient_clip_algorithm,
                 "'norm' (default), 'value'")  # fmt: skip
        self._set(gradient_clip_val=float(value) if value and value > 0 else None, gradient_clip_algorithm=algorithm)


class Adjustable:
    """The part of the Config that users and callbacks may change on the Trainer while it runs."""

    max_epochs: int | None
    min_epochs: int | None
    max_steps: int
    min_steps: int | None
    limit_train_batches: float
    limit_val_batches: float
    limit_test_batches: float
    limit_predict_batches: float
    overfit_batches: float
    val_check_interval: float
    check_val_every_n_epoch: int | None
    num_sanity_val_steps: float
    log_every_n_steps: int
    accumulate_grad_batches: int
    gradient_clip_val: float | None
    gradient_clip_algorithm: str | None
    reload_dataloaders_every_n_epochs: int
    fast_dev_run: int
    barebones: bool

    def __init__(self, config: Config) -> None:
        for name in Adjustable.__annotations__:
            setattr(self, name, getattr(config, name))


def _devices(given: Any) -> Any:
    """A count, -1, "auto" or a list of indices, from all forms that `devices` may have; "0,2" and "1," are lists."""
    devices = given
    if isinstance(given, str) and given != "auto":
        parts = [p.strip() for p in given.split(",")]
        if all(p.removeprefix("-").isdigit() for p in parts if p) and any(parts):
            devices = [int(p) for p in parts if p] if "," in given else int(given)
    if isinstance(devices, tuple):
        devices = list(devices)
    if isinstance(devices, list):
        good = bool(devices) and all(type(i) is int and i >= 0 for i in devices) and len({*devices}) == len(devices)
    else:
        good = devices == "auto" or (type(devices) is int and (devices == -1 or devices > 0))
    _require(good, "devices", given, "a count, a list of different indices (or '0,2'), -1 or 'auto'")
    return devices


# What an argument that was given as None, or not at all, is.
_WHERE_NONE = {
    "precision": "32-true", "logger": True, "limit_train_batches": 1.0, "limit_val_batches": 1.0,
    "limit_test_batches": 1.0, "limit_predict_batches": 1.0, "num_sanity_val_steps": 2, "log_every_n_steps": 50,
    "enable_checkpointing": True, "enable_progress_bar": True, "enable_model_summary": True,
}  # fmt: skip
# The least that a count may be.
_COUNTS = {
    "max_epochs": -1, "min_epochs": 0, "max_steps": -1, "min_steps": 0, "num_nodes": 1, "accumulate_grad_batches": 1,
    "reload_dataloaders_every_n_epochs": 0, "check_val_every_n_epoch": 1, "log_every_n_steps": 0,
    "num_sanity_val_steps": -1, "virtual_ranks": 1,
}  # fmt: skip
_OPTIONAL = ("min_epochs", "min_steps", "check_val_every_n_epoch", "virtual_ranks")
# With fixed shares of every batch, whose gradients are summed in one order.
_WITH_VIRTUAL_RANKS: dict[str, tuple[Any, ...]] = {
    "strategy": ("auto", "single", "single_device", "ddp"),
    "deterministic": (None, True, "warn"),
    "benchmark": (None, False),
    "sync_batchnorm": (False,),
    "use_distributed_sampler": (True,),
    "compile": (False,),
    "guard": (False,),
}
_BAREBONES_OFF = (
    "enable_checkpointing", "logger", "enable_progress_bar", "log_every_n_steps", "enable_model_summary",
    "num_sanity_val_steps", "fast_dev_run", "detect_anomaly", "profiler",
)  # fmt: skip


def _barebones(config: Config) -> dict[str, Any]:
    for name in _BAREBONES_OFF:
        if value := getattr(config, name):
            raise ConfigError(f"Trainer(barebones=True, {name}={value!r}): barebones switches {name} off.")
    return {
        "enable_checkpointing": False, "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
        "log_every_n_steps": 0, "num_sanity_val_steps": 0,
    }  # fmt: skip


def configured(
    config: Callable[P, Config],
) -> Callable[[Callable[[T, Config], None]], Callable[Concatenate[T, P], None]]:
    """Give an `__init__(self, config)` the arguments of Config in place of the Config.

    So the arguments stand in one place, and editors and type checkers see them where they are used.
    """

    def decorate(init: Callable[[T, Config], None]) -> Callable[Concatenate[T, P], None]:
        def accept(self: T, /, *args: P.args, **kwargs: P.kwargs) -> None:
            if args:
                raise ConfigError(f"Trainer({args[0]!r}, ...): all arguments are keywords, e.g. max_epochs=10.")
            for name in kwargs:
                _require_known(name)
            for name, value in _from_environment().items():
                kwargs.setdefault(name, value)
            init(self, config(*args, **kwargs))

        own, given = Parameter("self", Parameter.POSITIONAL_ONLY), signature(config)
        accept.__signature__ = given.replace(parameters=[own, *given.parameters.values()])  # type: ignore[attr-defined]
        accept.__name__, accept.__doc__ = init.__name__, config.__doc__
        return accept

    return decorate


def _arguments() -> list[str]:
    return [f.name for f in fields(Config) if f.init]


def _require_known(name: str) -> None:
    if name in REMOVED:
        raise ConfigError(f"Trainer({name}=...) does not exist any more. Today: {REMOVED[name]}.")
    if name not in _arguments():
        raise ConfigError(f"Trainer has no argument {name!r}. Allowed: {', '.join(_arguments())}.")


def _from_environment() -> dict[str, Any]:
    """Arguments from PL_TRAINER_<NAME>, which Lightning reads too; what the script itself says wins."""
    found = {}
    for name in _arguments():
        text = os.environ.get(f"PL_TRAINER_{name.upper()}")
        if text is not None:
            try:
                found[name] = ast.literal_eval(text)
            except (ValueError, SyntaxError):
                found[name] = text
    return found


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
