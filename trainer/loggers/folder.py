"""Loggers that write to `save_dir/name/version_N`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from trainer.loggers.hparams_file import to_yaml
from trainer.loggers.logger import Logger, claim_version, plain_params, remembered
from trainer.ranks import rank_zero_only, read_ranks

if TYPE_CHECKING:
    from argparse import Namespace

    from trainer.distributed import World


class FolderLogger(Logger):
    """Which folder is this run's, and the hyperparameters in it.

    Without a `version` the next free number is taken. In a run folder (under `launch`) the number is remembered, so
    that a restart goes on in the same log: from its first report on, what an earlier attempt logged for that step or
    later ones no longer counts.

    Args:
        save_dir: folder or fsspec URL.
        name: name of the experiment; "" or None leaves that level out.
        version: a number, or the name of the folder.
        prefix: put before every metric's name, with a dash.
    """

    LOGGER_JOIN_CHAR = "-"
    NAME_HPARAMS_FILE = "hparams.yaml"

    def __init__(
        self,
        save_dir: str | os.PathLike[str],
        name: str | None = "lightning_logs",
        version: int | str | None = None,
        prefix: str = "",
    ) -> None:
        self._save_dir = os.fspath(save_dir)
        self._name = name or ""
        self._version = version
        self._prefix = prefix
        self._resumed_at: int | None = None
        # Whether an earlier attempt of this run wrote to the same folder.
        self._continues = False
        self.hparams: dict[str, Any] = {}

    @property
    def name(self) -> str:
        return self._name

    @property
    def save_dir(self) -> str:
        return self._save_dir

    @property
    def root_dir(self) -> str:
        return os.path.join(self._save_dir, self._name) if self._name else self._save_dir

    @property
    def version(self) -> int | str:
        """The version; on rank 0 it is chosen, and on a local disk its folder is made, when first asked for."""
        if self._version is None:
            if read_ranks().rank == 0:
                key = f"{type(self).__name__} {os.path.abspath(self.root_dir)}"
                self._version, self._continues = remembered(key, lambda: claim_version(self.root_dir))
            else:
                # Only until the ranks have met: then rank 0's choice arrives with `agree`.
                return 0
        return self._version

    @property
    def log_dir(self) -> str:
        version = self.version if isinstance(self.version, str) else f"version_{self.version}"
        return os.path.expanduser(os.path.expandvars(os.path.join(self.root_dir, version)))

    def agree(self, world: World) -> None:
        self._version = world.broadcast(self.version if world.is_global_zero else None)

    def resume(self, step: int) -> None:
        self._resumed_at = step

    def _void_from(self, step: int) -> int | None:
        """From which step on the entries of an earlier attempt are void, given the first step that is logged now."""
        if self._resumed_at is not None:
            return min(step, self._resumed_at)
        return step if self._continues else None

    def _prefixed(self, metrics: dict[str, Any]) -> dict[str, Any]:
        if not self._prefix:
            return metrics
        return {f"{self._prefix}{self.LOGGER_JOIN_CHAR}{name}": value for name, value in metrics.items()}

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        self.hparams.update(plain_params(params))
        self._write_hparams()

    def _write_hparams(self) -> None:
        import fsspec

        fs, folder = fsspec.core.url_to_fs(self.log_dir)
        fs.makedirs(folder, exist_ok=True)
        with fs.open(f"{folder}/{self.NAME_HPARAMS_FILE}", "w") as file:
            file.write(to_yaml(self.hparams))
