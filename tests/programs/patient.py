"""Light ranks without torch that wait to be stopped, in a chosen way.

usage: patient.py HOW [...]   HOW, what SIGTERM does: leave75 | leave0 | default | ignore | slow (leave75 when the file
                              `go` is there)
options: --children N, each ignoring SIGTERM, one of them in its own session; --dataloader: children write `got-term` if
         they get SIGTERM; --log-stop: print what the stop record says when SIGTERM arrives
"""

import argparse
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("how")
parser.add_argument("--children", type=int, default=0)
parser.add_argument("--attempts", type=int, default=99)
options = parser.parse_args()
rank, attempt = os.environ["RANK"], os.environ["LAUNCH_ATTEMPT"]
run = Path(os.environ["LAUNCH_RUN_DIR"])


def worker(index: int) -> None:
    """As a loader's worker: SIGTERM that was meant for the rank must not reach it."""

    def got(number: int, frame: object) -> None:
        (run / f"worker-got-{number}-{rank}-{index}").touch()

    signal.signal(signal.SIGTERM, got)
    print(f"worker {index} of rank {rank} is ready", flush=True)
    while True:
        signal.pause()


def leave(code: int) -> None:
    stop = run / f"stop-{attempt}.json"
    what = json.loads(stop.read_text())["cause"] if stop.exists() else "no record"
    print(f"rank {rank} got SIGTERM ({what})", flush=True)
    os._exit(code)


def wait_and_leave(number: int, frame: object) -> None:
    print(f"rank {rank} saves", flush=True)
    while not Path("go").exists():
        time.sleep(0.01)
    leave(75)


handlers = {
    "leave75": lambda *_: leave(75),
    "leave0": lambda *_: leave(0),
    "default": signal.SIG_DFL,
    "ignore": signal.SIG_IGN,
    "slow": wait_and_leave,
}
if options.how in handlers:
    signal.signal(signal.SIGTERM, handlers[options.how])
for index in range(options.children):
    multiprocessing.get_context("fork").Process(target=worker, args=(index,), daemon=True).start()
if options.children:
    # Grandchildren that nobody would find by session or process group.
    stubborn = "trap '' TERM INT HUP; while :; do sleep 1000; done"
    subprocess.Popen(["sh", "-c", stubborn], start_new_session=True)
    subprocess.Popen(["sh", "-c", f'sh -c "{stubborn}" &'], start_new_session=True).wait()
print(f"rank {rank} is ready in attempt {attempt}, pid {os.getpid()}", flush=True)
if int(attempt) >= options.attempts:
    sys.exit(0)
while True:
    signal.pause()
