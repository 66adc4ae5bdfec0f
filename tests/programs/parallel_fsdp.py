"""What FSDP2 must keep, on real ranks: single-process results, states that go anywhere, and no needless traffic."""

from __future__ import annotations

import copy
import inspect
import sys

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

from trainer.distributed import connect
from trainer.errors import ConfigError
from trainer.parallel import DDP, FSDP, Single, make_parallel
from trainer.precision import make_precision


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return x + self.two(torch.relu(self.one(x)))


class Net(nn.Module):
    automatic_optimization = True

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(8, 10, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    def training_step(self, batch, index):
        return nn.functional.cross_entropy(self(batch).float(), batch.flip(0))

    def validation_step(self, batch):
        return self.training_step(batch, 0)


def fresh(strategy, world, seed=1):
    torch.manual_seed(seed)
    module = Net()
    parallel = make_parallel(strategy, world)
    parallel.wrap(module)
    return module, parallel, torch.optim.AdamW(module.parameters(), lr=1e-2)


def batches(step, world):
    """This rank's batch, and that of all ranks together."""
    whole = torch.randint(0, 10, (world.size, 6), generator=torch.Generator().manual_seed(step))
    return whole[world.rank], whole


def train(module, optimizer, parallel, world, steps, clip=0.05, precision=None):
    norms = []
    for index in steps:
        own, whole = batches(index, world)
        optimizer.zero_grad()
        if isinstance(parallel, Single):
            loss = sum(parallel.step(row, 0) for row in whole) / world.size
        elif precision is not None:
            with precision.context():
                loss = parallel.step(own, 0)
        else:
            loss = parallel.step(own, 0)
        (loss if precision is None or precision.scaler is None else precision.scaler.scale(loss)).backward()
        if precision is not None and precision.scaler is not None:
            precision.scaler.unscale_(optimizer)
        norms.append(parallel.clip(module.parameters(), clip))
        if precision is not None and precision.scaler is not None:
            precision.scaler.step(optimizer)
            precision.scaler.update()
        else:
            optimizer.step()
    return torch.stack(norms)


def full(state):
    return {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in state.items()}


def alone(world, seed=1):
    torch.manual_seed(seed)
    module = Net()
    single = Single()
    single.world = world
    single.wrap(module)
    return module, single, torch.optim.AdamW(module.parameters(), lr=1e-2)


def equals_one_process(world):
    reference, single, theirs = alone(world)
    norms = train(reference, theirs, single, world, range(4))
    options = [FSDP(), FSDP(units=Block), FSDP(units=200), FSDP(reshard_after_forward=False)]
    if world.size == 4:
        options.append(FSDP(replicas=2))
    for strategy in options:
        module, parallel, optimizer = fresh(strategy, world)
        assert isinstance(module.blocks[0], FSDPModule)
        assert module.head.weight is module.embed.weight
        assert list(inspect.signature(module.training_step).parameters)[-2:] == ["batch", "index"]
        found = train(module, optimizer, parallel, world, range(4))
        assert not isinstance(found, DTensor)
        torch.testing.assert_close(found, norms, rtol=1e-4, atol=1e-6)
        for name, value in full(parallel.module_state()).items():
            torch.testing.assert_close(value, reference.state_dict()[name], rtol=1e-4, atol=1e-5, msg=name)
        with torch.no_grad():
            found = module.validation_step(batches(9, world)[0])
            expected = reference.validation_step(batches(9, world)[0])
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    uneven = FSDP(replicas=3 if world.size != 3 else 2)
    uneven.world = world
    with pytest.raises(ConfigError, match="does not divide"):
        uneven.wrap(Net())


def states_go_anywhere(world):
    """sharded -> sharded anew, sharded -> single, single -> sharded, ddp -> sharded -> ddp; training goes on alike."""
    reference, single, theirs = alone(world)
    train(reference, theirs, single, world, range(5))
    expected = reference.state_dict()
    module, parallel, optimizer = fresh("fsdp", world)
    train(module, optimizer, parallel, world, range(2))
    state, optimizer_state = parallel.module_state(), parallel.optimizer_state(optimizer)
    whole = full(state)
    whole_optimizer = copy.deepcopy(optimizer_state)
    for values in whole_optimizer["state"].values():
        for key, value in values.items():
            values[key] = value.full_tensor() if isinstance(value, DTensor) else value
    starts = {"shards": (state, optimizer_state), "whole": (whole, whole_optimizer)}
    for strategy in ("fsdp", "ddp"):
        for kind, (weights, moments) in starts.items():
            if strategy == "ddp" and kind == "shards":
                continue
            module, parallel, optimizer = fresh(strategy, world, seed=7)
            parallel.load_module_state(copy.deepcopy(weights))
            parallel.load_optimizer_state(optimizer, copy.deepcopy(moments))
            train(module, optimizer, parallel, world, range(2, 5))
            for name, value in full(parallel.module_state()).items():
                torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5, msg=f"{strategy} {name}")
    # What replicas number goes into shards, which have names.
    module, parallel, optimizer = fresh(DDP(), world)
    train(module, optimizer, parallel, world, range(2))
    weights, moments = copy.deepcopy(parallel.module_state()), copy.deepcopy(parallel.optimizer_state(optimizer))
    module, parallel, optimizer = fresh("fsdp", world, seed=7)
    parallel.load_module_state(weights)
    parallel.load_optimizer_state(optimizer, moments)
    train(module, optimizer, parallel, world, range(2, 5))
    for name, value in full(parallel.module_state()).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5, msg=name)


def traffic(world):
    module, parallel, _ = fresh(FSDP(reshard_after_forward=False), world)
    own, _ = batches(0, world)

    def count(call):
        with CommDebugMode() as seen:
            call()
        return {str(k).split(".")[-1]: v for k, v in seen.get_comm_counts().items()}

    def backward():
        parallel.step(own, 0).backward()

    backward()
    with parallel.no_sync():
        quiet = count(backward)
    loud = count(backward)
    assert not [k for k in quiet if "reduce" in k], quiet
    assert sum(v for k, v in loud.items() if "reduce_scatter" in k) == 3, loud  # two blocks and the rest
    # Gradients of both micro-batches are in the sum.
    module.zero_grad()
    with parallel.no_sync():
        backward()
    backward()
    twice = module.blocks[0].one.weight.grad.full_tensor()
    module.zero_grad()
    backward()
    torch.testing.assert_close(twice, 2 * module.blocks[0].one.weight.grad.full_tensor())
    norms = count(lambda: parallel.clip(module.parameters(), 1.0))
    assert sum(norms.values()) == 1, norms
    assert parallel.clip(module.parameters(), 0.001, "value") is None
    assert max(p.grad.full_tensor().abs().max() for p in module.parameters()) <= 0.001
    # Once more, as test after fit: hooks do not run twice.
    again = make_parallel("fsdp", world)
    again.wrap(module, training=False)
    assert again.step == parallel.step


def precisions(world):
    """As replicas do in the same precision; the scaler skips the same steps on all ranks."""
    for name, policy in (("bf16-mixed", None), ("16-mixed", None),
                         ("bf16-mixed", MixedPrecisionPolicy(reduce_dtype=torch.bfloat16))):  # fmt: skip
        ends = []
        for strategy in (DDP(), FSDP(mp_policy=policy)):
            module, parallel, optimizer = fresh(strategy, world)
            precision = make_precision(name, world.device)
            train(module, optimizer, parallel, world, range(6), precision=precision)
            scale = precision.state_dict().get("scale")
            assert len(set(world.gather(scale))) == 1
            ends.append((full(parallel.module_state()), scale))
        assert ends[0][1] == ends[1][1]
        for key, value in ends[1][0].items():
            assert value.dtype == torch.float32
            torch.testing.assert_close(value, ends[0][0][key], rtol=0.02, atol=0.02, msg=f"{name} {key}")


if __name__ == "__main__":
    with connect() as world:
        for check in (equals_one_process, states_go_anywhere, traffic, precisions):
            if len(sys.argv) == 1 or check.__name__ in sys.argv[1:]:
                check(world)
        if world.is_global_zero:
            print("all held")
