"""Planning a checkpoint of very many ranks, simulated on one core: ours, and torch's DCP planner on a smaller case.

    python benchmarks/checkpoint_plan.py [--ranks 1024] [--tensors 1000] [--dcp-ranks 64] [--json FILE]

Every rank holds one shard of each of `tensors` tensors. Ours: the work of one rank to lay out its shard, of rank 0 to
commit, and of a rank to plan its reads of a checkpoint by `ranks` ranks for half as many. DCP: the coordinator's
`create_global_plan` for `dcp-ranks` ranks; its cost grows at least with their number.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from facts import facts, tell

from trainer.checkpoint.catalog import Checkpoint
from trainer.checkpoint.contents import read_contents
from trainer.checkpoint.folder import Folder
from trainer.checkpoint.manifest import MANIFEST, Manifest, Piece, Record, new_attempt
from trainer.checkpoint.plan import Part
from trainer.checkpoint.reader import Reading
from trainer.checkpoint.shards import lay_out
from trainer.checkpoint.writing import commit

ROWS = 4  # of each tensor on each rank, 8 bytes wide


def record(rank: int, ranks: int, tensors: int) -> Record:
    pieces = tuple(
        Piece(
            f"model.layers.{i}.weight", "F32", (ROWS * ranks, 2), (ROWS * rank, 0), (ROWS, 2), 64 + 32 * i, 96 + 32 * i
        )
        for i in range(tensors)
    )
    return Record(rank, pieces, (), 0, (), None, {})


def ours(folder: Folder, ranks: int, tensors: int) -> dict[str, float]:
    data = torch.zeros(ROWS, 2)
    times = {}
    began = time.perf_counter()
    lay_out([[Part(f"model.layers.{i}.weight", (ROWS * ranks, 2), (0, 0), (ROWS, 2), data) for i in range(tensors)]])
    times["one rank lays out its shard"] = time.perf_counter() - began
    folder.make()
    for rank in range(ranks):
        Path(f"{folder.path}/rank-{rank:05d}.jsonl").write_bytes(record(rank, ranks, tensors).dump())
    began = time.perf_counter()
    manifest = commit(folder, Manifest("x", folder.name, 1, ranks, (), 0.0), 1.0, {})
    times["rank 0 commits"] = time.perf_counter() - began
    began = time.perf_counter()
    contents = read_contents(Checkpoint(folder, manifest))
    times["a rank reads all records"] = time.perf_counter() - began
    began = time.perf_counter()
    reading = Reading(contents)
    for i in range(tensors):
        reading.box(f"model.layers.{i}.weight", (2 * ROWS, 0), (2 * ROWS, 2))
    times["a rank plans its reads"] = time.perf_counter() - began
    times["manifest, bytes"] = float(folder.sizes()[MANIFEST])
    return times


def dcp(ranks: int, tensors: int) -> float:
    from torch.distributed.checkpoint import DefaultSavePlanner
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
    from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

    def item(rank: int, i: int) -> WriteItem:
        offset, size = torch.Size((ROWS * rank, 0)), torch.Size((ROWS, 2))
        data = TensorWriteData(ChunkStorageMetadata(offset, size), TensorProperties(), torch.Size((ROWS * ranks, 2)))
        return WriteItem(MetadataIndex(f"model.layers.{i}.weight", offset), WriteItemType.SHARD, tensor_data=data)

    plans = [SavePlan([item(rank, i) for i in range(tensors)], planner_data={}) for rank in range(ranks)]
    planner = DefaultSavePlanner()
    planner.set_up_planner({}, is_coordinator=True)
    began = time.perf_counter()
    planner.create_global_plan(plans)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=1024)
    parser.add_argument("--tensors", type=int, default=1000)
    parser.add_argument("--dcp-ranks", type=int, default=64)
    parser.add_argument("--json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        times = ours(Folder.at(folder) / "x" / new_attempt(), arguments.ranks, arguments.tensors)
    report = facts() | {
        "ranks": arguments.ranks,
        "tensors": arguments.tensors,
        "ours, seconds": {k: round(v, 3) for k, v in times.items()},
        f"dcp create_global_plan for {arguments.dcp_ranks} ranks, seconds": round(
            dcp(arguments.dcp_ranks, arguments.tensors), 3
        ),
    }
    tell(report, arguments.json)


if __name__ == "__main__":
    main()
