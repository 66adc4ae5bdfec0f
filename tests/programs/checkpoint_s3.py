"""One process's store on an object store: `checkpoint_s3.py URL`. Its own process, since fsspec keeps a thread."""

from __future__ import annotations

import sys
import time
import warnings

import torch

from trainer.checkpoint import Retention, Store
from trainer.checkpoint.__main__ import main as command
from trainer.checkpoint.catalog import open_checkpoint
from trainer.checkpoint.reader import verify


def state(step: int) -> dict:
    return {"w": torch.arange(3_000_000) * step, "step": step, "b": torch.full((3,), float(step))}


def main(url: str) -> None:
    with Store(url, retention=Retention(last=2)) as store:
        assert store.newest() is None
        for step in (1, 2, 3):
            store.save(state(step), step=step, wait=step == 1)
        store.wait()
        deadline = time.monotonic() + 20
        while [m.step for m in store.list()] != [3, 2]:  # the writer removes the first after it has committed the third
            assert time.monotonic() < deadline, store.list()
        loaded = store.load_newest()
        assert loaded is not None
        assert torch.equal(loaded.state["w"], state(3)["w"])
        assert verify(open_checkpoint(url)) == []
        assert command(["ls", url]) == 0
        # A damaged object: the checkpoint before it is taken.
        folder = open_checkpoint(url).folder
        content = bytearray(folder.read("rank-00000.safetensors"))
        content[5_000_000] ^= 4
        folder.fs.pipe_file(f"{folder.path}/rank-00000.safetensors", bytes(content))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            older = store.load_newest()
        assert older is not None
        assert older.state["step"] == 2
        assert any("bytes 4194304 to 5242880 does not fit" in str(w.message) for w in caught)


if __name__ == "__main__":
    main(*sys.argv[1:])
