"""Compiled by torch's inductor: a training that is broken off and resumed computes what one that went on does."""

import contextlib
import tempfile

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import trainer as T


class Model(T.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Dropout(0.2), nn.LayerNorm(64), nn.Linear(64, 1))

    def training_step(self, batch, batch_idx):
        loss = nn.functional.mse_loss(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class Save(T.Callback):
    """Behind the smaller batch of an epoch, in the middle of the next one."""

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step == 4:
            trainer.save_checkpoint(f"{folder}/half.ckpt")
            raise KeyboardInterrupt


def train(steps, path=None, callbacks=()):
    torch._dynamo.reset()  # as a new process would begin
    T.seed_everything(1, verbose=False)
    module = Model()
    generator = torch.Generator().manual_seed(2)
    data = TensorDataset(torch.randn(22, 8, generator=generator), torch.randn(22, 1, generator=generator))
    trainer = T.Trainer(
        accelerator="cpu", max_steps=steps, compile=True, callbacks=list(callbacks), logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(data, 8, shuffle=True), ckpt_path=path)
    return module, trainer


with tempfile.TemporaryDirectory() as folder:
    whole, trainer = train(9)
    assert trainer.compiling.recompiled == 1  # the last batch of an epoch
    with contextlib.suppress(KeyboardInterrupt):
        train(9, callbacks=[Save()])
    resumed, trainer = train(9, f"{folder}/half.ckpt")
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
print("the same", flush=True)
