"""Training onto a disk that fills up, and has room again later: `full_disk.py FOLDER`. Needs root, for a disk of 3 MiB.

Prints `WARNED <number> <checkpoints on disk>` when the training is over.
"""

from __future__ import annotations

import ctypes
import sys
import warnings
from pathlib import Path

import torch
from torch.utils.data import DataLoader, TensorDataset

import trainer as T
from trainer.checkpoint import load_file

# <sched.h>, <sys/mount.h>
CLONE_NEWNS, MS_REC, MS_PRIVATE = 0x20000, 0x4000, 1 << 18
FULL_AT = 20


def mount_a_small_disk(folder: str) -> None:
    """Seen by this process and its children only, and gone with them."""
    libc = ctypes.CDLL(None, use_errno=True)
    for done in (
        libc.unshare(CLONE_NEWNS),
        libc.mount(None, b"/", None, MS_REC | MS_PRIVATE, None),
        libc.mount(b"none", folder.encode(), b"tmpfs", 0, b"size=3m"),
    ):
        if done:
            raise OSError(ctypes.get_errno(), f"no disk at {folder}")


class Model(T.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 60_000)  # 0.7 MiB

    def training_step(self, batch, batch_idx):
        return self.layer(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


class MakesRoom(T.Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == FULL_AT:
            trainer.saves.settle()
            for path in Path(folder).glob("*.ckpt"):
                load_file(path)
            (Path(folder) / "step=1.ckpt").unlink()


def main() -> None:
    mount_a_small_disk(folder)
    callback = T.callbacks.ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = T.Trainer(
        accelerator="cpu", max_steps=FULL_AT + 1, logger=False, callbacks=[callback, MakesRoom()],
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(Model(), DataLoader(TensorDataset(torch.ones(400, 2)), batch_size=1))
    warned = [w for w in caught if "The store is full, and training goes on without this" in str(w.message)]
    assert trainer.global_step == FULL_AT + 1
    assert "No space left on device" in str(warned[0].message), warned[0]
    steps = {int(path.stem.removeprefix("step=")): load_file(path) for path in Path(folder).glob("*.ckpt")}
    for step, state in steps.items():
        assert state["global_step"] == step
    assert not list(Path(folder).glob(".*"))
    print("WARNED", len(warned), sorted(steps))


if __name__ == "__main__":
    folder = sys.argv[1]
    main()
