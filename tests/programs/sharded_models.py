"""What sharding must keep: weights made on the meta device, mixed precision, offload, running statistics."""

import torch
import torch.distributed as dist
from torch import nn

from trainer.distributed import connect
from trainer.materialize import is_meta, materialize
from trainer.parallel import DDP, FSDP, make_parallel
from trainer.precision import make_precision
from trainer.recompute import recompute


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Model(nn.Module):
    automatic_optimization = True

    def __init__(self, statistics=False):
        super().__init__()
        self.inlet = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.statistics = nn.BatchNorm1d(8) if statistics else nn.Identity()
        self.head = nn.Linear(8, 1)

    def forward(self, x):
        x = self.inlet(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.statistics(x))

    def training_step(self, batch, index):
        x, y = batch
        return nn.functional.mse_loss(self(x), y)


def full(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def batch_of(world, number):
    generator = torch.Generator().manual_seed(number * 10 + world.rank)
    return torch.randn(4, 8, generator=generator), torch.randn(4, 1, generator=generator)


def train(world, strategy, module, name="32", steps=3, hurt=None):
    precision = make_precision(name, world.device)
    parallel = make_parallel(strategy, world, precision)
    parallel.place(module)
    parallel.wrap(module)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    losses, scaler = [], precision.scaler
    for number in range(steps):
        with precision.context():
            loss = parallel.step(batch_of(world, number), number)
        losses.append(loss.detach().float())
        if hurt == (number, world.rank):
            loss = loss * torch.inf
        if scaler is None:
            loss.backward()
        else:
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
        parallel.clip(module.parameters(), 1.0)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad()
    return torch.tensor(losses), {k: full(v).detach().clone() for k, v in module.state_dict().items()}, precision


def fresh(seed=0, **kwargs):
    torch.manual_seed(seed)
    return Model(**kwargs)


with connect(accelerator="cpu") as world:
    # Weights that are made on the meta device do not depend on how they are sharded, nor on a rank's own seed.
    def meta():
        torch.manual_seed(11 + world.rank)
        with torch.device("meta"):
            return Model()

    alone = meta()
    materialize(alone, world.device, seed=11)
    for strategy in (FSDP(), FSDP(units=nn.Linear), DDP()):
        module = meta()
        train(world, strategy, module, steps=0)
        assert not is_meta(module)
        for name, value in module.state_dict().items():
            assert torch.equal(full(value), alone.state_dict()[name]), (type(strategy), name)

    # Layers that recompute, and parameters that live on the CPU, train as they do without.
    expected = train(world, DDP(), fresh())
    for options, again in (({"cpu_offload": True}, False), ({}, True), ({"reshard_after_forward": False}, True)):
        module = fresh()
        if again:
            recompute(module, Block)
        found = train(world, FSDP(**options), module)
        torch.testing.assert_close(found[0], expected[0])
        torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-5)

    # Mixed precision moves 16 bits and sums in 32, and computes as DDP's autocast does.
    expected = train(world, DDP(), fresh(), "bf16-mixed")
    formats = set()
    module = fresh()
    module.blocks[0].up.register_forward_pre_hook(lambda layer, args: formats.add(layer.weight.dtype))
    found = train(world, FSDP(), module, "bf16-mixed")
    assert formats == {torch.bfloat16}, formats
    torch.testing.assert_close(found[0], expected[0], rtol=0.03, atol=0.01)
    torch.testing.assert_close(found[1], expected[1], rtol=0.05, atol=0.01)
    assert all(v.dtype == torch.float32 for v in found[1].values())

    # An overflow on one rank skips the step on all, and halves the scale everywhere.
    start = {k: v.clone() for k, v in fresh().state_dict().items()}
    for strategy in (DDP(), FSDP()):
        _, after, precision = train(world, strategy, fresh(), "16-mixed", steps=1, hurt=(0, world.size - 1))
        assert precision.scaler.get_scale() == 2.0**15, precision.scaler.get_scale()
        assert all(torch.equal(start[k], v) for k, v in after.items())

    # Running statistics are the same on all ranks, as with DDP.
    expected = train(world, DDP(), fresh(statistics=True), steps=4)
    found = train(world, FSDP(), fresh(statistics=True), steps=4)
    for name in ("statistics.running_mean", "statistics.running_var"):
        everyone = world.gather(found[1][name])
        last = world.gather(expected[1][name])
        for mine, theirs in zip(everyone, last, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    print("kept", flush=True)
    dist.barrier()
    dist.destroy_process_group()
