"""What goes to the loggers, at which step, and what of it a checkpoint must hold."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trainer.errors import ConfigError
from trainer.loggers.logger import SilentLogger

if TYPE_CHECKING:
    from trainer.config import Config
    from trainer.metrics import Metrics
    from trainer.module import Module
    from trainer.trainer import Trainer


def make_loggers(config: Config, root_dir: str) -> list[Any]:
    """The loggers that were given, or the default: TensorBoard's. With fast_dev_run one that takes everything."""
    if not config.logger:
        return []
    if config.fast_dev_run:
        return [SilentLogger()]
    if config.logger is True:
        from trainer.loggers import TensorBoardLogger

        return [TensorBoardLogger(save_dir=root_dir)]
    return list(config.logger) if isinstance(config.logger, (list, tuple)) else [config.logger]


class Reports:
    """Gives the Trainer's loggers their values."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        # What the loggers were given for the newest step.
        self._rows: list[tuple[int, dict[str, float]]] = []
        # Steps before this one are repeated after a rollback, and the loggers have them.
        self.told_until = 0

    @property
    def _metrics(self) -> Metrics:
        assert self._trainer.metrics is not None
        return self._trainer.metrics

    def step(self) -> None:
        """Give the loggers what was logged per step."""
        self.log(self._metrics.step_report(), None)

    def epoch(self) -> None:
        """Give the loggers what was logged per epoch, at the step of the epoch's last batch."""
        values = self._metrics.epoch_values()
        if values:
            self.log(values, None if "step" in values else max(0, self._trainer.train_state.logger_step - 1))

    def evaluation(self, values: dict[str, Any]) -> None:
        """Give the loggers the results of a validation or test."""
        self.log({k: v.item() for k, v in values.items()}, None)

    def evaluation_step(self, index: int) -> None:
        """Give the loggers what an evaluation step logged with on_step=True."""
        if self._metrics.logs_evaluation_steps and (values := self._metrics.evaluation_step_report()):
            self.log(values, index)

    def log(self, values: dict[str, float], step: int | None, *, epoch: bool = True) -> None:
        """Write values to every logger. step: None is the current one, or `values["step"]` if it was logged.

        Rows of the current step are kept until the next one: a checkpoint holds them, because on resume the loggers
        forget that step, whose later rows will be written again.
        """
        if not self._trainer.loggers or not values:
            return
        if step is None:
            if "step" in values:
                step = int(values.pop("step"))
            elif (step := self._trainer.train_state.logger_step) < self.told_until:
                return
        if epoch:
            values.setdefault("epoch", self._trainer.current_epoch)
        if self._rows and self._rows[0][0] != step:
            self._rows.clear()
        self._rows.append((step, dict(values)))
        for logger in self._trainer.loggers:
            logger.log_metrics(values, step=step)
            logger.save()

    def rows_of_step(self) -> list[list[Any]]:
        """What the loggers were given for the current step so far."""
        return [[step, values] for step, values in self._rows if step == self._trainer.train_state.logger_step]

    def resume(self, checkpoint: dict[str, Any]) -> None:
        """Let the loggers forget what an earlier attempt logged after the checkpoint."""
        for logger in self._trainer.loggers:
            logger.resume(self._trainer.train_state.logger_step)
        for step, values in checkpoint.get("rows", []):
            self.log(values, step, epoch=False)

    def hyperparameters(self, module: Module) -> None:
        """Give the loggers what save_hyperparameters kept."""
        if not self._trainer.loggers:
            return
        owners = [o for o in (module, self._trainer.datamodule) if o is not None and o._log_hyperparams]
        values: dict[str, Any] = {}
        for owner in owners:
            initial = owner.hparams_initial
            clashes = [k for k in initial if k in values and values[k] != initial[k]]
            if clashes:
                raise ConfigError(
                    f"The Module and the DataModule have different values for the hyperparameters {clashes}. Rename "
                    "them, or leave them out of one: save_hyperparameters(ignore=[...]) or (logger=False)."
                )
            values.update(initial)
        for logger in self._trainer.loggers:
            if owners:
                logger.log_hyperparams(values)
            logger.log_graph(module)
            logger.save()
