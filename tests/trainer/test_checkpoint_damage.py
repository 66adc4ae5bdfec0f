"""Every damage to the files of a checkpoint is found, named, and gone round."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest
import torch

from tests.soak.table import keep
from trainer.checkpoint import Store, load_file, save_file
from trainer.checkpoint.catalog import open_checkpoint
from trainer.checkpoint.contents import verify
from trainer.errors import CheckpointDamagedError


def state(step: int, size: int = 5000) -> dict:
    generator = torch.Generator().manual_seed(step)
    return {"w": torch.randn(size, generator=generator), "n": {"b": torch.full((3,), float(step))}, "step": step}


def files_of(url: str, step: int) -> list[Path]:
    return sorted(Path(open_checkpoint(f"{url}/step-{step:012d}").folder.path).iterdir())


@pytest.mark.parametrize("stride", [211, pytest.param(1, marks=[pytest.mark.soak, pytest.mark.timeout(1500)])])
def test_every_flipped_bit_of_a_torch_file_is_found(stride, tmp_path):
    began = time.monotonic()
    path = tmp_path / "x.ckpt"
    save_file(state(1, 700), path)
    content = path.read_bytes()
    places = sorted({*range(0, len(content), stride), *range(len(content) - 110, len(content), 3)})
    for place in places:
        flipped = bytearray(content)
        flipped[place] ^= 1 << (place % 8)
        path.write_bytes(flipped)
        with pytest.raises(CheckpointDamagedError):
            load_file(path)
    for length in (0, 1, 100, len(content) // 2, len(content) - 100, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointDamagedError):
            load_file(path)
    if stride == 1:
        keep("damage", "one file: a bit of every byte flipped", time.monotonic() - began, found=len(places),
             tried=len(places))  # fmt: skip


@pytest.fixture
def url(tmp_path):
    store = Store(str(tmp_path / "store"))
    store.save(state(1), step=1)
    store.save(state(2), step=2, rank_state={"own": torch.arange(7)})
    return str(tmp_path / "store")


def falls_back(url: str) -> None:
    """The damaged one is passed over, with its file named, and never given out."""
    store = Store(url)
    if store.newest().step == 2:
        with pytest.raises(CheckpointDamagedError, match="rank-00000"):
            store.load(store.newest())
        with pytest.warns(UserWarning, match="rank-00000.*set aside"):
            loaded = store.load_newest()
    else:
        with pytest.warns(UserWarning, match=r"manifest of .*step-0+2/.* is damaged"):
            loaded = store.load_newest()
    assert loaded.state["step"] == 1
    assert torch.equal(loaded.state["w"], state(1)["w"])
    assert store.newest().step == 1


def repair(url: str, path: Path, content: bytes) -> None:
    path.write_bytes(content)
    note = path.parent / "damaged.json"
    note.unlink(missing_ok=True)
    assert Store(url).newest().step == 2


@pytest.mark.parametrize("stride", [997, pytest.param(1, marks=[pytest.mark.soak, pytest.mark.timeout(1500)])])
def test_every_flipped_bit_is_found(url, stride):
    began, tried = time.monotonic(), 0
    for path in files_of(url, 2):
        content = path.read_bytes()
        # Every byte of the first line of a record and of a header, then every `stride`th.
        places = sorted({*range(0, len(content), stride), *range(0, min(len(content), 200), 13), len(content) - 1})
        for place in places:
            flipped = bytearray(content)
            flipped[place] ^= 1 << (place % 8)
            path.write_bytes(flipped)
            store = Store(url)
            newest = store.newest()
            if newest.step == 2:
                with pytest.raises(CheckpointDamagedError):
                    store.load(newest)
                assert verify(open_checkpoint(f"{url}/step-{2:012d}"))
            tried += 1
        falls_back(url)
        repair(url, path, content)
    assert tried > 60
    if stride == 1:
        keep("damage", "a store: a bit of every byte flipped", time.monotonic() - began, found=tried, tried=tried)


def test_a_file_cut_off_or_missing_is_found(url):
    for path in files_of(url, 2):
        content = path.read_bytes()
        for length in (0, 1, 7, len(content) // 2, len(content) - 1):
            path.write_bytes(content[:length])
            falls_back(url)
            repair(url, path, content)
        path.unlink()
        if path.name == "manifest.json":  # without it there is no checkpoint: a save that died looks the same
            assert Store(url).load_newest().state["step"] == 1
        else:
            falls_back(url)
        repair(url, path, content)


def test_files_swapped_between_two_checkpoints_are_found(url):
    for mine, other in zip(files_of(url, 2), files_of(url, 1), strict=True):
        content, foreign = mine.read_bytes(), other.read_bytes()
        if mine.name == "manifest.json":
            continue
        mine.write_bytes(foreign)
        falls_back(url)
        repair(url, mine, content)


@pytest.mark.parametrize("kind", ["safetensors", "jsonl"])
def test_files_swapped_between_two_ranks_are_found(kind, tmp_path):
    shutil.copytree(Path(__file__).parent / "formats" / "store-1", tmp_path / "store")
    folder = Path(open_checkpoint(tmp_path / "store").folder.path)
    files = [folder / f"rank-0000{rank}.{kind}" for rank in (0, 1)]
    contents = [file.read_bytes() for file in files]
    for file, content in zip(files, reversed(contents), strict=True):
        file.write_bytes(content)
    with pytest.raises(CheckpointDamagedError, match=r"rank-0000[01]\."):
        Store(tmp_path / "store").load("step-7")
    assert len(verify(open_checkpoint(tmp_path / "store"))) == 2


def test_a_manifest_of_another_checkpoint_confirms_nothing(url):
    mine, other = (open_checkpoint(f"{url}/step-{s:012d}").folder.path for s in (2, 1))
    shutil.copy(f"{other}/manifest.json", f"{mine}/manifest.json")
    store = Store(url)
    with pytest.warns(UserWarning, match=r"rank-00000.*set aside"):
        assert store.load_newest().state["step"] == 1


def test_if_nothing_is_whole_that_is_an_error_and_not_a_new_start(url):
    for step in (1, 2):
        os.truncate(files_of(url, step)[-1], 50)
    nothing = pytest.raises(CheckpointDamagedError, match=r"No checkpoint in .* is whole")
    with pytest.warns(UserWarning, match="set aside"), nothing:
        Store(url).load_newest()
    # A second look does not forget that there was something.
    with pytest.raises(CheckpointDamagedError, match=r"No checkpoint in .* is whole"):
        Store(url).load_newest()
