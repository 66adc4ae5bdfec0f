"""The interface of a callback: code that acts at points of a run without being part of the model.

Only hooks that a class overrides are ever called (see `trainer.hooks`), so an empty hook costs nothing.
Names and signatures are those of Lightning 2.6.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trainer.errors import LoggingError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor
    from torch.optim import Optimizer

    from trainer.module import Module
    from trainer.trainer import Trainer


class Callback:
    """Override the hooks you need and pass the object in `Trainer(callbacks=[...])`.

    Hooks run on every rank, in the order of the list, after the trainer's own work of that point and before the
    module's hook of the same name. A callback whose state must survive a restart returns it from `state_dict`.
    """

    # While a run lasts: the module, whose values a callback may log as well.
    _module: Module | None = None

    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        """Log one number, as the module does in the hook of the same name; see `Module.log`."""
        self._logging(name).log(name, value, *args, **kwargs)

    def log_dict(self, dictionary: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        """`log` for each item of a dict; see `Module.log_dict`."""
        self._logging(", ".join(map(str, dictionary))).log_dict(dictionary, *args, **kwargs)

    def _logging(self, name: str) -> Module:
        if self._module is None:
            raise LoggingError(
                f"{type(self).__name__}.log({name!r}, ...) was called outside of the hooks of a running fit, validate "
                "or test."
            )
        return self._module

    @property
    def state_key(self) -> str:
        """Under this key the callback's state stands in a checkpoint.

        Two callbacks of one class in one trainer must differ here: build the key from the arguments that
        distinguish them, with `_generate_state_key`.
        """
        return type(self).__qualname__

    def _generate_state_key(self, **kwargs: Any) -> str:
        return f"{type(self).__qualname__}{kwargs!r}"

    def state_dict(self) -> dict[str, Any]:
        """What must survive a restart: tensors and plain values, no other objects."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what `state_dict` returned; called before `on_train_start`."""

    def snapshot_state(self) -> dict[str, Any]:
        """What goes back with training when `Trainer(guard=...)` undoes a step: tensors (copied) and plain values.

        By default the `state_dict`. Empty for what goes on: clocks, and what tells of files.
        """
        return self.state_dict()

    def load_snapshot_state(self, state: dict[str, Any]) -> None:
        """Take back, in the middle of training, what `snapshot_state` returned."""
        self.load_state_dict(state)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Module, checkpoint: dict[str, Any]) -> None:
        """Add to, or change, the checkpoint that is about to be written."""

    def on_load_checkpoint(self, trainer: Trainer, pl_module: Module, checkpoint: dict[str, Any]) -> None:
        """Read from, or change, the checkpoint that was read, before anything is restored from it."""

    # ------------------------------------------------------------------------------------------- whole runs

    def setup(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        """Before fit, validate, test or predict begins; `stage` is that word."""

    def teardown(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        """After fit, validate, test or predict has ended, however it ended."""

    def on_exception(self, trainer: Trainer, pl_module: Module, exception: BaseException) -> None:
        """An exception leaves fit, validate, test or predict."""

    def on_fit_start(self, trainer: Trainer, pl_module: Module) -> None:
        """The model is on its device, nothing has been restored yet."""

    def on_fit_end(self, trainer: Trainer, pl_module: Module) -> None:
        """Training and its last validation are over."""

    def on_sanity_check_start(self, trainer: Trainer, pl_module: Module) -> None:
        """Before the short validation that precedes training."""

    def on_sanity_check_end(self, trainer: Trainer, pl_module: Module) -> None:
        """After the short validation that precedes training."""

    # --------------------------------------------------------------------------------------------- training

    def on_train_start(self, trainer: Trainer, pl_module: Module) -> None:
        """Everything is restored, the first epoch is about to begin."""

    def on_train_end(self, trainer: Trainer, pl_module: Module) -> None:
        """The last epoch is over."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Module) -> None:
        """An epoch of training begins."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Module) -> None:
        """An epoch of training has ended, its metrics are in `trainer.callback_metrics`."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: Module, batch: Any, batch_idx: int) -> None:
        """A batch is on the device, `training_step` has not seen it yet."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: Module, outputs: Any, batch: Any, batch_idx: int) -> None:
        """The batch is done; `outputs` is what `training_step` returned."""

    def on_before_backward(self, trainer: Trainer, pl_module: Module, loss: Tensor) -> None:
        """Before `loss.backward()`; the loss is already divided by the number of accumulated batches."""

    def on_after_backward(self, trainer: Trainer, pl_module: Module) -> None:
        """Gradients of this batch are there."""

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Module, optimizer: Optimizer) -> None:
        """Gradients are complete and unscaled, but not yet clipped."""

    def on_before_zero_grad(self, trainer: Trainer, pl_module: Module, optimizer: Optimizer) -> None:
        """Before the gradients are cleared."""

    # ------------------------------------------------------------------------------------------- validation

    def on_validation_start(self, trainer: Trainer, pl_module: Module) -> None:
        """A validation begins."""

    def on_validation_end(self, trainer: Trainer, pl_module: Module) -> None:
        """A validation has ended, its metrics are in `trainer.callback_metrics`."""

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: Module) -> None:
        """Validation is about to read its loaders."""

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Module) -> None:
        """Validation has read its loaders; what is logged here belongs to it."""

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: Module, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Before `validation_step`."""

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: Module, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """After `validation_step`, which returned `outputs`."""

    # ------------------------------------------------------------------------------------------------- test

    def on_test_start(self, trainer: Trainer, pl_module: Module) -> None:
        """A test begins."""

    def on_test_end(self, trainer: Trainer, pl_module: Module) -> None:
        """A test has ended."""

    def on_test_epoch_start(self, trainer: Trainer, pl_module: Module) -> None:
        """The test is about to read its loaders."""

    def on_test_epoch_end(self, trainer: Trainer, pl_module: Module) -> None:
        """The test has read its loaders; what is logged here belongs to it."""

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: Module, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Before `test_step`."""

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: Module, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """After `test_step`, which returned `outputs`."""

    # ---------------------------------------------------------------------------------------------- predict

    def on_predict_start(self, trainer: Trainer, pl_module: Module) -> None:
        """Prediction begins."""

    def on_predict_end(self, trainer: Trainer, pl_module: Module) -> None:
        """Prediction has ended."""

    def on_predict_epoch_start(self, trainer: Trainer, pl_module: Module) -> None:
        """Prediction is about to read its loaders."""

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: Module) -> None:
        """Prediction has read its loaders."""

    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: Module, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Before `predict_step`."""

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: Module, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """After `predict_step`, which returned `outputs`."""
