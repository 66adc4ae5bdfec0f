"""`python -m trainer.checkpoint`, and loading parts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from trainer import Module
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
    for command in ("ls", "gc"):
        assert main([command, f"{url}/nowhere"]) == 2
        assert "nothing at" in capsys.readouterr().err
        assert main([command, "s3x://bucket"]) == 2
        assert "s3x://bucket is neither a path nor a URL that fsspec can open" in capsys.readouterr().err


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


def flip_the_last_byte(url: str) -> Path:
    """Damage the shard of a checkpoint; returns its folder."""
    folder = Path(open_checkpoint(url).folder.path)
    shard = folder / "rank-00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    return folder


def test_gc_removes_nothing_older_if_nothing_newer_is_whole(url, capsys):
    flip_the_last_byte(f"{url}/s2")
    assert main(["gc", url, "--last", "1"]) == 1
    assert "not one is whole" in capsys.readouterr().out
    assert [m.name for m in Store(url).list()] == ["s2", "s1"]


def test_what_was_set_aside_is_named_checked_and_removed(url, capsys):
    folder = flip_the_last_byte(f"{url}/s2")
    with pytest.warns(UserWarning, match="set aside"):
        Store(url).load_newest()
    assert main(["show", f"{url}/s2"]) == 2
    assert "was set aside: " in capsys.readouterr().err
    assert main(["verify", f"{url}/s2"]) == 1
    said = capsys.readouterr().out
    assert "remove damaged.json" in said
    assert "rank-00000.safetensors is damaged" in said
    assert main(["gc", url, "--damaged", "--dry-run"]) == 0
    assert folder.exists()
    assert main(["gc", url, "--damaged"]) == 0
    assert not folder.exists()
    assert [m.name for m in Store(url).list()] == ["s1"]


@pytest.mark.parametrize("name", ["foreign.pt", "foreign.safetensors"])
def test_a_file_without_a_checksum_is_not_called_whole(name, tmp_path, capsys):
    save = torch.save if name.endswith(".pt") else safetensors.torch.save_file
    save({"w": torch.ones(3)}, tmp_path / name)
    assert main(["verify", str(tmp_path / name)]) == 0
    assert "no checksum of ours" in capsys.readouterr().out
    assert main(["show", str(tmp_path / name)]) == 0
    assert "w  torch.float32 [3]" in capsys.readouterr().out
    os.truncate(tmp_path / name, 60)
    assert main(["verify", str(tmp_path / name)]) == 1


def test_launch_starts_it_as_a_program(url):
    launch = Path(sys.executable).parent / "launch"
    done = subprocess.run([launch, "ckpt", "ls", url], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "s2" in done.stdout


def test_every_command_on_a_torch_file(url, tmp_path, capsys):
    """What one process writes: a file in a folder of them."""
    one, other = tmp_path / "runs" / "s1.ckpt", tmp_path / "runs" / "s2.ckpt"
    save_file(state(1), one)
    save_file(state(2), other)
    assert main(["ls", str(one.parent)]) == 0
    assert [line.split()[-1] for line in capsys.readouterr().out.splitlines()] == ["s1.ckpt", "s2.ckpt"]
    assert main(["show", str(one)]) == 0
    assert "state_dict.encoder.w  torch.float32 [4, 3]" in capsys.readouterr().out
    assert main(["diff", str(one), str(other)]) == 1
    assert "state_dict.encoder.w: 12 of 12 elements differ" in capsys.readouterr().out
    assert main(["diff", str(other), f"{url}/s2"]) == 0
    assert main(["export", str(other), str(tmp_path / "y.safetensors"), "--only", "state_dict.*"]) == 0
    assert set(safetensors.torch.load_file(tmp_path / "y.safetensors")) == {"state_dict.encoder.w", "state_dict.head.b"}
    assert main(["consolidate", str(one), str(tmp_path / "z")]) == 2
    assert main(["verify", str(one)]) == 0
    content = bytearray(one.read_bytes())
    content[len(content) // 2] ^= 1
    one.write_bytes(content)
    assert main(["verify", str(one)]) == 1
    left = one.parent / ".s9.ckpt.77.part"
    left.touch()
    os.utime(left, (1, 1))
    assert main(["gc", str(one.parent)]) == 0
    assert not left.exists()


@pytest.mark.parametrize("kind", ["store", "torch", "safetensors"])
def test_a_warm_start_from_any_file(kind, url, tmp_path):
    class Net(Module):
        def __init__(self):
            super().__init__()
            self.body = torch.nn.Module()
            self.body.w = torch.nn.Parameter(torch.zeros(4, 3))
            self.extra = torch.nn.Linear(1, 1)

    path = {"store": f"{url}/s2", "torch": tmp_path / "x.ckpt", "safetensors": tmp_path / "x.safetensors"}[kind]
    if kind == "torch":
        torch.save(state(2)["state_dict"], path)  # foreign: the weights alone
    if kind == "safetensors":
        safetensors.torch.save_file(state(2)["state_dict"], path)
    net = Net()
    before = net.extra.weight.item()
    assert net.load_weights(path, only="encoder.*", rename={"^encoder": "body"}) == ["body.w"]
    assert torch.equal(net.body.w, torch.full((4, 3), 2.0))
    assert net.extra.weight.item() == before
    for arguments, message in (
        ({}, "encoder.w has no place in the module"),
        ({"only": "nothing.*"}, "no tensor whose key matches"),
        ({"only": "head.b", "rename": {"head.b": "body.w"}}, r"has shape \(2,\) in the file, \(4, 3\) in the module"),
        ({"only": "encoder.*", "rename": {"^encoder": "body"}, "strict": True}, "extra.weight of the module is not in"),
    ):
        with pytest.raises(CheckpointError, match=message):
            net.load_weights(path, **arguments)


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


def test_ls_show_and_verify_need_no_torch(url, tmp_path):
    save_file(state(1), tmp_path / "s1.ckpt")
    code = """
import sys
from trainer.checkpoint.__main__ import main
assert [main([command, sys.argv[1]]) for command in ("ls", "show", "verify")] == [0, 0, 0]
assert main(["verify", sys.argv[2]]) == 0
assert "torch" not in sys.modules
"""
    subprocess.run(
        [sys.executable, "-c", code, f"{url}/s2", tmp_path / "s1.ckpt"], check=True, stdout=subprocess.DEVNULL
    )
