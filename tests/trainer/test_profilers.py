"""Profilers: every action is measured once, reports go where they were asked for, traces can be opened."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from trainer import Module, Trainer
from trainer.errors import ConfigError, TrainerError
from trainer.profilers import AdvancedProfiler, PassThroughProfiler, PyTorchProfiler, SimpleProfiler


class Tiny(Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch[0]).square().mean()

    def on_train_epoch_end(self):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def fit(folder, profiler, batches=6):
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=folder, max_epochs=1,
        enable_progress_bar=False, enable_model_summary=False, profiler=profiler,
    )  # fmt: skip
    trainer.fit(Tiny(), DataLoader(TensorDataset(torch.ones(batches, 2))))
    return trainer.profiler


def test_simple(tmp_path, capsys):
    profiler = fit(tmp_path, "simple")
    assert isinstance(profiler, SimpleProfiler)
    assert len(profiler.recorded_durations["training_step"]) == 6
    assert len(profiler.recorded_durations["[Module]Tiny.on_train_epoch_end"]) == 1
    assert "training_step" in capsys.readouterr().out


def test_without_one_code_that_asks_for_it_runs(tmp_path):
    profiler = fit(tmp_path, None)
    with profiler.profile("load"):
        pass
    assert type(profiler) is PassThroughProfiler


def test_simple_by_hand():
    profiler = SimpleProfiler(extended=False)
    with profiler.profile("a"), profiler.profile("b"):
        pass
    assert "Mean duration" in profiler.summary()
    profiler.start("a")
    with pytest.raises(TrainerError, match="runs already"):
        profiler.start("a")
    with pytest.raises(TrainerError, match="not started"):
        profiler.stop("c")


def test_report_in_a_file(tmp_path, capsys):
    fit(tmp_path, SimpleProfiler(dirpath=tmp_path, filename="report"))
    assert "training_step" in (tmp_path / "fit-report.txt").read_text()
    assert capsys.readouterr().out == ""


def test_advanced(tmp_path, capsys):
    profiler = fit(tmp_path, "advanced")
    assert "training_step" in profiler.profiled_actions
    assert "Profile stats for: training_step" in capsys.readouterr().out
    dumping = AdvancedProfiler(tmp_path, "deep", line_count_restriction=5, dump_stats=True)
    with dumping.profile("outer"), dumping.profile("in/ner"):
        sum(range(10))
    dumping.describe()
    assert sorted(p.name for p in tmp_path.glob("deep*")) == ["deep-in_ner.prof", "deep-outer.prof", "deep.txt"]
    with pytest.raises(TrainerError, match="not the action that runs"):
        dumping.stop("outer")


def test_pytorch_writes_a_trace_and_a_table(tmp_path, capsys):
    shapes = {"group_by_input_shapes": True, "table_kwargs": {"max_name_column_width": 70}}
    profiler = fit(tmp_path, PyTorchProfiler(tmp_path, "ops", with_stack=False, **shapes))
    [path] = profiler.trace_paths
    names = {event.get("name") for event in json.loads(path.read_text())["traceEvents"]}
    assert "[trainer]training_step" in names
    assert "aten::linear" in names
    table = (tmp_path / "fit-ops.txt").read_text()
    assert "aten::linear" in table
    assert "Input Shapes" in table
    assert capsys.readouterr().out == ""
    with pytest.raises(ConfigError, match="not both"):
        PyTorchProfiler(on_trace_ready=print)
    with pytest.raises(ConfigError, match=r"unknown arguments \['emit_nvtx'\]. torch has activities"):
        PyTorchProfiler(emit_nvtx=True)


def test_names():
    with pytest.raises(ConfigError, match="simple, advanced, pytorch"):
        Trainer(profiler="fast", accelerator="cpu", logger=False)
    nothing = PassThroughProfiler()
    with nothing.profile("a"):
        pass
    assert nothing.summary() == ""
