"""Collectives of training steps and the bytes in them: ours beside loops written by hand.

argv: the strategies. 2 or 4 ranks.
"""

import sys
from collections import Counter

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, TensorDataset

import trainer as T

STEPS, FROM = 8, 3
BATCH = 4


class Traffic(TorchDispatchMode):
    """Counts calls of process groups by name, and the bytes of the tensors that they are given."""

    def __init__(self):
        super().__init__()
        self.calls, self.bytes = Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if DTensor in types:
            return NotImplemented  # comes again as what is done with its parts
        if func.namespace in ("c10d", "_c10d_functional"):
            name = func._schema.name.split("::")[1]
            if name not in ("wait_tensor", "_wrap_tensor_autograd"):
                self.calls[name] += 1
                self.bytes[name] += sum(t.nbytes for t in tree_leaves(args) if isinstance(t, torch.Tensor))
        return func(*args, **(kwargs or {}))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


class Net(nn.Module):
    def __init__(self, statistics):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.statistics = nn.BatchNorm1d(16) if statistics else nn.Identity()
        self.head = nn.Linear(16, 1)

    def forward(self, x, y):
        for block in self.blocks:
            x = block(x)
        return nn.functional.mse_loss(self.head(self.statistics(x)), y)


class Model(T.Module):
    def __init__(self, statistics):
        super().__init__()
        self.net = Net(statistics)

    def training_step(self, batch, batch_idx):
        loss = self.net(*batch)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class Count(T.Callback):
    """Counts from one step's first batch to another's."""

    def __init__(self, accumulate):
        self.first, self.end = FROM * accumulate, STEPS * accumulate
        self.traffic = Traffic()

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == self.first:
            self.traffic.__enter__()
        if batch_idx == self.end:
            self.traffic.__exit__(None, None, None)


def ours(strategy, accumulate, clip, statistics):
    count = Count(accumulate)
    batches = (STEPS + 1) * accumulate
    n = BATCH * batches * dist.get_world_size()
    T.Trainer(
        accelerator="cpu", strategy={"ddp": T.DDP, "fsdp": T.FSDP, "hsdp": lambda: T.FSDP(replicas=2)}[strategy](),
        max_epochs=1, accumulate_grad_batches=accumulate, gradient_clip_val=clip, callbacks=[count], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    ).fit(Model(statistics), DataLoader(TensorDataset(torch.randn(n, 16), torch.randn(n, 1)), BATCH))  # fmt: skip
    return count.traffic


def by_hand(strategy, accumulate, clip, statistics):
    net, size, traffic = Net(statistics), dist.get_world_size(), Traffic()
    if strategy == "ddp":
        model = nn.parallel.DistributedDataParallel(net)
    else:
        shape, names = ((size,), ("shard",)) if strategy == "fsdp" else ((2, size // 2), ("replicate", "shard"))
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        for block in net.blocks:
            fully_shard(block, mesh=mesh)
        model = fully_shard(net, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for step in range(STEPS):
        if step == FROM:
            traffic.__enter__()
        for micro in range(accumulate):
            last = micro + 1 == accumulate
            if strategy == "ddp":
                model.require_backward_grad_sync = last
            else:
                model.set_requires_gradient_sync(last)
            loss = model(torch.randn(BATCH, 16), torch.randn(BATCH, 1)) / accumulate
            loss.backward()
        if clip:
            norm = nn.utils.get_total_norm([p.grad for p in model.parameters()])
            norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
            nn.utils.clip_grads_with_norm_(model.parameters(), clip, norm)
        optimizer.step()
        optimizer.zero_grad()
    traffic.__exit__(None, None, None)
    return traffic


dist.init_process_group("gloo")
for strategy in sys.argv[1:]:
    for accumulate, clip, statistics in ((1, None, strategy == "ddp"), (3, 1.0, False)):
        torch.manual_seed(1)
        expected = by_hand(strategy, accumulate, clip, statistics)
        found = ours(strategy, accumulate, clip, statistics)
        what = (strategy, accumulate, clip, statistics)
        assert sum(expected.calls.values()) >= STEPS - FROM, (what, expected.calls)
        assert found.calls == expected.calls, (what, found.calls, expected.calls)
        assert found.bytes == expected.bytes, (what, found.bytes, expected.bytes)
        if dist.get_rank() == 0:
            print(*what, dict(found.calls), sum(found.bytes.values()), flush=True)
print("equal", flush=True)
dist.destroy_process_group()
