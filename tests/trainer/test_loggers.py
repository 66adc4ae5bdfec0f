"""Loggers: which folder a run writes to, what stands there, and that a restart continues it without doubled steps."""

from __future__ import annotations

import csv
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from trainer import Module, Trainer
from trainer.errors import LoggingError
from trainer.loggers import CSVLogger, Logger, TensorBoardLogger
from trainer.loggers import logger as logger_module
from trainer.loggers.hparams_file import to_yaml
from trainer.loggers.logger import claim_version, flat_params, plain_params
from trainer.loggers.table import results_table


def scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, round(e.value, 4)) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def new_attempt(tmp_path, monkeypatch):
    """A function that does what a restarted process does: the same run folder, and no memory of the one before."""
    monkeypatch.setenv("LAUNCH_RUN_DIR", str(tmp_path))
    return lambda: monkeypatch.setattr(logger_module, "_asked", {})


@pytest.mark.parametrize("kind", [TensorBoardLogger, CSVLogger])
def test_folders(tmp_path, kind):
    assert kind(tmp_path).log_dir == str(tmp_path / "lightning_logs" / "version_0")
    assert kind(tmp_path).log_dir == str(tmp_path / "lightning_logs" / "version_1")
    assert kind(tmp_path, name="a", version=7).log_dir == str(tmp_path / "a" / "version_7")
    assert kind(tmp_path, name="a", version="best").log_dir == str(tmp_path / "a" / "best")
    assert kind(tmp_path, name=None, version="x").log_dir == str(tmp_path / "x")
    (tmp_path / "lightning_logs" / "version_10").mkdir()
    (tmp_path / "lightning_logs" / "version_x").mkdir()
    assert kind(tmp_path).version == 11


def test_no_two_runs_get_one_version(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        versions = list(pool.map(lambda _: claim_version(str(tmp_path)), range(32)))
    assert sorted(versions) == list(range(32))


def test_a_restart_finds_its_own_logs_again(tmp_path, new_attempt):
    first = [TensorBoardLogger(tmp_path / "a").log_dir, TensorBoardLogger(tmp_path / "a").log_dir]
    new_attempt()
    assert [TensorBoardLogger(tmp_path / "a").log_dir, TensorBoardLogger(tmp_path / "a").log_dir] == first
    assert TensorBoardLogger(tmp_path / "a").version == 2


def test_tensorboard_continues_without_doubled_steps(tmp_path, new_attempt):
    first = TensorBoardLogger(tmp_path)
    first.log_hyperparams({"lr": 0.1})
    for step in range(10):
        first.log_metrics({"loss": 1.0, "late" if step > 6 else "early": 1.0}, step)
    first.finalize("failed")
    new_attempt()
    again = TensorBoardLogger(tmp_path)
    again.log_hyperparams({"lr": 0.1})
    again.resume(6)
    for step in range(7, 12, 2):
        again.log_metrics({"loss": torch.tensor(2.0)}, step)
    again.finalize("success")
    found = scalars(again.log_dir)
    assert found["loss"] == [(s, 1.0) for s in range(6)] + [(7, 2.0), (9, 2.0), (11, 2.0)]
    assert found["early"] == [(s, 1.0) for s in range(6)]
    # Nothing is left of what the lost attempt logged after the step it was resumed from.
    assert found.get("late", []) == []
    assert found["hp_metric"] == [(0, -1.0)]


def test_csv_continues_without_doubled_steps(tmp_path, new_attempt):
    first = CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    for step in range(6):
        first.log_metrics({"loss": 1.0}, step)
    path = tmp_path / "lightning_logs" / "version_0" / "metrics.csv"
    with open(path, "a") as file:
        file.write("6,")  # a kill in the middle of a row
    new_attempt()
    again = CSVLogger(tmp_path)
    again.resume(3)
    again.log_metrics({"loss": 2.0, "new": 5}, 3)
    again.save()
    found = [(r["step"], r["loss"], r["new"]) for r in rows(path)]
    assert found == [("0", "1.0", ""), ("1", "1.0", ""), ("2", "1.0", ""), ("3", "2.0", "5")]


def test_a_restart_before_the_first_checkpoint_begins_anew(tmp_path, new_attempt):
    first = CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    first.log_metrics({"loss": 1.0}, 4)
    new_attempt()
    again = CSVLogger(tmp_path)
    again.log_metrics({"loss": 2.0}, 4)
    again.finalize("success")
    assert [(r["step"], r["loss"]) for r in rows(tmp_path / "lightning_logs/version_0/metrics.csv")] == [("4", "2.0")]


def test_csv_keeps_a_file_that_is_not_of_this_run(tmp_path):
    first = CSVLogger(tmp_path, version=0)
    first.log_metrics({"loss": 1.0}, 0)
    first.save()
    other = CSVLogger(tmp_path, version=0)
    other.log_metrics({"loss": 2.0}, 0)
    other.save()
    folder = tmp_path / "lightning_logs" / "version_0"
    assert [r["loss"] for r in rows(folder / "metrics.csv")] == ["2.0"]
    assert [r["loss"] for r in rows(folder / "metrics.csv.1")] == ["1.0"]


def test_csv_gets_columns_as_they_come_and_writes_when_due(tmp_path):
    logger = CSVLogger(tmp_path, prefix="p", flush_logs_every_n_steps=3)
    path = Path(logger.log_dir) / "metrics.csv"
    logger.log_metrics({"a": 1}, 0)
    logger.log_metrics({"b": torch.tensor(0.5)}, 1)
    assert not path.exists()
    logger.log_metrics({"a": 2}, 2)
    logger.log_metrics({"c": 3}, 3)
    logger.save()
    assert rows(path) == [
        {"p-a": "1", "p-b": "", "step": "0", "p-c": ""}, {"p-a": "", "p-b": "0.5", "step": "1", "p-c": ""},
        {"p-a": "2", "p-b": "", "step": "2", "p-c": ""}, {"p-a": "", "p-b": "", "step": "3", "p-c": "3"},
    ]  # fmt: skip


def test_tensorboard_hyperparameters_scalars_and_graph(tmp_path):
    logger = TensorBoardLogger(tmp_path, log_graph=True, sub_dir="sub", prefix="p")
    logger.log_hyperparams(Namespace(lr=0.1, layers=[8, 4], nested={"a": None}), {"hp/acc": 0.5})
    logger.log_metrics({"loss": 1, "both": {"x": 1.0, "y": 2.0}}, 3)
    model = nn.Linear(2, 1)
    model.example_input_array = torch.zeros(1, 2)
    logger.log_graph(model)
    with pytest.raises(LoggingError, match="cannot show 'p-text'"):
        logger.log_metrics({"text": "no number"}, 4)
    logger.finalize("success")
    logger.log_metrics({"loss": 2}, 4)  # a finished logger goes on, in another file of the same folder
    logger.finalize("success")
    folder = tmp_path / "lightning_logs" / "version_0" / "sub"
    assert scalars(folder) == {"hp/acc": [(0, 0.5)], "p-loss": [(3, 1.0), (4, 2.0)]}
    assert (folder / "hparams.yaml").read_text() == 'lr: 0.1\nlayers: [8, 4]\nnested: {"a": null}\n'


def test_only_rank_zero_writes(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    for logger in (TensorBoardLogger(tmp_path), CSVLogger(tmp_path)):
        logger.log_hyperparams({"a": 1})
        logger.log_metrics({"loss": 1.0}, 0)
        logger.experiment.add_image("x", None)
        logger.finalize("success")
    assert list(tmp_path.iterdir()) == []


class Tiny(Module):
    def __init__(self, lr=0.1):
        super().__init__()
        self.save_hyperparameters()
        self.layer = nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        loss = self.layer(batch[0]).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.hparams.lr)


class Mine(Logger):
    """A logger as a user writes one."""

    def __init__(self):
        self.calls = []

    @property
    def name(self):
        return "mine"

    @property
    def version(self):
        return "1"

    def log_metrics(self, metrics, step=None):
        self.calls.append((step, sorted(metrics)))

    def log_hyperparams(self, params, *args, **kwargs):
        self.calls.append(dict(params))

    def finalize(self, status):
        self.calls.append(status)


def test_several_loggers_in_a_fit(tmp_path):
    mine, table, board = Mine(), CSVLogger(tmp_path, name="csv"), TensorBoardLogger(tmp_path, name="tb")
    trainer = Trainer(
        max_epochs=1, logger=[mine, table, board], log_every_n_steps=2, accelerator="cpu", default_root_dir=tmp_path,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Tiny(), DataLoader(TensorDataset(torch.ones(4, 2))))
    assert mine.calls == [{"lr": 0.1}, (1, ["epoch", "loss"]), (3, ["epoch", "loss"]), "success"]
    assert [r["step"] for r in rows(Path(table.log_dir) / "metrics.csv")] == ["1", "3"]
    assert [s for s, _ in scalars(board.log_dir)["loss"]] == [1, 3]
    assert trainer.checkpoint_callback.dirpath.endswith("checkpoints")


def test_defaults_of_the_trainer(tmp_path):
    trainer = Trainer(accelerator="cpu", default_root_dir=tmp_path)
    assert isinstance(trainer.logger, TensorBoardLogger)
    assert Trainer(accelerator="cpu", logger=False).logger is None


def test_containers_of_hyperparameters():
    @dataclass
    class Config:
        lr: float = 0.1
        inner: object = None

    assert plain_params(Namespace(a=1)) == plain_params({"a": 1}) == {"a": 1}
    assert plain_params(Config(inner=Config())) == {"lr": 0.1, "inner": {"lr": 0.1, "inner": None}}
    assert plain_params(None) == {}
    assert flat_params({"a": {"b": 1, "c": Namespace(d=2)}, "e": 3}) == {"a/b": 1, "a/c/d": 2, "e": 3}


def test_yaml_is_read_back_by_a_yaml_reader():
    yaml = pytest.importorskip("yaml")
    values = {
        "lr": 1e-3, "name": 'quote " and: colon', "none": None, "yes": True, "list": [1, [2.5, "x"]],
        "dict": {"a b": {"c": False}}, "strange: key": 1, "empty": {}, "path": Path("/tmp/x"), "1": "number",
        "tensor": torch.tensor(2),
    }  # fmt: skip
    read = yaml.safe_load(to_yaml(values))
    assert read == values | {"path": "/tmp/x", "tensor": 2}
    inf = yaml.safe_load(to_yaml({"a": float("inf"), "b": float("-inf")}))
    assert inf == {"a": float("inf"), "b": float("-inf")}
    assert yaml.safe_load(to_yaml({})) == {}


def test_results_table():
    assert results_table([{"test_acc": 0.98765432, "n": 3}], "test") == (
        "test metric |    value\n----------------------\ntest_acc    | 0.987654\nn           |        3"
    )
    two = results_table([{"a/dataloader_idx_0": 1.0}, {"a/dataloader_idx_1": 2.0}], "validate")
    assert two.splitlines()[0] == "validate metric    | loader 0 | loader 1"
