"""What DDP must keep, on real ranks: exact resumes, the collectives of hand-written DDP, their order, odd modules."""

from __future__ import annotations

import copy
import hashlib
import io
import pickle
import sys
import warnings
from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch.profiler import ProfilerActivity, profile

from trainer.distributed import connect
from trainer.parallel import DDP, make_parallel

sys.modules.setdefault("parallel_ddp", sys.modules[__name__])  # so that what is defined here can be pickled


class Net(nn.Module):
    automatic_optimization = True

    def __init__(self, width=64, depth=5, norm=False):
        super().__init__()
        layers = [nn.Linear(8, width)]
        for _ in range(depth):
            layers += [nn.Linear(width, width), nn.BatchNorm1d(width) if norm else nn.Tanh()]
        self.layers = nn.Sequential(*layers, nn.Linear(width, 1))

    def training_step(self, batch, index):
        return self.layers(batch).square().mean()


class Tied(nn.Module):
    """A shared weight, a frozen layer, an unused one, sparse gradients, a bool buffer and one that is replaced."""

    automatic_optimization = True

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.sparse = nn.Embedding(16, 8, sparse=True)
        self.body = nn.Linear(8, 8)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.unused = nn.Linear(3, 3)
        self.head = nn.Linear(8, 16, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("mask", torch.ones(3, dtype=torch.bool))

    def training_step(self, batch, index):
        self.seen = self.seen + 1 + dist.get_rank()  # another tensor object each time
        # (Without the factor the sparse gradient would share memory with the dense one, and torch's reducer divides it
        # in place: torch 2.11 and 2.15 then give a wrong dense gradient in hand-written DDP as well.)
        x = self.embed(batch) + 2 * self.sparse(batch)
        return self.head(self.frozen(torch.tanh(self.body(x)))).logsumexp(-1).mean()


class Gan(nn.Module):
    automatic_optimization = False

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)

    def training_step(self, batch, index):
        for part in (self.one, self.two):
            loss = part(self.norm(batch)).square().mean()
            part.zero_grad()
            self.parallel.prepare_backward(loss)
            loss.backward()
            with torch.no_grad():
                for p in part.parameters():
                    p -= 0.1 * p.grad


def digest(module):
    return hashlib.sha256(b"".join(v.numpy().tobytes() for v in module.state_dict().values())).hexdigest()


def batch(step):
    return torch.randn(6, 8, generator=torch.Generator().manual_seed(100 * step + dist.get_rank()))


def train(module, optimizer, step, steps, accumulate=None, share_buffers=None):
    for index in steps:
        optimizer.zero_grad()
        if accumulate is not None:
            with accumulate():
                step(batch(1000 + index), 0).backward()
        step(batch(index), 0).backward()
        optimizer.step()
        if share_buffers is not None:
            share_buffers()


def fresh(seed, world, strategy="ddp", **kwargs):
    torch.manual_seed(seed)
    module = Net(**kwargs)
    parallel = make_parallel(strategy, world)
    parallel.wrap(module)
    return module, parallel, torch.optim.AdamW(module.parameters(), lr=1e-2)


def resumes_exactly(world):
    for options in ({}, {"find_unused_parameters": True}, {"static_graph": True}, {"gradient_as_bucket_view": True}):
        options["bucket_cap_mb"] = 0.02
        for norm in (False, True)[: 1 + (len(options) == 1)]:
            module, parallel, optimizer = fresh(1, world, DDP(**options), norm=norm)
            saved = {}
            for index in range(5):
                buffer = io.BytesIO()
                torch.save((module.state_dict(), optimizer.state_dict()), buffer)
                saved[index] = buffer.getvalue()
                # static_graph knows no steps of several backwards
                accumulate = None if "static_graph" in options else parallel.no_sync
                train(module, optimizer, parallel.step, [index], accumulate, parallel.share_buffers)
            whole = digest(module)
            assert len(set(world.gather(whole))) == 1, options
            for stop in (1, 3):
                # Other weights, until those of rank 0 are loaded.
                module, parallel, optimizer = fresh(50 + world.rank, world, DDP(**options), norm=norm)
                state, optimizer_state = torch.load(io.BytesIO(saved[stop]))
                parallel.load_module_state(state)
                parallel.load_optimizer_state(optimizer, optimizer_state)
                accumulate = None if "static_graph" in options else parallel.no_sync
                train(module, optimizer, parallel.step, range(stop, 5), accumulate, parallel.share_buffers)
                assert digest(module) == whole, (options, norm, stop)


def collectives(call):
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
        call()
    events = sorted(recorded.events(), key=lambda e: e.time_range.start)
    sent = [(e.name, e.input_shapes) for e in events if e.name.startswith("c10d::")]
    marks = [e.name for e in events if e.name.startswith("c10d::all") or e.name == "AddmmBackward0"]
    return sent, marks


def sends_what_ddp_sends(world):
    for norm in (False, True):
        torch.manual_seed(3)
        plain = nn.parallel.DistributedDataParallel(Net(norm=norm).layers, bucket_cap_mb=0.02)
        theirs = torch.optim.SGD(plain.parameters(), lr=0.01)
        module, parallel, optimizer = fresh(3, world, DDP(bucket_cap_mb=0.02), norm=norm)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.01)

        def hand(value, index, plain=plain):
            return plain(value).square().mean()

        share = parallel.share_buffers
        assert (share is not None) == norm
        for index in range(2):
            train(plain, theirs, hand, [index])
            train(module, optimizer, parallel.step, [index], share_buffers=share)
        for theirs_quiet, ours_quiet in ((None, None), (plain.no_sync, parallel.no_sync)):
            expected, _ = collectives(partial(train, plain, theirs, hand, [2], theirs_quiet))
            sent, _ = collectives(partial(train, module, optimizer, parallel.step, [2], ours_quiet, share))
            # Ours are the same; buffers go after the step instead of before the next forward.
            buffers = [event for event in expected if "broadcast" in event[0]]
            assert bool(buffers) == norm
            assert sent == expected[len(buffers) :] + buffers, f"ours {sent}\nDDP's {expected}"
        _, marks = collectives(partial(train, module, optimizer, parallel.step, [2]))
        reductions = [i for i, name in enumerate(marks) if name.startswith("c10d::all")]
        # The first bucket leaves while most layers are still to come, and so on to the last.
        assert len(reductions) == 3, marks
        assert marks[: reductions[0]].count("AddmmBackward0") <= 3, marks
        assert "AddmmBackward0" in marks[reductions[0] : reductions[1]], marks
        assert "AddmmBackward0" in marks[reductions[1] : reductions[2]], marks
        with parallel.no_sync():
            loss = parallel.step(batch(9), 0)
            quiet, _ = collectives(loss.backward)
        assert not [name for name, _ in quiet if name.startswith("c10d::all")], quiet


def odd_modules(world):
    torch.manual_seed(world.rank)  # the start is rank 0's all the same
    module = Tied()
    parallel = make_parallel("ddp_find_unused_parameters_true", world)
    parallel.wrap(module)
    assert len(set(world.gather(digest(module)))) == 1
    ids = torch.randint(0, 16, (5,), generator=torch.Generator().manual_seed(world.rank))
    for _ in range(3):
        module.zero_grad()
        parallel.step(ids, 0).backward()
        parallel.share_buffers()
    assert module.unused.weight.grad is None
    assert module.frozen.weight.grad is None
    assert module.embed.weight is module.head.weight
    # The gradient is the mean over the ranks of each alone.
    alone = copy.deepcopy(module)
    alone.zero_grad()
    Tied.training_step(alone, ids, 0).backward()
    for ours, theirs in ((module.embed, alone.embed), (module.sparse, alone.sparse), (module.body, alone.body)):
        expected = theirs.weight.grad.to_dense().clone()
        dist.all_reduce(expected)
        torch.testing.assert_close(ours.weight.grad.to_dense(), expected / world.size)
    # Rank 0's buffer is everybody's after each step.
    assert module.seen.item() == 3, module.seen
    # Nothing of ours stays behind in the module.
    assert not [k for k in (*module.state_dict(), *dict(module.named_modules())) if "/" in k or "inner" in k]
    again = pickle.loads(pickle.dumps(copy.deepcopy(module)))
    assert digest(again) == digest(module)
    parallel = None
    module.zero_grad()
    module.training_step(ids, 0).backward()  # and its gradients are its own again


def buffers_that_stay(world):
    """By both names that torch has for it, without a warning of torch's."""
    for options, initial in (({"broadcast_buffers": False}, world.rank), ({"forward_sync_buffers": False}, 0)):
        module = Tied()
        module.seen += world.rank
        parallel = make_parallel(DDP(find_unused_parameters=True, **options), world)
        parallel.wrap(module)
        assert parallel.share_buffers is None
        assert module.seen.item() == initial
        parallel.step(torch.tensor([1]), 0).backward()
        assert module.seen.item() == initial + 1 + world.rank


def frozen_altogether(world):
    module = Net().requires_grad_(False)
    parallel = make_parallel("ddp", world)
    parallel.wrap(module)
    parallel.step(batch(0), 0)
    with parallel.no_sync():
        pass


def second_wrap(world):
    """fit after fit, test after fit: the reducer before is gone, and evaluation makes none."""
    module, parallel, optimizer = fresh(5, world)
    train(module, optimizer, parallel.step, range(2))
    again = make_parallel("ddp", world)
    again.wrap(module, training=False)
    assert again.step == module.training_step
    parallel = make_parallel("ddp", world)
    parallel.wrap(module)
    del again
    module.zero_grad()
    parallel.step(batch(0), 0).backward()
    gradient = module.layers[0].weight.grad.clone()
    alone = copy.deepcopy(module)
    alone.zero_grad()
    alone.training_step(batch(0), 0).backward()
    expected = alone.layers[0].weight.grad
    dist.all_reduce(expected)
    torch.testing.assert_close(gradient, expected / world.size)


def manual(world):
    torch.manual_seed(1)
    module = Gan()
    parallel = make_parallel("ddp", world)
    parallel.wrap(module)
    module.parallel = parallel
    weights = {n: p.detach().clone() for n, p in module.named_parameters()}
    parallel.step(torch.randn(4, 4, generator=torch.Generator().manual_seed(world.rank)), 0)
    assert all((p != weights[n]).any() for n, p in module.named_parameters() if "norm" not in n)
    for _ in range(2):
        parallel.step(torch.randn(4, 4), 0)
    state = {n: p for n, p in module.state_dict().items() if "running" not in n}
    for name, value in state.items():
        assert len({v.numpy().tobytes() for v in world.gather(value)}) == 1, name
    # Without exchange the ranks part.
    with parallel.no_sync():
        parallel.step(torch.randn(4, 4, generator=torch.Generator().manual_seed(world.rank)), 0)
    assert len({v.numpy().tobytes() for v in world.gather(module.one.weight.detach())}) == world.size


if __name__ == "__main__":
    warnings.simplefilter("error", FutureWarning)
    with connect() as world:
        assert world.size > 1
        for check in (
            resumes_exactly, sends_what_ddp_sends, odd_modules, buffers_that_stay, frozen_altogether, second_wrap,
            manual,
        ):  # fmt: skip
            if len(sys.argv) == 1 or check.__name__ in sys.argv[1:]:
                check(world)
        if world.is_global_zero:
            print("all held")
