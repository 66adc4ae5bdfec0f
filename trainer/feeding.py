"""The loaders of a run: asked for when they are needed, counted, and made anew when that is due."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from trainer.errors import ConfigError
from trainer.hooks import overridden
from trainer.module import Module
from trainer.prefetch import prefetch
from trainer.preparation import make_evaluation, training_mover
from trainer.ranks import rank_zero_info, rank_zero_warn
from trainer.sources import Loaders, Source

if TYPE_CHECKING:
    from trainer.loop import Fit
    from trainer.trainer import Trainer


class RunData:
    """What the loops of one run take their batches from.

    given: what was passed to fit, validate, test or predict, by kind ("train", "val", "test", "predict"). loaders:
    those that were asked for so far.
    """

    def __init__(self, trainer: Trainer, given: dict[str, Any]) -> None:
        self._trainer = trainer
        self.given = given
        self.loaders: dict[str, Loaders] = {}
        # The epochs in which they were asked for.
        self._loaded_in: dict[str, int] = {}
        # After how many batches fit validates, in epochs in which it does.
        self._validate_every: float = 0

    def source(self, kind: str) -> Source:
        """Whom to ask for the loaders of a kind."""
        module = self._trainer.lightning_module
        assert module is not None
        return Source(kind, self.given.get(kind), module, self._trainer.datamodule)

    def load(self, kind: str) -> Loaders:
        """Ask for the loaders of a kind, anew if they are there."""
        self.loaders[kind] = Loaders(self.source(kind).loaders(), kind, self._trainer)
        self._loaded_in[kind] = self._trainer.train_state.epoch
        return self.loaders[kind]

    def train(self) -> Loaders:
        """The training loaders, asked for once."""
        return self.loaders["train"] if "train" in self.loaders else self.load("train")

    def arguments(self) -> dict[str, Any]:
        """What a fit on the same data is to be called with."""
        return {"train_dataloaders": self.given.get("train"), "datamodule": self._trainer.datamodule}

    def raw(self, kind: str) -> Any:
        """The loader(s) as they were given, or None before they were asked for."""
        return self.loaders[kind].raw if kind in self.loaders else None

    def limits(self, kind: str) -> list[float]:
        """Batches that are used of each loader of a kind."""
        return self.loaders[kind].limits if kind in self.loaders else []

    def batches_of_pass(self, kind: str, at_most: float = math.inf) -> float:
        """Batches of one pass over the loaders of a kind: one after another, each at most so many, or all together."""
        loaders = self.loaders[kind]
        if loaders.mode == "sequential":
            return sum(min(limit, at_most) for limit in loaders.limits)
        return min(loaders.batches, at_most)

    def close(self) -> None:
        """End loader workers that persist."""
        for loaders in self.loaders.values():
            for feed in loaders.feeds:
                feed.close()

    def validates(self) -> bool:
        """Whether fit has anything to validate with."""
        module = self._trainer.lightning_module
        has_step = module is not None and overridden(module, "validation_step", Module)
        return has_step and self.source("val").defined and self._trainer.limit_val_batches > 0

    def load_training(self, run: Fit) -> None:
        """Give a fit its training batches, and say how long an epoch is and when to validate."""
        trainer = self._trainer
        loaders = self.train()
        run.feed, run.move = loaders.training_feed(), training_mover(run)
        prefetch(run)
        run.batches_per_epoch = batches = loaders.batches
        if trainer.loggers and batches < trainer.log_every_n_steps and not trainer.fast_dev_run:
            rank_zero_info(
                f"An epoch has {batches} batches, fewer than log_every_n_steps={trainer.log_every_n_steps}: "
                "values logged per step are reported less than once per epoch."
            )
        interval = trainer.val_check_interval
        if isinstance(interval, int):
            if interval > batches and trainer.check_val_every_n_epoch is not None and self.validates():
                raise ConfigError(
                    f"val_check_interval={interval} is more than the {batches} batches of an epoch. Use at most that, "
                    "or count across epochs with check_val_every_n_epoch=None."
                )
            self._validate_every = interval
        elif batches == math.inf:
            if interval != 1.0 and trainer.config.val_check_seconds is None:
                raise ConfigError(
                    f"val_check_interval={interval} is a part of a training loader that has no length; pass a number "
                    "of batches or a duration."
                )
            self._validate_every = math.inf
        else:
            self._validate_every = max(1, int(batches * interval))
        run.validate_every = self._validate_every

    def load_validation(self, run: Fit) -> None:
        """Give a fit what it validates with, or say what is missing for that."""
        if self.validates():
            run.validation = make_evaluation(self._trainer, "validation", self.load("val"), inference_mode=False)
        elif self._trainer.limit_val_batches > 0:
            has_step, has_loader = overridden(run.module, "validation_step", Module), self.source("val").defined
            if has_loader and not has_step:
                rank_zero_warn("There is a validation loader but no validation_step, so nothing is validated.")
            elif has_step and not has_loader:
                rank_zero_info("There is a validation_step but no validation loader, so nothing is validated.")

    def prepare_epoch(self, run: Fit) -> None:
        """Before an epoch: new loaders if they are due, and whether this epoch validates."""
        every = self._trainer.reload_dataloaders_every_n_epochs
        if every and run.state.batch == 0 and not run.state.resume_at:
            due = {kind for kind, epoch in self._loaded_in.items() if run.state.epoch - epoch >= every}
            if "train" in due:
                self.loaders.pop("train")
                self.load_training(run)
            if "val" in due:
                self.load_validation(run)
        n = self._trainer.check_val_every_n_epoch
        validates = run.validation is not None and (n is None or (run.state.epoch + 1) % n == 0)
        run.validate_every = self._validate_every if validates else 0
