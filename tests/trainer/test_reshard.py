"""From any strategy and number of ranks to any other: the same state to the bit, and losses as of one process."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from trainer.checkpoint.__main__ import main as ckpt

WAYS = [("single", 1), ("ddp", 2), ("fsdp", 2), ("hsdp", 2), ("ddp", 4), ("fsdp", 4), ("hsdp", 4)]
# Losses are means of the ranks' means, summed in another order than one process does; AdamW amplifies the last bit.
BOUND = 2e-6


def names(way):
    return f"{way[0]}{way[1]}"


def run(gang, tmp_path, sources, targets):
    folders, losses = [], []
    for way in sources:
        folder = tmp_path / names(way)
        folder.mkdir()
        ranks = gang.ok(way[1], "reshard.py", "save", way[0], str(folder), timeout=100)
        losses.append([float(loss) for loss in ranks[0].stdout.split()])
        folders.append(str(folder))
        # What is exported has the weights that all ranks had.
        weights = f"{folder}/weights.safetensors"
        assert ckpt(["export", f"{folder}/saved.ckpt", weights, "--only", "state_dict.*"]) == 0
        exported = {k.removeprefix("state_dict."): v for k, v in load_file(weights).items()}
        expected = torch.load(f"{folder}/expected.pt")
        assert exported.keys() == {name for name in expected if ": " not in name}
        assert all(torch.equal(value, expected[name]) for name, value in exported.items())
    for way in targets:
        ranks = gang.ok(way[1], "reshard.py", "load", way[0], *folders, timeout=100)
        losses += [[float(loss) for loss in line.split()] for line in ranks[0].stdout.splitlines()]
    assert len(losses) == len(sources) + len(sources) * len(targets)
    for found in losses:
        torch.testing.assert_close(torch.tensor(found), torch.tensor(losses[0]), rtol=BOUND, atol=BOUND)


@pytest.mark.slow
def test_from_some_to_some(gang, tmp_path):
    run(gang, tmp_path, [("single", 1), ("fsdp", 2)], [("single", 1), ("ddp", 2)])


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_from_every_to_every(gang, tmp_path):
    run(gang, tmp_path, WAYS, WAYS)
