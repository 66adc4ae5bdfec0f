"""self.log: what is reported when, and how it is reduced."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

import trainer as T
from trainer.errors import LoggingError


class Rows(T.loggers.Logger):
    """Keeps what it is given."""

    name, version = "rows", 0

    def __init__(self):
        self.rows, self.params = [], {}

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, dict(metrics)))

    def log_hyperparams(self, params, *args, **kwargs):
        self.params.update(params)

    def named(self, name):
        return [(step, row[name]) for step, row in self.rows if name in row]


def test_defaults_by_hook_and_forked_names(boring, data, quiet):
    class Model(boring):
        def training_step(self, batch, batch_idx):
            self.log("step_only", float(batch_idx))
            self.log("both", float(batch_idx), on_epoch=True)
            self.log("epoch_only", float(batch_idx), on_step=False, on_epoch=True)
            return self.loss(batch)

        def on_train_epoch_end(self):
            self.log("end", 5.0)

        def validation_step(self, batch, batch_idx):
            self.log("val", float(batch_idx))
            self.log("val_step", float(batch_idx), on_step=True, on_epoch=False)

    rows = Rows()
    trainer = quiet(max_epochs=2, logger=rows, log_every_n_steps=2)
    trainer.fit(Model(), data(), data(8))
    assert rows.named("step_only") == [
        (1, 1.0),
        (3, 3.0),
        (5, 5.0),
        (7, 7.0),
        (9, 1.0),
        (11, 3.0),
        (13, 5.0),
        (15, 7.0),
    ]
    assert rows.named("both_step") == rows.named("step_only")
    assert rows.named("both_epoch") == rows.named("epoch_only") == [(7, 3.5), (15, 3.5)]
    assert rows.named("end") == [(7, 5.0), (15, 5.0)]
    assert rows.named("val") == [(7, 0.5), (15, 0.5)]
    assert rows.named("val_step") == [(0, 0.0), (1, 1.0), (0, 0.0), (1, 1.0)]
    metrics = trainer.callback_metrics
    assert {"step_only", "both", "both_step", "both_epoch", "epoch_only", "end", "val"} <= metrics.keys()
    assert "val_step" not in metrics
    assert metrics["both"] == 3.5
    assert metrics["both_step"] == 7.0
    assert all(isinstance(v, torch.Tensor) and v.ndim == 0 for v in metrics.values())


@pytest.mark.parametrize(
    ("reduce", "value"), [("mean", 2.0), ("sum", 10.0), (torch.max, 4.0), (min, 0.0), ("avg", 2.0)]
)
def test_reductions(boring, data, quiet, reduce, value):
    class Model(boring):
        def validation_step(self, batch, batch_idx):
            self.log("v", torch.tensor(float(batch_idx), dtype=torch.float64), reduce_fx=reduce)

    found = quiet().validate(Model(), data(20, 4), verbose=False)
    assert found == [{"v": value}]


def test_the_mean_is_weighted_by_batch_size(boring, data, quiet):
    class Model(boring):
        def validation_step(self, batch, batch_idx):
            self.log("found", float(batch_idx))
            self.log("given", float(batch_idx), batch_size=1)

    found = quiet().validate(Model(), data(10, 8), verbose=False)
    assert found == [{"found": pytest.approx(0.2), "given": 0.5}]


def test_values_are_taken_when_they_are_logged(boring, data, quiet):
    class Model(boring):
        def training_step(self, batch, batch_idx):
            loss = self.loss(batch)
            self.log("before", loss)
            before = loss.item()
            loss += 100
            assert self.trainer.callback_metrics["before"] == before
            return loss

    trainer = quiet(max_epochs=1, limit_train_batches=2)
    trainer.fit(Model(), data())
    assert trainer.callback_metrics["before"] < 100


def test_metric_objects_are_computed_and_reset_per_epoch(boring, data, quiet):
    class Model(boring):
        def __init__(self):
            super().__init__()
            self.mean = MeanMetric()
            self.many = MetricCollection({"acc": MulticlassAccuracy(2, average="micro")}, prefix="val_")

        def training_step(self, batch, batch_idx):
            self.mean(float(batch_idx + 10 * self.current_epoch))
            self.log("mean", self.mean, on_step=True, on_epoch=True)
            return self.loss(batch)

        def validation_step(self, batch, batch_idx):
            self.many(torch.tensor([1, 0]), torch.tensor([1, batch_idx % 2]))
            self.log_dict(self.many)

    rows = Rows()
    trainer = quiet(max_epochs=2, logger=rows, log_every_n_steps=8)
    trainer.fit(Model(), data(), data(8))
    assert rows.named("mean_step") == [(7, 7.0), (15, 17.0)]
    assert rows.named("mean_epoch") == [(7, 3.5), (15, 13.5)]
    assert rows.named("val_acc") == [(7, 0.75), (15, 0.75)]


def test_progress_bar_metrics_are_numbers(boring, data, quiet):
    class Model(boring):
        def training_step(self, batch, batch_idx):
            self.log("bar", 1.5, prog_bar=True, logger=False)
            return self.loss(batch)

    trainer = quiet(max_epochs=1)
    trainer.fit(Model(), data())
    assert trainer.progress_bar_metrics == {"bar": 1.5}
    assert "bar" not in trainer.logged_metrics


def test_epoch_and_step_axes_can_be_chosen(boring, data, quiet):
    class Model(boring):
        def on_train_epoch_end(self):
            self.log_dict({"x": 1.0, "step": float(self.current_epoch)})

    rows = Rows()
    quiet(max_epochs=2, logger=rows).fit(Model(), data())
    assert [step for step, row in rows.rows if "x" in row] == [0, 1]


def test_hyperparameters_reach_the_logger(data, quiet, boring):
    class Model(boring):
        def __init__(self, width=3, secret="x"):
            super().__init__()
            self.save_hyperparameters(ignore="secret")

    rows = Rows()
    quiet(max_epochs=1, logger=rows).fit(Model(), data())
    assert rows.params == {"width": 3}


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: m.log("a", torch.ones(2)), "shape \\(2,\\)"),
        (lambda m: m.log("a", "text"), "given a str"),
        (lambda m: m.log("a", {"b": 1}), "self.log_dict"),
        (lambda m: m.log("a", 1.0, reduce_fx="median"), "mean, sum, min, max"),
        (lambda m: m.log("a", 1.0, on_step=False, on_epoch=False), "never be reported"),
        (lambda m: m.log("a/dataloader_idx_1", 1.0), "appended for you"),
        (lambda m: (m.log("a", 1.0), m.log("a", 1.0, prog_bar=True)), "twice in training_step"),
        (lambda m: m.log(3, 1.0), "must be a str"),
    ],
)
def test_what_cannot_be_logged(boring, data, quiet, call, words):
    class Model(boring):
        def training_step(self, batch, batch_idx):
            call(self)
            return self.loss(batch)

    with pytest.raises(LoggingError, match=words):
        quiet(max_epochs=1).fit(Model(), data())


@pytest.mark.parametrize("hook", ["on_fit_start", "on_train_end", "setup"])
def test_where_nothing_can_be_logged(boring, data, quiet, hook):
    class Model(boring):
        pass

    setattr(Model, hook, lambda self, *args, **kwargs: self.log("a", 1.0))
    with pytest.raises(LoggingError, match=r"not possible|outside"):
        quiet(max_epochs=1).fit(Model(), data())


def test_without_a_trainer_logging_warns(boring, data):
    with pytest.warns(UserWarning, match="outside of a Trainer"):
        boring().training_step(next(iter(data())), 0)


def test_a_batch_without_tensors_needs_its_size(boring, data, quiet):
    class Model(boring):
        def validation_step(self, batch, batch_idx):
            self.log("v", 1.0)

    with pytest.raises(LoggingError, match="batch_size=n"):
        quiet().validate(Model(), DataLoader(["text"], batch_size=None))
