"""The ranks' collectives, barriers that tell who is missing, and groups that are somebody else's."""

from __future__ import annotations

import math
import os
import sys
import threading

import torch
import torch.distributed as dist

from trainer.distributed import connect
from trainer.errors import ConfigError, DistributedError


def raises(kind, call):
    try:
        call()
    except kind as error:
        return str(error)
    raise AssertionError(f"no {kind.__name__}")


def main():
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if "own" in sys.argv:
        dist.init_process_group("gloo")
        with connect() as world:
            assert world.any(rank == 1)
        assert dist.is_initialized()
        wrong = dict(os.environ, WORLD_SIZE=str(size + 1), LOCAL_WORLD_SIZE=str(size + 1))
        text = raises(DistributedError, lambda: connect(environ=wrong))
        assert f"is rank {rank} of {size} in the process group" in text, text
        alone = {"PATH": os.environ["PATH"]}
        assert "by its environment" in raises(DistributedError, lambda: connect(environ=alone))
        dist.destroy_process_group()
        return
    world = connect()
    assert (world.rank, world.size, world.device.type) == (rank, size, "cpu")
    assert world.broadcast({"from": rank}, src=1) == {"from": 1}
    assert world.gather(rank * 10) == [r * 10 for r in range(size)]
    for op, expected in (("sum", sum(range(size))), ("mean", (size - 1) / 2), ("max", size - 1), ("min", 0)):
        assert world.all_reduce(torch.tensor(float(rank)), op).item() == expected
    assert "sum, mean, max, min" in raises(ConfigError, lambda: world.all_reduce(torch.zeros(1), "median"))
    assert world.any(rank == size - 1)
    assert not world.any(False)
    world.barrier("the start")
    world.barrier("prepare_data", timeout_s=math.inf)
    # A second World on the same group does not run through the first one's barriers.
    other = connect()
    reached = threading.Event()
    if rank == 0:
        waiting = threading.Thread(target=lambda: (other.barrier("again", timeout_s=20), reached.set()))
        waiting.start()
        assert not reached.wait(0.3)
        world.any(True)
        waiting.join()
    else:
        world.any(True)
        other.barrier("again", timeout_s=20)
    if rank < size - 1:
        text = raises(DistributedError, lambda: world.barrier("the end", timeout_s=1))
        assert f"not there: rank {size - 1} (last seen at 'again')" in text, text
        assert "waited 1 s for the others at 'the end'" in text
    dist.barrier()
    world.close()
    world.close()
    assert not dist.is_initialized()


if __name__ == "__main__":
    main()
    print("all held")
