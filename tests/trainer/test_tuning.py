"""Finding a learning rate and a batch size: by the Tuner and by callbacks."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from trainer import DataModule, Module
from trainer.callbacks import BatchSizeFinder, LearningRateFinder, ModelCheckpoint
from trainer.errors import ConfigError
from trainer.tuning import LearningRates, Tuner

LARGEST = 20


class Net(Module):
    """A regression that runs out of memory with more than LARGEST samples in a batch."""

    def __init__(self, lr=1e-3, batch_size=2):
        super().__init__()
        self.save_hyperparameters()
        self.lr = lr
        self.layer = nn.Linear(4, 1)
        self.calls = []

    def setup(self, stage):
        self.calls.append("setup")

    def teardown(self, stage):
        self.calls.append("teardown")

    def training_step(self, batch, batch_idx):
        if len(batch[0]) > LARGEST:
            torch.empty(2**60)
        loss = (self.layer(batch[0]) - batch[1]).square().mean()
        self.log("loss", loss)
        return loss

    validation_step = test_step = training_step

    def predict_step(self, batch, batch_idx):
        return self.layer(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)

    def train_dataloader(self):
        x = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=self.hparams.batch_size)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_lr_find_rises_suggests_and_leaves_no_trace(quiet, tmp_path):
    model, trainer = Net(batch_size=20), quiet(max_steps=3)
    before, state = weights(model), torch.get_rng_state()
    found = Tuner(trainer).lr_find(model, min_lr=1e-6, max_lr=10, num_training=60, early_stop_threshold=None)
    lrs = found.results["lr"]
    assert len(lrs) == len(found.results["loss"]) == 60
    assert (lrs[0], lrs[-1]) == (1e-6, pytest.approx(10))
    assert lrs[1] / lrs[0] == pytest.approx(lrs[-1] / lrs[-2])
    assert found.suggestion() == model.lr == model.hparams.lr
    assert model.lr in lrs[10:]  # where the loss falls fastest, which noise decides here, but never among the first
    assert model.lr < 1
    assert torch.equal(weights(model), before)
    assert torch.equal(torch.get_rng_state(), state)
    assert model._trainer is None
    assert list(tmp_path.iterdir()) == []
    trainer.fit(model)
    assert trainer.optimizers[0].param_groups[0]["lr"] == found.suggestion()
    assert trainer.global_step == 3


def test_lr_find_stops_where_the_loss_diverges_and_plots(quiet, tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    found = Tuner(quiet()).lr_find(Net(), max_lr=1e4, num_training=80, mode="linear", min_lr=1e-4, update_attr=False)
    assert 2 < len(found.results["lr"]) < 80
    steps = LearningRates("exponential", 1e-4, 1.0, 40)
    steps.results = {"lr": [steps.lr_at(i) for i in range(40)], "loss": [1.0] * 25 + [0.1] * 15}
    assert steps.suggestion() in (steps.lr_at(24), steps.lr_at(25))
    figure = steps.plot(suggest=True)
    assert figure.axes[0].get_xscale() == "log"
    assert len(figure.axes[0].lines) == 2
    steps.results["loss"][-1] = 1e6  # what diverges does not hide the rest
    assert steps.plot().axes[0].get_ylim()[1] < 3
    figure.savefig(tmp_path / "lr.png")
    import matplotlib.pyplot as plt

    plt.close("all")


@pytest.mark.parametrize(("mode", "expected"), [("power", 16), ("binsearch", 19)])
def test_batch_size_that_fits(quiet, mode, expected):
    model = Net()
    assert Tuner(quiet()).scale_batch_size(model, mode=mode) == expected
    assert model.hparams.batch_size == expected


def test_batch_size_of_a_datamodule_stops_at_its_samples(quiet):
    class Data(DataModule):
        def __init__(self):
            super().__init__()
            self.batch_size = 1

        def predict_dataloader(self):
            return DataLoader(TensorDataset(torch.randn(6, 4), torch.randn(6, 1)), batch_size=self.batch_size)

    data = Data()
    assert Tuner(quiet()).scale_batch_size(Net(), datamodule=data, method="predict") == 8
    assert data.batch_size == 8


def test_callbacks_find_once_and_a_resumed_run_keeps_what_was_found(quiet, tmp_path):
    def run(**options):
        model = Net()
        finders = [LearningRateFinder(num_training_steps=30), BatchSizeFinder()]
        trainer = quiet(callbacks=[*finders, ModelCheckpoint(tmp_path, save_last=True)],
                        enable_checkpointing=True, **options)  # fmt: skip
        return model, trainer, finders

    model, trainer, (lr, size) = run(max_epochs=1)
    trainer.fit(model)
    assert size.optimal_batch_size == model.hparams.batch_size == 16
    assert trainer.num_training_batches == 13
    assert trainer.optimizers[0].param_groups[0]["lr"] == model.lr == lr.optimal_lr.suggestion()
    # The trials set nothing up and tore nothing down inside of the run.
    assert model.calls == ["setup", "teardown"]
    assert trainer.callback_metrics["loss"] > 0

    again, resumed, (_, size) = run(max_epochs=2)
    resumed.fit(again, ckpt_path=tmp_path / "last.ckpt")
    assert size.optimal_batch_size == again.hparams.batch_size == 16
    assert resumed.global_step == 26
    assert resumed.optimizers[0].param_groups[0]["lr"] == model.lr


def test_bad_input_is_refused(quiet, data):
    tuner = Tuner(quiet())
    for act, text in (
        (lambda: tuner.lr_find(Net(), mode="cubic"), "'exponential', 'linear'"),
        (lambda: tuner.lr_find(Net(), min_lr=1, max_lr=0.1), "min_lr < max_lr"),
        (lambda: tuner.lr_find(Net(), attr_name="speed"), "no attribute"),
        (lambda: tuner.scale_batch_size(Net(), data()), "batch_size=self.batch_size"),
        (lambda: tuner.scale_batch_size(Net(), batch_arg_name="size"), "no attribute"),
        (lambda: quiet(callbacks=BatchSizeFinder()).fit(Net(), data()), "cannot change"),
    ):
        with pytest.raises(ConfigError, match=text):
            act()
