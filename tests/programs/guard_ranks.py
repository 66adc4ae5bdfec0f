"""Guarded ranks leave out a step in which one of them had a sample that is not finite; argv: the strategy."""

import math
import sys
import tempfile
import warnings

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils.data import DataLoader, TensorDataset

import trainer as T

BATCH, STEPS, BAD = 4, 12, 8


class Model(T.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1))
        self.traffic = []

    def training_step(self, batch, batch_idx):
        loss = nn.functional.mse_loss(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class Stop(T.Callback):
    """Saves at a step and leaves, as one that is killed later, before it saves again."""

    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step == 5 and not trainer.fit_run.guard.rollbacks:
            trainer.save_checkpoint(self.path)
        if trainer.fit_run.guard.rollbacks and trainer.global_step == 7:
            raise KeyboardInterrupt


def full(module):
    return {k: v.full_tensor() if hasattr(v, "full_tensor") else v.clone() for k, v in module.state_dict().items()}


def train(x, y, path=None, **arguments):
    torch.manual_seed(1 + dist.get_rank() if dist.is_initialized() else 1)
    module = Model()
    trainer = T.Trainer(
        accelerator="cpu", strategy=sys.argv[1], max_epochs=1, gradient_clip_val=1.0, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, **arguments,
    )  # fmt: skip
    T.seed_everything(7 + trainer.global_rank, verbose=False)
    try:
        trainer.fit(module, DataLoader(TensorDataset(x, y), BATCH), ckpt_path=path)
    except KeyboardInterrupt:
        return None
    return full(module)


warnings.simplefilter("ignore")
generator = torch.Generator().manual_seed(0)
count = 2 * BATCH * STEPS
x, y = torch.randn(count, 4, generator=generator), torch.randn(count, 1, generator=generator)
keep = [i for i in range(count) if i // (2 * BATCH) != BAD]
expected = train(x[keep], y[keep])
assert expected is not None
y[2 * BATCH * BAD + 1] = math.nan
found = train(x, y, guard=T.Guard(snapshot_every=3))
for k, v in expected.items():
    assert torch.equal(found[k], v), (k, found[k], v)

folder = [tempfile.mkdtemp()] if dist.get_rank() == 0 else [None]
dist.broadcast_object_list(folder)
path = f"{folder[0]}/at5.ckpt"
assert train(x, y, guard=True, callbacks=[Stop(path)]) is None
resumed = train(x, y, path, guard=True)
assert all(torch.equal(resumed[k], v) for k, v in expected.items())

# Where gradients are clipped anyway, a guard adds no exchange to a step.
with CommDebugMode() as plain:
    train(x[keep], y[keep])
with CommDebugMode() as guarded:
    train(x[keep], y[keep], guard=True)
assert guarded.get_total_counts() == plain.get_total_counts(), (plain.get_comm_counts(), guarded.get_comm_counts())
print("the same", flush=True)
dist.barrier()
if dist.get_rank() == 0:
    import shutil

    shutil.rmtree(folder[0])
dist.destroy_process_group()
