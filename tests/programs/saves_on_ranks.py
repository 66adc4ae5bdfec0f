"""Background saves of a Trainer of which rank 1's go wrong: `saves_on_ranks.py FOLDER`.

Each rank prints `ENDED <step> <last checkpoint>` of a fit with a full disk, and `RAISED <step>` of one with an error.
"""

from __future__ import annotations

import errno
import sys
import warnings

import torch
from torch.utils.data import DataLoader, TensorDataset

import trainer as T
from trainer.checkpoint.folder import Folder
from trainer.errors import CheckpointWriteError


class Model(T.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 40_000)  # so large that each rank has a part to write

    def training_step(self, batch, batch_idx):
        return self.layer(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def main(folder: str) -> None:
    warnings.filterwarnings("ignore")
    original = Folder.write_blocks
    writes = 0
    what = errno.ENOSPC

    def wrong(self: Folder, name: str, blocks: object) -> int:
        nonlocal writes
        writes += 1
        if T.ranks.read_ranks().rank == 1 and writes == 3:  # the second shard: a record follows each
            raise OSError(what, "scripted")
        return original(self, name, blocks)

    Folder.write_blocks = wrong
    trainer, callback = fit(f"{folder}/full")
    print("ENDED", trainer.global_step, callback.best_model_path)
    writes, what = 0, errno.EIO
    try:
        trainer, _ = fit(f"{folder}/error")
    except CheckpointWriteError as error:
        assert "rank 1" in str(error), error
        print("RAISED", str(error).split(".ckpt")[0])


def fit(folder: str) -> tuple[T.Trainer, T.callbacks.ModelCheckpoint]:
    callback = T.callbacks.ModelCheckpoint(folder, "{step}", every_n_train_steps=2, save_last=True)
    trainer = T.Trainer(
        accelerator="cpu", max_steps=30, logger=False, callbacks=[callback], enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Model(), DataLoader(TensorDataset(torch.ones(400, 2)), batch_size=1))
    return trainer, callback


if __name__ == "__main__":
    main(*sys.argv[1:])
