"""The ranks meet, exchange, and say who is missing; on real gloo ranks where it takes several."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from trainer.distributed import choose_device, connect
from trainer.errors import ConfigError, DistributedError
from trainer.ranks import Ranks


def test_collectives_and_barriers(gang):
    assert all("all held" in r.stdout for r in gang.ok(3, "parallel_world.py"))


def test_a_group_that_the_script_made(gang):
    gang.ok(2, "parallel_world.py", "own")


def test_alone_there_is_no_group():
    with connect(environ={}) as world:
        assert not dist.is_initialized()
        assert world.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
        world.barrier("nobody to wait for", timeout_s=1)
        assert world.gather("x") == ["x"]
        assert world.broadcast("x") == "x"
        assert world.any(True)
        assert not world.any(False)
        assert world.all_reduce(torch.ones(1)).item() == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"devices": 2}, r"devices=2 needs 2 processes.*launch --procs 2"),
        ({"devices": "2"}, "devices='2' needs 2 processes"),
        ({"devices": 0}, "asks for no device"),
        ({"devices": "two"}, "give a count, a list of indices, -1 or 'auto'"),
        ({"num_nodes": 3}, r"num_nodes=3 contradicts the launcher, which started ranks on 1 node"),
        ({"accelerator": "tpu"}, "'tpu' is not supported"),
        ({"accelerator": "quantum"}, "one of auto, cpu, gpu, cuda, mps"),
    ],
)
def test_contradictory_requests(arguments, message):
    with pytest.raises(ConfigError, match=message):
        connect(environ={}, **arguments)


def test_the_launchers_number_of_ranks_counts():
    environ = {"RANK": "0", "WORLD_SIZE": "4"}
    with pytest.raises(ConfigError, match="devices=2 contradicts the launcher, which started 4 ranks"):
        connect(environ=environ, devices=2)
    with pytest.raises(DistributedError, match="MASTER_ADDR or MASTER_PORT is not set"):
        connect(environ=environ, accelerator="cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu():
    with pytest.raises(ConfigError, match="finds no CUDA device here; use accelerator='cpu'"):
        choose_device("gpu", "auto", Ranks())


def test_nobody_comes(monkeypatch):
    import socket

    with socket.socket() as taken:  # bound but not listening: nobody can answer there
        taken.bind(("127.0.0.1", 0))
        place = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken.getsockname()[1])}
        for name, value in place.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(DistributedError, match=r"rank 1 of 2 did not meet the others at 127.0.0.1 port"):
            connect(accelerator="cpu", timeout_s=1)
