"""`TensorBoardLogger`: event files that TensorBoard shows."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from torch import Tensor

from trainer.errors import LoggingError
from trainer.loggers.folder import FolderLogger
from trainer.loggers.logger import flat_params, plain_params, rank_zero_experiment
from trainer.ranks import rank_zero_only, rank_zero_warn

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Mapping

    from torch import nn


class TensorBoardLogger(FolderLogger):
    """Writes metrics, hyperparameters and, if asked, the model's graph for TensorBoard, on global rank 0.

    Args:
        save_dir, name, version, prefix: see FolderLogger.
        log_graph: write the graph; the model needs an `example_input_array`.
        default_hp_metric: show hyperparameters even if no metric is logged with them.
        sub_dir: a folder below the version's.
        kwargs: for `torch.utils.tensorboard.SummaryWriter`. Events reach the disk at each checkpoint and every
            `flush_secs` seconds, here 10.
    """

    def __init__(
        self,
        save_dir: str | os.PathLike[str],
        name: str | None = "lightning_logs",
        version: int | str | None = None,
        log_graph: bool = False,
        default_hp_metric: bool = True,
        prefix: str = "",
        sub_dir: str | os.PathLike[str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(save_dir, name, version, prefix)
        self._log_graph = log_graph
        self._default_hp_metric = default_hp_metric
        self._sub_dir = None if sub_dir is None else os.fspath(sub_dir)
        self._kwargs = {"flush_secs": 10} | kwargs
        self._writer: Any = None
        self._reported = False

    @property
    def sub_dir(self) -> str | None:
        """The folder below the version's, if there is one."""
        return self._sub_dir

    @property
    def log_dir(self) -> str:
        return os.path.join(super().log_dir, self._sub_dir) if self._sub_dir else super().log_dir

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The `SummaryWriter`."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(log_dir=self.log_dir, **self._kwargs)
        return self._writer

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        writer = self.experiment
        if not self._reported:
            self._reported = True
            self._purge(step or 0)
        for name, value in self._prefixed(dict(metrics)).items():
            if isinstance(value, Tensor):
                value = value.item()
            try:
                if isinstance(value, dict):
                    writer.add_scalars(name, value, step)
                else:
                    writer.add_scalar(name, value, step)
            except (TypeError, ValueError, NotImplementedError, AssertionError) as error:
                raise LoggingError(
                    f"TensorBoard cannot show {name!r} = {value!r}; log a number, or a dict of numbers."
                ) from error

    def _purge(self, step: int) -> None:
        """Tell TensorBoard to forget what an earlier attempt logged for this step and later ones."""
        void = self._void_from(step)
        if void is None:
            return
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        # The same two events that SummaryWriter(purge_step=...) writes when it opens its file; the step is known later.
        writer = self.experiment._get_file_writer()
        for event in (Event(file_version="brain.Event:2"), Event(session_log=SessionLog(status=SessionLog.START))):
            writer.add_event(event, void)

    @rank_zero_only
    def log_hyperparams(
        self,
        params: dict[str, Any] | Namespace,
        metrics: Mapping[str, Any] | float | Tensor | None = None,
        step: int | None = None,
    ) -> None:
        """Write hyperparameters; `metrics` are the values that TensorBoard's table shows beside them."""
        super().log_hyperparams(params)
        known = self._continues and metrics is None
        if metrics is None:
            values: dict[str, Any] = {"hp_metric": -1} if self._default_hp_metric else {}
        else:
            values = {"hp_metric": metrics} if isinstance(metrics, (int, float, Tensor)) else dict(metrics)
        if known or not values:
            return
        from torch.utils.tensorboard.summary import hparams

        shown = {
            k: v if isinstance(v, (bool, int, float, str)) else str(v)
            for k, v in flat_params(plain_params(params)).items()
        }
        for name, value in values.items():
            self.experiment.add_scalar(name, value, step)
        for summary in hparams(shown, values):  # type: ignore[no-untyped-call]
            self.experiment._get_file_writer().add_summary(summary, step)

    @rank_zero_only
    def log_graph(self, model: nn.Module, input_array: Tensor | None = None) -> None:
        if not self._log_graph:
            return
        example: Any = getattr(model, "example_input_array", None) if input_array is None else input_array
        if not isinstance(example, (Tensor, tuple)):
            rank_zero_warn(
                f"TensorBoardLogger(log_graph=True) needs model.example_input_array to be a tensor or a tuple; it is "
                f"a {type(example).__name__}. No graph is written."
            )
            return
        parameter = next(model.parameters(), None)
        if parameter is not None:
            moved = [x.to(parameter.device) for x in ((example,) if isinstance(example, Tensor) else example)]
            example = moved[0] if isinstance(example, Tensor) else tuple(moved)
        self.experiment.add_graph(model, example)

    @rank_zero_only
    def save(self) -> None:
        if self._writer is not None:
            self._writer.flush()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        if self._writer is not None:
            # Closed, its thread ends; used again, a SummaryWriter opens a new file beside the first.
            self._writer.close()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_writer": None}
