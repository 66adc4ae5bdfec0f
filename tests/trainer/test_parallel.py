"""DDP and FSDP2 on real ranks, and the names of strategies."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from trainer.errors import ConfigError
from trainer.parallel import DDP, FSDP, Single, make_parallel


def world(size=1):
    return SimpleNamespace(rank=0, size=size, device=torch.device("cpu"))


# 2 ranks sum alike in any order; it takes 3 to see a bucket layout that differs after a resume.
def test_ddp(gang):
    assert "all held" in gang.ok(3, "parallel_ddp.py", timeout=110)[0].stdout


def test_fsdp(gang):
    assert "all held" in gang.ok(2, "parallel_fsdp.py", timeout=110)[0].stdout


def test_one_rank_is_single_by_every_name():
    module = nn.Linear(2, 2)
    module.training_step = lambda batch, index: batch
    for strategy in ("auto", "single", "single_device", "ddp", "ddp_static_graph", "fsdp", "hsdp", DDP(), FSDP()):
        parallel = make_parallel(strategy, world())
        assert type(parallel) is Single
        parallel.wrap(module)
        assert parallel.step is module.training_step
        with parallel.no_sync():
            pass


@pytest.mark.parametrize(
    ("strategy", "kind", "options"),
    [
        ("auto", DDP, {}),
        ("ddp", DDP, {}),
        ("ddp_find_unused_parameters_true", DDP, {"find_unused_parameters": True}),
        ("ddp_find_unused_parameters_false", DDP, {"find_unused_parameters": False}),
        ("ddp_static_graph", DDP, {"static_graph": True}),
    ],
)
def test_names(strategy, kind, options):
    parallel = make_parallel(strategy, world(2))
    assert type(parallel) is kind
    assert parallel.options == options


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        ("single", "for one rank, and there are 2"),
        ("dp", "is gone; use strategy='ddp'"),
        ("ddp_spawn", "processes are started by launch"),
        ("deepspeed_stage_2", "ZeRO-2 is FSDP"),
        ("ddpp", "one of auto, single, ddp, .*fsdp.* is possible"),
    ],
)
def test_names_that_are_none(strategy, message):
    with pytest.raises(ConfigError, match=message):
        make_parallel(strategy, world(2))


def test_options_that_are_none():
    with pytest.raises(ConfigError, match=r"DDP\(buckets=...\) is not an option"):
        DDP(buckets=3)
    with pytest.raises(ConfigError, match=r"DDP\(device_ids=...\)"):
        DDP(device_ids=[0])
    with pytest.raises(ConfigError, match="give one of them"):
        DDP(broadcast_buffers=True, forward_sync_buffers=False)
    with pytest.raises(ConfigError, match=r"replicas=0"):
        FSDP(replicas=0)
    with pytest.raises(ConfigError, match=r"tensor_parallel=0"):
        FSDP(tensor_parallel=0)


def test_shares_of_a_batch_with_tensor_parallelism():
    parallel = FSDP(tensor_parallel=2)
    parallel.world = SimpleNamespace(rank=5, size=8, ranks=SimpleNamespace(num_nodes=1))
    assert parallel.data_rank == (2, 4)
    parallel.world.size = 7
    with pytest.raises(ConfigError, match=r"tensor_parallel=2. does not divide the 7 ranks"):
        _ = parallel.device_mesh


def test_clip_on_one_rank():
    parallel = make_parallel("auto", world())
    weight = nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([3.0, 4.0])
    assert parallel.clip([weight], 1.0).item() == 5.0
    torch.testing.assert_close(weight.grad, torch.tensor([0.6, 0.8]))
    assert parallel.clip([weight], 0.5, "value") is None
    assert weight.grad.tolist() == [0.5, 0.5]
