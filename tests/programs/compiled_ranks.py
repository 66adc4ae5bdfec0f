"""Compiled on several ranks: trains as uncompiled, in the same names, with buckets that travel during the backward."""

import torch
from torch import nn
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.utils import counters
from torch.utils.data import DataLoader, TensorDataset

import trainer as T


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(160, 640), nn.Linear(640, 160)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


class Model(T.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(160, 1)

    def training_step(self, batch, batch_idx):
        x, y = batch
        for block in self.blocks:
            x = block(x)
        loss = nn.functional.mse_loss(self.head(x), y)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.training_step(batch, batch_idx)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def train(strategy, **arguments):
    torch.manual_seed(1)
    module = Model()
    generator = torch.Generator().manual_seed(2)
    data = TensorDataset(torch.randn(38, 160, generator=generator), torch.randn(38, 1, generator=generator))
    trainer = T.Trainer(
        accelerator="cpu", strategy=strategy, max_epochs=1, accumulate_grad_batches=2, gradient_clip_val=0.5,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, **arguments,
    )  # fmt: skip
    trainer.fit(module, DataLoader(data, 4), DataLoader(data, 4))
    state = trainer.parallel.module_state()
    return {k: v.full_tensor() if hasattr(v, "full_tensor") else v.clone() for k, v in state.items()}, trainer


graphs = []


def counted(graph, inputs):
    graphs.append(graph)
    return aot_eager(graph, inputs)


# The model has 2.4 MB, and torch wants buckets of at least one.
for name, strategy in (("ddp", lambda: T.DDP(bucket_cap_mb=1)), ("fsdp", T.FSDP)):
    expected, _ = train(strategy())
    counters.clear()
    given = strategy()
    found, trainer = train(given, compile={"backend": counted})
    assert list(found) == list(expected), list(found)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value)
    compiling = trainer.compiling
    assert compiling.compiled >= 1
    if name == "ddp":
        # One step is several graphs, cut where a bucket ends.
        assert len(graphs) > counters["stats"]["unique_graphs"], (len(graphs), counters["stats"])
    else:
        # A unit for itself: without and with gradients of what comes in, and under validation.
        assert all(m._compiled_call_impl is None for m in trainer.lightning_module.modules())
        assert compiling.compiled == 1, compiling.told()
    # The same strategy object compiles nothing in a run that does not ask for it.
    made = len(graphs)
    train(given)
    assert len(graphs) == made
    print("alike", name, flush=True)
torch.distributed.destroy_process_group()
