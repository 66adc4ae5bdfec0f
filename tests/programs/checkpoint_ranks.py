"""Saves and loads on real ranks: `checkpoint_ranks.py save|load URL`. The state is a function of its keys alone."""

from __future__ import annotations

import sys

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import torch.distributed as dist
from trainer.checkpoint import Store
from trainer.distributed import connect
from trainer.errors import CheckpointError

SHAPES = {"big": (301, 257), "odd": (7, 3), "long": (40000,), "scalar": (), "empty": (0, 4), "row": (1, 70000)}


def expected(name: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(name.encode()))
    return torch.randn(SHAPES[name], generator=generator)


def build(fill: bool) -> nn.Module:
    torch.manual_seed(3 if fill else 4)
    model = nn.Sequential(nn.Linear(30, 17), nn.Linear(17, 3), nn.Linear(3, 1, bias=False))
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    return model


def count_collectives() -> list[str]:
    calls: list[str] = []
    for name in ("all_gather_object", "broadcast_object_list", "all_reduce", "gather_object"):
        original = getattr(dist, name)
        setattr(dist, name, lambda *a, _f=original, _n=name, **k: (calls.append(_n), _f(*a, **k))[1])
    return calls


def main(action: str, url: str) -> None:
    with connect() as world:
        store = Store(url, world)
        model = build(fill=action == "save")
        optimizer = torch.optim.Adam(model.parameters())
        if action == "save":
            model(torch.ones(2, 30)).sum().backward()
            optimizer.step()
            calls = count_collectives()
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "plain": {name: expected(name) for name in SHAPES},
                "step": 12,
            }
            saved = store.save(state, step=12, rank_state={"rank": world.rank, "own": torch.full((5,), world.rank)})
            many = len(calls)
            calls.clear()
            store.save({"one": torch.zeros(3)}, step=1)
            assert many == len(calls), (many, calls)
            assert saved.step == 12
            try:
                store.save({"t": torch.zeros(2 + world.rank)}, step=20)
            except CheckpointError as error:
                assert "do not hold the same tensors" in str(error), error
            else:
                raise SystemExit("ranks with different states were saved")
            try:
                store.save({"t": object() if world.rank == 1 else 1}, step=20)
            except CheckpointError as error:
                assert "Rank 1" in str(error) and "at t a builtins.object" in str(error), error
            else:
                raise SystemExit("an object was saved")
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


if __name__ == "__main__":
    main(*sys.argv[1:])
