"""One rank of the doctor's all-reduce: the only part of it that needs torch, in a process of its own."""

from __future__ import annotations

import datetime
import json
import os
import sys
import time
from typing import Any

from launcher.processes import die_with_parent

__all__ = ["bootstrap"]

_SMALL = 30  # all-reduces of one number
_LARGE = 4
_BYTES = {"gloo": 16 << 20, "nccl": 256 << 20}


def bootstrap() -> None:
    """Entry of the interpreter: argv[1] is the order as JSON.

    rank, size; backend: "gloo" or "nccl"; device: of this rank; address, port: of the store, which rank 0 opens (0: on
    a free port) and prints as the first line. The last line is what was measured, seconds and bytes a second.
    """
    die_with_parent(int(os.environ.pop("LAUNCH_STARTER_PID")))
    _measure(**json.loads(sys.argv[1]))


def _measure(*, rank: int, size: int, backend: str, device: int, address: str, port: int, within_s: float) -> None:
    import torch
    import torch.distributed as dist

    limit = datetime.timedelta(seconds=within_s)
    store = dist.TCPStore(  # type: ignore[attr-defined]  # torch's documentation imports it here
        address, port, None, is_master=rank == 0, timeout=limit, wait_for_workers=False
    )
    if rank == 0:
        _tell({"port": store.port})
    where = torch.device("cpu")
    if backend == "nccl":
        where = torch.device("cuda", device)
        torch.cuda.set_device(where)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
    small = torch.ones(1, device=where)
    large = torch.ones(_BYTES[backend] // 4, device=where)
    for data in (small, large):  # connections are made, buffers are touched
        dist.all_reduce(data)
        if float(data[-1]) != size:
            sys.exit(f"the all-reduce of ones over {size} ranks came to {float(data[-1])}")
        data.fill_(0)

    def seconds(data: torch.Tensor, times: int) -> float:
        dist.barrier()
        began = time.perf_counter()
        for _ in range(times):
            dist.all_reduce(data)
        if backend == "nccl":
            torch.cuda.synchronize()
        return (time.perf_counter() - began) / times

    quick, slow = seconds(small, _SMALL), seconds(large, _LARGE)
    dist.barrier()
    dist.destroy_process_group()
    # What each link carries: a ring moves 2 (n - 1) / n of the data over every one of them.
    _tell({"latency_s": quick, "rate": 2 * (size - 1) / size * _BYTES[backend] / slow, "bytes": _BYTES[backend]})


def _tell(message: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()
