"""Progress display and model summary: what is shown, and how seldom it is drawn."""

from __future__ import annotations

import io
import re
import sys

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from trainer import Module, Trainer
from trainer.callbacks import ModelSummary, ProgressBar, RichModelSummary, RichProgressBar, TQDMProgressBar
from trainer.callbacks import progress as progress_module
from trainer.callbacks.progress import Screen, format_value
from trainer.callbacks.summary import Summary, human_count
from trainer.errors import ConfigError


class Tiny(Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        loss = self.layer(batch[0]).square().mean()
        self.log("loss", loss, prog_bar=True)
        self.log("hidden", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val", 0.5, prog_bar=True)

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        return self.layer(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def loader(n):
    return DataLoader(TensorDataset(torch.ones(n, 2)))


def run(bar, folder, n=5, **options):
    options = {"max_epochs": 2, "enable_model_summary": False} | options
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=folder, callbacks=[bar], **options
    )
    model = Tiny()
    trainer.fit(model, loader(n), loader(2))
    trainer.validate(model, loader(2), verbose=False)
    trainer.test(model, loader(2), verbose=False)
    trainer.predict(model, loader(3))
    return trainer


class Recorder(Screen):
    def __init__(self, every):
        self.every = every
        self.calls = []

    def _note(self, what, task):
        self.calls.append((what, task.stage, task.done, task.total, sorted(task.metrics)))

    def begin(self, task):
        self._note("begin", task)

    def draw(self, task):
        self._note("draw", task)

    def end(self, task):
        self._note("end", task)

    def say(self, text):
        self.calls.append(text)


class Recorded(ProgressBar):
    def __init__(self, every, refresh_rate=1):
        super().__init__(refresh_rate)
        self.screen = Recorder(every)

    def make_screen(self):
        return self.screen


def test_what_is_shown_when(tmp_path):
    bar = Recorded(every=1e9)
    run(bar, tmp_path)
    assert bar.screen.calls == [
        ("begin", "sanity", 0, 2, []), ("end", "sanity", 2, 2, []),
        ("begin", "train", 0, 5, []), ("begin", "validate", 0, 2, []), ("end", "validate", 2, 2, ["loss", "val"]),
        ("end", "train", 5, 5, ["loss", "val"]),
        ("begin", "train", 0, 5, []), ("begin", "validate", 0, 2, []), ("end", "validate", 2, 2, ["loss", "val"]),
        ("end", "train", 5, 5, ["loss", "val"]),
        ("begin", "test", 0, 2, []), ("end", "test", 2, 2, ["val"]),
        ("begin", "test", 0, 2, []), ("end", "test", 2, 2, ["val"]),
        ("begin", "predict", 0, 3, []), ("end", "predict", 3, 3, []),
    ]  # fmt: skip


def test_drawn_by_time_and_refresh_rate(tmp_path):
    def draws(bar):
        run(bar, tmp_path, n=10, max_epochs=1, limit_val_batches=0)
        return [done for what, stage, done, *_ in bar.screen.calls if (what, stage) == ("draw", "train")]

    assert draws(Recorded(every=0)) == list(range(1, 11))
    assert draws(Recorded(every=0, refresh_rate=4)) == [4, 8]
    assert draws(Recorded(every=1e9)) == []


def test_a_batch_between_two_looks_only_reads_the_clock(tmp_path, monkeypatch):
    """What is shown is not computed for a batch at which nothing is drawn."""
    bar = Recorded(every=1e9)
    asked = []
    monkeypatch.setattr(bar, "get_metrics", lambda trainer, module: asked.append(1) or {})
    run(bar, tmp_path, n=50, max_epochs=1, limit_val_batches=0)
    assert len(asked) == sum(call[0] == "end" for call in bar.screen.calls)


def test_lines_where_there_is_no_terminal(tmp_path, capsys):
    run(RichProgressBar(), tmp_path)
    lines = capsys.readouterr().out.splitlines()
    time_of_day = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d "
    assert re.fullmatch(time_of_day + r"epoch 1/2  batch 5/5  \S+ it/s  \S+ samples/s  loss \S+  val 0\.5", lines[0])
    assert [line.split("  ")[0].split(" ", 2)[2] for line in lines] == ["epoch 1/2", "epoch 2/2", "validation", "test",
                                                                       "predict"]  # fmt: skip


def test_rich_bar(tmp_path):
    screen = io.StringIO()
    bar = RichProgressBar(console_kwargs={"file": screen, "force_terminal": True, "width": 160}, leave=True)
    run(bar, tmp_path)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    assert "epoch 1/2" in text
    assert re.search(r"epoch 2/2 .* 5/5 .*it/s.*loss: .*val: 0\.500", text)
    assert "validation" in text
    assert "\x1b[?25h" in screen.getvalue()  # the cursor is shown again


def test_on_a_narrow_screen_the_metrics_take_several_lines(tmp_path):
    screen = io.StringIO()
    run(RichProgressBar(console_kwargs={"file": screen, "force_terminal": True, "width": 72}), tmp_path)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    assert re.search(r"epoch 2/2 \S+ 5/5 \S+ • \S+ \S+it/s loss:", text)
    assert re.search(r"\n *(val: )?0\.500", text)


def test_tqdm_bar(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(progress_module, "on_terminal", lambda: True)
    run(TQDMProgressBar(leave=True), tmp_path)
    text = capsys.readouterr().out
    assert "epoch 1/2: 100%" in text
    assert re.search(r"epoch 2/2: 100%.* 5/5 .*loss=.*val=0.5", text)
    assert "predict: 100%" in text


def test_tqdm_bar_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(progress_module, "on_terminal", lambda: True)
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(ConfigError, match="pip install tqdm"):
        TQDMProgressBar().make_screen()


def test_the_terminal_is_left_in_order_after_an_error(tmp_path):
    class Failing(Tiny):
        def training_step(self, batch, batch_idx):
            raise RuntimeError("scripted")

    screen = io.StringIO()
    bar = RichProgressBar(console_kwargs={"file": screen, "force_terminal": True})
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=tmp_path, callbacks=[bar]
    )
    with pytest.raises(RuntimeError, match="scripted"):
        trainer.fit(Failing(), loader(2), loader(1))
    assert screen.getvalue().endswith("\x1b[?25h") or "\x1b[?25h" in screen.getvalue()


def test_switched_off(tmp_path, capsys):
    bar = RichProgressBar(refresh_rate=0)
    assert bar.is_disabled
    run(bar, tmp_path)
    other = RichProgressBar()
    other.disable()
    run(other, tmp_path)
    assert capsys.readouterr().out == ""
    with pytest.raises(ConfigError, match="refresh_rate=-1"):
        RichProgressBar(refresh_rate=-1)
    with pytest.raises(ConfigError, match="enable_progress_bar=False"):
        Trainer(callbacks=[bar], enable_progress_bar=False, accelerator="cpu", logger=False)
    with pytest.raises(ConfigError, match="more than one"):
        Trainer(callbacks=[bar, other], accelerator="cpu", logger=False)


@pytest.mark.parametrize(
    ("value", "text"), [(3, "3"), (0.123456, "0.1235"), (1e-9, "1e-09"), (True, "True"), ("a", "a")]
)
def test_values_are_short(value, text):
    assert format_value(value) == text


class Nested(Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.body = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Sequential(nn.Linear(16, 2)))
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.body.eval()

    def forward(self, x):
        return self.frozen(self.body(x)) * self.scale.sum()


def test_summary_of_layers():
    top, whole = Summary(Nested()), Summary(Nested(), max_depth=-1)
    assert [(r.name, r.type, r.parameters, r.trainable, r.training) for r in top.layers] == [
        ("body", "Sequential", 178, 178, False),
        ("frozen", "Linear", 6, 0, True),
    ]
    assert [r.name for r in whole.layers] == ["body", "body.0", "body.1", "body.2", "body.2.0", "frozen"]
    assert (top.total_parameters, top.trainable_parameters) == (187, 181)
    assert top.total_training_modes == {"train": 1, "eval": 5}
    assert "(other parameters)" in str(top)
    assert "Trainable params" in str(Summary(Nested(), max_depth=0))
    assert "body" not in str(Summary(Nested(), max_depth=0))
    with pytest.raises(ConfigError, match="max_depth=-2"):
        Summary(Nested(), max_depth=-2)


def test_summary_with_an_example_input():
    model = Nested()
    model.example_input_array = torch.zeros(4, 8)
    summary = Summary(model)
    assert [(r.in_size, r.out_size, r.flops) for r in summary.layers] == [
        ([4, 8], [4, 2], 2 * 4 * (8 * 16 + 16 * 2)),
        ([4, 2], [4, 2], 2 * 4 * 2 * 2),
    ]
    assert summary.total_flops == sum(r.flops for r in summary.layers)
    assert "[4, 8]" in str(summary)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("kind", [ModelSummary, RichModelSummary])
def test_summary_in_a_fit(tmp_path, capsys, kind):
    run(Recorded(1e9), tmp_path, enable_model_summary=True)
    assert "layer | Linear" in capsys.readouterr().out
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=tmp_path, max_epochs=1,
        enable_progress_bar=False, callbacks=[kind(max_depth=-1)],
    )  # fmt: skip
    trainer.fit(Tiny(), loader(1), loader(1))
    assert capsys.readouterr().out.count("Total params") == 1


@pytest.mark.parametrize(
    ("n", "text"), [(0, "0"), (999, "999"), (1234, "1.2 K"), (345_678, "346 K"), (7 * 10**9, "7.0 B")]
)
def test_counts_are_short(n, text):
    assert human_count(n) == text
