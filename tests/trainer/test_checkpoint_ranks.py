"""Several real ranks share one store."""

from __future__ import annotations

import pytest
import torch

from trainer.checkpoint import Store
from trainer.checkpoint.catalog import open_checkpoint


def _lines(results, word):
    return {line for r in results for line in r.stdout.splitlines() if line.startswith(word)}


def test_state_is_saved_by_three_ranks_and_loaded_by_two_and_one(gang, tmp_path):
    store = str(tmp_path / "store")
    saved = gang.ok(3, "checkpoint_ranks.py", "save", store)
    loaded = gang.ok(2, "checkpoint_ranks.py", "load", store)
    for word in ("MOMENTS", "WEIGHTS"):
        assert len(_lines(saved, word)) == 1
        assert _lines(saved, word) == _lines(loaded, word)
    alone = Store(store)
    manifest = alone.newest()
    assert manifest.world_size == 3
    whole = alone.load(manifest)
    assert whole.state["model"]["0.weight"].shape == (17, 30)
    assert whole.rank_state["rank"] == 0
    # What every rank has is written once, and the ranks share the work.
    sizes = [file.shard_bytes for file in manifest.files]
    payload = sum(t.nbytes for t in whole.state["plain"].values())
    assert sum(sizes) < payload * 1.1
    assert max(sizes) - min(sizes) < 70000 * 4 + 5000  # one row of "row" cannot be cut


def test_dcp_opens_the_shards(gang, tmp_path):
    import torch.distributed.checkpoint as dcp

    store = str(tmp_path / "store")
    gang.ok(2, "checkpoint_ranks.py", "save", store)
    checkpoint = open_checkpoint(store)
    whole = Store(store).load(checkpoint.manifest).state
    state = {f"model.{key}": torch.zeros_like(t) for key, t in whole["model"].items()}
    state |= {f"plain.{key}": torch.zeros_like(t) for key, t in whole["plain"].items()}
    dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(checkpoint.folder.path), no_dist=True)
    for key, tensor in state.items():
        part, name = key.split(".", 1)
        assert torch.equal(tensor, whole[part][name]), key


if __name__ == "__main__":
    pytest.main([__file__])
