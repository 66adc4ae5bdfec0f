"""Meet, then one rank ends in a chosen way (in the chosen attempts) while the others wait for it in a collective.

usage: crash.py HOW [--rank R] [--attempts N]     HOW: raise | exit3 | exit0 | kill | segv | oom | hang | ignore-term
"""

import argparse
import ctypes
import os
import resource
import signal
import sys
import time

import torch
import torch.distributed as dist

parser = argparse.ArgumentParser()
parser.add_argument("how")
parser.add_argument("--rank", type=int, default=1)
parser.add_argument("--attempts", type=int, default=1)
options = parser.parse_args()

dist.init_process_group("gloo")
dist.all_reduce(torch.ones(1))
rank, attempt = dist.get_rank(), int(os.environ.get("LAUNCH_ATTEMPT", "0"))
print(f"rank {rank} met its peers in attempt {attempt} at {time.monotonic_ns()}", flush=True)


def fail_on_purpose(how: str) -> None:
    if how == "raise":
        raise ValueError("no such label: 17")
    if how == "exit3":
        sys.exit(3)
    if how == "exit0":
        sys.exit(0)
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "segv":
        ctypes.string_at(0)
    if how == "oom":
        resource.setrlimit(resource.RLIMIT_AS, (1 << 33, 1 << 33))
        bytearray(1 << 34)
    if how == "hang":
        signal.pause()
    if how == "ignore-term":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while True:
            signal.pause()


if rank == options.rank and attempt < options.attempts:
    fail_on_purpose(options.how)
dist.all_reduce(torch.ones(1))
print(f"rank {rank} is done", flush=True)
dist.destroy_process_group()
