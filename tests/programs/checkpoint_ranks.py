"""Saves and loads on real ranks: `checkpoint_ranks.py save|load|fail|lost URL`."""

from __future__ import annotations

import errno
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.checkpoint import Store, snapshot
from trainer.checkpoint.catalog import checkpoints_in, open_checkpoint
from trainer.checkpoint.folder import Folder
from trainer.distributed import World, connect
from trainer.errors import CheckpointError, CheckpointWriteError

if TYPE_CHECKING:
    from collections.abc import Callable

SHAPES = {"big": (301, 257), "odd": (7, 3), "long": (40000,), "scalar": (), "empty": (0, 4), "row": (1, 70000)}


def expected(name: str) -> torch.Tensor:
    """The tensor is a function of its name alone."""
    return torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(sum(name.encode())))


def build(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(30, 17), nn.Linear(17, 3), nn.Linear(3, 1, bias=False))
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    return model


class Collectives(TorchDispatchMode):
    """Counts what reaches c10d, whichever function of torch.distributed it came through."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.namespace in ("c10d", "_c10d_functional")
        return func(*args, **(kwargs or {}))


def collectives_of(act: Callable[[], object]) -> int:
    with Collectives() as counted:
        act()
    return counted.count


def refuses(kind: type[Exception], words: list[str], act: object) -> None:
    try:
        act()
    except kind as error:
        missing = [w for w in words if w not in str(error)]
        if missing:
            raise SystemExit(f"not in the error: {missing}: {error}") from error
    else:
        raise SystemExit(f"no {kind.__name__}: {words}")


def save(world: World, store: Store, model: nn.Module) -> None:
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(2, 30)).sum().backward()
    optimizer.step()
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "plain": {name: expected(name) for name in SHAPES},
        "step": 12,
    }
    own = {"rank": world.rank, "own": torch.full((5,), world.rank)}
    many = collectives_of(lambda: store.save(state, step=12, rank_state=own))
    few = collectives_of(lambda: store.save({"one": torch.zeros(3)}, step=1))
    # Two gathers and a broadcast, each of a length and a content, whatever the number of tensors.
    assert many == few == 6, (many, few)
    different = {"t": torch.zeros(2 + world.rank)}
    refuses(CheckpointError, ["do not hold the same tensors"], lambda: store.save(different, step=20))
    unknown = {"t": object() if world.rank == 1 else 1}
    refuses(CheckpointError, ["Rank 1", "at t a builtins.object"], lambda: store.save(unknown, step=20))


def load(world: World, store: Store, model: nn.Module) -> None:
    manifest = store.newest()
    assert manifest is not None
    assert manifest.step == 12
    loaded = store.load(manifest, {"model": model.state_dict()})
    for name in SHAPES:
        assert torch.equal(loaded.state["plain"][name], expected(name)), name
    for key, tensor in loaded.state["model"].items():
        assert isinstance(tensor, DTensor), key
    model.load_state_dict(loaded.state["model"])
    if world.rank < manifest.world_size:
        assert loaded.rank_state["rank"] == world.rank
        assert loaded.rank_state["own"].tolist() == [world.rank] * 5
    else:
        assert loaded.rank_state == {}
    whole = store.load(manifest)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor.full_tensor(), whole.state["model"][key]), key
    moments = [s["exp_avg"] for s in whole.state["optimizer"]["state"].values()]
    print("MOMENTS", sum(float(m.double().abs().sum()) for m in moments))
    print("WEIGHTS", sum(float(t.double().abs().sum()) for t in whole.state["model"].values()))


def polled(store: Store) -> None:
    """Ask until there is an answer; an error is one."""
    while store.poll() is None:
        pass


def lost(world: World, store: Store) -> None:
    """A rank is killed before it has written its part: rank 0 waits for it no longer, and says so."""
    size = int(os.environ["ELEMENTS"])
    store.save({"t": torch.zeros(size)}, step=1)
    if world.rank == 1:
        store.background.begin = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    store.save({"t": torch.ones(size)}, step=2, wait=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        store.close()
    (said,) = (str(w.message) for w in caught)
    assert "step-000000000002 was not committed: CheckpointWriteError: Rank 1 (process" in said, said
    assert [c.manifest.step for c in checkpoints_in(store.folder)] == [1]
    print("SAID", said, flush=True)
    os._exit(0)  # the group is not whole


def fail(world: World, store: Store) -> None:
    """What goes wrong on one rank is learnt, and answered alike, by all."""
    state = {str(i): torch.full((600_000,), float(i)) for i in range(4)}  # large enough for processes
    for step in (1, 2, 3):  # in the background, one after the other
        store.save(state | {"step": step}, step=step, wait=False)
        state["0"].fill_(-step)
    store.wait()
    assert [m.step for m in store.list()] == [3, 2, 1]

    def full(self: Folder, name: str, blocks: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    original = Folder.write_blocks
    if world.rank == 1:
        Folder.write_blocks = full
    refuses(CheckpointWriteError, ["rank 1", "No space left"], lambda: store.save(state, step=4))
    Folder.write_blocks = original

    # The writer of one rank is killed: that rank hears of it at its next step, all of them at the next save.
    store.save(state, step=5, wait=False)
    store.wait()
    if world.rank == 1:
        store.background._process._process.send_signal(signal.SIGSTOP)
    store.save(state, step=6, wait=False)
    if world.rank == 1:
        assert store.poll() is None
        store.background._process._process.kill()
        store.background._process._process.wait()
        refuses(CheckpointWriteError, ["signal SIGKILL"], lambda: polled(store))
    refuses(CheckpointWriteError, ["rank 1", "signal SIGKILL"], store.wait)
    store.save(state, step=7, wait=False)
    store.wait()

    # Damage in what one rank wrote: all go back to the same older checkpoint.
    world.barrier("before the damage")
    if world.rank == 0:
        shard = Path(open_checkpoint(str(store.folder)).folder.path) / "rank-00001.safetensors"
        content = bytearray(shard.read_bytes())
        content[-3] ^= 16
        shard.write_bytes(content)
    world.barrier("after the damage")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = store.load_newest()
    assert loaded is not None
    assert loaded.path.endswith(f"step-{5:012d}"), loaded.path


def short_of_memory(world: World, url: str) -> None:
    """Rank 1 has no memory for a copy: it writes while its training waits, rank 0 beside its own."""
    state = {"w": torch.arange(2_000_000) * 3}
    if world.rank == 1:
        snapshot.available_memory = lambda: 1000.0
    with Store(url, world) as store:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            store.save(state, step=1, wait=False)
            assert store.wait()
        said = [str(w.message) for w in caught if "no memory for a copy of its state" in str(w.message)]
        assert len(said) == world.rank, said
        assert torch.equal(store.load(store.newest()).state["w"], state["w"])


def main(action: str, url: str) -> None:
    with connect() as world, Store(url, world) as store:
        if action == "fail":
            fail(world, store)
            short_of_memory(world, f"{url}-short")
            return
        if action == "lost":
            lost(world, store)
        model = build(seed=3 if action == "save" else 4)
        if action == "save":
            save(world, store, model)
        load(world, store, model)


if __name__ == "__main__":
    main(*sys.argv[1:])
