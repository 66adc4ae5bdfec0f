"""Several real ranks share one store."""

from __future__ import annotations

import signal

import pytest
import torch
import torch.distributed.checkpoint as dcp

from trainer.checkpoint import Store
from trainer.checkpoint.catalog import open_checkpoint


def _lines(results, word):
    return {line for r in results for line in r.stdout.splitlines() if line.startswith(word)}


def test_state_is_saved_by_three_ranks_and_loaded_by_two_by_one_and_by_dcp(gang, tmp_path):
    store = str(tmp_path / "store")
    saved = gang.ok(3, "checkpoint_ranks.py", "save", store)
    loaded = gang.ok(2, "checkpoint_ranks.py", "load", store)
    for word in ("MOMENTS", "WEIGHTS"):
        assert len(_lines(saved, word)) == 1
        assert _lines(saved, word) == _lines(loaded, word)
    alone = Store(store)
    manifest = alone.newest()
    assert manifest.world_size == 3
    whole = alone.load(manifest, orphans=True)
    assert whole.state["model"]["0.weight"].shape == (17, 30)
    assert whole.rank_state["rank"] == 0
    assert [(o["rank"], o["own"].tolist()) for o in whole.orphans] == [(1, [1] * 5), (2, [2] * 5)]
    # What every rank has is written once, and the ranks share the work.
    sizes = [file.shard_bytes for file in manifest.files]
    payload = sum(t.nbytes for t in whole.state["plain"].values())
    assert sum(sizes) < payload * 1.1
    assert max(sizes) - min(sizes) < 70000 * 4 + 5000  # one row of "row" cannot be cut

    state = {f"model.{key}": torch.zeros_like(t) for key, t in whole.state["model"].items()}
    state |= {f"plain.{key}": torch.zeros_like(t) for key, t in whole.state["plain"].items()}
    folder = open_checkpoint(f"{store}/{manifest.name}").folder.path
    dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(folder), no_dist=True)
    for key, tensor in state.items():
        part, name = key.split(".", 1)
        assert torch.equal(tensor, whole.state[part][name]), key


@pytest.mark.parametrize(
    "elements",
    [
        pytest.param("1000", id="written by a thread"),
        pytest.param("3000000", id="by a process", marks=pytest.mark.slow),
    ],
)
def test_a_rank_killed_in_a_save_is_not_waited_for(gang, tmp_path, elements):
    first, second = gang(2, "checkpoint_ranks.py", "lost", str(tmp_path / "store"), env={"ELEMENTS": elements})
    assert second.returncode == -signal.SIGKILL, second.stderr
    assert first.returncode == 0, first.stderr
    assert "ended before it had written its part" in first.stdout


def test_what_goes_wrong_on_one_rank_is_answered_alike_by_all(gang, tmp_path):
    gang.ok(2, "checkpoint_ranks.py", "fail", str(tmp_path / "store"))
