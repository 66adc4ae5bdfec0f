"""`WandbLogger`: Weights & Biases (needs the wandb package)."""

from __future__ import annotations

import os
import secrets
from typing import TYPE_CHECKING, Any

from trainer.errors import ConfigError, LoggingError
from trainer.loggers.logger import Logger, Uploads, plain_params, rank_zero_experiment, remembered
from trainer.ranks import rank_zero_only

if TYPE_CHECKING:
    from argparse import Namespace

    from torch import nn

    from trainer.callbacks.checkpoint import Checkpoint
    from trainer.distributed import World


class WandbLogger(Logger):
    """Logs to Weights & Biases on global rank 0, with the step as x axis of every metric.

    In a run folder (under `launch`) the id is remembered, so that a restart goes on in the same W&B run. The run ends
    with the process, or with `wandb.finish()`.

    Args:
        name: what the run is called on screen.
        save_dir, dir: folder for W&B's files.
        version, id: the run's id; given again, that run goes on.
        offline: write files only, which `wandb sync` uploads later.
        project: default: WANDB_PROJECT, else "lightning_logs".
        log_model: checkpoints that ModelCheckpoint keeps become artifacts at the end (True) or at each save ("all").
        experiment: a run that was made with `wandb.init`, to be used as it is.
        prefix: put before every metric's name, with a dash.
        checkpoint_name: of the artifacts; default: model-ID, of the run.
        kwargs: for `wandb.init`.

    Raises:
        ConfigError: wandb is not installed, or log_model is none of these.
    """

    LOGGER_JOIN_CHAR = "-"

    def __init__(
        self,
        name: str | None = None,
        save_dir: str | os.PathLike[str] | None = ".",
        version: str | None = None,
        offline: bool = False,
        dir: str | os.PathLike[str] | None = None,  # noqa: A002 - wandb's and Lightning's name
        id: str | None = None,  # noqa: A002 - likewise
        project: str | None = None,
        log_model: bool | str = False,
        experiment: Any = None,
        prefix: str = "",
        checkpoint_name: str | None = None,
        **kwargs: Any,
    ) -> None:
        try:
            import wandb  # noqa: F401 - only whether it is there
        except ImportError as error:
            raise ConfigError("WandbLogger needs the wandb package: pip install wandb.") from error
        if log_model not in (True, False, "all"):
            raise ConfigError(f"WandbLogger(log_model={log_model!r}). Allowed: True, False, 'all'.")
        folder = save_dir if dir is None else dir
        self._name = name
        self._save_dir = None if folder is None else os.fspath(folder)
        self._id = version or id
        self._offline = offline
        self._project = project or os.environ.get("WANDB_PROJECT", "lightning_logs")
        self._experiment = experiment
        self._prefix = prefix
        self._kwargs = kwargs
        self._log_model = log_model
        self._checkpoint_name = checkpoint_name
        self._callback: Checkpoint | None = None
        self._uploads = Uploads()

    @property
    def name(self) -> str | None:
        return self._project

    @property
    def version(self) -> str | None:
        return self._id if self._experiment is None else self._experiment.id

    @property
    def save_dir(self) -> str | None:
        return self._save_dir

    def agree(self, world: World) -> None:
        if self._id is None and self._experiment is None and world.is_global_zero:
            self._id = str(remembered(f"WandbLogger {self._project}", lambda: secrets.token_hex(4))[0])
        self._id = world.broadcast(self._id)

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The wandb run."""
        if self._experiment is None:
            import wandb

            if self._save_dir is not None:
                os.makedirs(self._save_dir, exist_ok=True)
            mode = {"mode": "offline"} if self._offline else {}
            options = {"name": self._name, "project": self._project, "dir": self._save_dir, "id": self._id}
            self._experiment = wandb.init(**(options | {"resume": "allow"} | mode | self._kwargs))
            self._experiment.define_metric("trainer/global_step")
            self._experiment.define_metric("*", step_metric="trainer/global_step", step_sync=True)
        return self._experiment

    def watch(
        self, model: nn.Module, log: str | None = "gradients", log_freq: int = 100, log_graph: bool = True
    ) -> None:
        """Log the model's gradients or parameters as histograms; see `wandb.watch`."""
        self.experiment.watch(model, log=log, log_freq=log_freq, log_graph=log_graph)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        plain = {
            k: v if isinstance(v, (bool, int, float, str, list, dict, type(None))) else str(v)
            for k, v in plain_params(params).items()
        }
        self.experiment.config.update(plain, allow_val_change=True)

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        named = {f"{self._prefix}{self.LOGGER_JOIN_CHAR}{k}" if self._prefix else k: v for k, v in metrics.items()}
        self.experiment.log(named if step is None else named | {"trainer/global_step": step})

    @rank_zero_only
    def log_table(
        self,
        key: str,
        columns: list[str | int] | None = None,
        data: list[list[Any]] | None = None,
        dataframe: Any = None,
        step: int | None = None,
    ) -> None:
        """Log a table, from columns and rows or from a data frame."""
        import wandb

        self.log_metrics({key: wandb.Table(columns=columns, data=data, dataframe=dataframe)}, step)

    log_text = log_table

    @rank_zero_only
    def log_image(self, key: str, images: list[Any], step: int | None = None, **kwargs: Any) -> None:
        """Log images (arrays, tensors, PIL images or paths); each of `kwargs` is a list with one value per image."""
        self._log_media("Image", key, images, step, kwargs)

    @rank_zero_only
    def log_audio(self, key: str, audios: list[Any], step: int | None = None, **kwargs: Any) -> None:
        """Log sounds (arrays or paths); each of `kwargs` is a list with one value per sound."""
        self._log_media("Audio", key, audios, step, kwargs)

    @rank_zero_only
    def log_video(self, key: str, videos: list[Any], step: int | None = None, **kwargs: Any) -> None:
        """Log videos (arrays of frames, or paths); each of `kwargs` is a list with one value per video."""
        self._log_media("Video", key, videos, step, kwargs)

    def _log_media(
        self, kind: str, key: str, items: list[Any], step: int | None, options: dict[str, list[Any]]
    ) -> None:
        import wandb

        if wrong := [name for name, values in options.items() if len(values) != len(items)]:
            raise LoggingError(
                f"{key!r} has {len(items)} items; {wrong} must be lists with one value for each of them."
            )
        each = [{name: values[i] for name, values in options.items()} for i in range(len(items))]
        media = [getattr(wandb, kind)(item, **own) for item, own in zip(items, each, strict=True)]
        self.log_metrics({key: media}, step)

    def after_save_checkpoint(self, checkpoint_callback: Checkpoint) -> None:
        self._callback = checkpoint_callback
        if self._log_model == "all":
            self._upload()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        if self._log_model:
            self._upload()

    def _upload(self) -> None:
        """Make artifacts of the checkpoints that are kept and were not yet."""
        import wandb

        for path in self._uploads.new(self._callback):
            best = path == getattr(self._callback, "best_model_path", "")
            artifact = wandb.Artifact(
                self._checkpoint_name or f"model-{self.version}", type="model",
                metadata={"original_filename": os.path.basename(path)},
            )  # fmt: skip
            if os.path.isdir(path):
                artifact.add_dir(path)
            else:
                artifact.add_file(path, name="model.ckpt")
            self.experiment.log_artifact(artifact, aliases=["latest", "best"] if best else ["latest"])
