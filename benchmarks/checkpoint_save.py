"""Save and load of one process's state on a local disk: ours beside torch.save and torch's DCP, in one run.

    python benchmarks/checkpoint_save.py [--mib 1024] [--rounds 5] [--folder DIR] [--json FILE]

stall    seconds that training stands still for a save in the background: `Store.save(wait=False)` and
         `dcp.async_save` (its thread mode, with a stager that keeps its buffers; and its default), beside the floor:
         one copy of the state into warm buffers.
durable  seconds until it is on disk: `Store.save` in the background and at once, `dcp.save`, torch.save + fsync, and
         the floor: a raw write of the same bytes + fsync.
load     seconds to have it back: ours, every byte verified; `dcp.load` and torch.load, nothing verified. The page
         cache is warm for all.
inflation  a loop of small matrix products, on one thread, while nothing is written and while a save is: what the
         median and the 99th percentile of a step grow by. It says something about ours only where a core is free for
         the writer; how many were, beside the loop and before the saves, is told with it.
memory   what this process and the writer's hold more at the height of a save than before the first (proportional set
         size, so that shared pages count once), as a share of the state.

The candidates take turns; quoted are the minima in seconds, and each ratio twice: of the minima, and the median of
those within a round, which says more on a machine that others use too.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import psutil
import torch
import torch.distributed.checkpoint as dcp
from facts import facts, tell
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from trainer.checkpoint import Store, load_file, save_file
from trainer.checkpoint.background import Alone, Background

TENSORS = 64


def timed(act) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def raw_write(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    with open(path, "wb", buffering=0) as file:
        for tensor in tensors.values():
            view = memoryview(tensor.numpy()).cast("B")
            while view:
                view = view[file.write(view) :]
        os.fsync(file.fileno())


def torch_save(path: Path, state: dict) -> None:
    with open(path, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


def steps(seconds: float) -> list[float]:
    matrix, times = torch.randn(256, 256), []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        times.append(timed(lambda: [matrix @ matrix for _ in range(8)]))
    torch.set_num_threads(threads)
    return times


def idle_seconds() -> float:
    """Of all cores together, since the machine has started."""
    return psutil.cpu_times().idle


def held() -> int:
    """Bytes of memory of this process and its children, each shared page counted once.

    Memory files are counted where most of them is mapped: shares of their pages, read from one process after the
    other while the second one maps them, would count them twice.
    """
    own, files = 0, 0
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
        own += sum(int(kib) for kib in re.findall(r"^Pss_(?:Anon|File): +(\d+)", rollup, re.MULTILINE))
        status = Path(f"/proc/{process.pid}/status").read_text()
        files = max(files, *(int(kib) for kib in re.findall(r"^RssShmem:\s+(\d+)", status, re.MULTILINE)))
    return 1024 * (own + files)


def extra_memory(store: Store, tensors: dict[str, torch.Tensor]) -> int:
    before = most = held()
    saved = store.save(tensors, step=0, wait=False)
    while store.poll() is None:
        most = max(most, held())
    store.wait()
    store.remove(saved.name)
    return most - before


def inflation(calm: list[float], busy: list[float], free_cores: float) -> dict:
    report: dict = {"steps while quiet, while a save is written": [len(calm), len(busy)]}
    for name, q in (("median", 0.5), ("p99", 0.99)):
        quiet, written = (sorted(times)[int(len(times) * q)] for times in (calm, busy))
        report[f"{name}: ms while quiet, while a save is written, more in %"] = [
            round(1000 * quiet, 3), round(1000 * written, 3), round(100 * (written / quiet - 1), 1)
        ]  # fmt: skip
    report["cores free beside the loop"] = round(free_cores, 2)
    if free_cores < 0.9:
        report["note"] = "no core was free: the steps had to share theirs with the writer, whatever it is"
    return report


def ratios(times: dict[str, list[float]], one: str, other: str) -> list[float]:
    within = [a / b for a, b in zip(times[one], times[other], strict=True)]
    return [round(min(times[one]) / min(times[other]), 2), round(statistics.median(within), 2)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder")
    parser.add_argument("--json")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", module="torch")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        report = facts() | measure(Path(folder), arguments.mib, arguments.rounds)
    tell(report, arguments.json)


def measure(folder: Path, mib: int, rounds: int) -> dict:
    rows = mib * 2**20 // TENSORS // 4096
    tensors = {f"layer{i}": torch.randn(rows, 1024) for i in range(TENSORS)}
    warm = [torch.empty_like(t) for t in tensors.values()]
    for buffer, tensor in zip(warm, tensors.values(), strict=True):
        buffer.copy_(tensor)
    stall: dict[str, list[float]] = {}
    durable: dict[str, list[float]] = {}
    load: dict[str, list[float]] = {}
    stager = DefaultStager(StagingOptions(False, False, False, False))
    background = Background(Alone())
    store = Store(str(folder / "ours"), background=background)
    calm, busy, free = [], [], []
    extra = extra_memory(store, tensors)
    for turn in range(rounds + 1):  # the first warms every candidate up, and does not count
        for which in (stall, durable, load):
            if turn == 1:
                which.clear()
        stall.setdefault("one copy", []).append(
            timed(lambda: [b.copy_(t) for b, t in zip(warm, tensors.values(), strict=True)])
        )
        durable.setdefault("raw write + fsync", []).append(timed(lambda: raw_write(folder / "raw", tensors)))
        (folder / "raw").unlink()

        began = time.perf_counter()
        saved = store.save(tensors, step=turn, wait=False)
        stall.setdefault("ours", []).append(time.perf_counter() - began)
        store.wait()
        durable.setdefault("ours, background", []).append(time.perf_counter() - began)
        load.setdefault("ours, verified", []).append(timed(lambda s=saved: store.load(s.name)))
        store.remove(saved.name)
        began = time.perf_counter()
        save_file(tensors, folder / "file.ckpt", background=background, wait=False)
        stall.setdefault("ours, one file", []).append(time.perf_counter() - began)
        background.wait()
        durable.setdefault("ours, one file", []).append(time.perf_counter() - began)
        load.setdefault("ours, one file, verified", []).append(timed(lambda: load_file(folder / "file.ckpt")))
        (folder / "file.ckpt").unlink()
        saved = store.save(tensors, step=turn)
        durable.setdefault("ours, at once", []).append(saved.seconds)
        store.remove(saved.name)

        for name, stage in (("dcp.async_save, default", None), ("dcp.async_save, buffers kept", stager)):
            began = time.perf_counter()
            future = dcp.async_save(tensors, checkpoint_id=folder / "async", async_stager=stage, no_dist=True)
            stall.setdefault(name, []).append(time.perf_counter() - began)
            future.result()
            durable.setdefault(name, []).append(time.perf_counter() - began)
            shutil.rmtree(folder / "async")
        durable.setdefault("dcp.save", []).append(
            timed(lambda: dcp.save(tensors, checkpoint_id=folder / "dcp", no_dist=True))
        )
        empty = {k: torch.empty_like(t) for k, t in tensors.items()}
        load.setdefault("dcp.load", []).append(
            timed(lambda e=empty: dcp.load(e, checkpoint_id=folder / "dcp", no_dist=True))
        )
        shutil.rmtree(folder / "dcp")
        durable.setdefault("torch.save + fsync", []).append(timed(lambda: torch_save(folder / "one", tensors)))
        load.setdefault("torch.load", []).append(timed(lambda: torch.load(folder / "one", weights_only=True)))
        (folder / "one").unlink()

        idle, began = idle_seconds(), time.perf_counter()
        calm += steps(0.5)
        free.append((idle_seconds() - idle) / (time.perf_counter() - began))
        saved = store.save(tensors, step=turn, wait=False)
        while store.poll() is None:
            busy += steps(0.02)
        store.wait()
        store.remove(saved.name)
    background.close()
    stager.close()
    best = {kind: {k: round(min(v), 4) for k, v in found.items()} for kind, found in
            (("stall", stall), ("durable", durable), ("load", load))}  # fmt: skip
    return {
        "state": f"{mib} MiB in {TENSORS} tensors, {rounds} rounds, minima in seconds",
        **best,
        "ratios: of minima, median within a round": {
            "stall: ours / one copy": ratios(stall, "ours", "one copy"),
            "stall: ours, one file / one copy": ratios(stall, "ours, one file", "one copy"),
            "stall: ours / dcp.async_save, default": ratios(stall, "ours", "dcp.async_save, default"),
            "stall: ours / dcp.async_save, buffers kept": ratios(stall, "ours", "dcp.async_save, buffers kept"),
            "durable: ours, background / raw": ratios(durable, "ours, background", "raw write + fsync"),
            "durable: ours, one file / raw": ratios(durable, "ours, one file", "raw write + fsync"),
            "load: ours, verified / dcp.load": ratios(load, "ours, verified", "dcp.load"),
            "load: ours, one file, verified / torch.load": ratios(load, "ours, one file, verified", "torch.load"),
        },
        "inflation of a step": inflation(calm, busy, statistics.median(free)),
        "extra memory of a save / state": round(extra / (mib * 2**20), 3),
    }


if __name__ == "__main__":
    main()
