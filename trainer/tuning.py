"""Finding a learning rate and a batch size by trying: `Tuner`, and what its callbacks of the same use stand on.

A trial is a fit (or validate, test, predict) of a few steps by a Trainer of its own, without loggers, checkpoints and
callbacks; afterwards the weights and the random state are what they were.
"""

# ruff: noqa: ARG002 - a callback's hooks take what the interface gives them

from __future__ import annotations

import copy
import gc
import math
from contextlib import contextmanager
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch

from trainer.callbacks.callback import Callback
from trainer.config import Config
from trainer.errors import ConfigError
from trainer.module import Module
from trainer.ranks import rank_zero_info, rank_zero_warn
from trainer.seed import isolate_rng
from trainer.trainer import Trainer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["LearningRates", "Tuner", "find_batch_size", "find_lr"]

# What a trial takes over; the rest of the Config would make it longer, or leave traces.
_KEPT = (
    "accelerator", "strategy", "devices", "num_nodes", "precision", "accumulate_grad_batches", "gradient_clip_val",
    "gradient_clip_algorithm", "deterministic", "benchmark", "inference_mode", "use_distributed_sampler",
    "detect_anomaly", "sync_batchnorm", "default_root_dir",
)  # fmt: skip
_SMOOTHING = 0.98


class Tuner:
    """Tries out what the Trainer's fit would do, and sets what was found on the model (or DataModule)."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def lr_find(
        self,
        model: Module,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        dataloaders: Any = None,
        datamodule: Any = None,
        method: str = "fit",
        min_lr: float = 1e-8,
        max_lr: float = 1,
        num_training: int = 100,
        mode: str = "exponential",
        early_stop_threshold: float | None = 4.0,
        update_attr: bool = True,
        attr_name: str = "",
    ) -> LearningRates | None:
        """Train with a learning rate that rises from min_lr to max_lr; where the loss falls fastest is a good one.

        num_training: steps to take. mode: "exponential" or "linear". early_stop_threshold: stop when the smoothed
        loss is this many times the best. update_attr: set the suggestion as `lr` or `learning_rate` (or attr_name)
        of the model or its hparams. None is returned under fast_dev_run.

        Raises:
            ConfigError: an argument is not allowed, the model has no such attribute, or there is not one optimizer.
        """
        if method != "fit" or dataloaders is not None:
            raise ConfigError("lr_find() trains: give it train_dataloaders (or a datamodule), and method='fit'.")
        if self._trainer.fast_dev_run:
            rank_zero_warn("lr_find() is skipped: the Trainer has fast_dev_run.")
            return None
        return find_lr(
            self._trainer, model, {"train_dataloaders": train_dataloaders, "datamodule": datamodule}, min_lr=min_lr,
            max_lr=max_lr, num_training=num_training, mode=mode, early_stop_threshold=early_stop_threshold,
            update_attr=update_attr, attr_name=attr_name,
        )  # fmt: skip

    def scale_batch_size(
        self,
        model: Module,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        dataloaders: Any = None,
        datamodule: Any = None,
        method: str = "fit",
        mode: str = "power",
        steps_per_trial: int = 3,
        init_val: int = 2,
        max_trials: int = 25,
        batch_arg_name: str = "batch_size",
        margin: float = 0.05,
        max_val: int = 8192,
    ) -> int | None:
        """Find the largest batch size that fits into memory, and set it.

        The loaders must come from hooks that read `batch_size` (or batch_arg_name) of the model, the DataModule or
        their hparams. method: "fit", "validate", "test" or "predict". mode: "power" doubles until memory runs out;
        "binsearch" then also tries between, and takes margin (a fraction) off for safety. None under fast_dev_run.

        Raises:
            ConfigError: an argument is not allowed, loaders were passed, there is no such attribute, or there are
                several ranks (one of them running out of memory would leave the others waiting).
        """
        if any(given is not None for given in (train_dataloaders, val_dataloaders, dataloaders)):
            raise ConfigError(
                "scale_batch_size() was given loaders, whose batch size cannot be changed. Define the loader in the "
                f"model or a DataModule, with batch_size=self.{batch_arg_name}."
            )
        if self._trainer.fast_dev_run:
            rank_zero_warn("scale_batch_size() is skipped: the Trainer has fast_dev_run.")
            return None
        return find_batch_size(
            self._trainer, model, datamodule, method=method, mode=mode, steps_per_trial=steps_per_trial,
            init_val=init_val, max_trials=max_trials, batch_arg_name=batch_arg_name, margin=margin, max_val=max_val,
        )  # fmt: skip


class LearningRates:
    """What `lr_find` saw: `results` has the lists "lr" and "loss" (smoothed), one value per step."""

    def __init__(self, mode: str, lr_min: float, lr_max: float, num_training: int) -> None:
        self.mode, self.lr_min, self.lr_max, self.num_training = mode, lr_min, lr_max, num_training
        self.results: dict[str, list[float]] = {"lr": [], "loss": []}

    def lr_at(self, step: int) -> float:
        """The learning rate of a step, from 0."""
        part = step / max(1, self.num_training - 1)
        if self.mode == "linear":
            return self.lr_min + part * (self.lr_max - self.lr_min)
        return float(self.lr_min * (self.lr_max / self.lr_min) ** part)

    def suggestion(self, skip_begin: int = 10, skip_end: int = 1) -> float | None:
        """The learning rate at which the loss falls fastest; None if there are too few points to say."""
        place = self._steepest(skip_begin, skip_end)
        return None if place is None else self.results["lr"][place]

    def _steepest(self, skip_begin: int, skip_end: int) -> int | None:
        lrs, losses = self.results["lr"], self.results["loss"]
        places = [i for i in range(skip_begin, len(losses) - skip_end) if math.isfinite(losses[i])]
        if len(places) < 2:
            rank_zero_warn(
                f"There are too few losses ({len(places)}) to suggest a learning rate from: raise num_training, or "
                "lower max_lr."
            )
            return None
        # Along the axis on which the rates are evenly spaced, so that small rates do not outweigh the others.
        axis = [math.log(lrs[i]) if self.mode == "exponential" else lrs[i] for i in places]
        slopes = torch.gradient(torch.tensor([losses[i] for i in places]), spacing=(torch.tensor(axis),))[0]
        return places[int(slopes.argmin())]

    def plot(self, suggest: bool = False, show: bool = False, ax: Any = None) -> Any:
        """The loss over the learning rate, as a matplotlib figure; suggest: the suggestion as a red point.

        Raises:
            ConfigError: matplotlib is not installed.
        """
        try:
            import matplotlib.pyplot as plt
        except ImportError as error:
            raise ConfigError("plot() needs matplotlib: pip install matplotlib.") from error
        if ax is None:
            _, ax = plt.subplots()
        lrs, losses = self.results["lr"], self.results["loss"]
        ax.plot(lrs, losses)
        if self.mode == "exponential":
            ax.set_xscale("log")
        # The last losses, where it diverges, tower above all that one wants to see.
        finite = sorted(filter(math.isfinite, losses))
        if finite and (height := finite[len(finite) * 95 // 100] - finite[0]) > 0:
            ax.set_ylim(finite[0] - 0.1 * height, finite[0] + 1.5 * height)
        ax.set_xlabel("Learning rate")
        ax.set_ylabel("Loss")
        if suggest and (place := self._steepest(10, 1)) is not None:
            ax.plot(lrs[place], losses[place], markersize=10, marker="o", color="red")
        if show:
            plt.show()
        return ax.figure


class _Rise(Callback):
    """Sets each step's learning rate and records its loss."""

    def __init__(self, found: LearningRates, threshold: float | None) -> None:
        self.found, self.threshold = found, threshold
        self._average, self._best = 0.0, math.inf
        self._losses: list[float] = []

    def on_train_start(self, trainer: Trainer, pl_module: Module) -> None:
        if len(trainer.optimizers) != 1:
            raise ConfigError(f"lr_find() needs one optimizer; there are {len(trainer.optimizers)}.")

    def on_train_batch_start(self, trainer: Trainer, pl_module: Module, batch: Any, batch_idx: int) -> None:
        for group in trainer.optimizers[0].param_groups:
            group["lr"] = self.found.lr_at(trainer.global_step)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Module, outputs: Any, batch: Any, batch_idx: int) -> None:
        loss = outputs.get("loss") if isinstance(outputs, dict) else None
        if loss is None:
            raise ConfigError("lr_find() needs the loss: training_step must return it.")
        self._losses.append(float(loss))
        if trainer.global_step == len(self.found.results["lr"]):
            return  # gradients accumulate
        # Ranks share their losses, so that all see the same curve and stop together.
        mean = torch.tensor(sum(self._losses) / len(self._losses), device=trainer.device)
        value = float(trainer.world.all_reduce(mean, "mean"))
        self._losses.clear()
        step = trainer.global_step
        self._average = _SMOOTHING * self._average + (1 - _SMOOTHING) * value
        smoothed = self._average / (1 - _SMOOTHING**step)
        self.found.results["lr"].append(self.found.lr_at(step - 1))
        self.found.results["loss"].append(smoothed)
        if self.threshold is not None and step > 1 and not smoothed <= self.threshold * self._best:
            trainer.should_stop = True
        self._best = min(self._best, smoothed)


def find_lr(
    trainer: Trainer,
    model: Module,
    data: dict[str, Any],
    *,
    min_lr: float,
    max_lr: float,
    num_training: int,
    mode: str,
    early_stop_threshold: float | None,
    update_attr: bool,
    attr_name: str,
) -> LearningRates:
    """See `Tuner.lr_find`."""
    if mode not in ("exponential", "linear"):
        raise ConfigError(f"lr_find(mode={mode!r}). Allowed: 'exponential', 'linear'.")
    if not 0 < min_lr < max_lr:
        raise ConfigError(f"lr_find(min_lr={min_lr}, max_lr={max_lr}): 0 < min_lr < max_lr must hold.")
    if num_training < 2:
        raise ConfigError(f"lr_find(num_training={num_training}): at least 2 steps.")
    owner = _owner_of([attr_name] if attr_name else ["lr", "learning_rate"], model) if update_attr else None
    found = LearningRates(mode, min_lr, max_lr, num_training)
    trial = _trial(trainer, max_steps=num_training, max_epochs=-1, callbacks=[_Rise(found, early_stop_threshold)])
    with _undisturbed(model, data["datamodule"], trial):
        trial.fit(model, **data)
    if len(found.results["lr"]) < num_training:
        rank_zero_info(f"lr_find() stopped after {len(found.results['lr'])} steps: the loss diverged.")
    if owner is not None and (best := found.suggestion()) is not None:
        _set(*owner, best)
        rank_zero_info(f"lr_find() sets {owner[1]} to {best:.3g}.")
    return found


def find_batch_size(
    trainer: Trainer,
    model: Module,
    datamodule: Any,
    *,
    method: str,
    mode: str,
    steps_per_trial: int,
    init_val: int,
    max_trials: int,
    batch_arg_name: str,
    margin: float,
    max_val: int,
) -> int:
    """See `Tuner.scale_batch_size`."""
    if method not in ("fit", "validate", "test", "predict"):
        raise ConfigError(f"scale_batch_size(method={method!r}). Allowed: 'fit', 'validate', 'test', 'predict'.")
    if mode not in ("power", "binsearch"):
        raise ConfigError(f"scale_batch_size(mode={mode!r}). Allowed: 'power', 'binsearch'.")
    if not 0 <= margin < 1:
        raise ConfigError(f"scale_batch_size(margin={margin}): a fraction in [0, 1).")
    if not 1 <= init_val <= max_val or steps_per_trial < 1 or max_trials < 1:
        raise ConfigError(
            f"scale_batch_size(init_val={init_val}, max_val={max_val}, steps_per_trial={steps_per_trial}, "
            f"max_trials={max_trials}): all must be at least 1, and init_val at most max_val."
        )
    if trainer.world_size > 1:
        raise ConfigError(
            "scale_batch_size() runs on one process: a rank that runs out of memory would leave the others waiting. "
            "Run it with plain python, and give the batch size that it finds to the run with several ranks."
        )
    owner = _owner_of([batch_arg_name], datamodule, model)
    kind = {"fit": "train", "validate": "val"}.get(method, method)

    def batches(size: int) -> int:
        """Batches of an epoch with this size; 0 if it does not fit into memory."""
        _set(*owner, size)
        trial = _trial(trainer, **_steps(method, steps_per_trial))
        with _undisturbed(model, datamodule, trial):
            ran = _within_memory(lambda: getattr(trial, method)(model, datamodule=datamodule))
            return max(1, sum(len(f) if f.sized else 2 for f in trial.data.loaders[kind].feeds)) if ran else 0

    before = _get(*owner)
    try:
        best = _largest(batches, init_val, max_val, max_trials, between=mode == "binsearch")
    except BaseException:
        _set(*owner, before)
        raise
    if mode == "binsearch":
        best = max(1, int(best * (1 - margin)))
    _set(*owner, best)
    rank_zero_info(f"scale_batch_size() sets {batch_arg_name} to {best}.")
    return best


def _largest(batches: Callable[[int], int], start: int, limit: int, trials: int, *, between: bool) -> int:
    """The largest size that fits, among those tried: doublings of start, and with `between` also between them.

    batches(size): how many an epoch then has, 0 if the size does not fit. One that holds all samples is the largest.

    Raises:
        ConfigError: not even 1 fits.
    """
    size, good, bad = start, 0, limit + 1
    for _ in range(trials):
        count = batches(size)
        good, bad = (size, bad) if count else (good, size)
        if not good:
            size = bad // 2
        elif bad > limit:
            size = min(2 * good, limit)
        else:
            size = (good + bad) // 2
        if not size or size == good or count == 1 or (good and bad <= limit and not between):
            break
    if not good:
        raise ConfigError(f"scale_batch_size(): not even a batch of {bad} fits into memory.")
    return good


def _within_memory(act: Callable[[], Any]) -> bool:
    """Whether it runs without running out of memory."""
    try:
        act()
    except RuntimeError as error:
        if not _ran_out(error):
            raise
        return False
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return True


def _ran_out(error: RuntimeError) -> bool:
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError) or any(
        sign in text for sign in ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
    )


def _steps(method: str, steps: int) -> dict[str, Any]:
    if method == "fit":
        return {"max_steps": steps, "max_epochs": -1}
    return {f"limit_{ {'validate': 'val'}.get(method, method) }_batches": steps}


def _trial(trainer: Trainer, **arguments: Any) -> Trainer:
    """A Trainer like this one that leaves no traces."""
    config = trainer.config
    kept = {f.name: getattr(config, f.name) for f in fields(Config) if f.name in _KEPT}
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    validation = {} if "limit_val_batches" in arguments else {"limit_val_batches": 0}
    made = Trainer(**(kept | off | validation | {"num_sanity_val_steps": 0} | arguments))
    # A run folder belongs to the run itself: a trial neither goes on from it nor writes to it.
    made.run_dir = None
    return made


@contextmanager
def _undisturbed(model: Module, datamodule: Any, trial: Trainer) -> Iterator[None]:
    """What a trial changes of the model and the DataModule is put back afterwards.

    Inside of a run they are set up already: there a trial neither does it again nor tears anything down.
    """
    weights = copy.deepcopy(model.state_dict())
    device, mode = model.device, model.training
    running = model._trainer is not None and model._trainer.running
    hooks = ("prepare_data", "setup", "teardown") if running else ()
    shadowed = [(o, name) for o in (model, datamodule) if o is not None for name in hooks]
    shadowed.append((model, "configure_callbacks"))
    kept = [(m, m._trainer, m._metrics) for m in model.modules() if isinstance(m, Module)]
    trainer_of_data = None if datamodule is None else datamodule.trainer
    for owner, name in shadowed:
        owner.__dict__[name] = _nothing
    try:
        with isolate_rng():
            yield
    finally:
        for owner, name in shadowed:
            del owner.__dict__[name]
        if trial.parallel is not None:
            trial.parallel.load_module_state(weights)
        model.zero_grad()
        model.train(mode)
        if trial.parallel is None or not trial.parallel.sharded:
            model.to(device)
        for module, trainer, metrics in kept:
            module.__dict__.update(_trainer=trainer, _metrics=metrics)
        if datamodule is not None:
            datamodule.trainer = trainer_of_data


def _nothing(*_args: Any, **_kwargs: Any) -> list[Any]:
    """Stands for a hook that a trial leaves out."""
    return []


def _owner_of(names: list[str], *candidates: Any) -> tuple[Any, str]:
    """The first of the candidates that has one of the attributes, itself or in its hparams."""
    for name in names:
        for candidate in candidates:
            if candidate is not None and (hasattr(candidate, name) or name in candidate.hparams):
                return candidate, name
    owners = " or ".join(type(c).__name__ for c in candidates if c is not None)
    raise ConfigError(f"{owners} has no attribute (or hyperparameter) {' or '.join(names)} that could be set.")


def set_attribute(name: str, value: Any, *candidates: Any) -> None:
    """Set an attribute (or hyperparameter) of the first candidate that has it."""
    _set(*_owner_of([name], *candidates), value)


def _get(owner: Any, name: str) -> Any:
    return getattr(owner, name) if hasattr(owner, name) else owner.hparams[name]


def _set(owner: Any, name: str, value: Any) -> None:
    """Set it wherever it is."""
    if hasattr(owner, name):
        setattr(owner, name, value)
    if name in owner.hparams:
        owner.hparams[name] = value
