"""Layers cut over ranks by a plan of torch's, alone or under FSDP2: trains as one process does, and resumes.

argv: how many ranks share a layer, a folder.
"""

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader, TensorDataset

import trainer as T

GLOBAL_BATCH, SHARED, FOLDER = 8, int(sys.argv[1]), sys.argv[2]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Model(T.Module):
    def __init__(self, cut=True, dropout=0.0):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(8, 1)
        self.dropout = dropout
        self.cut, self.seen, self.losses = cut, [], []

    def configure_model(self):
        if not self.cut or isinstance(self.blocks[0].up.weight, DTensor):
            return
        plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        for block in self.blocks:
            parallelize_module(block, self.device_mesh["tensor_parallel"], plan)

    def training_step(self, batch, batch_idx):
        x, y, ids = batch
        self.seen += ids.tolist()
        for block in self.blocks:
            x = block(x)
        loss = nn.functional.mse_loss(self.head(nn.functional.dropout(x, self.dropout) if self.dropout else x), y)
        self.losses.append(loss.detach())
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class Save(T.Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step == 4:
            trainer.save_checkpoint(f"{FOLDER}/at4.ckpt")


def full(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def train(strategy, path=None, callbacks=(), seed=3, dropout=0.0, **arguments):
    torch.manual_seed(seed)
    module = Model(strategy != "ddp", dropout)
    generator = torch.Generator().manual_seed(4)
    n = GLOBAL_BATCH * 8
    data = TensorDataset(
        torch.randn(n, 8, generator=generator), torch.randn(n, 1, generator=generator), torch.arange(n)
    )
    trainer = T.Trainer(
        accelerator="cpu", strategy=strategy, max_epochs=1, gradient_clip_val=0.5, callbacks=list(callbacks),
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, **arguments,
    )  # fmt: skip
    shares = trainer.connect().size // (SHARED if strategy != "ddp" else 1)
    trainer.fit(module, DataLoader(data, GLOBAL_BATCH // shares, shuffle=True), ckpt_path=path)
    return module, trainer, {k: full(v).detach().clone() for k, v in trainer.parallel.module_state().items()}


T.seed_everything(3, verbose=False)
_, plain, expected = train("ddp")
module, trainer, found = train(T.FSDP(tensor_parallel=SHARED), callbacks=[Save()])
for name, value in expected.items():
    torch.testing.assert_close(found[name], value, rtol=2e-4, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}")
assert isinstance(module.blocks[0].up.weight, DTensor)
assert module.blocks[0].up.weight.to_local().numel() == 8 * 16 // trainer.world_size
torch.testing.assert_close(trainer.callback_metrics["loss"], plain.callback_metrics["loss"], rtol=1e-4, atol=1e-6)
# Ranks that share a layer see the same samples, and all together each once.
seen = trainer.world.gather(module.seen)
assert all(seen[r] == seen[r - r % SHARED] for r in range(len(seen))), seen
assert sorted(i for own in seen[::SHARED] for i in own) == list(range(GLOBAL_BATCH * 8))
# What goes on from the middle ends the same, to the bit; guarded, too; and so does, nearly, what shares no layer.
for arguments in ({}, {"guard": True}):
    _, _, resumed = train(T.FSDP(tensor_parallel=SHARED), f"{FOLDER}/at4.ckpt", **arguments)
    for name, value in found.items():
        assert torch.equal(resumed[name], value), name
_, _, resumed = train("ddp", f"{FOLDER}/at4.ckpt")
for name, value in expected.items():
    torch.testing.assert_close(resumed[name], value, rtol=2e-4, atol=2e-5)
# In a script that seeds its ranks otherwise, those that share a layer draw alike all the same.
rank = trainer.world.rank
module, _, _ = train(T.FSDP(tensor_parallel=SHARED), seed=rank, dropout=0.5)
losses = trainer.world.gather([loss.item() for loss in module.losses])
assert all(losses[r] == losses[r - r % SHARED] for r in range(len(losses))), losses
print("as one", flush=True)
dist.barrier()
