"""`Module`: what a user writes to say how a model is trained. A plain `nn.Module` with hooks."""

# ruff: noqa: ARG002 - a hook's default does not use what an override may

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn

from trainer.errors import LoggingError, ModuleError
from trainer.hparams import HyperParameters, build_from_hparams
from trainer.optimizers import parameters_of, unwrap
from trainer.ranks import rank_zero_warn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from torch import Tensor
    from torch.optim import Optimizer
    from typing_extensions import Self

    from trainer.metrics import Metrics
    from trainer.trainer import Trainer


class DataHooks:
    """Hooks about data, which a Module and a DataModule share."""

    prepare_data_per_node: bool = True
    allow_zero_length_dataloader_with_multiple_devices: bool = False

    def prepare_data(self) -> None:
        """Download, tokenise, ...: called once per node (once in all with `prepare_data_per_node = False`).

        It runs before `setup`, while the other ranks wait. Do not assign state here: they would not have it.
        """

    def setup(self, stage: str) -> None:
        """Called on every rank before the loaders are asked for. stage: fit, validate, test or predict."""

    def teardown(self, stage: str) -> None:
        """Called on every rank at the end of fit, validate, test or predict."""

    def train_dataloader(self) -> Any:
        """Return the training loader: a DataLoader, any iterable, or a list or dict of them."""
        raise ModuleError(f"{type(self).__name__} has no train_dataloader(); define it or pass a loader to fit().")

    def val_dataloader(self) -> Any:
        """Return the validation loader(s)."""
        raise ModuleError(f"{type(self).__name__} has no val_dataloader(); define it or pass a loader.")

    def test_dataloader(self) -> Any:
        """Return the test loader(s)."""
        raise ModuleError(f"{type(self).__name__} has no test_dataloader(); define it or pass a loader to test().")

    def predict_dataloader(self) -> Any:
        """Return the loader(s) to predict on."""
        raise ModuleError(
            f"{type(self).__name__} has no predict_dataloader(); define it or pass a loader to predict()."
        )

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Change the batch before it moves to the device."""
        return batch

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move a batch of a type of your own. Tensors in lists, tuples, dicts and dataclasses need no override."""
        from trainer.loading import to_device

        return to_device(batch, device)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Change the batch on the device."""
        return batch


class Module(HyperParameters, DataHooks, nn.Module):
    """A model and how it is trained, validated, tested and used.

    Only overridden hooks are ever called. It stays an `nn.Module`: it can be called, moved, saved and taken apart
    without a Trainer.
    """

    # Keeps torch.jit from compiling properties that need the Trainer.
    __jit_unused_properties__ = (
        "example_input_array", "device", "dtype", "on_gpu", "current_epoch", "global_step", "global_rank",
        "local_rank", "logger", "loggers", "trainer", "automatic_optimization", "strict_loading", "hparams",
        "hparams_initial", "world_size", "device_mesh",
    )  # fmt: skip

    if TYPE_CHECKING:  # torch.jit evaluates a class's annotations, and does not know these
        _trainer: Trainer | None
        _metrics: Metrics | None
        _automatic_optimization: bool
        _strict_loading: bool
        _example_input_array: Any
        _frozen_by_toggle: dict[Tensor, bool]
        _exporting: bool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        # Written around nn.Module.__setattr__, whose checks have nothing to do with these.
        self.__dict__.update(_trainer=None, _metrics=None, _automatic_optimization=True, _strict_loading=True,
                             _example_input_array=None, _frozen_by_toggle={}, _exporting=False)  # fmt: skip

    # ------------------------------------------------------------------------------------------ the steps

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model computes; used for inference and by the default `predict_step`."""
        return super().forward(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """`training_step(batch, batch_idx)`: the loss, or a dict with "loss", or None to skip the batch."""
        raise ModuleError(f"{type(self).__name__} has no training_step(batch, batch_idx); define it to use fit().")

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """`validation_step(batch, batch_idx, dataloader_idx=0)`: log what you want to know; no gradients here."""
        raise ModuleError(f"{type(self).__name__} has no validation_step(batch, batch_idx).")

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """`test_step(batch, batch_idx, dataloader_idx=0)`."""
        raise ModuleError(f"{type(self).__name__} has no test_step(batch, batch_idx).")

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """`predict_step(batch, batch_idx, dataloader_idx=0)`: one batch's predictions. Default: `self(batch)`."""
        return self(args[0] if args else next(iter(kwargs.values())))

    def configure_optimizers(self) -> Any:
        """Return the optimizer(s), with or without schedulers; see `trainer.optimizers` for the forms."""
        raise ModuleError(f"{type(self).__name__} has no configure_optimizers(); define it to use fit().")

    def configure_callbacks(self) -> Any:
        """Return callbacks that belong to this model; they replace the Trainer's of the same type."""
        return []

    def configure_model(self) -> None:
        """Build (large) layers here: it runs on every rank, on the device and in the precision of training.

        It may be called more than once, so make each layer only if it is not there yet.
        """

    def tokens_in_batch(self, batch: Any) -> int:
        """Override it to have speed told in tokens, not samples: how many are in this rank's training batch.

        It is asked now and then, not at every step; where lengths vary, give ThroughputMonitor a `length_fn`.
        """
        raise NotImplementedError

    # ------------------------------------------------------------------------------------- optimization

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Back-propagate the loss (already scaled for accumulation and mixed precision)."""
        loss.backward(*args, **kwargs)  # type: ignore[no-untyped-call]

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """Step the optimizer; `optimizer_closure` runs training_step, zero_grad and backward and must be called."""
        optimizer.step(closure=optimizer_closure)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        """Clear the gradients."""
        optimizer.zero_grad()

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip before the optimizer step; the default does what the Trainer's arguments say."""
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def clip_gradients(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the optimizer's gradients by "norm" (default) or "value"; also usable in manual optimization."""
        trainer = self.trainer
        value = trainer.gradient_clip_val if gradient_clip_val is None else gradient_clip_val
        if value is None:
            return
        algorithm = gradient_clip_algorithm or trainer.gradient_clip_algorithm or "norm"
        trainer.parallel.clip(parameters_of(unwrap(optimizer)), float(value), algorithm)

    def lr_scheduler_step(self, scheduler: Any, metric: Any | None) -> None:
        """Step a scheduler; `metric` is the monitored value of a plateau scheduler, else None."""
        if metric is None:
            scheduler.step()
        else:
            scheduler.step(metric)

    def optimizers(self, use_pl_optimizer: bool = True) -> Any:
        """The optimizer, or the list of them if there are several.

        `use_pl_optimizer=False` gives those that you made; with the default their `step` counts global steps and
        goes through the loss scaler.
        """
        found = self.trainer.wrapped_optimizers if use_pl_optimizer else self.trainer.optimizers
        return found[0] if len(found) == 1 else list(found)

    def lr_schedulers(self) -> Any:
        """None, the scheduler, or the list of them if there are several."""
        found = [config.scheduler for config in self.trainer.lr_scheduler_configs]
        return None if not found else found[0] if len(found) == 1 else found

    def manual_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Back-propagate in manual optimization, with the loss scaling that the precision wants."""
        if self.automatic_optimization:
            raise ModuleError(
                "manual_backward() is for manual optimization. Set self.automatic_optimization = False in __init__."
            )
        self.trainer.backward(loss, *args, **kwargs)

    def toggle_optimizer(self, optimizer: Any) -> None:
        """Only this optimizer's parameters require gradients until `untoggle_optimizer`."""
        mine = {id(p) for p in parameters_of(unwrap(optimizer))}
        before: dict[Tensor, bool] = {}
        for other in self.trainer.optimizers:
            for parameter in parameters_of(other):
                before.setdefault(parameter, parameter.requires_grad)
                if id(parameter) not in mine:
                    parameter.requires_grad = False
        self._frozen_by_toggle = before

    def untoggle_optimizer(self, optimizer: Any) -> None:
        """Undo `toggle_optimizer`."""
        for parameter, required in self._frozen_by_toggle.items():
            parameter.requires_grad = required
        self._frozen_by_toggle = {}

    @contextmanager
    def toggled_optimizer(self, optimizer: Any) -> Iterator[None]:
        """`toggle_optimizer` for the length of a with block."""
        self.toggle_optimizer(optimizer)
        try:
            yield
        finally:
            self.untoggle_optimizer(optimizer)

    # ------------------------------------------------------------------------------------------- logging

    def log(
        self,
        name: str,
        value: Any,
        prog_bar: bool = False,
        logger: bool | None = None,
        on_step: bool | None = None,
        on_epoch: bool | None = None,
        reduce_fx: Any = "mean",
        enable_graph: bool = False,
        sync_dist: bool | None = None,
        sync_dist_group: Any | None = None,
        add_dataloader_idx: bool = True,
        batch_size: int | None = None,
        metric_attribute: str | None = None,
        rank_zero_only: bool = False,
    ) -> None:
        """Log one number: a float, a tensor of one element, or a torchmetrics object.

        on_step: report the value itself, every `log_every_n_steps`. on_epoch: report the reduction over the epoch.
        The defaults follow the hook that logs: steps in training hooks, the epoch elsewhere. With both, the names
        get the suffixes `_step` and `_epoch`.
        reduce_fx: mean (weighted by batch size), sum, min or max. batch_size: if it cannot be read off the batch.
        sync_dist: None reduces epoch values over the ranks (in one exchange per report) and leaves step values
        those of rank 0; True reduces both; False neither. Every rank must log the same names, except with
        `rank_zero_only=True`, `sync_dist=False`.
        enable_graph and metric_attribute are accepted for code written for Lightning and have no effect.
        """
        metrics = self._metrics
        if metrics is None:
            self._log_without_trainer(name)
            return
        metrics.log(
            name, value, prog_bar, logger, on_step, on_epoch, reduce_fx, sync_dist, sync_dist_group,
            add_dataloader_idx, batch_size, rank_zero_only,
        )  # fmt: skip

    def log_dict(
        self,
        dictionary: Mapping[str, Any],
        prog_bar: bool = False,
        logger: bool | None = None,
        on_step: bool | None = None,
        on_epoch: bool | None = None,
        reduce_fx: Any = "mean",
        enable_graph: bool = False,
        sync_dist: bool | None = None,
        sync_dist_group: Any | None = None,
        add_dataloader_idx: bool = True,
        batch_size: int | None = None,
        rank_zero_only: bool = False,
    ) -> None:
        """`log` for each item of a dict or a torchmetrics MetricCollection."""
        metrics = self._metrics
        if metrics is None:
            self._log_without_trainer(", ".join(map(str, dictionary)))
            return
        items: Any
        if hasattr(dictionary, "compute_groups"):  # a MetricCollection: its items carry the prefix, uncopied
            items = dictionary.items(keep_base=False, copy_state=False)  # type: ignore[call-arg]
        else:
            items = dictionary.items()
        for name, value in items:
            metrics.log(
                name, value, prog_bar, logger, on_step, on_epoch, reduce_fx, sync_dist, sync_dist_group,
                add_dataloader_idx, batch_size, rank_zero_only,
            )  # fmt: skip

    def _log_without_trainer(self, name: str) -> None:
        if self._trainer is None:
            # Not an error, so that a step can be tried without a Trainer.
            rank_zero_warn(f"self.log({name!r}, ...) outside of a Trainer: the value goes nowhere.")
        elif not self._trainer.barebones:
            raise LoggingError(
                f"self.log({name!r}, ...) was called outside of the hooks of a running fit, validate or test."
            )

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print on global rank 0 only."""
        if self._trainer is None or self._trainer.is_global_zero:
            print(*args, **kwargs)  # noqa: T201

    @property
    def logger(self) -> Any | None:
        """The first logger, or None."""
        return self.trainer.logger if self._trainer is not None else None

    @property
    def loggers(self) -> list[Any]:
        """All loggers."""
        return list(self.trainer.loggers) if self._trainer is not None else []

    def all_gather(self, data: Any, group: Any | None = None, sync_grads: bool = False) -> Any:
        """Gather a tensor, or every tensor in a collection, from all ranks: shape (world_size, *shape).

        On one process the tensors come back as they are. `sync_grads` lets gradients flow through the gathering.
        """
        return self.trainer.all_gather(data, group=group, sync_grads=sync_grads)

    # ------------------------------------------------------------------------------------- where am I

    @property
    def trainer(self) -> Trainer:
        """The Trainer that runs this module."""
        if self._trainer is None and not self._exporting:
            raise ModuleError(f"{type(self).__name__} is not attached to a Trainer; call trainer.fit(model) first.")
        return self._trainer  # type: ignore[return-value] # torch.jit looks at every property

    @trainer.setter
    def trainer(self, trainer: Trainer | None) -> None:
        for child in self.modules():
            if isinstance(child, Module):
                child.__dict__["_trainer"] = trainer

    @property
    def current_epoch(self) -> int:
        """Epochs finished so far; 0 without a Trainer."""
        return self._trainer.current_epoch if self._trainer is not None else 0

    @property
    def global_step(self) -> int:
        """Optimizer steps taken so far; 0 without a Trainer."""
        return self._trainer.global_step if self._trainer is not None else 0

    @property
    def device_mesh(self) -> Any:
        """The ranks as a DeviceMesh, for `configure_model`, with strategies that shard; else None."""
        parallel = self._trainer.parallel if self._trainer is not None else None
        return None if parallel is None else parallel.device_mesh

    @property
    def global_rank(self) -> int:
        """Rank among all processes; 0 without a Trainer."""
        return self._trainer.global_rank if self._trainer is not None else 0

    @property
    def local_rank(self) -> int:
        """Rank among the processes of this node; 0 without a Trainer."""
        return self._trainer.local_rank if self._trainer is not None else 0

    @property
    def world_size(self) -> int:
        """Number of ranks; 1 without a Trainer."""
        return self._trainer.world_size if self._trainer is not None else 1

    @property
    def device(self) -> torch.device:
        """Where the parameters are; before they are moved, where the Trainer will move them."""
        if self._trainer is not None and self._trainer.running:
            return self._trainer.device
        for tensor in (*self.parameters(), *self.buffers()):
            return tensor.device
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """Type of the first floating parameter."""
        for tensor in (*self.parameters(), *self.buffers()):
            if tensor.is_floating_point():
                return tensor.dtype
        return torch.get_default_dtype()

    @property
    def on_gpu(self) -> bool:
        """Whether the parameters are on a CUDA device."""
        return self.device.type == "cuda"

    @property
    def automatic_optimization(self) -> bool:
        """Whether the Trainer runs backward and the optimizer (else training_step does)."""
        return bool(self._automatic_optimization)

    @automatic_optimization.setter
    def automatic_optimization(self, value: bool) -> None:
        self.__dict__["_automatic_optimization"] = value

    @property
    def strict_loading(self) -> bool:
        """Whether a checkpoint must hold exactly the parameters of this module."""
        return bool(self._strict_loading)

    @strict_loading.setter
    def strict_loading(self, value: bool) -> None:
        self.__dict__["_strict_loading"] = value

    @property
    def example_input_array(self) -> Any:
        """An input for summaries, graphs and exports."""
        return self._example_input_array

    @example_input_array.setter
    def example_input_array(self, value: Any) -> None:
        self.__dict__["_example_input_array"] = value

    # ------------------------------------------------------------------------------- weights and files

    def freeze(self) -> Self:
        """No parameter requires gradients, and the module is in eval mode."""
        for parameter in self.parameters():
            parameter.requires_grad = False
        return self.eval()

    def unfreeze(self) -> Self:
        """Every parameter requires gradients, and the module is in train mode."""
        for parameter in self.parameters():
            parameter.requires_grad = True
        return self.train()

    @classmethod
    def load_from_checkpoint(
        cls,
        checkpoint_path: str | Path,
        map_location: Any = None,
        hparams_file: str | Path | None = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        **kwargs: Any,
    ) -> Self:
        """Build the module from a checkpoint's hyperparameters (`kwargs` win) and load its weights.

        checkpoint_path: a torch file, Lightning's own .ckpt, or a folder of shards; a path or any fsspec URL.
        strict: whether the weights must fit exactly (default: the module's `strict_loading`). hparams_file: a YAML
        file that replaces the saved hyperparameters. weights_only=False allows a file that holds pickled objects,
        which runs code from it.
        """
        from trainer.checkpoint import load_checkpoint

        checkpoint = load_checkpoint(checkpoint_path, map_location=map_location, weights_only=weights_only is not False)
        if hparams_file is not None:
            import yaml  # type: ignore[import-untyped]

            with open(hparams_file) as file:
                checkpoint[cls.CHECKPOINT_HYPER_PARAMS_KEY] = yaml.safe_load(file)
        module: Self = build_from_hparams(cls, checkpoint, kwargs)
        if type(module).configure_model is not Module.configure_model:
            module.configure_model()
        module.on_load_checkpoint(checkpoint)
        strictly = module.strict_loading if strict is None else strict
        result = module.load_state_dict(checkpoint["state_dict"], strict=strictly)
        if not strictly and (result.missing_keys or result.unexpected_keys):
            rank_zero_warn(
                f"Loaded {checkpoint_path} with strict=False: missing {result.missing_keys}, "
                f"left over {result.unexpected_keys}."
            )
        if map_location is not None and isinstance(map_location, (str, torch.device)):
            module.to(map_location)
        return module

    def to_onnx(
        self, file_path: Any = None, input_sample: Any = None, *, export_params: bool = True, **kwargs: Any
    ) -> Any:
        """Export `forward` as ONNX, to a path or file object; without one the program is returned.

        input_sample: a tensor, or a tuple of the inputs of `forward`; default: `example_input_array`. kwargs: those of
        torch.onnx.export, e.g. dynamic_shapes or input_names.

        Raises:
            ConfigError: onnx and onnxscript are not installed. ModuleError: there are no inputs to export with.
        """
        from trainer.export import to_onnx

        return to_onnx(self, file_path, input_sample, export_params=export_params, **kwargs)

    def to_torchscript(
        self, file_path: Any = None, method: str = "script", example_inputs: Any = None, **kwargs: Any
    ) -> Any:
        """Compile the module for torch.jit, by "script" or "trace" (of example_inputs or `example_input_array`).

        file_path: where to save it too, a path or fsspec URL. (torch advises torch.export for what is new: a Module is
        a plain nn.Module to `torch.export.export(module, inputs)`.)
        """
        from trainer.export import to_torchscript

        return to_torchscript(self, file_path, method, example_inputs, **kwargs)

    def load_weights(
        self,
        path: str | Path,
        *,
        only: str = "*",
        rename: Mapping[str, str] | None = None,
        strict: bool | None = None,
    ) -> list[str]:
        """A warm start: weights of any checkpoint, ours, a torch or a safetensors file, put into this module.

        path: a path or fsspec URL. only: a shell pattern on names, such as "encoder.*". rename: regular expressions
        and what their match becomes: {"^backbone\\.": "encoder."}. strict: whether every weight of the module must be
        there; default: if `only` selects all. Returns the names that were loaded.

        Raises:
            CheckpointError: something does not fit; says what.
        """
        from trainer.checkpoint import load_weights

        return load_weights(self, path, only=only, rename=rename, strict=strict)

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        # A copy or a pickled module is not part of this run.
        state.update(_trainer=None, _metrics=None)
        return state

    # --------------------------------------------------------- hooks, in the order in which they are called

    def on_fit_start(self) -> None:
        """At the very beginning of fit, on the device."""

    def on_fit_end(self) -> None:
        """At the very end of fit."""

    def on_train_start(self) -> None:
        """After the sanity check, before the first epoch."""

    def on_train_end(self) -> None:
        """After the last epoch."""

    def on_train_epoch_start(self) -> None:
        """Before the first batch of an epoch."""

    def on_train_epoch_end(self) -> None:
        """After the last batch of an epoch and its validation."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        """Before a batch; return -1 to skip the rest of the epoch."""

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """After a batch; outputs is {"loss": ..., and what else training_step returned}."""

    def on_before_zero_grad(self, optimizer: Optimizer) -> None:
        """Before the gradients are cleared."""

    def on_before_backward(self, loss: Tensor) -> None:
        """Before back-propagation."""

    def on_after_backward(self) -> None:
        """After back-propagation, gradients still scaled in 16-mixed."""

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Before clipping and the optimizer step, gradients unscaled."""

    def on_validation_start(self) -> None:
        """At the beginning of a validation."""

    def on_validation_end(self) -> None:
        """At the end of a validation."""

    def on_validation_epoch_start(self) -> None:
        """Before the first validation batch."""

    def on_validation_epoch_end(self) -> None:
        """After the last validation batch, with the epoch's values in `trainer.callback_metrics`."""

    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Before a validation batch."""

    def on_validation_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """After a validation batch."""

    def on_validation_model_zero_grad(self) -> None:
        """Before a validation inside fit: free the gradients' memory."""
        self.zero_grad()

    def on_validation_model_eval(self) -> None:
        """Put the module into eval mode for validation."""
        self.eval()

    def on_validation_model_train(self) -> None:
        """Undo eval mode after validation (by default every sub-module gets its own mode back)."""

    def on_test_start(self) -> None:
        """At the beginning of test."""

    def on_test_end(self) -> None:
        """At the end of test."""

    def on_test_epoch_start(self) -> None:
        """Before the first test batch."""

    def on_test_epoch_end(self) -> None:
        """After the last test batch."""

    def on_test_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Before a test batch."""

    def on_test_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """After a test batch."""

    def on_test_model_eval(self) -> None:
        """Put the module into eval mode for test."""
        self.eval()

    def on_test_model_train(self) -> None:
        """Undo eval mode after test (by default every sub-module gets its own mode back)."""

    def on_predict_start(self) -> None:
        """At the beginning of predict."""

    def on_predict_end(self) -> None:
        """At the end of predict."""

    def on_predict_epoch_start(self) -> None:
        """Before the first batch of predict."""

    def on_predict_epoch_end(self) -> None:
        """After the last batch of predict."""

    def on_predict_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Before a batch of predict."""

    def on_predict_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """After a batch of predict."""

    def on_predict_model_eval(self) -> None:
        """Put the module into eval mode for predict."""
        self.eval()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add to, or change, what a checkpoint holds."""

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """See (and may change) a checkpoint before the weights are loaded from it."""
