"""How late an agent's signs of life come on a busy machine, which says how soon one that sends none may be given up.

    python benchmarks/liveness.py [--busy 8] [--seconds 60] [--json FILE]

The sender is a process of its own, as an agent is, whose main thread is busy in Python besides (console lines); the
other processes compute as hard as they can. A sign is sent every second; figures are the gaps between their arrivals.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import select
import statistics
import time
from typing import TYPE_CHECKING

from facts import facts, tell

from launcher.channel import pair
from launcher.pulse import Beating

if TYPE_CHECKING:
    from launcher.channel import Channel


def _agent(link: Channel) -> None:
    Beating(link)
    _compute()


def _compute() -> None:
    while True:
        sum(range(10_000))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--busy", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--json")
    o = parser.parse_args()
    context = multiprocessing.get_context("fork")
    ours, theirs = pair()
    running = [context.Process(target=_compute, daemon=True) for _ in range(o.busy)]
    running.append(context.Process(target=_agent, args=(theirs,), daemon=True))
    for process in running:
        process.start()
    came: list[float] = []
    end = time.monotonic() + o.seconds
    while (left := end - time.monotonic()) > 0:
        if select.select([ours], [], [], left)[0]:
            came += [time.monotonic() for message in ours.receive() if "beat" in message]
    for process in running:
        process.kill()
    gaps = [later - earlier for earlier, later in itertools.pairwise(came)]
    result = {
        "busy processes": o.busy,
        "cores": os.cpu_count(),
        "signs": len(came),
        "gap: median s": round(statistics.median(gaps), 3),
        "gap: longest s": round(max(gaps), 3),
    }
    tell({**facts(), "results": [result]}, o.json)


if __name__ == "__main__":
    main()
