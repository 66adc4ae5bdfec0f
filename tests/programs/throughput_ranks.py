"""Two ranks train twice, with a ThroughputMonitor and without: what it found, and whether the weights are the same."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import trainer as T
from trainer.callbacks import ThroughputMonitor


class Net(T.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))

    def training_step(self, batch: list, batch_idx: int) -> torch.Tensor:
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Found(T.Callback):
    def on_train_end(self, trainer: T.Trainer, pl_module: T.Module) -> None:
        meter = trainer.fit_run.meter
        if meter.communication is not None:
            print("communication", meter.communication, flush=True)
            print("flops", meter.flops, meter.flops_by, flush=True)


def train(*callbacks: T.Callback) -> torch.Tensor:
    data = TensorDataset(torch.randn(64, 8, generator=torch.Generator().manual_seed(0)))
    model = Net()
    T.Trainer(
        max_epochs=2, accelerator="cpu", accumulate_grad_batches=2, callbacks=[*callbacks, Found()],
        logger=T.loggers.CSVLogger("logs"), enable_checkpointing=False, enable_model_summary=False,
    ).fit(model, DataLoader(data, 4))  # fmt: skip
    return torch.cat([p.detach().flatten() for p in model.parameters()])


print("equal", torch.equal(train(ThroughputMonitor()), train()), flush=True)
