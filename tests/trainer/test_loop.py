"""The loops: which batches are seen, in which order things happen, and where they end."""

from __future__ import annotations

import itertools
import math
import struct

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import trainer as T
from trainer.errors import ConfigError, DataError, ModuleError


class Seen(T.Callback):
    """Counts what happened."""

    def __init__(self):
        self.train, self.val, self.events = [], [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.train.append((trainer.current_epoch, batch_idx))
        self.events.append(f"train {batch_idx}")

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        if not trainer.sanity_checking:
            self.val.append((trainer.current_epoch, dataloader_idx, batch_idx))

    def on_validation_start(self, trainer, pl_module):
        self.events.append("sanity" if trainer.sanity_checking else "validate")


def test_fit_trains_validates_and_counts(boring, data, quiet):
    seen = Seen()
    trainer = quiet(max_epochs=3, callbacks=[seen])
    model = boring()
    trainer.fit(model, data(), data(8))
    assert len(seen.train) == 24
    assert len(seen.val) == 6
    assert trainer.global_step == 24
    assert trainer.current_epoch == 3
    assert seen.events[0] == "sanity"
    assert trainer.callback_metrics["val_loss"] < 0.5
    assert trainer.state.finished
    assert trainer.num_training_batches == 8
    assert trainer.num_val_batches == [2]


def test_own_time_counts_on_where_an_epoch_was_left_early(boring, data, quiet, tmp_path, monkeypatch):
    monkeypatch.setenv("LAUNCH_PROGRESS", str(tmp_path / "page"))
    own_ns = []

    class Impatient(boring):
        def on_train_batch_start(self, batch, batch_idx):
            own_ns.append(struct.unpack_from("<Q", (tmp_path / "page").read_bytes(), 32)[0])
            return -1 if batch_idx == 2 else None

    quiet(max_epochs=3).fit(Impatient(), data())
    assert own_ns[0] == 0
    assert [b > a for a, b in itertools.pairwise(own_ns)] == [True, True, False] * 2 + [True, True]
    assert own_ns == sorted(own_ns)


@pytest.mark.parametrize(
    ("arguments", "steps", "epochs"),
    [
        ({"max_steps": 5}, 5, 1),
        ({"max_steps": 11, "max_epochs": -1}, 11, 2),
        ({"max_epochs": 2, "max_steps": 100}, 16, 2),
        ({"max_epochs": 2, "limit_train_batches": 3}, 6, 2),
        ({"max_epochs": 2, "limit_train_batches": 0.5}, 8, 2),
        ({"max_epochs": 1, "limit_train_batches": 0}, 0, 0),
        ({"max_epochs": 2, "accumulate_grad_batches": 3}, 6, 2),
        ({"fast_dev_run": True}, 1, 1),
        ({"fast_dev_run": 3}, 3, 1),
        ({"max_epochs": 0}, 0, 0),
    ],
)
def test_limits_of_fit(boring, data, quiet, arguments, steps, epochs):
    trainer = quiet(**arguments)
    trainer.fit(boring(), data(), data(8))
    assert (trainer.global_step, trainer.current_epoch) == (steps, epochs)


def test_min_epochs_and_min_steps_hold_off_should_stop(boring, data, quiet):
    class Stop(T.Callback):
        def on_train_batch_end(self, trainer, *args):
            trainer.should_stop = True

    for arguments, steps in (({}, 1), ({"min_steps": 5}, 5), ({"min_epochs": 2}, 16)):
        trainer = quiet(max_epochs=4, callbacks=[Stop()], **arguments)
        trainer.fit(boring(), data())
        assert trainer.global_step == steps


@pytest.mark.parametrize(
    ("arguments", "places"),
    [
        ({"val_check_interval": 0.25}, [2, 4, 6, 8, 10, 12, 14, 16]),
        ({"val_check_interval": 3}, [3, 6, 11, 14]),
        ({"val_check_interval": 5, "check_val_every_n_epoch": None}, [5, 10, 15]),
        ({"check_val_every_n_epoch": 2}, [16]),
        ({"limit_val_batches": 0}, []),
        ({"val_check_interval": {"seconds": 0}, "max_steps": 3}, [1, 2, 3]),
    ],
)
def test_when_fit_validates(boring, data, quiet, arguments, places):
    found = []

    class Look(T.Callback):
        def on_validation_start(self, trainer, pl_module):
            if not trainer.sanity_checking:
                found.append(trainer.global_step)

    quiet(max_epochs=2, callbacks=[Look()], **arguments).fit(boring(), data(), data(8))
    assert found == places


def test_sanity_check_comes_first_and_leaves_no_trace(boring, data, quiet):
    class Look(T.Callback):
        def on_sanity_check_end(self, trainer, pl_module):
            self.batches = trainer.num_sanity_val_batches

        def on_train_start(self, trainer, pl_module):
            self.metrics = dict(trainer.callback_metrics)

    look = Look()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    quiet(max_epochs=1, max_steps=0, callbacks=[look]).fit(boring(), data(), data(40))
    assert look.batches == [2]
    assert look.metrics == {}
    del before


def test_a_loader_without_length(boring, quiet):
    class Stream(IterableDataset):
        def __iter__(self):
            for _ in range(10):
                x = torch.randn(4)
                yield x, x.sum().unsqueeze(0)

    ends = []

    class Look(T.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            ends.append(trainer.global_step)

    trainer = quiet(max_epochs=2, accumulate_grad_batches=2, callbacks=[Look()])
    trainer.fit(boring(), DataLoader(Stream(), batch_size=2), DataLoader(Stream(), batch_size=5))
    # Five batches: two windows of two, and the last batch alone.
    assert ends == [3, 6]
    assert trainer.num_training_batches == math.inf
    with pytest.raises(ConfigError, match=r"limit_train_batches=0\.5"):
        quiet(max_epochs=1, limit_train_batches=0.5).fit(boring(), DataLoader(Stream(), batch_size=2))


def test_overfit_batches_sees_the_same_ones_in_order(boring, data, quiet):
    batches = []

    class Model(boring):
        def training_step(self, batch, batch_idx):
            batches.append(batch[0].clone())
            return super().training_step(batch, batch_idx)

    quiet(max_epochs=2, overfit_batches=2).fit(Model(), data(shuffle=True), data(shuffle=True))
    assert len(batches) == 4
    assert torch.equal(batches[0], batches[2])
    assert torch.equal(batches[0], next(iter(data()))[0])


def test_several_training_loaders(boring, data, quiet):
    shapes = []

    class Model(boring):
        def training_step(self, batch, batch_idx):
            shapes.append({k: None if v is None else len(v[0]) for k, v in batch.items()})
            return self.loss(batch["a"] if batch["a"] is not None else batch["b"])

    loaders = {"a": data(8, 4), "b": data(15, 5)}
    quiet(max_epochs=1).fit(Model(), loaders)
    assert shapes == [{"a": 4, "b": 5}] * 3
    for mode, count in (("min_size", 2), ("max_size", 3)):
        shapes.clear()
        quiet(max_epochs=1).fit(Model(), T.CombinedLoader(loaders, mode))
        assert len(shapes) == count
    assert shapes[-1] == {"a": None, "b": 5}
    with pytest.raises(ConfigError, match="sequential"):
        quiet(max_epochs=1).fit(Model(), T.CombinedLoader(loaders, "sequential"))


def test_several_validation_loaders_are_told_apart(boring, data, quiet):
    class Model(boring):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            self.log("val", float(dataloader_idx))
            self.log("seen", 1.0, reduce_fx="sum", add_dataloader_idx=False)

        def on_validation_epoch_end(self):
            self.log("all", 7.0)

    trainer = quiet()
    results = trainer.validate(Model(), [data(8), data(16)], verbose=False)
    assert [r["val/dataloader_idx_0"] for r in results[:1]] == [0.0]
    assert results[1]["val/dataloader_idx_1"] == 1.0
    assert results[0]["all"] == results[1]["all"] == 7.0
    assert trainer.callback_metrics["seen"] == 6
    with pytest.raises(ModuleError, match="dataloader_idx"):
        quiet().validate(boring(), [data(8), data(16)])


@pytest.mark.parametrize(("mode", "count"), [("min_size", 2), ("max_size", 4), ("max_size_cycle", 4)])
def test_validation_loaders_that_are_gone_through_together(boring, data, quiet, mode, count):
    class Model(boring):
        def validation_step(self, batch, batch_idx):
            seen.append(batch_idx)

    seen = []
    quiet().validate(Model(), T.CombinedLoader({"a": data(8), "b": data(16)}, mode), verbose=False)
    assert seen == list(range(count))
    seen.clear()
    loaders = T.CombinedLoader({"a": data(8), "b": data(16)}, mode)
    quiet(limit_val_batches=1).validate(Model(), loaders, verbose=False)
    assert seen == [0]


@pytest.mark.parametrize(
    ("mode", "limit", "second"),
    [  # as Lightning 2.6.6 does it: a pass is as long as the limits say, and no loader is cut by its own within it
        ("min_size", 1.0, "0123"), ("min_size", 0.5, "01"), ("min_size", 2, "01"), ("min_size", 5, "0123"),
        ("max_size_cycle", 1.0, "012301"), ("max_size_cycle", 0.5, "012"), ("max_size_cycle", 5, "01230"),
        ("max_size", 1.0, "0123--"), ("max_size", 0.5, "012"), ("max_size", 5, "0123-"), ("max_size", 0, ""),
    ],
)  # fmt: skip
def test_limits_of_loaders_that_are_gone_through_together(boring, quiet, capsys, mode, limit, second):
    class Model(boring):
        def validation_step(self, batch, batch_idx):
            first, other = batch
            assert first.tolist() == [batch_idx]
            seen.append("-" if other is None else str(other.item()))

    seen = []
    loaders = T.CombinedLoader([DataLoader(range(6), 1), DataLoader(range(4), 1)], mode)
    quiet(limit_val_batches=limit, enable_progress_bar=True).validate(Model(), loaders, verbose=False)
    assert "".join(seen) == second
    if second:
        assert f"validation  batch {len(second)}/{len(second)} " in capsys.readouterr().out


def test_fast_dev_run_leaves_what_code_asks_for_in_place(boring, data, tmp_path):
    class Model(boring):
        def training_step(self, batch, batch_idx):
            self.logger.experiment.add_scalar("x", 1.0, self.global_step)
            self.logger.watch(self)
            return super().training_step(batch, batch_idx)

    trainer = T.Trainer(
        fast_dev_run=True, accelerator="cpu", default_root_dir=tmp_path, enable_progress_bar=False,
        callbacks=[T.callbacks.LearningRateMonitor()],
    )  # fmt: skip
    trainer.fit(Model(), data(8), data(8))
    assert trainer.checkpoint_callback.best_model_path == ""
    assert list(tmp_path.iterdir()) == []
    assert T.Trainer(fast_dev_run=True, accelerator="cpu", logger=False).logger is None


def test_init_module_makes_layers_where_they_are_used(quiet):
    with quiet(precision="64-true").init_module():
        layer = torch.nn.Linear(2, 2)
    assert layer.weight.dtype is torch.float64
    assert torch.get_default_dtype() is torch.float32
    state = torch.get_rng_state()
    with quiet().init_module(empty_init=True):
        torch.nn.Linear(2, 2)
    assert torch.equal(torch.get_rng_state(), state)  # nothing was drawn
    with quiet().init_module():
        torch.nn.Linear(2, 2)
    assert not torch.equal(torch.get_rng_state(), state)


def test_predict_returns_lists(boring, data, quiet):
    class Model(boring):
        def predict_step(self, batch, batch_idx, dataloader_idx=0):
            return self(batch[0])

    one = quiet().predict(Model(), data(10))
    assert [len(p) for p in one] == [4, 4, 2]
    two = quiet(limit_predict_batches=1).predict(Model(), [data(8), data(4)])
    assert [[len(p) for p in loader] for loader in two] == [[4], [4]]
    assert quiet().predict(Model(), data(8), return_predictions=False) is None
    assert not one[0].requires_grad


def test_predict_defaults_to_forward(quiet):
    class Model(T.Module):
        def forward(self, x):
            return x * 2

    found = quiet().predict(Model(), DataLoader(torch.arange(4.0), batch_size=2))
    assert torch.equal(torch.cat(found), torch.arange(4.0) * 2)


def test_modes_and_gradients_in_each_stage(boring, data, quiet):
    modes = {}

    class Model(boring):
        def __init__(self):
            super().__init__()
            self.frozen = torch.nn.BatchNorm1d(4).eval()

        def note(self, name, batch):
            x = self.layer(batch[0])
            modes[name] = (self.training, self.frozen.training, torch.is_grad_enabled(), x.is_inference())
            return x.sum()

        def training_step(self, batch, batch_idx):
            return self.note("train", batch)

        def validation_step(self, batch, batch_idx):
            self.note("val", batch)

        def test_step(self, batch, batch_idx):
            self.note("test", batch)

    model = Model()
    trainer = quiet(max_epochs=1, num_sanity_val_steps=1)
    trainer.fit(model, data(8), data(4))
    trainer.test(model, data(4), verbose=False)
    assert modes == {
        "train": (True, False, True, False),
        "val": (False, False, False, False),
        "test": (False, False, False, True),
    }
    quiet(inference_mode=False).test(model, data(4), verbose=False)
    assert modes["test"] == (False, False, False, False)


def test_reload_of_loaders(boring, data, quiet):
    asked = []

    class Model(boring):
        def train_dataloader(self):
            asked.append(("train", self.current_epoch))
            return data(8)

        def val_dataloader(self):
            asked.append(("val", self.current_epoch))
            return data(4)

    quiet(max_epochs=4, reload_dataloaders_every_n_epochs=2).fit(Model())
    assert asked == [("train", 0), ("val", 0), ("train", 2), ("val", 2)]


def test_skipping_batches_and_epochs(boring, data, quiet):
    class Model(boring):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if batch_idx == 3 else None

    trainer = quiet(max_epochs=2)
    trainer.fit(Model(), data())
    assert trainer.global_step == 6

    class Skips(boring):
        def training_step(self, batch, batch_idx):
            return None if batch_idx % 2 else super().training_step(batch, batch_idx)

    with pytest.warns(UserWarning, match="training_step returned None"):
        quiet(max_epochs=1).fit(Skips(), data())


def test_detect_anomaly(boring, data, quiet):
    class Model(boring):
        def training_step(self, batch, batch_idx):
            return torch.sqrt(self.loss(batch) * 0.0 - 1.0)

    with pytest.warns(UserWarning, match="Error detected"), pytest.raises(RuntimeError, match="nan"):
        quiet(max_epochs=1, detect_anomaly=True).fit(Model(), data())


def test_errors_before_the_first_step(boring, data, quiet):
    class NoStep(T.Module):
        pass

    class Old(boring):
        def training_epoch_end(self, outputs):
            pass

    class Dict(boring):
        def training_step(self, batch, batch_idx):
            return {"log": {}}

    with pytest.raises(ModuleError, match="training_step"):
        quiet().fit(NoStep(), data())
    with pytest.raises(ModuleError, match="on_train_epoch_end"):
        quiet().fit(Old(), data())
    with pytest.raises(ModuleError, match="'loss'"):
        quiet(max_epochs=1).fit(Dict(), data())
    with pytest.raises(DataError, match="train_dataloader"):
        quiet(max_epochs=1).fit(boring())
    with pytest.raises(ModuleError, match=r"trainer\.Module"):
        quiet().fit(torch.nn.Linear(1, 1), data())
    with pytest.raises(ConfigError, match="val_check_interval=99"):
        quiet(max_epochs=1, val_check_interval=99).fit(boring(), data(), data())
    with pytest.raises(DataError, match="iterable"):
        quiet(max_epochs=1).fit(boring(), 3)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"gpus": 2}, "devices=N"),
        ({"progress_bar_refresh_rate": 1}, "refresh_rate"),
        ({"no_such": 1}, "no argument 'no_such'"),
        ({"limit_val_batches": 1.5}, "limit_val_batches=1.5"),
        ({"limit_val_batches": -1}, "limit_val_batches=-1"),
        ({"max_epochs": -2}, "max_epochs=-2"),
        ({"gradient_clip_val": "a"}, "gradient_clip_val"),
        ({"gradient_clip_algorithm": "max"}, "'norm'"),
        ({"accumulate_grad_batches": 0}, "accumulate_grad_batches=0"),
        ({"check_val_every_n_epoch": None}, "val_check_interval"),
        ({"check_val_every_n_epoch": None, "val_check_interval": 0.5}, "fraction"),
        ({"barebones": True, "log_every_n_steps": 5}, "barebones"),
        ({"deterministic": "maybe"}, "deterministic"),
        ({"profiler": "fast"}, "profiler='fast'"),
    ],
)
def test_arguments_are_checked(arguments, words):
    with pytest.raises(ConfigError, match=words):
        T.Trainer(logger=False, enable_checkpointing=False, **arguments) if "barebones" not in arguments else T.Trainer(
            **arguments
        )


def test_barebones_runs_and_logs_nothing(boring, data):
    trainer = T.Trainer(barebones=True, max_epochs=1, accelerator="cpu")
    trainer.fit(boring(), data(), data(4))
    assert trainer.callback_metrics == {}
    assert trainer.global_step == 8


def test_a_tensor_of_a_compiled_module_is_its_own(boring, data, quiet):
    model = boring()
    wrapped = torch.compile(model, backend="eager")
    trainer = quiet(max_epochs=1)
    with pytest.warns(UserWarning, match=r"runs it uncompiled: Trainer\(compile=True\) compiles"):
        trainer.fit(wrapped, data())
    assert trainer.lightning_module is model


def test_order_without_shuffling_is_the_loaders(data, quiet, boring):
    rows = []

    class Model(boring):
        def training_step(self, batch, batch_idx):
            rows.append(batch[0])
            return self.loss(batch)

    quiet(max_epochs=1).fit(Model(), data(10, 4))
    assert torch.equal(torch.cat(rows), torch.cat([b[0] for b in data(10, 4)]))
    assert isinstance(data().dataset, TensorDataset)
