"""One process's store on an object store: `checkpoint_s3.py URL`. Its own process, since fsspec keeps a thread."""

from __future__ import annotations

import sys
import tempfile
import time
import warnings

import torch
import torch.distributed.checkpoint as dcp

from trainer.checkpoint import Retention, Store
from trainer.checkpoint.__main__ import main as command
from trainer.checkpoint.catalog import is_complete, open_checkpoint
from trainer.checkpoint.contents import verify


def state(step: int) -> dict:
    return {"w": torch.arange(3_000_000) * step, "step": step, "b": torch.full((3,), float(step))}


def in_several_files(url: str) -> None:
    """A large shard is several objects, each a file that others read; a tensor that goes whole stays whole."""
    tensors = {"w": torch.arange(6_000_003.0).view(3, -1), "v": torch.arange(4_000_000), "e": torch.empty(0, 3)}
    own = {"mine": torch.arange(2_000_000)}
    with Store(url) as store:
        path = store.save(tensors, step=1, rank_state=own).path
        loaded = store.load(path)
    assert all(torch.equal(loaded.state[key], tensor) for key, tensor in tensors.items())
    assert torch.equal(loaded.rank_state["mine"], own["mine"])
    checkpoint = open_checkpoint(path)
    files = [stretch.name for stretch in checkpoint.manifest.files[0].stretches]
    assert len(files) == 4
    lines: list[str] = []
    assert verify(checkpoint, lines.append) == []
    assert [line.split(":")[0] for line in lines] == files
    with tempfile.TemporaryDirectory() as here:
        checkpoint.folder.fs.get(f"{checkpoint.folder.path}/", f"{here}/", recursive=True)
        into = {key: torch.empty_like(tensor) for key, tensor in tensors.items()}
        dcp.load(into, storage_reader=dcp.HuggingFaceStorageReader(here), no_dist=True)
    assert all(torch.equal(into[key], tensor) for key, tensor in tensors.items())
    # Another's content is found, and each file's loss.
    content = checkpoint.folder.read(files[1])
    checkpoint.folder.fs.pipe_file(f"{checkpoint.folder.path}/{files[1]}", content[:-1] + bytes([content[-1] ^ 1]))
    assert f"{files[1]} is damaged: the checksum of bytes" in verify(checkpoint)[0]
    checkpoint.folder.remove(files[2])
    assert not is_complete(checkpoint)


def main(url: str) -> None:
    in_several_files(f"{url}-large")
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
