"""What every logger is to the trainer, and which log of a folder a run writes to."""

from __future__ import annotations

import functools
import json
import os
from abc import ABC, abstractmethod
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.errors import ConfigError
from trainer.ranks import read_ranks

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from trainer.callbacks.checkpoint import Checkpoint
    from trainer.distributed import World


class Logger(ABC):
    """Takes the metrics of a run somewhere. Subclass it to write to a service of your own.

    The trainer calls the methods on every rank; a logger writes on global rank 0 only (decorate with
    `trainer.ranks.rank_zero_only`).
    """

    group_separator: str = "/"

    @property
    @abstractmethod
    def name(self) -> str | None:
        """Name of the experiment."""

    @property
    @abstractmethod
    def version(self) -> int | str | None:
        """Which run of the experiment this is."""

    @property
    def root_dir(self) -> str | None:
        """Folder of all versions, if the logger writes files."""
        return None

    @property
    def log_dir(self) -> str | None:
        """Folder of this version, if the logger writes files."""
        return None

    @property
    def save_dir(self) -> str | None:
        """Folder above name and version, if the logger writes files."""
        return None

    @abstractmethod
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Write the values of one report. `step` is the number of optimizer steps before it."""

    @abstractmethod
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Write the run's hyperparameters."""

    def log_graph(self, model: nn.Module, input_array: Tensor | None = None) -> None:
        """Write the model's graph, where the logger can show one."""

    def agree(self, world: World) -> None:
        """Take over rank 0's version. Called on every rank when the ranks have met, before anything is logged."""

    def resume(self, step: int) -> None:
        """Training goes on after `step` optimizer steps: what an earlier attempt logged for later ones is void.

        Called on every rank, after a checkpoint was restored and before anything is logged.
        """

    def save(self) -> None:
        """Bring to disk what is buffered."""

    def finalize(self, status: str) -> None:
        """The run is over; `status` is "success", "interrupted" or "failed". The logger may be used again later."""
        self.save()

    def after_save_checkpoint(self, checkpoint_callback: Checkpoint) -> None:
        """`checkpoint_callback` has written a checkpoint (rank 0 only)."""


class NoExperiment:
    """Stands for a logger's backend on ranks that do not log: takes every call and does nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._nothing

    def __getitem__(self, index: object) -> NoExperiment:
        return self

    def __setitem__(self, index: object, value: object) -> None:
        pass

    @staticmethod
    def _nothing(*_args: Any, **_kwargs: Any) -> None:
        return None


class SilentLogger(Logger):
    """Stands for the loggers of a run that logs nothing: code that calls them, or theirs, runs as it is."""

    name = None
    version = None
    experiment = NoExperiment()

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        pass

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return getattr(self.experiment, name)


def rank_zero_experiment(method: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """For a logger's `experiment` property: other ranks than global rank 0 get a `NoExperiment`.

    So `self.logger.experiment.add_image(...)` may stand in a module without asking for the rank.
    """

    @functools.wraps(method)
    def experiment(self: Any) -> Any:
        return method(self) if read_ranks().rank == 0 else NoExperiment()

    return experiment


def plain_params(params: Any) -> dict[str, Any]:
    """Hyperparameters in any of the usual containers as a dict."""
    if params is None:
        return {}
    if isinstance(params, Namespace):
        return vars(params)
    if is_dataclass(params) and not isinstance(params, type):
        return asdict(params)
    return dict(params)


def flat_params(params: Mapping[str, Any], separator: str = "/") -> dict[str, Any]:
    """Nested mappings as one level: `{"a": {"b": 1}}` becomes `{"a/b": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in params.items():
        if isinstance(value, Namespace) or (is_dataclass(value) and not isinstance(value, type)):
            value = plain_params(value)
        if isinstance(value, Mapping):
            flat |= {f"{key}{separator}{k}": v for k, v in flat_params(value, separator).items()}
        else:
            flat[str(key)] = value
    return flat


# ------------------------------------------------------------------------------------- which log is this run's

# How many logs this process has asked for, by (run folder, key): a script that makes two loggers in one folder
# gets two logs, and its restart, which makes them in the same order, finds each one again.
_asked: dict[tuple[str, str], int] = {}


def remembered(key: str, choose: Callable[[], int | str]) -> tuple[int | str, bool]:
    """The version (or id) for `key` that this run chose in an earlier attempt and True, else `choose()` and False.

    Outside a run folder nothing is remembered. Only rank 0 may call this: it writes `logs.json` in the run folder.
    """
    run_dir = read_ranks().run_dir
    if run_dir is None:
        return choose(), False
    number = _asked.get((run_dir, key), 0)
    _asked[run_dir, key] = number + 1
    path = Path(run_dir) / "logs.json"
    known: dict[str, list[int | str]] = json.loads(path.read_text()) if path.exists() else {}
    versions = known.setdefault(key, [])
    if number < len(versions):
        return versions[number], True
    versions.append(choose())
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(known, indent=1))
    os.replace(temporary, path)
    return versions[number], False


def claim_version(root_dir: str) -> int:
    """The next free `version_N` below `root_dir`; on a local disk the folder is made, so that it is ours."""
    import fsspec

    fs, path = fsspec.core.url_to_fs(root_dir)
    local = "file" in ((fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol)
    while True:
        names = [os.path.basename(p.rstrip("/")) for p in fs.ls(path, detail=False)] if fs.exists(path) else []
        numbers = [int(n[8:]) for n in names if n.startswith("version_") and n[8:].isdigit()]
        version = max(numbers, default=-1) + 1
        if not local:
            return version
        try:
            (Path(path) / f"version_{version}").mkdir(parents=True)
        except FileExistsError:  # another process was faster
            continue
        except OSError as error:
            raise ConfigError(
                f"The logger's folder {path} cannot be written: {error.strerror}. Give another save_dir, or "
                "default_root_dir, or logger=False."
            ) from error
        return version


class Uploads:
    """The checkpoints that a callback keeps, each once: what a logger with log_model still has to upload."""

    def __init__(self) -> None:
        self._seen: set[tuple[str, float]] = set()

    def new(self, callback: Any) -> list[str]:
        """Paths of the best and the last ones that were not returned before, or were written anew."""
        kept = {
            *getattr(callback, "best_k_models", {}), getattr(callback, "best_model_path", ""),
            getattr(callback, "last_model_path", ""),
        }  # fmt: skip
        found = {path: os.path.getmtime(path) for path in map(str, kept) if path and os.path.exists(path)}
        new = sorted(path for path, written in found.items() if (path, written) not in self._seen)
        self._seen.update(found.items())
        return new
