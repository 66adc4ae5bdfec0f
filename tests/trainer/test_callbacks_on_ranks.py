"""Callbacks and loggers on two ranks that see different values."""

from __future__ import annotations

import json

from trainer.checkpoint import Store


def test_ranks_act_as_one(gang, tmp_path):
    (tmp_path / "lightning_logs" / "version_4").mkdir(parents=True)
    results = gang.ok(2, "callbacks_on_ranks.py", str(tmp_path))
    facts = [json.loads(r.stdout.split("FACTS ")[1].splitlines()[0]) for r in results]
    zero, one = (f | {"rank": None, "reason": None} for f in facts)
    assert zero == one
    # Rank 0's values decide which checkpoint is the best one, any rank's NaN ends training on all.
    assert zero["best"] == str(tmp_path / "best" / "epoch=3-score=0.ckpt")
    assert zero["score"] == 0
    assert zero["epochs"] == 4
    assert [f["reason"] for f in facts] == ["NOT_STOPPED", "NON_FINITE_METRIC"]
    assert zero["versions"] == [5, 0]
    assert zero["log_dir"] == str(tmp_path / "lightning_logs" / "version_5")

    assert sorted(p.name for p in (tmp_path / "best").iterdir()) == ["epoch=3-score=0.ckpt", "last.ckpt"]
    assert sorted(p.name for p in (tmp_path / "timed").iterdir()) == sorted(f"step={n}.ckpt" for n in range(1, 9))
    assert Store(str(tmp_path / "best"), None).load(zero["best"], None).extra is not None

    # One process wrote the logs, one showed progress, and the one that saw the NaN said so.
    assert len(list((tmp_path / "lightning_logs" / "version_5").glob("events*"))) == 2
    assert (tmp_path / "csv" / "version_0" / "metrics.csv").read_text().count("\n") > 8
    assert [r.stdout.count(" it/s") for r in results] == [4, 0]
    assert "[rank 1]" in results[1].stdout


def test_a_run_that_was_saved_in_a_validation_of_its_averages_goes_on_with_its_own_buffers(gang, tmp_path):
    for result in gang.ok(2, "averages_ranks.py", str(tmp_path)):
        whole, resumed = (result.stdout.split(word)[1].split()[0] for word in ("WHOLE", "RESUMED"))
        assert whole == resumed
