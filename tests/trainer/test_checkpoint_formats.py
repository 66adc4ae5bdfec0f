"""Checkpoints of every release load for ever: `formats/` holds one of each format, which is never written anew."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from trainer.checkpoint import Store, load_file
from trainer.checkpoint.catalog import open_checkpoint
from trainer.checkpoint.contents import verify
from trainer.checkpoint.manifest import FORMAT
from trainer.checkpoint.seal import is_sealed

FORMATS = Path(__file__).parent / "formats"


def check(state: dict) -> None:
    assert list(state) == ["state_dict", "optimizer", "plain", "epoch"]
    weights = state["state_dict"]
    assert torch.equal(weights["w"], torch.arange(36864, dtype=torch.float16).reshape(192, 192).fmod(7))
    assert weights["b"].tolist() == [1.5, -2.0]
    assert weights["n"].item() == 3
    assert state["optimizer"][0]["step"].item() == 1.0
    assert state["optimizer"][1] == (1, 2, {3})
    assert repr(state["plain"]) == repr([None, True, 1.1, float("nan"), b"abc", 2**70])
    assert state["epoch"] == 2


def test_there_is_one_of_the_format_of_today():
    assert (FORMATS / f"store-{FORMAT}").is_dir()


@pytest.mark.parametrize("store", sorted(FORMATS.glob("store-*")), ids=lambda p: p.name)
def test_a_store_of_two_ranks(store, tmp_path):
    shutil.copytree(store, tmp_path / "store")
    manifest = Store(tmp_path / "store").newest()
    assert (manifest.name, manifest.step, manifest.world_size, manifest.extra) == ("step-7", 7, 2, {"loss": 0.5})
    loaded = Store(tmp_path / "store").load(manifest, orphans=True)
    check(loaded.state)
    assert [(s["rank"], s["own"].tolist()) for s in (loaded.rank_state, *loaded.orphans)] == [(0, [0, 0]), (1, [1, 1])]
    assert verify(open_checkpoint(tmp_path / "store")) == []


@pytest.mark.parametrize("file", sorted(FORMATS.glob("file-*.ckpt")), ids=lambda p: p.name)
def test_a_torch_file(file):
    assert is_sealed(memoryview(file.read_bytes()))
    state = load_file(file)
    assert state.pop("rank_state") == {"rank": 0}
    check(state)
