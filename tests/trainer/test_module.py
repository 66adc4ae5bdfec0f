"""Module and DataModule: hyperparameters, checkpoints as files, and use without a Trainer."""

from __future__ import annotations

import copy
import pickle
from argparse import Namespace
from dataclasses import dataclass

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import trainer as T
from trainer.errors import CheckpointError, ModuleError


class Sized(T.Module):
    """Keeps its arguments."""

    def __init__(self, width: int = 4, lr: float = 0.1, **extra):
        super().__init__()
        self.save_hyperparameters()
        self.layer = torch.nn.Linear(width, 1)

    def forward(self, x):
        return self.layer(x)

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.mse_loss(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.hparams.lr)


class Sub(Sized):
    """Passes some on."""

    def __init__(self, depth: int, **rest):
        super().__init__(**rest)
        self.depth = depth


def test_a_module_is_a_module():
    model = Sized().eval()
    assert isinstance(model, torch.nn.Module)
    assert T.Module is T.LightningModule
    assert T.DataModule is T.LightningDataModule
    assert model(torch.ones(2, 4)).shape == (2, 1)
    assert model.device == torch.device("cpu")
    assert (model.current_epoch, model.global_step, model.global_rank) == (0, 0, 0)
    assert model.logger is None
    assert set(model.state_dict()) == {"layer.weight", "layer.bias"}
    assert not any(p.requires_grad for p in model.freeze().parameters())
    assert all(p.requires_grad for p in model.unfreeze().parameters())
    assert model.training
    with pytest.raises(ModuleError, match="not attached"):
        _ = model.trainer


def test_hyperparameters_in_every_form():
    assert dict(Sub(depth=2, width=8, colour="red").hparams) == {"depth": 2, "width": 8, "lr": 0.1, "colour": "red"}

    class Named(T.Module):
        def __init__(self, a, b, c=3):
            super().__init__()
            self.save_hyperparameters("a", "c")

    assert dict(Named(1, 2).hparams) == {"a": 1, "c": 3}

    class Ignoring(T.Module):
        def __init__(self, a, net):
            super().__init__()
            self.save_hyperparameters(ignore=["net"])

    assert dict(Ignoring(1, torch.nn.Linear(1, 1)).hparams) == {"a": 1}

    class Whole(T.Module):
        def __init__(self, conf):
            super().__init__()
            self.save_hyperparameters(conf)

    @dataclass
    class Conf:
        x: int = 5

    for conf in ({"x": 5}, Namespace(x=5), Conf()):
        assert Whole(conf).hparams.x == 5
    model = Whole({"x": 5})
    model.hparams.x = 6
    assert model.hparams_initial == {"x": 5}
    with pytest.raises(AttributeError, match="no hyperparameter 'y'"):
        _ = model.hparams.y
    with pytest.raises(ModuleError, match="cannot keep a int"):
        Whole(3)

    class Warned(T.Module):
        def __init__(self, net):
            super().__init__()
            self.save_hyperparameters()

    with pytest.warns(UserWarning, match=r"ignore=\['net'\]"):
        Warned(torch.nn.Linear(1, 1))


def test_checkpoint_file_round_trip(data, quiet, tmp_path):
    model = Sub(depth=3, lr=0.05)
    trainer = quiet(max_epochs=1)
    trainer.fit(model, data())
    path = tmp_path / "x.ckpt"
    trainer.save_checkpoint(path)
    plain = torch.load(path, weights_only=True)
    assert plain["hyper_parameters"] == {"depth": 3, "lr": 0.05, "width": 4}
    assert plain["global_step"] == 8
    again = torch.nn.Module.load_state_dict(Sub(depth=3), plain["state_dict"])
    assert not again.missing_keys
    loaded = Sub.load_from_checkpoint(path)
    assert loaded.depth == 3
    assert loaded.hparams.lr == 0.05
    assert torch.equal(loaded.layer.weight, model.layer.weight)
    assert Sub.load_from_checkpoint(path, lr=1.0).hparams.lr == 1.0
    (tmp_path / "hparams.yaml").write_text("depth: 9\nwidth: 4\n")
    assert Sub.load_from_checkpoint(path, hparams_file=tmp_path / "hparams.yaml").depth == 9
    with pytest.raises(RuntimeError, match="size mismatch"):
        Sub.load_from_checkpoint(path, width=5)
    trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    with pytest.raises(CheckpointError, match="weights only"):
        quiet(max_epochs=2).fit(Sub(depth=1), data(), ckpt_path=tmp_path / "weights.ckpt")
    with pytest.raises(CheckpointError, match=r"no checkpoint at|There is no"):
        quiet().fit(Sub(depth=1), data(), ckpt_path=tmp_path / "none.ckpt")


def test_hyperparameters_that_no_checkpoint_holds_are_named_before_training(data, quiet, tmp_path):
    class Wrapping(Sized):
        def __init__(self, net, root, table, act=torch.relu):
            T.Module.__init__(self)
            self.save_hyperparameters()
            self.layer, self.lr = net, 0.1

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def build():
        return Wrapping(torch.nn.Linear(4, 1), tmp_path, {"paths": [tmp_path], "n": 1})

    trainer = quiet(max_epochs=1)
    with pytest.warns(UserWarning, match=r"keeps the module 'net'"):
        model = build()
    with pytest.warns(UserWarning, match=r"hyperparameters net, act of Wrapping\. .*\(path, net=\.\.\., act=\.\.\.\)"):
        trainer.fit(model, data())
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    saved = torch.load(tmp_path / "x.ckpt", weights_only=True)["hyper_parameters"]
    assert saved == {"root": str(tmp_path), "table": {"paths": [str(tmp_path)], "n": 1}}
    with pytest.raises(ModuleError, match="missing a required argument: 'net'"):
        Wrapping.load_from_checkpoint(tmp_path / "x.ckpt")
    with pytest.warns(UserWarning, match=r"keeps the module 'net'"):
        loaded = Wrapping.load_from_checkpoint(tmp_path / "x.ckpt", net=torch.nn.Linear(4, 1))
    assert torch.equal(loaded.layer.weight, model.layer.weight)


def test_missing_hyperparameters_are_named(data, quiet, tmp_path):
    class Silent(Sized):
        def __init__(self, width, lr=0.1):
            T.Module.__init__(self)
            self.hparams.lr = lr
            self.layer = torch.nn.Linear(width, 1)

    trainer = quiet(max_epochs=1)
    trainer.fit(Silent(4), data())
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    with pytest.raises(ModuleError, match="width"):
        Silent.load_from_checkpoint(tmp_path / "x.ckpt")
    assert Silent.load_from_checkpoint(tmp_path / "x.ckpt", width=4).layer.in_features == 4


def test_hooks_see_and_change_checkpoints(data, quiet, tmp_path):
    class Model(Sized):
        note = None

        def on_save_checkpoint(self, checkpoint):
            checkpoint["mine"] = {"tokens": 5}

        def on_load_checkpoint(self, checkpoint):
            self.note = checkpoint["mine"]["tokens"]

    trainer = quiet(max_epochs=1)
    trainer.fit(Model(), data())
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    assert Model.load_from_checkpoint(tmp_path / "x.ckpt").note == 5


def test_weights_from_partly_fitting_checkpoints(data, quiet, tmp_path):
    class More(Sized):
        def __init__(self, **rest):
            super().__init__(**rest)
            self.extra = torch.nn.Linear(1, 1)

    trainer = quiet(max_epochs=1)
    trainer.fit(Sized(), data())
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    with pytest.raises(RuntimeError, match="extra"):
        More.load_from_checkpoint(tmp_path / "x.ckpt")
    with pytest.warns(UserWarning, match="strict=False"):
        More.load_from_checkpoint(tmp_path / "x.ckpt", strict=False)


def test_modules_are_copied_and_pickled_without_the_run(data, quiet):
    model = Sized()
    quiet(max_epochs=1).fit(model, data())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other._trainer is None
        assert torch.equal(other.layer.weight, model.layer.weight)


def test_datamodule_state_and_hyperparameters(quiet, data, tmp_path):
    class Data(T.DataModule):
        def __init__(self, size=32):
            super().__init__()
            self.save_hyperparameters()
            self.seen, self.stages = 0, []

        def setup(self, stage):
            self.stages.append(stage)

        def teardown(self, stage):
            self.stages.append("-" + stage)

        def train_dataloader(self):
            self.seen += 1
            return data(self.hparams.size)

        def test_dataloader(self):
            return data(8)

        def state_dict(self):
            return {"seen": self.seen}

        def load_state_dict(self, state_dict):
            self.seen = state_dict["seen"]

    class Model(Sized):
        def test_step(self, batch, batch_idx):
            self.log("t", 1.0)

    datamodule = Data(size=16)
    trainer = quiet(max_epochs=1)
    model = Model()
    trainer.fit(model, datamodule)
    assert trainer.test(model, datamodule=datamodule, verbose=False) == [{"t": 1.0}]
    assert datamodule.stages == ["fit", "-fit", "test", "-test"]
    assert datamodule.trainer is trainer
    trainer.fit(model, datamodule=datamodule)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    again = Data.load_from_checkpoint(tmp_path / "x.ckpt")
    assert (again.hparams.size, again.seen) == (16, 2)
    with pytest.raises(T.errors.ConfigError, match="pass one of them"):
        quiet().fit(model, data(), datamodule=datamodule)


def test_from_datasets():
    class Stream(IterableDataset):
        def __iter__(self):
            yield 1

    pairs = TensorDataset(torch.arange(10.0))
    datamodule = T.DataModule.from_datasets(pairs, val_dataset=[pairs, pairs], test_dataset=Stream(), batch_size=5)
    train = datamodule.train_dataloader()
    assert isinstance(train, DataLoader)
    assert train.batch_size == 5
    assert type(train.sampler).__name__ == "RandomSampler"
    assert len(datamodule.val_dataloader()) == 2
    assert next(iter(datamodule.test_dataloader())) == torch.tensor([1])
    with pytest.raises(ModuleError, match="predict_dataloader"):
        datamodule.predict_dataloader()


def test_example_input_and_all_gather_on_one_process(data, quiet):
    class Model(Sized):
        def training_step(self, batch, batch_idx):
            assert self.all_gather(torch.ones(2)).shape == (2,)
            assert self.device.type == "cpu"
            return super().training_step(batch, batch_idx)

    model = Model()
    model.example_input_array = torch.ones(1, 4)
    quiet(max_epochs=1).fit(model, data(4))


def test_lightning_checkpoints_are_read(data, quiet, tmp_path):
    """The layout of a file that Lightning 2.6 writes at the end of an epoch."""
    model = Sized(lr=0.02)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    progress = {"ready": 1, "started": 1, "processed": 1, "completed": 0}
    total = {"total": {"ready": 8, "started": 8, "processed": 8, "completed": 8}}
    torch.save({
        "epoch": 0, "global_step": 8, "pytorch-lightning_version": "2.6.6", "state_dict": model.state_dict(),
        "loops": {"fit_loop": {
            "state_dict": {}, "epoch_loop.state_dict": {"_batches_that_stepped": 7},
            "epoch_loop.batch_progress": total | {"current": total["total"], "is_last_batch": True},
            "epoch_progress": {"total": progress, "current": progress},
        }},
        "callbacks": {}, "optimizer_states": [optimizer.state_dict()], "lr_schedulers": [],
        "hparams_name": "kwargs", "hyper_parameters": {"lr": 0.02, "width": 4},
    }, tmp_path / "theirs.ckpt")  # fmt: skip
    assert Sized.load_from_checkpoint(tmp_path / "theirs.ckpt").hparams.lr == 0.02
    trainer = quiet(max_epochs=3)
    trainer.fit(Sized(), data(), ckpt_path=tmp_path / "theirs.ckpt")
    assert (trainer.current_epoch, trainer.global_step) == (3, 24)
