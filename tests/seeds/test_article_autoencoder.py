"""The autoencoder article: its code with the import line changed, and nothing else."""

from __future__ import annotations

import pytest
import torch

from trainer.errors import ConfigError, RanksError


def test_the_autoencoder(article_folder, capsys):
    # fmt: off
    import os

    from torch import nn, optim, utils
    from torchvision.datasets import MNIST
    from torchvision.transforms import ToTensor

    import trainer as L

    # define any number of nn.Modules (or use your current ones)
    encoder = nn.Sequential(nn.Linear(28 * 28, 64), nn.ReLU(), nn.Linear(64, 3))
    decoder = nn.Sequential(nn.Linear(3, 64), nn.ReLU(), nn.Linear(64, 28 * 28))


    # define the LightningModule
    class LitAutoEncoder(L.LightningModule):
        def __init__(self, encoder, decoder):
            super().__init__()
            self.encoder = encoder
            self.decoder = decoder

        def training_step(self, batch, batch_idx):
            # training_step defines the train loop.
            # it is independent of forward
            x, y = batch  # noqa: RUF059
            x = x.view(x.size(0), -1)
            z = self.encoder(x)
            x_hat = self.decoder(z)
            loss = nn.functional.mse_loss(x_hat, x)
            # Logging to TensorBoard (if installed) by default
            self.log("train_loss", loss)
            return loss

        def configure_optimizers(self):
            optimizer = optim.Adam(self.parameters(), lr=1e-3)
            return optimizer  # noqa: RET504


    # init the autoencoder
    autoencoder = LitAutoEncoder(encoder, decoder)

    # setup data
    dataset = MNIST(os.getcwd(), download=True, transform=ToTensor())  # noqa: PTH109
    train_loader = utils.data.DataLoader(dataset)

    # train the model (hint: here are some helpful Trainer arguments for rapid idea iteration)
    trainer = L.Trainer(limit_train_batches=100, max_epochs=1)
    trainer.fit(model=autoencoder, train_dataloaders=train_loader)

    # load checkpoint
    checkpoint = "./lightning_logs/version_0/checkpoints/epoch=0-step=100.ckpt"
    autoencoder = LitAutoEncoder.load_from_checkpoint(checkpoint, encoder=encoder, decoder=decoder)

    # choose your trained nn.Module
    encoder = autoencoder.encoder
    encoder.eval()

    # embed 4 fake images!
    fake_image_batch = torch.rand(4, 28 * 28, device=autoencoder.device)
    embeddings = encoder(fake_image_batch)
    print("⚡" * 20, "\nPredictions (4 image embeddings):\n", embeddings, "\n", "⚡" * 20)

    # 20+ helpful flags for rapid idea iteration
    trainer = L.Trainer(
        max_epochs=10,
        min_epochs=5,
        overfit_batches=1
     )
    # fmt: on
    trainer.fit(autoencoder, train_loader)
    assert embeddings.shape == (4, 3)
    assert trainer.global_step == 10
    assert "Predictions" in capsys.readouterr().out
    assert list((article_folder / "lightning_logs" / "version_0").glob("events*"))

    # access the latest state of the art techniques
    from trainer.callbacks import StochasticWeightAveraging

    trainer = L.Trainer(callbacks=[StochasticWeightAveraging(swa_lrs=1e-2)], max_epochs=2, overfit_batches=1)
    trainer.fit(autoencoder, train_loader)


def test_four_devices_need_four_processes(article_folder):
    import trainer as L

    module = L.LightningModule()
    module.layer = torch.nn.Linear(1, 1)
    module.training_step = lambda batch, batch_idx: None
    module.configure_optimizers = lambda: None
    trainer = L.Trainer(devices=4, accelerator="gpu", logger=False)
    with pytest.raises((ConfigError, RanksError), match="launch"):
        trainer.fit(module, [torch.ones(1)])


def test_deepspeed_is_answered_by_fsdp(article_folder):
    import trainer as L

    module = L.LightningModule()
    module.training_step = lambda batch, batch_idx: None
    module.configure_optimizers = lambda: None
    with pytest.raises(ConfigError, match="FSDP"):
        L.Trainer(accelerator="cpu", strategy="deepspeed_stage_2", logger=False).fit(module, [torch.ones(1)])
