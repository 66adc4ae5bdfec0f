"""The overview article: its fragments, each with the import lines changed."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import trainer as pl
from trainer import LightningModule, Trainer
from trainer.errors import ConfigError, ModuleError


def images(n=40):
    x = torch.rand(n, 28 * 28, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x), batch_size=2)


class Autoencoder(LightningModule):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(28 * 28, 64))
        self.decoder = nn.Sequential(nn.Linear(64, 28 * 28))

    def forward(self, x):
        embedding = self.encoder(x)
        return embedding  # noqa: RET504 - the article's own code

    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self.decoder(self(batch[0])), batch[0])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def test_several_optimizers_by_hand(article_folder):
    class TwoPlayers(LightningModule):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(28 * 28, 1), nn.Linear(28 * 28, 1)
            self.automatic_optimization = False

        def generator(self, batch):
            return self.a(batch[0]).square().mean()

        def discriminator(self, batch):
            return self.b(batch[0]).square().mean()

        # fmt: off
        def training_step(self, batch, batch_idx):
            # access your optimizers with use_pl_optimizer=False. Default is True,
            # setting use_pl_optimizer=True will maintain plugin/precision support
            opt_a, opt_b = self.optimizers(use_pl_optimizer=True)

            loss_a = self.generator(batch)
            opt_a.zero_grad()
            # use `manual_backward()` instead of `loss.backward` to automate half precision, etc...
            self.manual_backward(loss_a)
            opt_a.step()

            loss_b = self.discriminator(batch)
            opt_b.zero_grad()
            self.manual_backward(loss_b)
            opt_b.step()
        # fmt: on

        def configure_optimizers(self):
            return [torch.optim.SGD(m.parameters(), lr=1e-3) for m in (self.a, self.b)]

    model = TwoPlayers()
    before = [p.clone() for p in model.parameters()]
    trainer = Trainer(max_epochs=1, logger=False)
    trainer.fit(model, images())
    assert trainer.global_step == 40
    assert not any(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))


def test_sub_models_and_forward_of_a_checkpoint(article_folder):
    trainer = Trainer(max_epochs=1, logger=False)
    trainer.fit(Autoencoder(), images(), images(2))
    checkpoint_path = trainer.checkpoint_callback.best_model_path

    autoencoder = Autoencoder.load_from_checkpoint(checkpoint_path)
    encoder_model = autoencoder.encoder
    encoder_model.eval()
    embedding = autoencoder(torch.rand(1, 28 * 28))
    assert embedding.shape == (1, 64)

    # load the ckpt
    ckpt = torch.load(checkpoint_path)

    # equivalent to the above
    model = Autoencoder()
    model.load_state_dict(ckpt["state_dict"])
    assert torch.equal(model.encoder[0].weight, autoencoder.encoder[0].weight)

    # automatically restores model, epoch, step, LR schedulers, apex, etc...
    trainer = Trainer(max_epochs=2, logger=False)
    trainer.fit(model, images(), images(2), ckpt_path=checkpoint_path)
    assert (trainer.current_epoch, trainer.global_step) == (2, 40)


def test_hyperparameters_are_in_the_checkpoint(article_folder):
    # fmt: off
    class MyLightningModule(Autoencoder):
        def __init__(self, learning_rate, *args, **kwargs):
            super().__init__()
            self.save_hyperparameters()
    # fmt: on

    trainer = Trainer(max_epochs=1, logger=False, limit_train_batches=1, limit_val_batches=0)
    trainer.fit(MyLightningModule(0.125, extra="kept"), images())
    CKPT_PATH = trainer.checkpoint_callback.best_model_path

    # all init args were saved to the checkpoint
    checkpoint = torch.load(CKPT_PATH)
    assert checkpoint["hyper_parameters"]["learning_rate"] == 0.125
    assert checkpoint["hyper_parameters"]["extra"] == "kept"


@pytest.mark.parametrize(
    ("flags", "steps"),
    [
        # use only 10 train batches and three val batches per epoch
        ({"limit_train_batches": 10, "limit_val_batches": 3}, 10),
        # use 20% of total train batches and 10% of total val batches per epoch
        ({"limit_train_batches": 0.2, "limit_val_batches": 0.1}, 4),
        # use only 10 train batches
        ({"overfit_batches": 10}, 10),
        # use only 20% of total train batches
        ({"overfit_batches": 0.2}, 4),
        ({"fast_dev_run": True}, 1),
        ({"fast_dev_run": 4}, 4),
        # run validation every 25% of a training epoch
        ({"val_check_interval": 0.25}, 20),
    ],
)
def test_debugging_flags(article_folder, flags, steps):
    trainer = Trainer(max_epochs=1, logger=False, **flags)
    trainer.fit(Autoencoder(), images(), images())
    assert trainer.global_step == steps


def test_profiler(article_folder, capsys):
    # Profile your code to find speed/memory bottlenecks
    Trainer(profiler="simple", max_epochs=1, logger=False, fast_dev_run=True).fit(Autoencoder(), images(), images())
    assert "training_step" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["training_step_end", "training_epoch_end", "validation_epoch_end", "test_epoch_end"])
def test_removed_hooks_are_answered_by_todays(article_folder, name):
    model = Autoencoder()
    setattr(type(model), name, lambda self, outputs: None)
    try:
        with pytest.raises(ModuleError, match=name):
            Trainer(max_epochs=1, logger=False).fit(model, images(), images())
    finally:
        delattr(type(model), name)


@pytest.mark.parametrize(
    ("flags", "answer"),
    [
        ({"gpus": [0, 1], "strategy": "ddp", "max_epochs": 30, "default_root_dir": "logs", "precision": 16}, "devices"),
        ({"accelerator": "cpu", "devices": 8}, "launch --procs 8"),
        ({"accelerator": "cpu", "devices": 8, "num_nodes": 128}, "launch"),
        ({"accelerator": "gpu", "devices": [1, 3, 5]}, "launch"),
        ({"accelerator": "tpu"}, "cpu, gpu"),
        ({"accelerator": "ipu"}, "cpu, gpu"),
        ({"strategy": "dp"}, "ddp"),
    ],
)
def test_devices(article_folder, flags, answer):
    with pytest.raises((ConfigError, pl.errors.RanksError), match=answer):
        pl.Trainer(logger=False, **flags).fit(Autoencoder(), images(), images())
