"""What ranks that print without end cost: every line into its file, those of shown ranks through the console filter.

    python benchmarks/log_load.py [--ranks 64] [--rate 10] [--seconds 3] [--show 0,1] [--folder /dev/shm] [--json FILE]

Each rank writes numbered lines of 1 KiB at `rate` MB/s (0: as fast as it can) until it has written rate * seconds, or
`--mb`. Afterwards every line of every file, and every line on the console, is compared with what was written: lost or
torn ones are counted, and any makes the exit code 1. What is quoted of processor time is the agent's alone (all its
threads, /proc/PID/task/*/schedstat), as a share of one core while the ranks were writing.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from facts import facts, tell

from launcher.processes import children_of

LAUNCH = Path(sys.executable).with_name("launch")
LINE, BLOCK = 1024, 64
FLOOD = f"""
import os, sys, time
rank, blocks, rate = int(os.environ["RANK"]), int(sys.argv[1]), float(sys.argv[2])
line = b"%d %%012d " % rank
template = (line + b"x" * ({LINE} - len(line % 0) - 1) + b"\\n") * {BLOCK}
began = time.monotonic()
for block in range(blocks):
    view = memoryview(template % tuple(range(block * {BLOCK}, (block + 1) * {BLOCK})))
    while view:
        view = view[os.write(1, view):]
    if rate and (ahead := (block + 1) * {LINE * BLOCK} / rate - (time.monotonic() - began)) > 0:
        time.sleep(ahead)
with open(os.path.join(os.environ["LAUNCH_RUN_DIR"], "wrote-%d" % rank), "w") as file:
    file.write(repr(time.monotonic() - began))
"""


def processor_s(pid: int) -> float:
    tasks = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(task.read_text().split()[0]) for task in tasks) / 1e9


def check(lines: list[bytes], rank: int, count: int) -> int:
    """How many of a rank's lines are not there as they were written, in order."""
    head = b"%d " % rank
    wrong = abs(len(lines) - count)
    for number, line in enumerate(lines):
        if len(line) != LINE - 1 or line[: len(head) + 13] != head + b"%012d " % number:
            wrong += 1
    return wrong


def measure(folder: Path, ranks: int, blocks: int, rate: float, show: str) -> dict:
    (folder / "flood.py").write_text(FLOOD)
    words = [LAUNCH, "--procs", str(ranks), "--preload", "json", "--show-ranks", show, "--run", "job", "flood.py",
             str(blocks), str(rate)]  # fmt: skip
    console: list[bytes] = []
    with subprocess.Popen(words, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        reader = threading.Thread(target=lambda: console.extend(process.stdout))
        reader.start()
        logs = folder / "runs" / "job" / "logs" / "attempt-0"
        used = at = end = last = 0.0
        while process.poll() is None:
            agents = children_of(process.pid)
            if agents and not at and len(list(logs.glob("rank-*.log"))) == ranks:
                at, used = time.monotonic(), processor_s(agents[0])
            if agents and at and not list(folder.glob(f"runs/job/wrote-{ranks - 1}")):
                end, last = time.monotonic(), processor_s(agents[0])
            time.sleep(0.02)
        reader.join()
        assert process.returncode == 0, process.returncode
    lost = sum(
        check((logs / f"rank-{rank}.log").read_bytes().split(b"\n")[:-1], rank, blocks * BLOCK) for rank in range(ranks)
    )
    shown = {int(text) for text in show.split(",")} if show not in ("none", "all") else set(range(ranks))
    shown = set() if show == "none" else shown
    by_rank: dict[int, list[bytes]] = {rank: [] for rank in shown}
    strange = 0
    for line in console:
        head, _, rest = line.partition(b"] ")
        rank = int(head[1:]) if head[1:].isdigit() else -1
        if rank in by_rank:
            by_rank[rank].append(rest[:-1])
        else:
            strange += 1
    lost_shown = strange + sum(check(lines, rank, blocks * BLOCK) for rank, lines in by_rank.items())
    seconds = max(float((folder / f"runs/job/wrote-{rank}").read_text()) for rank in range(ranks))
    total = ranks * blocks * BLOCK * LINE / 1e6
    return {
        "ranks": ranks,
        "asked: MB/s per rank": rate / 1e6 or "all it can",
        "reached: MB/s per rank": round(total / ranks / seconds, 2),
        "reached: MB/s in all": round(total / seconds, 1),
        "written: MB": round(total),
        "shown on the console: ranks": len(shown),
        "lines lost or torn: files": lost,
        "lines lost or torn: console": lost_shown,
        "agent: share of a core": round((last - used) / max(end - at, 1e-9), 3),
        "agent: processor s per GB": round((last - used) / (total / 1e3) * seconds / max(end - at, 1e-9), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, default=64)
    parser.add_argument("--rate", type=float, default=10, help="MB/s of each rank; 0: as fast as it can")
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--mb", type=float, help="of each rank, in place of --seconds")
    parser.add_argument("--show", default="0,1", help="ranks on the console")
    parser.add_argument("--folder", default="/dev/shm", help="where the run goes: memory, so that no disk is measured")
    parser.add_argument("--json")
    o = parser.parse_args()
    amount = o.mb if o.mb is not None else o.rate * o.seconds
    blocks = max(1, round(amount * 1e6 / (LINE * BLOCK)))
    with tempfile.TemporaryDirectory(dir=o.folder) as folder:
        result = measure(Path(folder), o.ranks, blocks, o.rate * 1e6, o.show)
    tell({**facts(), "result": result}, o.json)
    sys.exit(int(result["lines lost or torn: files"] + result["lines lost or torn: console"] > 0))


if __name__ == "__main__":
    main()
