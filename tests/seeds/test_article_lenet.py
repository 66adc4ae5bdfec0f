"""The LeNet article: written for a Lightning that is long gone. What was removed fails with today's form named."""

from __future__ import annotations

import pytest
import torch
from torch import nn, optim
from torch.nn import functional as F
from torch.optim.lr_scheduler import StepLR
from torchvision import datasets, transforms

import trainer as pl
from trainer.errors import ConfigError, ModuleError

# fmt: off

class LeNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, kernel_size=(5, 5))
        self.pool1 = nn.MaxPool2d(kernel_size=(2, 2), stride=2)
        self.conv2 = nn.Conv2d(6, 16, kernel_size=(5, 5))
        self.pool2 = nn.MaxPool2d(kernel_size=(2, 2), stride=2)
        self.fc1 = nn.Linear(400, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, x):
        x = self.pool1(F.relu(self.conv1(x)))
        x = self.pool2(F.relu(self.conv2(x)))
        x = x.view(-1, 400)
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        x = self.fc3(x)
        return x  # noqa: RET504 - the article's own code


model = LeNet()
criterion = nn.CrossEntropyLoss()
optimizer = optim.Adam(model.parameters())

class MyModel(pl.LightningModule):

    def __init__(self):
        super().__init__()

        # set up model architecture
        self.conv1 = nn.Conv2d(1, 6, kernel_size=(5, 5))
        self.pool1 = nn.MaxPool2d(kernel_size=(2, 2), stride=2)
        self.conv2 = nn.Conv2d(6, 16, kernel_size=(5, 5))
        self.pool2 = nn.MaxPool2d(kernel_size=(2, 2), stride=2)
        self.fc1 = nn.Linear(400, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, x):
        x = self.pool1(F.relu(self.conv1(x)))
        x = self.pool2(F.relu(self.conv2(x)))
        x = x.view(-1, 400)
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        x = self.fc3(x)
        return x  # noqa: RET504

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x)
        loss = criterion(logits, y)
        accuracy = self.accuracy(logits, y)
        tensorboard_logs = {'loss': loss, 'acc': accuracy}
        return {'loss': loss, 'log': tensorboard_logs}

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=1e-3)
        scheduler = StepLR(optimizer, step_size=10, gamma=0.1)
        return [optimizer], [scheduler]

    def validation_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x)
        loss = criterion(logits, y)
        acc = self.accuracy(logits, y)
        return {'val_loss': loss, 'val_acc': acc}

    @staticmethod
    def accuracy(output, target):
        pred = output.argmax(dim=1, keepdim=True)
        correct = pred.eq(target.view_as(pred)).sum().item()
        acc = correct / len(target)
        return acc  # noqa: RET504

# fmt: on


def article_data():
    # fmt: off
    transform = transforms.Compose([transforms.ToTensor(),
                                    transforms.Normalize((0.5,), (0.5,))])
    trainset = datasets.MNIST('~/datasets', train=True, download=True, transform=transform)
    testset = datasets.MNIST('~/datasets', train=False, download=True, transform=transform)
    # fmt: on
    return trainset, testset


def padded(dataset, count):
    """The article's network is for images of 32 x 32; MNIST's have 28 x 28, so its code as printed cannot train."""
    rows = [(F.pad(dataset[i][0], (2, 2, 2, 2)), dataset[i][1]) for i in range(count)]
    return torch.utils.data.DataLoader(rows, batch_size=16)


def test_removed_arguments_are_named(article_folder):
    with pytest.raises(ConfigError, match="devices"):
        pl.Trainer(max_epochs=10, gpus=[0], progress_bar_refresh_rate=20)
    with pytest.raises(ConfigError, match="RichProgressBar"):
        pl.Trainer(max_epochs=10, progress_bar_refresh_rate=20)


def test_data_goes_in_by_from_datasets(article_folder):
    trainset, testset = article_data()
    with pytest.raises(ModuleError, match="from_datasets"):
        pl.LightningDataModule(trainset, testset, num_workers=4)
    mnist_dm = pl.LightningDataModule.from_datasets(trainset, testset, num_workers=4)
    assert mnist_dm.train_dataloader().num_workers == 4


def test_a_dict_under_log_is_refused(article_folder):
    trainset, _ = article_data()
    trainer = pl.Trainer(max_epochs=10, accelerator="cpu", logger=False, enable_checkpointing=False)
    with pytest.raises(ModuleError, match=r"self\.log"):
        trainer.fit(MyModel(), padded(trainset, 16))


def test_the_rest_trains(article_folder):
    class Today(MyModel):
        def training_step(self, batch, batch_idx):
            output = super().training_step(batch, batch_idx)
            self.log_dict(output.pop("log"))
            return output

    trainset, testset = article_data()
    today = Today()
    trainer = pl.Trainer(max_epochs=11, accelerator="cpu", limit_train_batches=1)
    trainer.fit(today, padded(trainset, 16), padded(testset, 16))
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-4)
    assert 0 <= trainer.callback_metrics["acc"] <= 1
