"""`MLFlowLogger`: MLflow tracking (needs the mlflow or mlflow-skinny package)."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.errors import ConfigError
from trainer.loggers.logger import Logger, Uploads, flat_params, plain_params, rank_zero_experiment, remembered
from trainer.ranks import rank_zero_only

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Mapping

    from trainer.callbacks.checkpoint import Checkpoint
    from trainer.distributed import World

_STATUS = {"success": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}
# What MLflow takes as the length of a parameter's value, and how many parameters in one call.
_VALUE, _BATCH = 6000, 100


class MLFlowLogger(Logger):
    """Logs to an MLflow server, or into MLflow's own store on disk, on global rank 0.

    In a run folder (under `launch`) the run's id is remembered, so that a restart goes on in the same MLflow run.

    Args:
        experiment_name: it is made if it is not there.
        run_name: what the run is called; tags: for the run.
        tracking_uri: of the server; default: MLFLOW_TRACKING_URI, else a SQLite file in save_dir.
        save_dir: folder for what is kept on disk if there is no tracking_uri.
        log_model: True uploads the checkpoints that are kept at the end, "all" each when it is written.
        prefix: put before every metric's name, with a dash.
        artifact_location: where a new experiment keeps its files; default: what the server says.
        run_id: of a run to go on with.
        synchronous: False sends metrics from a thread of MLflow's.

    Raises:
        ConfigError: mlflow is not installed, or an argument is not allowed.
    """

    LOGGER_JOIN_CHAR = "-"

    def __init__(
        self,
        experiment_name: str = "lightning_logs",
        run_name: str | None = None,
        tracking_uri: str | None = None,
        tags: dict[str, Any] | None = None,
        save_dir: str | os.PathLike[str] | None = "./mlruns",
        log_model: bool | str = False,
        prefix: str = "",
        artifact_location: str | None = None,
        run_id: str | None = None,
        synchronous: bool | None = None,
    ) -> None:
        try:
            import mlflow  # noqa: F401 - only whether it is there
        except ImportError as error:
            raise ConfigError("MLFlowLogger needs the mlflow package: pip install mlflow.") from error
        if log_model not in (True, False, "all"):
            raise ConfigError(f"MLFlowLogger(log_model={log_model!r}). Allowed: True, False, 'all'.")
        uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
        if uri is None and save_dir is None:
            raise ConfigError("MLFlowLogger needs a tracking_uri or a save_dir.")
        self._folder = None if uri else Path(os.path.abspath(os.fspath(save_dir or "")))
        self._uri = uri or f"sqlite:///{self._folder}/mlflow.db"
        self._experiment_name = experiment_name
        self._run_name = run_name
        self._tags = tags
        self._log_model = log_model
        self._prefix = prefix
        self._artifact_location = artifact_location
        self._given_id = run_id
        self._run_id = run_id
        self._experiment_id: str | None = None
        self._batch = {} if synchronous is None else {"synchronous": synchronous}
        self._client: Any = None
        self._uploads = Uploads()
        self._callback: Checkpoint | None = None

    @property
    def name(self) -> str | None:
        """The experiment's id, as soon as it is known."""
        return self._experiment_id

    @property
    def version(self) -> str | None:
        """The run's id, as soon as it is known."""
        return self._run_id

    run_id = version
    experiment_id = name

    @property
    def save_dir(self) -> str | None:
        return None if self._folder is None else str(self._folder)

    def agree(self, world: World) -> None:
        if world.is_global_zero:
            self._begin()
        self._experiment_id, self._run_id = world.broadcast((self._experiment_id, self._run_id))

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The MlflowClient."""
        if self._client is None:
            self._begin()
        return self._client

    def _begin(self) -> None:
        """Find or make the experiment and the run."""
        if self._client is not None:
            return
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient

        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            if self._artifact_location is None:
                self._artifact_location = (self._folder / "artifacts").as_uri()
        client = MlflowClient(self._uri)
        found = client.get_experiment_by_name(self._experiment_name)
        if found is not None:
            experiment = found.experiment_id
        else:
            try:
                experiment = client.create_experiment(self._experiment_name, self._artifact_location)
            except MlflowException:  # another process was faster
                made = client.get_experiment_by_name(self._experiment_name)
                if made is None:
                    raise
                experiment = made.experiment_id

        def create() -> str:
            run = client.create_run(experiment, tags=self._tags, run_name=self._run_name)
            return str(run.info.run_id)

        run_id = self._given_id
        if run_id is None:
            run_id = str(remembered(f"MLFlowLogger {self._uri} {self._experiment_name}", create)[0])
        client.update_run(run_id, status="RUNNING")
        self._experiment_id, self._run_id, self._client = experiment, run_id, client

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        from mlflow.entities import Param

        # A parameter's value is final in MLflow: a restart logs those again that it had, and new ones.
        known = self.experiment.get_run(self._run_id).data.params
        flat = {k: str(v)[:_VALUE] for k, v in flat_params(plain_params(params)).items()}
        new = [Param(key=k, value=v) for k, v in flat.items() if known.get(k) != v]
        for start in range(0, len(new), _BATCH):
            self.experiment.log_batch(run_id=self._run_id, params=new[start : start + _BATCH], **self._batch)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        import time

        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        prefix = f"{self._prefix}{self.LOGGER_JOIN_CHAR}" if self._prefix else ""
        # Of other characters MLflow would refuse the whole report.
        values = [
            Metric(key=re.sub(r"[^\w\-. :/]", "", prefix + k), value=float(v), timestamp=now, step=step or 0)
            for k, v in metrics.items()
        ]  # fmt: skip
        self.experiment.log_batch(run_id=self._run_id, metrics=values, **self._batch)

    def after_save_checkpoint(self, checkpoint_callback: Checkpoint) -> None:
        self._callback = checkpoint_callback
        if self._log_model == "all":
            self._upload()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        if self._client is None:
            return
        if self._log_model:
            self._upload()
        self._client.set_terminated(self._run_id, _STATUS.get(status, "FINISHED"))

    def _upload(self) -> None:
        """Upload the checkpoints that are kept and were not yet."""
        for path in self._uploads.new(self._callback):
            place = f"model/checkpoints/{Path(path).stem}"
            if os.path.isdir(path):
                self.experiment.log_artifacts(self._run_id, path, place)
            else:
                self.experiment.log_artifact(self._run_id, path, place)
