"""EarlyStopping and Timer: when training ends, and that a restart does not change it."""

from __future__ import annotations

import math
from datetime import timedelta

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from trainer import Module, Trainer
from trainer.callbacks import Callback, EarlyStopping, Timer
from trainer.callbacks.early_stopping import EarlyStoppingReason
from trainer.errors import ConfigError


class Scripted(Module):
    def __init__(self, values):
        super().__init__()
        self.layer = nn.Linear(2, 1)
        self.values = values

    def training_step(self, batch, batch_idx):
        return self.layer(batch[0]).square().mean()

    def on_train_epoch_end(self):
        # After the callbacks' hooks of the same name in the source, before those that look at values.
        self.log("score", float(self.values[self.current_epoch]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def fit(folder, values, *callbacks, ckpt_path=None, **options):
    options = {"max_epochs": len(values)} | options
    trainer = Trainer(
        default_root_dir=folder, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=list(callbacks), **options,
    )  # fmt: skip
    trainer.fit(Scripted(values), DataLoader(TensorDataset(torch.ones(2, 2))), ckpt_path=ckpt_path)
    return trainer


@pytest.mark.parametrize(
    ("options", "values", "epochs", "reason"),
    [
        ({"patience": 2}, [5, 4, 4, 4, 3], 4, "PATIENCE_EXHAUSTED"),
        ({"patience": 2, "min_delta": 1}, [5, 4.5, 4.2, 1], 3, "PATIENCE_EXHAUSTED"),
        ({"patience": 2, "min_delta": -1}, [5, 4.5, 4.2, 1], 3, "PATIENCE_EXHAUSTED"),
        ({"patience": 1, "mode": "max"}, [1, 2, 3, 3, 4], 4, "PATIENCE_EXHAUSTED"),
        ({"patience": 9}, [1, math.nan, 0], 2, "NON_FINITE_METRIC"),
        ({"patience": 9, "check_finite": False}, [1, math.inf, 0], 3, "NOT_STOPPED"),
        ({"patience": 9, "stopping_threshold": 2}, [3, 2, 1.5, 1], 3, "STOPPING_THRESHOLD"),
        ({"patience": 9, "divergence_threshold": 6}, [3, 6, 7, 1], 3, "DIVERGENCE_THRESHOLD"),
    ],
)
def test_when_training_ends(tmp_path, options, values, epochs, reason):
    callback = EarlyStopping("score", **options)
    trainer = fit(tmp_path, values, callback, enable_checkpointing=False)
    assert trainer.current_epoch == epochs
    assert callback.stopping_reason is EarlyStoppingReason[reason]
    assert callback.stopped_epoch == (epochs - 1 if reason != "NOT_STOPPED" else 0)


def test_min_epochs_is_met_first(tmp_path):
    trainer = fit(tmp_path, [1, 2, 3, 4], EarlyStopping("score", patience=1), min_epochs=3, enable_checkpointing=False)
    assert trainer.current_epoch == 3


def test_a_restart_goes_on_counting(tmp_path):
    fit(tmp_path, [5, 4, 4, 4, 4, 4], EarlyStopping("score", patience=3), max_epochs=3)
    path = next((tmp_path / "checkpoints").iterdir())
    again = EarlyStopping("score", patience=3)
    trainer = fit(tmp_path, [5, 4, 4, 4, 4, 4], again, ckpt_path=path)
    assert trainer.current_epoch == 5
    assert again.best_score == 4


def test_a_missing_value_is_an_error_or_a_warning(tmp_path):
    with pytest.raises(ConfigError, match=r"'accuracy'.*\['score'\]"):
        fit(tmp_path, [1], EarlyStopping("accuracy"))
    with pytest.warns(UserWarning, match="accuracy"):
        fit(tmp_path, [1], EarlyStopping("accuracy", strict=False))
    with pytest.raises(ConfigError, match="'min', 'max'"):
        EarlyStopping("score", mode="best")


class Clock(Callback):
    """A clock on which each batch takes a minute."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.now += 60


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("trainer.callbacks.interval.time", clock)
    monkeypatch.setattr("trainer.callbacks.timer.time", clock)
    return clock


def test_max_time(tmp_path, clock):
    timer = Timer(timedelta(minutes=4, seconds=30))
    trainer = fit(tmp_path, [1] * 9, timer, clock, enable_checkpointing=False)
    assert trainer.global_step == 5
    assert timer.time_elapsed() == 300
    assert timer.time_remaining() == -30
    assert timer.end_time() - timer.start_time() == 300


def test_timer_counts_the_earlier_attempts(tmp_path, clock):
    fit(tmp_path, [1] * 9, clock, Timer("00:00:02:30", interval="epoch"), max_epochs=1)
    path = next((tmp_path / "checkpoints").iterdir())
    again = Timer({"minutes": 2, "seconds": 30}, interval="epoch")
    trainer = fit(tmp_path, [1] * 9, clock, again, ckpt_path=path)
    assert trainer.global_step == 4
    assert again.time_elapsed() == 240


@pytest.mark.parametrize("duration", ["12h", "1:2:3:4", {"hour": 1}, 5])
def test_unreadable_durations(duration):
    with pytest.raises(ConfigError, match="cannot be read"):
        Timer(duration)


def test_max_time_of_the_trainer_is_a_timer():
    trainer = Trainer(max_time="00:12:00:00", logger=False, accelerator="cpu")
    assert [c._duration for c in trainer.callbacks if isinstance(c, Timer)] == [12 * 3600]
    with pytest.raises(ConfigError, match="contradict"):
        Trainer(max_time="00:12:00:00", callbacks=Timer(), logger=False, accelerator="cpu")
