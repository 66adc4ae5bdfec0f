"""Every way of running on several ranks trains as one process does on all of their samples."""

import copy
import sys

import torch
import torch.distributed as dist
from torch import nn

from trainer.distributed import connect
from trainer.parallel import DDP, FSDP, Single, make_parallel

BATCH, STEPS = 4, 3


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Model(nn.Module):
    automatic_optimization = True

    def __init__(self):
        super().__init__()
        self.inlet = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(8, 1)
        self.register_buffer("scale", torch.rand(1) + 0.5)

    def forward(self, x):
        x = self.inlet(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x) * self.scale

    def training_step(self, batch, index):
        x, y = batch
        return nn.functional.mse_loss(self(x), y)

    def validation_step(self, batch, index):
        return self.head(self.inlet(batch[0])).mean()


def single(world):
    parallel = Single()
    parallel.world = world
    return parallel


def make(seed):
    torch.manual_seed(seed)
    return Model()


def train(parallel, optimizer, batches, *, clip=None, accumulate=1):
    """batches: per step a list of (batch, weight)."""
    norms = []
    for number, micro in enumerate(batches):
        for last, (batch, weight) in enumerate(micro, 1):
            if last < len(micro):
                with parallel.no_sync():
                    (parallel.step(batch, number) * weight / len(micro)).backward()
            else:
                (parallel.step(batch, number) * weight / len(micro)).backward()
        if clip is not None:
            norms.append(parallel.clip(optimizer.param_groups[0]["params"], clip))
        optimizer.step()
        optimizer.zero_grad()
    return norms


def full(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def data(count):
    generator = torch.Generator().manual_seed(5)
    return torch.randn(count, 8, generator=generator), torch.randn(count, 1, generator=generator)


def main():
    strategy = {
        "ddp": lambda: "ddp",
        "unused": lambda: "ddp_find_unused_parameters_true",
        "static": lambda: DDP(static_graph=True),
        "views": lambda: DDP(gradient_as_bucket_view=True),
        "fsdp": lambda: "fsdp",
        "layers": lambda: FSDP(units=(nn.Linear, nn.LayerNorm)),
        "hsdp": lambda: FSDP(replicas=2),
        "sized": lambda: FSDP(units=200),
    }
    with connect(accelerator="cpu") as world:
        rank, size = world.rank, world.size
        for name in sys.argv[1:]:
            x, y = data(BATCH * size * STEPS * 2)
            last = data(size + 1) if size > 1 else data(1)
            # The reference: one process, the whole batch; then a last one with samples for fewer than all places.
            plain = single(world)
            reference = make(0)
            plain.wrap(reference)
            sgd = torch.optim.AdamW(reference.parameters(), lr=0.05)
            step = BATCH * size
            whole = [
                [
                    ((x[i : i + step], y[i : i + step]), 1.0),
                    ((x[i + step : i + 2 * step], y[i + step : i + 2 * step]), 1.0),
                ]
                for i in range(0, len(x), 2 * step)
            ]
            expected_norms = train(plain, sgd, [*whole, [(last, 1.0)]], clip=0.5)

            module = make(rank)  # the same start comes from rank 0
            parallel = make_parallel(strategy[name](), world)
            parallel.wrap(module)
            optimizer = torch.optim.AdamW(module.parameters(), lr=0.05)
            mine = [[((bx[rank::size], by[rank::size]), w) for (bx, by), w in micro] for micro in whole]
            own = last[0][rank::size], last[1][rank::size]
            mine.append([(own, len(own[0]) * size / (size + 1))])
            norms = train(parallel, optimizer, mine, clip=0.5)
            for a, b in zip(norms, expected_norms, strict=True):
                torch.testing.assert_close(full(a), b, rtol=1e-4, atol=1e-6)
            for (n, p), q in zip(module.named_parameters(), reference.parameters(), strict=True):
                torch.testing.assert_close(
                    full(p), q, rtol=2e-4, atol=2e-5, msg=lambda m, at=f"{name} {n}": f"{at}: {m}"
                )
            assert torch.equal(module.scale, reference.scale)

            # The state has the same form and values everywhere, and goes from any strategy to any other.
            state, optimizer_state = parallel.module_state(), parallel.optimizer_state(optimizer)
            assert list(state) == list(plain.module_state())
            again = make(7)
            other = make_parallel(strategy[name](), world)
            other.wrap(again)
            fresh = torch.optim.AdamW(again.parameters(), lr=0.1)
            other.load_module_state({k: full(v) for k, v in state.items()})
            plainly = {
                "state": {k: {j: full(u).clone() for j, u in v.items()} for k, v in optimizer_state["state"].items()},
                "param_groups": optimizer_state["param_groups"],
            }
            other.load_optimizer_state(fresh, plainly)
            assert fresh.param_groups[0]["lr"] == 0.05
            one = make(9)
            (alone := single(world)).wrap(one)
            lone = torch.optim.AdamW(one.parameters(), lr=0.3)
            alone.load_module_state({k: full(v) for k, v in state.items()})
            alone.load_optimizer_state(lone, copy.deepcopy(plainly))
            train(parallel, optimizer, mine[:1])
            train(other, fresh, mine[:1])
            train(alone, lone, whole[:1])
            for p, q, r in zip(module.parameters(), again.parameters(), one.parameters(), strict=True):
                assert name == "static" or torch.equal(full(p), full(q))
                torch.testing.assert_close(full(p), r, rtol=2e-4, atol=2e-5)
            module.eval()
            with torch.no_grad():
                module.validation_step((x[:4], y[:4]), 0)
            # A rank's own optimizer, clipped by value.
            parallel.step((x[rank::size], y[rank::size]), 0).backward()
            parallel.clip(module.parameters(), 1e-3, "value")
            assert all(full(p.grad).abs().max() <= 1e-3 for p in module.parameters())
            print("equal", name, flush=True)
            dist.barrier()


main()
