"""Save and load on an object store (moto's server, a process on loopback): ours beside DCP's FsspecWriter, in one run.

    python benchmarks/checkpoint_s3.py [--mib 256] [--rounds 3] [--json FILE]

The server is Python and shares the machine, so that its work bounds what any client can reach. `raw` are the same bytes
sent by http.client in one request, neither signed nor checked; the processor's seconds are told apart for the server
and for the client with its processes. The server keeps the memory that it has had once, since the pages of fresh memory
are half of its time otherwise. The candidates take turns; quoted are minima in seconds.
"""

from __future__ import annotations

import argparse
import http.client
import os
import subprocess
import sys
import time
import urllib.request
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed.checkpoint as dcp
from facts import facts, tell

if TYPE_CHECKING:
    from collections.abc import Callable

SERVER = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 0)
server.start()
print("PORT", server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""

SERVER_PID = 0
KEEPS_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40), "MALLOC_ARENA_MAX": "1"}


@dataclass
class Times:
    """Seconds of each candidate's turns: on the clock, and of the processor for the client and for the server."""

    server: int
    clock: dict[str, list[float]] = field(default_factory=dict)
    client_cpu: dict[str, list[float]] = field(default_factory=dict)
    server_cpu: dict[str, list[float]] = field(default_factory=dict)

    def of(self, name: str, act: Callable[[], object]) -> None:
        """Do it, and note what it took."""
        client, server = client_seconds(), processor_seconds(self.server)
        began = time.perf_counter()
        act()
        self.clock.setdefault(name, []).append(time.perf_counter() - began)
        self.client_cpu.setdefault(name, []).append(client_seconds() - client)
        self.server_cpu.setdefault(name, []).append(processor_seconds(self.server) - server)


def processor_seconds(pid: int | str) -> float:
    """What a process has used so far."""
    ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")


def client_seconds() -> float:
    """The same of this process and what it has started, but the server."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return processor_seconds("self") + sum(processor_seconds(pid) for pid in children if int(pid) != SERVER_PID)


def minima(seconds: dict[str, list[float]]) -> dict[str, float]:
    return {name: round(min(values), 3) for name, values in seconds.items()}


def main() -> None:
    global SERVER_PID
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mib", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    server = subprocess.Popen([sys.executable, "-W", "ignore", "-c", SERVER], stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                              env=os.environ | KEEPS_MEMORY)  # fmt: skip
    SERVER_PID = server.pid
    try:
        port = next(line for line in server.stdout if line.startswith("PORT")).split()[1]
        os.environ |= {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_ACCESS_KEY_ID": "x",
                       "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1"}  # fmt: skip
        urllib.request.urlopen(
            urllib.request.Request(f"http://127.0.0.1:{port}/bucket", method="PUT"), timeout=20
        ).close()
        report = facts() | measure(arguments.mib, arguments.rounds, int(port))
    finally:
        server.kill()
        server.wait()
    tell(report, arguments.json)


def put(port: int, body: memoryview) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port)
    # moto wants an identity, and does not check the signature.
    identity = "AWS4-HMAC-SHA256 Credential=x/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"
    connection.request("PUT", "/bucket/raw", body, {"Authorization": identity})
    assert connection.getresponse().status == 200
    connection.close()


def measure(mib: int, rounds: int, port: int) -> dict:
    from trainer.checkpoint import Store

    try:
        from torch.distributed.checkpoint.fsspec_filesystem import FsspecReader, FsspecWriter
    except ImportError:  # torch before 2.13
        from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter
    tensors = {f"layer{i}": torch.randn(mib * 2**20 // 16 // 4096, 1024) for i in range(16)}
    content = memoryview(os.urandom(mib << 20))
    times = Times(SERVER_PID)
    store = Store("s3://bucket/ours")
    for turn in range(rounds):
        times.of("raw", lambda: put(port, content))
        times.of("ours, save", lambda t=turn: store.save(tensors, step=t, name=f"x{t}"))
        times.of("ours, load, verified", lambda t=turn: store.load(f"x{t}"))
        store.remove(f"x{turn}")
        where = f"s3://bucket/dcp{turn}"
        times.of("dcp, save", lambda w=where: dcp.save(tensors, storage_writer=FsspecWriter(w), no_dist=True))
        into = {k: torch.empty_like(t) for k, t in tensors.items()}
        times.of("dcp, load", lambda w=where, i=into: dcp.load(i, storage_reader=FsspecReader(w), no_dist=True))
        store.folder.fs.rm(f"bucket/dcp{turn}", recursive=True)
    store.close()
    best = minima(times.clock)
    return {
        "state": f"{mib} MiB in 16 tensors, {rounds} rounds",
        "seconds": best,
        "processor seconds, client": minima(times.client_cpu),
        "processor seconds, server": minima(times.server_cpu),
        "dcp / ours, save": round(best["dcp, save"] / best["ours, save"], 2),
        "dcp / ours, load": round(best["dcp, load"] / best["ours, load, verified"], 2),
    }


if __name__ == "__main__":
    main()
