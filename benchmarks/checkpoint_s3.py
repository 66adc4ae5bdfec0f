"""Save and load on an object store (moto's server, a process on loopback): ours beside DCP's FsspecWriter, in one run.

    python benchmarks/checkpoint_s3.py [--mib 256] [--rounds 3] [--json FILE]

The server is Python and shares the machine: what is compared is the client's work and the number of its requests. It
keeps the memory that it has had once, since the pages of fresh memory are half of its time otherwise.
The candidates take turns; quoted are minima in seconds.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
import urllib.request
import warnings

import torch
import torch.distributed.checkpoint as dcp
from facts import facts, tell

SERVER = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 0)
server.start()
print("PORT", server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


KEEPS_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40), "MALLOC_ARENA_MAX": "1"}


def timed(act) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mib", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    server = subprocess.Popen([sys.executable, "-W", "ignore", "-c", SERVER], stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                              env=os.environ | KEEPS_MEMORY)  # fmt: skip
    try:
        port = next(line for line in server.stdout if line.startswith("PORT")).split()[1]
        os.environ |= {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_ACCESS_KEY_ID": "x",
                       "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1"}  # fmt: skip
        urllib.request.urlopen(
            urllib.request.Request(f"http://127.0.0.1:{port}/bucket", method="PUT"), timeout=20
        ).close()
        report = facts() | measure(arguments.mib, arguments.rounds)
    finally:
        server.kill()
        server.wait()
    tell(report, arguments.json)


def measure(mib: int, rounds: int) -> dict:
    from trainer.checkpoint import Store

    try:
        from torch.distributed.checkpoint.fsspec_filesystem import FsspecReader, FsspecWriter
    except ImportError:  # torch before 2.13
        from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter
    tensors = {f"layer{i}": torch.randn(mib * 2**20 // 16 // 4096, 1024) for i in range(16)}
    times: dict[str, list[float]] = {}
    store = Store("s3://bucket/ours")
    for turn in range(rounds):
        times.setdefault("ours, save", []).append(timed(lambda t=turn: store.save(tensors, step=t, name=f"x{t}")))
        times.setdefault("ours, load, verified", []).append(timed(lambda t=turn: store.load(f"x{t}")))
        store.remove(f"x{turn}")
        where = f"s3://bucket/dcp{turn}"
        times.setdefault("dcp, save", []).append(
            timed(lambda w=where: dcp.save(tensors, storage_writer=FsspecWriter(w), no_dist=True))
        )
        into = {k: torch.empty_like(t) for k, t in tensors.items()}
        times.setdefault("dcp, load", []).append(
            timed(lambda w=where, i=into: dcp.load(i, storage_reader=FsspecReader(w), no_dist=True))
        )
        store.folder.fs.rm(f"bucket/dcp{turn}", recursive=True)
    store.close()
    best = {k: round(min(v), 3) for k, v in times.items()}
    return {
        "state": f"{mib} MiB in 16 tensors, {rounds} rounds",
        "seconds": best,
        "dcp / ours, save": round(best["dcp, save"] / best["ours, save"], 2),
        "dcp / ours, load": round(best["dcp, load"] / best["ours, load, verified"], 2),
    }


if __name__ == "__main__":
    main()
