"""Trains under one strategy, or goes on under another; whatever was saved is there again, to the bit.

argv: "save" STRATEGY FOLDER: six steps on the same global batches for any number of ranks, then a checkpoint at
FOLDER/saved.ckpt, and beside it all tensors as rank 0 sees them. "load" STRATEGY FOLDER...: goes on from each of them,
compares everything before the first step, and prints the losses of three more.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import trainer as T

GLOBAL_BATCH = 12


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 10), nn.Linear(10, 6)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Model(T.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(6, 1)
        self.register_buffer("scale", torch.rand(3))
        self.losses = []

    def training_step(self, batch, batch_idx):
        x, y = batch
        for block in self.blocks:
            x = block(x)
        loss = nn.functional.mse_loss(self.head(x), y)
        self.losses.append(loss.detach())
        return loss

    def configure_optimizers(self):
        # Two groups, in another order than the parameters'.
        biases = [p for p in self.parameters() if p.ndim == 1]
        others = [p for p in self.parameters() if p.ndim > 1]
        return torch.optim.AdamW([{"params": biases, "weight_decay": 0.0}, {"params": others, "lr": 0.02}], lr=0.01)


def full(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def everything(trainer):
    """Weights, buffers and the optimizer's state by the parameters' names."""
    module, [optimizer] = trainer.lightning_module, trainer.optimizers
    found = {name: full(value).detach().clone() for name, value in trainer.parallel.module_state().items()}
    for name, parameter in module.named_parameters():
        for key, value in optimizer.state[parameter].items():
            found[f"{name}: {key}"] = full(value).detach().clone()
    return found


class Compare(T.Callback):
    def __init__(self, expected):
        self.expected = expected

    def on_train_start(self, trainer, module):
        found = everything(trainer)
        assert found.keys() == self.expected.keys(), found.keys() ^ self.expected.keys()
        for name, value in self.expected.items():
            assert torch.equal(found[name], value), name


def train(strategy, steps, path=None, callbacks=()):
    torch.manual_seed(3)
    module = Model()
    generator = torch.Generator().manual_seed(4)
    n = GLOBAL_BATCH * 12
    data = TensorDataset(torch.randn(n, 6, generator=generator), torch.randn(n, 1, generator=generator))
    made = {"hsdp": lambda: T.FSDP(replicas=2)}.get(strategy, lambda: strategy)()
    trainer = T.Trainer(
        accelerator="cpu", strategy=made, max_steps=steps, gradient_clip_val=1.0, callbacks=list(callbacks),
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    size = trainer.connect().size
    trainer.fit(module, DataLoader(data, GLOBAL_BATCH // size), ckpt_path=path)
    losses = torch.stack(module.losses)
    if size > 1:
        dist.all_reduce(losses)
    return trainer, (losses / size).tolist()


class Save(T.Callback):
    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step == 6:
            trainer.save_checkpoint(f"{self.folder}/saved.ckpt")
            found = everything(trainer)
            if trainer.is_global_zero:
                torch.save(found, f"{self.folder}/expected.pt")


what, strategy, *folders = sys.argv[1:]
if what == "save":
    _, losses = train(strategy, 9, callbacks=[Save(folders[0])])
    print(*losses[6:], flush=True)
else:
    for folder in folders:
        expected = torch.load(Path(folder) / "expected.pt")
        _, losses = train(strategy, 9, f"{folder}/saved.ckpt", [Compare(expected)])
        print(*losses, flush=True)
if dist.is_initialized():
    dist.barrier()
