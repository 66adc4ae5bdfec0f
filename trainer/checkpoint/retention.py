"""Which checkpoints of a store stay, and the removal of the others.

Torch-free: the writer's process imports it.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from trainer.checkpoint import catalog
from trainer.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from trainer.checkpoint.catalog import Checkpoint
    from trainer.checkpoint.folder import Folder
    from trainer.checkpoint.manifest import Manifest


@dataclass(frozen=True)
class Retention:
    """A checkpoint stays if any of these wants it; the newest always stays.

    last: the newest k. best: the k best by `monitor`, a number in the manifest's `extra`; `mode` "min" or "max".
    every_n_steps: those at multiples of n. every_hours: the first of each stretch of n hours. names: a pattern; others
    in the same store are left alone.
    """

    last: int = 1
    best: int = 0
    monitor: str | None = None
    mode: str = "min"
    every_n_steps: int | None = None
    every_hours: float | None = None
    names: str = "*"

    def __post_init__(self) -> None:
        if self.last < 1:
            raise ConfigError(f"Retention(last={self.last}): at least the newest checkpoint stays, so 1 or more.")
        if self.best < 0 or (self.best > 0) != (self.monitor is not None):
            raise ConfigError(f"Retention(best={self.best}, monitor={self.monitor!r}): give both or neither.")
        if self.mode not in ("min", "max"):
            raise ConfigError(f"Retention(mode={self.mode!r}): 'min' or 'max' is possible.")
        for name in ("every_n_steps", "every_hours"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"Retention({name}={value}): give a positive number, or None.")

    def removable(self, manifests: Sequence[Manifest]) -> list[Manifest]:
        """Those of a store's checkpoints that nothing keeps."""
        known = [m for m in manifests if fnmatchcase(m.name, self.names)]
        newest_first = sorted(known, key=lambda m: (m.step, m.created), reverse=True)
        kept = {m.attempt for m in newest_first[: self.last]}
        if self.best and self.monitor is not None:
            scored = [m for m in newest_first if isinstance(m.extra.get(self.monitor), (int, float))]
            sign, monitor = (1 if self.mode == "min" else -1), self.monitor
            # NaN is neither best nor worst: it compares false with all, so it is left out. Of equals the newest stays.
            scored = [m for m in scored if m.extra[monitor] == m.extra[monitor]]
            kept |= {m.attempt for m in sorted(scored, key=lambda m: sign * m.extra[monitor])[: self.best]}
        if self.every_n_steps is not None:
            kept |= {m.attempt for m in newest_first if m.step % self.every_n_steps == 0}
        if self.every_hours is not None:
            first_of: dict[int, str] = {}
            for m in newest_first:
                first_of[int(m.created // (self.every_hours * 3600))] = m.attempt
            kept |= set(first_of.values())
        return [m for m in newest_first if m.attempt not in kept]


def remove_unwanted(
    store: Folder, retention: Retention, is_good: Callable[[Checkpoint], bool] = catalog.is_complete
) -> list[str]:
    """Remove what the policy does not keep; returns the names. Nothing goes unless one that stays is good.

    is_good: by default, whether all files are there: enough for whoever has just written the newest of them and read
    it back.
    """
    checkpoints = catalog.checkpoints_in(store)
    unwanted = {m.attempt for m in retention.removable([c.manifest for c in checkpoints])}
    staying = (c for c in checkpoints if c.manifest.attempt not in unwanted)
    if not unwanted or not any(is_good(c) for c in staying):
        return []
    removed = []
    for checkpoint in checkpoints:
        if checkpoint.manifest.attempt in unwanted:
            catalog.remove_attempt(checkpoint.folder)
            removed.append(checkpoint.manifest.name)
    return removed
