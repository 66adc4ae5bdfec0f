"""`CSVLogger`: `metrics.csv`, one row per report, and `hparams.yaml`."""

from __future__ import annotations

import csv
import os
from typing import TYPE_CHECKING, Any

from torch import Tensor

from trainer.errors import ConfigError
from trainer.loggers.folder import FolderLogger
from trainer.loggers.logger import rank_zero_experiment
from trainer.ranks import rank_zero_only

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


class MetricsFile:
    """`metrics.csv` in a folder: rows are appended, and a new name adds a column to the old rows.

    Args:
        log_dir: its folder or fsspec URL.
        void_from: asked with the step of the first new row; rows of an earlier attempt with the step it returns or a
            later one are dropped. None keeps an older file under another name.
    """

    NAME_METRICS_FILE = "metrics.csv"

    def __init__(self, log_dir: str, void_from: Callable[[int], int | None]) -> None:
        import fsspec

        self.log_dir = log_dir
        self._fs, self._folder = fsspec.core.url_to_fs(log_dir)
        self._path = f"{self._folder}/{self.NAME_METRICS_FILE}"
        self._void_from: Callable[[int], int | None] | None = void_from
        self._columns: list[str] = []
        self.metrics: list[dict[str, Any]] = []

    def _take_over(self, void_from: int | None) -> None:
        if void_from is None:
            number = 1
            while self._fs.exists(f"{self._path}.{number}"):
                number += 1
            self._fs.mv(self._path, f"{self._path}.{number}")
            return
        rows = self._read()
        kept = [row for row in rows if row.get("step", "").isdigit() and int(row["step"]) < void_from]
        self._columns = list(dict.fromkeys(name for row in kept for name, value in row.items() if value != ""))
        self._replace(kept)

    def _read(self) -> list[dict[str, str]]:
        with self._fs.open(self._path, "r", newline="") as file:
            # A row that a kill cut off in the middle has too few cells: they count as empty.
            return [{k: v or "" for k, v in row.items() if k is not None} for row in csv.DictReader(file)]

    def _replace(self, rows: list[dict[str, Any]]) -> None:
        """Write the whole file anew; a crash leaves the old one or the new one."""
        temporary = f"{self._path}.{os.getpid()}.tmp"
        with self._fs.open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, self._columns)
            writer.writeheader()
            writer.writerows(rows)
        self._fs.mv(temporary, self._path)

    def log_metrics(self, metrics: Mapping[str, Any], step: int) -> None:
        """Add a row; it reaches the file with `save`."""
        if self._void_from is not None:
            self._fs.makedirs(self._folder, exist_ok=True)
            if self._fs.exists(self._path):
                self._take_over(self._void_from(step))
            self._void_from = None
        row = {k: v.item() if isinstance(v, Tensor) else v for k, v in metrics.items()}
        self.metrics.append(row | {"step": step})

    def save(self) -> None:
        """Append the rows that are not in the file yet."""
        if not self.metrics:
            return
        names = sorted({name for row in self.metrics for name in row} - set(self._columns))
        rows, self.metrics = self.metrics, []
        if names:
            old = self._read() if self._columns else []
            self._columns += names
            self._replace([*old, *rows])
            return
        with self._fs.open(self._path, "a", newline="") as file:
            csv.DictWriter(file, self._columns).writerows(rows)


class CSVLogger(FolderLogger):
    """Writes `metrics.csv` and `hparams.yaml`, on global rank 0.

    Args:
        save_dir, name, version, prefix: see FolderLogger.
        flush_logs_every_n_steps: rows reach the file at steps that are multiples of this, and at each checkpoint.
    """

    def __init__(
        self,
        save_dir: str | os.PathLike[str],
        name: str | None = "lightning_logs",
        version: int | str | None = None,
        prefix: str = "",
        flush_logs_every_n_steps: int = 100,
    ) -> None:
        if flush_logs_every_n_steps < 1:
            raise ConfigError(f"CSVLogger(flush_logs_every_n_steps={flush_logs_every_n_steps}). Allowed: 1 or more.")
        super().__init__(save_dir, name, version, prefix)
        self._flush_every = flush_logs_every_n_steps
        self._file: MetricsFile | None = None

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The `MetricsFile`."""
        if self._file is None:
            self._file = MetricsFile(self.log_dir, self._void_from)
        return self._file

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        step = len(self.experiment.metrics) if step is None else step
        self.experiment.log_metrics(self._prefixed(dict(metrics)), step)
        if (step + 1) % self._flush_every == 0:
            self.save()

    @rank_zero_only
    def save(self) -> None:
        if self._file is not None:
            self._file.save()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.save()
