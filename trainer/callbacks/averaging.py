"""Averages of the weights along training: plain, exponential (EMA), and SWA with its own learning rate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trainer.callbacks.callback import Callback
from trainer.errors import CheckpointError, ConfigError
from trainer.ranks import rank_zero_info, rank_zero_warn

if TYPE_CHECKING:
    from collections.abc import Callable

    from trainer.module import Module
    from trainer.trainer import Trainer

RAW = "current_model_state"


class WeightAveraging(Callback):
    """Keeps an average of the weights beside the model, validates with it, and leaves it in the model at the end.

    A checkpoint's `state_dict` holds the average, so `load_from_checkpoint`, `test` and other tools use it; the
    weights that training goes on with stand under `current_model_state`. Sharded parameters are averaged shard by
    shard. Override `should_update` to choose when.

    Args:
        device: where the average is kept; None: where the model is.
        use_buffers: average floating point buffers too (others, and all with False, are the model's newest).
        avg_fn: `avg_fn(averaged, current, count) -> Tensor`, count being how many the average holds so far; default:
            all have the same weight.
    """

    def __init__(
        self,
        device: torch.device | str | None = None,
        use_buffers: bool = True,
        avg_fn: Callable[[Tensor, Tensor, int], Tensor] | None = None,
    ) -> None:
        self._device = None if device is None else torch.device(device)
        self._use_buffers = use_buffers
        self._avg_fn = avg_fn
        self._average: dict[str, Tensor] = {}
        self._count = 0
        self._latest_step = 0
        self._latest_epoch = -1
        self._swapped = False

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Whether to take in the weights now: after the step, or at the end of the epoch, with this number from 0."""
        return step_idx is not None

    def on_fit_start(self, trainer: Trainer, pl_module: Module) -> None:
        if not self._average:
            self._average = {name: self._moved(t).clone() for name, t in self._tensors(pl_module)}

    def on_train_batch_end(self, trainer: Trainer, pl_module: Module, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if step > self._latest_step:
            self._latest_step = step
            if self.should_update(step_idx=step - 1):
                self._update(pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Module) -> None:
        if trainer.current_epoch > self._latest_epoch:
            self._latest_epoch = trainer.current_epoch
            if self.should_update(epoch_idx=trainer.current_epoch):
                self._update(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: Module) -> None:
        if self._count:
            rank_zero_info(f"{type(self).__name__}: the model now holds the average of {self._count} states.")
            self._give(pl_module)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: Module) -> None:
        if trainer.state.fn == "fit" and self._count and not self._swapped:
            self._swap(pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Module) -> None:
        if self._swapped:
            self._swap(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: Module, exception: BaseException) -> None:
        if self._swapped:
            self._swap(pl_module)

    # --------------------------------------------------------------------------------------------- the average

    def _tensors(self, module: nn.Module) -> list[tuple[str, Tensor]]:
        """What is averaged, by its name in the state_dict."""
        found: list[tuple[str, Tensor]] = list(module.named_parameters())
        if self._use_buffers:
            persistent = module.state_dict().keys()
            found += [(n, b) for n, b in module.named_buffers() if b.is_floating_point() and n in persistent]
        return [(name, tensor.detach()) for name, tensor in found]

    def _moved(self, tensor: Tensor) -> Tensor:
        return tensor if self._device is None else tensor.to(self._device)

    @torch.no_grad()
    def _update(self, module: nn.Module) -> None:
        named = self._tensors(module)
        if not self._count:
            for name, tensor in named:
                self._average[name].copy_(tensor)
        else:
            self._take_in([self._average[name] for name, _ in named], [self._moved(tensor) for _, tensor in named])
        self._count += 1

    def _take_in(self, averages: list[Tensor], current: list[Tensor]) -> None:
        if self._avg_fn is not None:
            for average, tensor in zip(averages, current, strict=True):
                average.copy_(self._avg_fn(average, tensor, self._count))
        else:
            torch._foreach_lerp_(averages, current, 1 / (self._count + 1))

    @torch.no_grad()
    def _swap(self, module: nn.Module) -> None:
        for name, tensor in self._tensors(module):
            average = self._average[name]
            kept = average.clone()
            average.copy_(tensor)
            tensor.copy_(kept)
        self._swapped = not self._swapped

    @torch.no_grad()
    def _give(self, module: nn.Module) -> None:
        for name, tensor in self._tensors(module):
            tensor.copy_(self._average[name])

    # ------------------------------------------------------------------------------------------------ its state

    def state_dict(self) -> dict[str, Any]:
        return {"count": self._count, "latest_step": self._latest_step, "latest_epoch": self._latest_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._count = state_dict["count"]
        self._latest_step = state_dict["latest_step"]
        self._latest_epoch = state_dict["latest_epoch"]

    def snapshot_state(self) -> dict[str, Any]:
        return {"own": self.state_dict(), "average": dict(self._average)}

    def load_snapshot_state(self, state: dict[str, Any]) -> None:
        self.load_state_dict(state["own"])
        self._average = state["average"]

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Module, checkpoint: dict[str, Any]) -> None:
        if not self._count:
            return
        current = checkpoint["state_dict"]
        other = {name: self._average.get(name, tensor) for name, tensor in current.items()}
        average, raw = (current, other) if self._swapped else (other, current)
        checkpoint["state_dict"], checkpoint[RAW] = average, raw

    def on_load_checkpoint(self, trainer: Trainer, pl_module: Module, checkpoint: dict[str, Any]) -> None:
        """In `fit` training goes on with the raw weights; elsewhere the average stays in the model."""
        self._swapped = False
        if trainer.state.fn != "fit":
            return
        # The model holds `state_dict`, whose values may come in another layout: take them from there.
        self._average = {name: self._moved(t).clone() for name, t in self._tensors(pl_module)}
        if RAW in checkpoint:
            trainer.parallel.load_module_state(checkpoint[RAW])


class EMAWeightAveraging(WeightAveraging):
    """An exponential moving average: after each update `average = decay * average + (1 - decay) * weights`.

    Args:
        device, use_buffers: see WeightAveraging.
        decay: how much of the old average stays, 0 to 1.
        update_every_n_steps: take in the weights after every n-th optimizer step.
        update_starting_at_step, update_starting_at_epoch: not before that step, and take in the weights at the end
            of every epoch from that one on. Without either it starts at once.
    """

    def __init__(
        self,
        device: torch.device | str | None = None,
        use_buffers: bool = True,
        decay: float = 0.999,
        update_every_n_steps: int = 1,
        update_starting_at_step: int | None = None,
        update_starting_at_epoch: int | None = None,
    ) -> None:
        if not 0 <= decay <= 1:
            raise ConfigError(f"EMAWeightAveraging(decay={decay}). Allowed: 0 to 1.")
        if update_every_n_steps < 1:
            raise ConfigError(f"EMAWeightAveraging(update_every_n_steps={update_every_n_steps}). Allowed: 1 or more.")
        super().__init__(device, use_buffers)
        self.decay = decay
        self.update_every_n_steps = update_every_n_steps
        self.update_starting_at_step = update_starting_at_step
        self.update_starting_at_epoch = update_starting_at_epoch

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        if step_idx is not None:
            begun = self.update_starting_at_step is None or step_idx >= self.update_starting_at_step
            return begun and step_idx % self.update_every_n_steps == 0
        return (
            epoch_idx is not None
            and self.update_starting_at_epoch is not None
            and epoch_idx >= self.update_starting_at_epoch
        )

    def _take_in(self, averages: list[Tensor], current: list[Tensor]) -> None:
        torch._foreach_lerp_(averages, current, 1 - self.decay)


class StochasticWeightAveraging(Callback):
    """SWA (Izmailov et al., 2018): from some epoch on a constant learning rate, and the mean of the epochs' weights.

    The schedulers are replaced by `torch.optim.swa_utils.SWALR` when averaging begins. At the end the model gets the
    averaged weights, and its BatchNorm layers new statistics from one pass over the training data.

    Args:
        swa_lrs: learning rate(s) while averaging, one or one per parameter group.
        swa_epoch_start: first epoch that is averaged, counted from 1; a float is a share of max_epochs.
        annealing_epochs, annealing_strategy: how the learning rate gets there ("cos" or "linear").
        avg_fn: see WeightAveraging.
        device: where the average is kept; None: where the model is.

    Raises:
        ConfigError: an argument is out of range, or (during `fit`) there is not exactly one optimizer and at most one
            scheduler, or no max_epochs.
    """

    def __init__(
        self,
        swa_lrs: float | list[float],
        swa_epoch_start: float = 0.8,
        annealing_epochs: int = 10,
        annealing_strategy: str = "cos",
        avg_fn: Callable[[Tensor, Tensor, int], Tensor] | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        rates = swa_lrs if isinstance(swa_lrs, list) else [swa_lrs]
        if not rates or not all(isinstance(r, (int, float)) and r > 0 for r in rates):
            raise ConfigError(f"StochasticWeightAveraging(swa_lrs={swa_lrs!r}). Allowed: a positive number, or a list.")
        whole = isinstance(swa_epoch_start, int)
        if swa_epoch_start < whole or (not whole and swa_epoch_start > 1):
            raise ConfigError(
                f"StochasticWeightAveraging(swa_epoch_start={swa_epoch_start!r}). Allowed: an epoch from 1, or a share "
                "between 0.0 and 1.0."
            )
        if annealing_strategy not in ("cos", "linear"):
            raise ConfigError(
                f"StochasticWeightAveraging(annealing_strategy={annealing_strategy!r}). Allowed: cos, linear."
            )
        self._rates = swa_lrs
        self._start = swa_epoch_start
        self._annealing_epochs = annealing_epochs
        self._strategy = annealing_strategy
        self._begun = False
        self._averaging = WeightAveraging(device, use_buffers=False, avg_fn=avg_fn)

    def first_epoch(self, max_epochs: int) -> int:
        """The first epoch that is averaged, from 0."""
        return max(0, (self._start if isinstance(self._start, int) else int(max_epochs * self._start)) - 1)

    def on_fit_start(self, trainer: Trainer, pl_module: Module) -> None:
        if len(trainer.optimizers) != 1 or len(trainer.lr_scheduler_configs) > 1:
            raise ConfigError("StochasticWeightAveraging works with one optimizer and at most one scheduler.")
        if trainer.max_epochs is None or trainer.max_epochs < 1:
            raise ConfigError("StochasticWeightAveraging needs max_epochs, to know when to begin.")
        self._averaging.on_fit_start(trainer, pl_module)
        if self._begun:
            # Resumed while averaging: the scheduler's state, which is restored next, is that of SWALR.
            self._install_scheduler(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Module) -> None:
        assert trainer.max_epochs is not None
        if not self._begun and trainer.current_epoch >= self.first_epoch(trainer.max_epochs):
            self._begun = True
            self._install_scheduler(trainer)

    def _install_scheduler(self, trainer: Trainer) -> None:
        from torch.optim.swa_utils import SWALR

        from trainer.optimizers import SchedulerConfig

        optimizer = trainer.optimizers[0]
        for group in optimizer.param_groups:
            # The replaced scheduler's: SWALR starts from where the rate is now.
            group["initial_lr"] = group["lr"]
        scheduler = SWALR(
            optimizer, swa_lr=self._rates, anneal_epochs=self._annealing_epochs, anneal_strategy=self._strategy  # type: ignore[arg-type]
        )  # fmt: skip
        if trainer.lr_scheduler_configs and not self._averaging._count:
            replaced = type(trainer.lr_scheduler_configs[0].scheduler).__name__
            rank_zero_info(f"StochasticWeightAveraging replaces {replaced} by SWALR.")
        trainer.lr_scheduler_configs[:] = [SchedulerConfig(scheduler)]

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Module) -> None:
        averaging = self._averaging
        if self._begun and trainer.current_epoch > averaging._latest_epoch:
            averaging._latest_epoch = trainer.current_epoch
            averaging._update(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: Module) -> None:
        if not self._averaging._count:
            rank_zero_warn("StochasticWeightAveraging: training ended before averaging began.")
            return
        self._averaging.on_train_end(trainer, pl_module)
        self._renew_batch_norm(trainer, pl_module)

    def _renew_batch_norm(self, trainer: Trainer, pl_module: Module) -> None:
        """New running statistics for the averaged weights: the mean over one pass, and over the ranks."""
        layers = [m for m in pl_module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        layers = [m for m in layers if m.running_mean is not None]
        if not layers:
            return
        momenta = [layer.momentum for layer in layers]
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None  # a plain mean over all batches
        # What the step logs in this pass goes into a section of its own, which is never reported.
        metrics = trainer.metrics
        assert metrics is not None
        hook = metrics.hook
        metrics.enter("batch_norm")
        metrics.hook = "training_step"
        training = pl_module.training
        pl_module.train()
        try:
            with torch.no_grad(), trainer.precision_object.context():
                for index, batch in enumerate(trainer.train_dataloader):
                    if index >= trainer.num_training_batches:
                        break
                    metrics.batch = pl_module.transfer_batch_to_device(batch, trainer.device, 0)
                    pl_module.training_step(metrics.batch, index)
        finally:
            metrics.reset()
            metrics.enter("train")
            metrics.hook = hook
            pl_module.train(training)
            for layer, momentum in zip(layers, momenta, strict=True):
                layer.momentum = momentum
        for layer in layers:
            for statistic in (layer.running_mean, layer.running_var):
                assert statistic is not None
                statistic.copy_(trainer.strategy.reduce(statistic, reduce_op="mean"))

    def state_dict(self) -> dict[str, Any]:
        averaging = self._averaging
        average = dict(averaging._average) if averaging._count else {}
        return {"begun": self._begun, "average": average, "averaging": averaging.state_dict()}

    def snapshot_state(self) -> dict[str, Any]:
        return {"begun": self._begun, "averaging": self._averaging.snapshot_state()}

    def load_snapshot_state(self, state: dict[str, Any]) -> None:
        self._begun = state["begun"]
        self._averaging.load_snapshot_state(state["averaging"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        try:
            self._begun = state_dict["begun"]
            self._averaging.load_state_dict(state_dict["averaging"])
            self._averaging._average = {n: self._averaging._moved(t) for n, t in state_dict["average"].items()}
        except KeyError as error:
            raise CheckpointError(
                f"The checkpoint's state of StochasticWeightAveraging has no {error}: it was written by another "
                "package. Resume without the callback, or from its weights alone."
            ) from error
