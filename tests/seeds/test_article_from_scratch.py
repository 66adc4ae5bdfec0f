"""The article that builds a linear regression and an MNIST data module: its classes with the imports changed."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, random_split
from torchvision import transforms
from torchvision.datasets import MNIST

from trainer import LightningDataModule, LightningModule, Trainer
from trainer.errors import ConfigError
from trainer.loggers import TensorBoardLogger

# fmt: off

class LinearRegression(LightningModule):
    def __init__(self, input_dim=10, output_dim=1):
        super().__init__()
        self.linear = nn.Linear(input_dim, output_dim)

    def forward(self, x):
        return self.linear(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        y_hat = self(x)
        loss = F.mse_loss(y_hat, y)
        self.log('train_loss', loss)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        y_hat = self(x)
        loss = F.mse_loss(y_hat, y)
        self.log('val_loss', loss)

    def test_step(self, batch, batch_idx):
        x, y = batch
        y_hat = self(x)
        loss = F.mse_loss(y_hat, y)
        self.log('test_loss', loss)

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=0.02)
        return optimizer  # noqa: RET504


class MNISTDataModule(LightningDataModule):
    def __init__(self, data_dir='./data', batch_size=32):
        super().__init__()
        self.data_dir = data_dir
        self.batch_size = batch_size
        self.transform = transforms.Compose([
            transforms.ToTensor(),
            transforms.Normalize((0.1307,), (0.3081,))
        ])

    def prepare_data(self):
        # 下载数据集
        MNIST(self.data_dir, train=True, download=True)
        MNIST(self.data_dir, train=False, download=True)

    def setup(self, stage=None):
        # 加载并划分数据集
        mnist_train = MNIST(self.data_dir, train=True, transform=self.transform)
        mnist_test = MNIST(self.data_dir, train=False, transform=self.transform)
        self.train_dataset, self.val_dataset = random_split(mnist_train, [55000, 5000])
        self.test_dataset = mnist_test

    def train_dataloader(self):
        return DataLoader(self.train_dataset, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.val_dataset, batch_size=self.batch_size)

    def test_dataloader(self):
        return DataLoader(self.test_dataset, batch_size=self.batch_size)


class MyModel(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(10, 1)

    def forward(self, x):
        return self.layer(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        y_hat = self(x)
        loss = F.mse_loss(y_hat, y)
        return loss  # noqa: RET504

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.02)

# fmt: on


def numbers():
    x = torch.randn(64, 10, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=8)


def test_the_regression_fits_validates_and_tests(article_folder):
    model = LinearRegression()
    logger = TensorBoardLogger("logs/", name="linear_regression")
    trainer = Trainer(max_epochs=10, logger=logger, check_val_every_n_epoch=1, log_every_n_steps=50)
    trainer.fit(model, numbers(), numbers())
    [validated] = trainer.validate(model, numbers())
    [tested] = trainer.test(model, numbers())
    assert validated["val_loss"] == pytest.approx(tested["test_loss"])
    assert validated["val_loss"] < 10
    assert list((article_folder / "logs" / "linear_regression" / "version_0").glob("events*"))


def test_gpus_is_answered_by_devices(article_folder):
    with pytest.raises(ConfigError, match="devices"):
        Trainer(max_epochs=10, gpus=1 if torch.cuda.is_available() else 0)


def test_the_data_module_feeds_a_trainer(article_folder):
    # The article trains its regression of 10 numbers on these images, which no framework can do.
    class Images(LinearRegression):
        def forward(self, x):
            return self.linear(x.flatten(1)).squeeze(1)

        def training_step(self, batch, batch_idx):
            return super().training_step((batch[0], batch[1].float()), batch_idx)

        def validation_step(self, batch, batch_idx):
            super().validation_step((batch[0], batch[1].float()), batch_idx)

    model, data_module = Images(input_dim=784), MNISTDataModule(batch_size=64)
    trainer = Trainer(max_epochs=1, limit_train_batches=0.01, limit_val_batches=2, log_every_n_steps=5)
    trainer.fit(model, data_module)
    assert trainer.global_step == int(0.01 * -(-55000 // 64))
    assert "val_loss" in trainer.callback_metrics


def test_the_smallest_module(article_folder):
    model = MyModel()
    trainer = Trainer(max_epochs=10, logger=False)
    trainer.fit(model, numbers())
    assert trainer.global_step == 80
