"""Command to exit, memory per rank, and death to all ranks met again: ours beside torchrun, in one run.

    python benchmarks/launch_time.py [--ranks 8] [--rounds 5] [--deaths 20] [--json FILE]

start    8 ranks, one all-reduce, wall time from command to exit: `launch`, `torchrun`, and the floor: one process that
         imports torch and forks 8 ranks, which end as interpreters do ("fork") or by os._exit ("fork, _exit": the
         lowest floor there is; our ranks run exit handlers and finalise the program's objects). They take turns, so a
         drift of the machine's speed hits all alike; quoted are the median ratios of the turns.
memory   PSS per rank while all ranks idle after an all-reduce (the kernel's smaps_rollup).
deaths   4 ranks, one is killed by SIGKILL after they met: nanoseconds from its death to the last rank having met again
         (clock: CLOCK_MONOTONIC of this machine, printed by the ranks). torchrun runs with its store unshared
         (TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1), without which it seldom comes back.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BIN = Path(sys.executable).parent
HELLO = """
import torch, torch.distributed as dist
dist.init_process_group("gloo")
one = torch.ones(1)
dist.all_reduce(one)
assert int(one) == dist.get_world_size()
dist.destroy_process_group()
"""
IDLE = """
import os, sys, torch, torch.distributed as dist
dist.init_process_group("gloo")
dist.all_reduce(torch.ones(1))
open(os.path.join(sys.argv[1], f"pid-{os.getpid()}"), "w").close()
import signal
signal.sigwait({signal.SIGTERM})
os._exit(0)
"""
DEATH = """
import os, signal, sys, time, torch, torch.distributed as dist
dist.init_process_group("gloo")
dist.all_reduce(torch.ones(1))
rank, attempt = dist.get_rank(), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
with open(os.path.join(sys.argv[1], f"met-{attempt}-{rank}"), "w") as file:
    file.write(str(time.monotonic_ns()))
if attempt == 0 and rank == 1:
    dist.barrier()
    with open(os.path.join(sys.argv[1], "died"), "w") as file:
        file.write(str(time.monotonic_ns()))
    os.kill(os.getpid(), signal.SIGKILL)
if attempt == 0:
    dist.barrier()
    dist.barrier()
dist.destroy_process_group()
"""
FORK = """
import os, sys
os.environ["OPENBLAS_NUM_THREADS"] = "1"
import socket, torch
n = int(sys.argv[2])
with socket.socket() as s:
    s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(n))
pids = []
for rank in range(n):
    pid = os.fork()
    if pid == 0:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
        exec(compile(open(sys.argv[1]).read(), sys.argv[1], "exec"), {"__name__": "__main__"})
        if sys.argv[3] == "fast":
            os._exit(0)
        sys.exit(0)
    pids.append(pid)
sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(p, 0)[1]) for p in pids))
"""


def launch(ranks, *rest):
    return [str(BIN / "launch"), "--procs", str(ranks), *rest]


def torchrun(ranks, *rest):
    return [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", str(ranks), *rest]


def wall(command, folder, **environment):
    began = time.perf_counter()
    done = subprocess.run(
        command, cwd=folder, env=os.environ | environment, capture_output=True, text=True, timeout=180
    )
    took = time.perf_counter() - began
    if done.returncode:
        sys.exit(f"{command} failed with {done.returncode}\n{done.stdout}\n{done.stderr}")
    return took


def wait_for(condition, what, timeout=120):
    deadline = time.monotonic() + timeout
    while not (found := condition()):
        if time.monotonic() > deadline:
            sys.exit(f"in vain: {what}")
        time.sleep(0.01)
    return found


def pss_mib(pid):
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1024
    raise OSError(pid)


def start_times(folder, ranks, rounds):
    (folder / "hello.py").write_text(HELLO)
    (folder / "fork.py").write_text(FORK)
    commands = {
        "launch": launch(ranks, "hello.py"),
        "torchrun": torchrun(ranks, "hello.py"),
        "fork": [sys.executable, "fork.py", "hello.py", str(ranks), "whole"],
        "fork, _exit": [sys.executable, "fork.py", "hello.py", str(ranks), "fast"],
    }
    times = {name: [] for name in commands}
    for turn in range(rounds + 1):
        for name, command in commands.items():
            took = wall(command, folder)
            if turn:  # the first fills the page cache
                times[name].append(took)
    ratio = {
        "launch/torchrun": statistics.median(a / b for a, b in zip(times["launch"], times["torchrun"], strict=True)),
        "launch/fork": statistics.median(a / b for a, b in zip(times["launch"], times["fork"], strict=True)),
        "launch/fork, _exit": statistics.median(
            a / b for a, b in zip(times["launch"], times["fork, _exit"], strict=True)
        ),
    }
    return {"seconds": {n: [round(t, 3) for t in v] for n, v in times.items()}, "median ratio": ratio}


def memory(folder, ranks):
    (folder / "idle.py").write_text(IDLE)
    result = {}
    for name, command in (("launch", launch(ranks)), ("torchrun", torchrun(ranks))):
        marks = folder / f"idle-{name}"
        marks.mkdir()
        process = subprocess.Popen([*command, "idle.py", str(marks)], cwd=folder, stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL)  # fmt: skip
        wait_for(lambda marks=marks: len(list(marks.iterdir())) == ranks, f"{ranks} idle ranks of {name}")
        pids = [int(p.name.removeprefix("pid-")) for p in marks.iterdir()]
        result[name] = round(statistics.mean(map(pss_mib, pids)), 1)
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    return {"PSS MiB per rank": result, "ratio": result["launch"] / result["torchrun"]}


def deaths(folder, times, ranks=4):
    (folder / "death.py").write_text(DEATH)
    result = {}
    for name, command, count in (
        ("launch", launch(ranks, "--max-restarts", "2"), times),
        ("torchrun", torchrun(ranks, "--max-restarts", "2"), max(2, times // 5)),
    ):
        took, back = [], 0
        for trial in range(count):
            marks = folder / f"death-{name}-{trial}"
            marks.mkdir()
            done = subprocess.run([*command, "death.py", str(marks)], cwd=folder, capture_output=True, timeout=180,
                                  env=os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"})  # fmt: skip
            met = [int(p.read_text()) for p in marks.glob("met-1-*")]
            if done.returncode == 0 and len(met) == ranks:
                back += 1
                took.append((max(met) - int((marks / "died").read_text())) / 1e9)
        result[name] = {
            "came back": f"{back} of {count}",
            "median s": round(statistics.median(took), 3),
            "worst s": round(max(took), 3),
        }
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--deaths", type=int, default=20)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for name in [n for n in os.environ if re.match("LAUNCH_|TORCHELASTIC_|PET_", n)]:
        del os.environ[name]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        results = {
            "commit": subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True,
                                     cwd=Path(__file__).parent).stdout.strip(),
            "machine": f"{os.cpu_count()} cores, {os.uname().machine}",
            "torch": __import__("torch").__version__,
            "start": start_times(folder, options.ranks, options.rounds),
            "memory": memory(folder, options.ranks),
            "deaths": deaths(folder, options.deaths),
        }  # fmt: skip
    print(json.dumps(results, indent=1))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
