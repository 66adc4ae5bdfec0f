"""Random kills and clean stops, counted: weights, optimizer and metric log must be those of an undisturbed run."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.soak.table import keep

REPO = Path(__file__).resolve().parents[2]
JOB = REPO / "tests" / "programs" / "soak_job.py"
# How many of each kind there are in one run, and in an attempt the most that can be counted of each place.
KILLS = STOPS = 9
PLACES = {"train": 5, "validation": 3, "save": 2, "epoch_end": 1}


def hurts(ranks: int, seed: int) -> list[list]:
    """One hurt per attempt: a signal to one rank, at a random time after a random place."""
    choice = random.Random(seed)
    kinds = ["SIGKILL"] * KILLS + ["SIGTERM"] * STOPS
    choice.shuffle(kinds)
    found = []
    for kind in kinds:
        where = choice.choice(list(PLACES))
        found.append([kind, choice.randrange(ranks), where, choice.randint(1, PLACES[where]), choice.random() * 0.05])
    return found


def run(folder: Path, ranks: int, **variables: str) -> dict:
    """Start the job, again after every clean stop, until it has finished."""
    environment = os.environ | variables | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    start = ["--run", str(folder), "--procs", str(ranks), "--max-restarts", str(KILLS + 1), str(JOB)]
    stops = 0
    for arguments in (start, *[["resume", str(folder)]] * (STOPS + 1)):
        done = subprocess.run(
            [sys.executable, "-c", "import sys; from launcher.cli import main; sys.exit(main())", *arguments],
            env=environment, capture_output=True, text=True, timeout=1200, check=False,
        )  # fmt: skip
        if done.returncode != 75:
            break
        stops += 1
    assert done.returncode == 0, done.stderr[-4000:]
    attempts = [int(p.name.removeprefix("attempt-")) for p in (folder / "logs").glob("attempt-*")]
    return json.loads((folder / "end.json").read_text()) | {"attempts": 1 + max(attempts), "stops": stops}


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_random_kills_and_stops(ranks, workers, tmp_path):
    began = time.monotonic()
    variables = {"WORKERS": str(workers), "EPOCHS": "8"}
    whole = run(tmp_path / "whole", ranks, **variables)
    seed = 100 * ranks + workers
    hurt = run(tmp_path / "hurt", ranks, **variables, HURT=json.dumps(hurts(ranks, seed)))
    result = {name: whole[name] == hurt[name] for name in ("weights", "optimizer", "rows", "place")}
    kills = hurt["attempts"] - 1 - hurt["stops"]
    assert all(result.values()), result
    assert kills + hurt["stops"] >= (KILLS + STOPS) // 2
    keep("exact resume", f"{ranks} ranks, {workers} loader workers", time.monotonic() - began,
         kills=kills, clean_stops=hurt["stops"], seed=seed)  # fmt: skip
