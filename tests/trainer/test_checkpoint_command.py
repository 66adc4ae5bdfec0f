"""`python -m trainer.checkpoint`, and loading parts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from trainer.checkpoint import Store, load_tensors, save_file
from trainer.checkpoint.__main__ import main
from trainer.checkpoint.catalog import open_checkpoint
from trainer.errors import CheckpointError


def state(step: int) -> dict:
    return {
        "state_dict": {"encoder.w": torch.full((4, 3), float(step)), "head.b": torch.ones(2)},
        "optimizer": [torch.zeros(5)],
        "epoch": step,
        "name": "x",
    }


@pytest.fixture
def url(tmp_path):
    store = Store(str(tmp_path / "store"))
    for step in (1, 2):
        store.save(state(step), step=step, name=f"s{step}", extra={"loss": 0.25})
    return str(tmp_path / "store")


def test_ls_show_and_verify(url, capsys):
    assert main(["ls", url]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines] == ["s2", "s1"]
    assert main(["show", f"{url}/s2"]) == 0
    shown = capsys.readouterr().out
    assert "state_dict.encoder.w  F32 [4, 3]  rank 0" in shown
    assert "epoch = 2" in shown
    assert '{"loss": 0.25}' in shown
    assert main(["verify", f"{url}/s2"]) == 0
    shard = Path(open_checkpoint(f"{url}/s2").folder.path) / "rank-00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert main(["verify", f"{url}/s2"]) == 1
    assert "rank-00000.safetensors is damaged" in capsys.readouterr().out
    assert main(["ls", f"{url}/nowhere"]) == 2
    assert "nothing at" in capsys.readouterr().err


def test_diff_names_what_differs(url, capsys):
    assert main(["diff", f"{url}/s1", f"{url}/s1"]) == 0
    capsys.readouterr()
    assert main(["diff", f"{url}/s1", f"{url}/s2"]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "epoch: 1 and 2",
        "state_dict.encoder.w: 12 of 12 elements differ, at most by 1",
    ]


def test_export_to_every_format(url, tmp_path, capsys):
    import torch.distributed.checkpoint as dcp

    wanted = state(2)["state_dict"]
    one = tmp_path / "x.safetensors"
    assert main(["export", f"{url}/s2", str(one), "--only", "state_dict.*"]) == 0
    loaded = safetensors.torch.load_file(one)
    assert {k.removeprefix("state_dict."): t.tolist() for k, t in loaded.items()} == {
        k: t.tolist() for k, t in wanted.items()
    }
    assert main(["export", f"{url}/s2", str(one)]) == 2
    assert "nothing is written over" in capsys.readouterr().err
    assert main(["export", f"{url}/s2", str(tmp_path / "x.ckpt"), "--to", "torch"]) == 0
    assert torch.load(tmp_path / "x.ckpt", weights_only=True)["epoch"] == 2
    assert main(["export", f"{url}/s2", str(tmp_path / "dcp"), "--to", "dcp"]) == 0
    into = {"state_dict.encoder.w": torch.zeros(4, 3)}
    dcp.load(into, checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert torch.equal(into["state_dict.encoder.w"], wanted["encoder.w"])


def test_consolidate_and_gc(url, tmp_path, capsys):
    other = str(tmp_path / "other")
    assert main(["consolidate", f"{url}/s2", other]) == 0
    assert Store(other).load("s2").state["epoch"] == 2
    assert main(["consolidate", f"{url}/s2", other]) == 2
    capsys.readouterr()
    dead = Path(url) / "s9" / "00000000000001abcdef"
    dead.mkdir(parents=True)
    (dead / "rank-00000.safetensors").write_bytes(b"x")
    assert main(["gc", url, "--last", "1", "--dry-run"]) == 0
    assert dead.exists()
    assert "s1" in capsys.readouterr().out
    assert main(["gc", url, "--last", "1"]) == 0
    assert not dead.parent.exists()
    assert [m.name for m in Store(url).list()] == ["s2"]


def test_the_module_runs_as_a_program(url):
    done = subprocess.run([sys.executable, "-m", "trainer.checkpoint", "ls", url], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "s2" in done.stdout


def test_parts_are_loaded_by_pattern_and_renamed_from_any_format(url, tmp_path):
    save_file(state(2), tmp_path / "x.ckpt")
    flat = {"state_dict.encoder.w": state(2)["state_dict"]["encoder.w"], "other": torch.zeros(1)}
    safetensors.torch.save_file(flat, tmp_path / "x.safetensors")
    for path in (f"{url}/s2", tmp_path / "x.ckpt", tmp_path / "x.safetensors"):
        loaded = load_tensors(path, only="state_dict.encoder.*", rename={r"^state_dict\.encoder": "body"})
        assert list(loaded) == ["body.w"]
        assert torch.equal(loaded["body.w"], torch.full((4, 3), 2.0))
    with pytest.raises(CheckpointError, match="no tensor whose key matches 'nothing'"):
        load_tensors(f"{url}/s2", only="nothing")
    with pytest.raises(CheckpointError, match="makes two tensors 'w'"):
        load_tensors(f"{url}/s2", rename={"^.*$": "w"})
