"""Layers that are unfrozen during fit are trained with the gradients of all ranks. argv: strategies. Prints weights."""

from __future__ import annotations

import sys

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from trainer import Module, Trainer
from trainer.callbacks import BackboneFinetuning


class Net(Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.backbone = nn.Sequential(nn.Linear(3, 4), nn.Tanh())
        self.head = nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        return (self.head(self.backbone(batch[0])) - batch[0].sum(1, keepdim=True)).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD((p for p in self.parameters() if p.requires_grad), lr=0.1)


def main() -> None:
    x = torch.randn(16, 3, generator=torch.Generator().manual_seed(0))
    for strategy in sys.argv[1:]:
        model = Net()
        trainer = Trainer(
            accelerator="cpu", strategy=strategy, max_epochs=3, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
            callbacks=BackboneFinetuning(1, should_align=False),
        )  # fmt: skip
        trainer.fit(model, DataLoader(TensorDataset(x), batch_size=8 // trainer.world_size))
        state = {n: getattr(t, "full_tensor", lambda t=t: t)() for n, t in model.state_dict().items()}
        print("WEIGHTS", [round(v, 6) for t in state.values() for v in t.flatten().tolist()])


main()
