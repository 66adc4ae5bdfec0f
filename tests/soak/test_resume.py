"""Random kills, clean stops and changes of the number of ranks, counted.

Weights, optimizer and metric log must be an undisturbed run's; the ids that an epoch saw must be the dataset's.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tests.soak.table import keep

REPO = Path(__file__).resolve().parents[2]
JOB = REPO / "tests" / "programs" / "soak_job.py"
# How many of each kind there are in one run (6 runs: 54 of each), and in an attempt the most of each place.
KILLS = STOPS = 9
PLACES = {"train": 5, "validation": 3, "save": 2, "epoch_end": 1}


def hurt_at_random(choice: random.Random, kind: str, ranks: int) -> list:
    """A signal to one rank, at a random time after a random place."""
    where = choice.choice(list(PLACES))
    return [kind, choice.randrange(ranks), where, choice.randint(1, PLACES[where]), choice.random() * 0.05]


def hurts(ranks: int, seed: int) -> list[list]:
    """One hurt per attempt."""
    choice = random.Random(seed)
    kinds = ["SIGKILL"] * KILLS + ["SIGTERM"] * STOPS
    choice.shuffle(kinds)
    return [hurt_at_random(choice, kind, ranks) for kind in kinds]


def launch(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """`launch` as a process. What is left of an attempt that lost a rank has little to save."""
    environment = os.environ | variables | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", "import sys; from launcher.cli import main; sys.exit(main())", *arguments]
    # The loader workers of a rank that was killed leave their temporary folders.
    with tempfile.TemporaryDirectory() as temporary:
        environment["TMPDIR"] = temporary
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200, check=False)


def start(folder: Path, ranks: int, *options: str) -> list[str]:
    return ["--run", str(folder), "--procs", str(ranks), "--grace", "5", *options, str(JOB)]


def end(folder: Path) -> dict:
    return json.loads((folder / "end.json").read_text())


def run(folder: Path, ranks: int, **variables: str) -> dict:
    """Start the job, again after every clean stop, until it has finished."""
    begin = start(folder, ranks, "--max-restarts", str(KILLS + 1))
    stops = 0
    for arguments in (begin, *[["resume", str(folder)]] * (STOPS + 1)):
        done = launch(*arguments, **variables)
        if done.returncode != 75:
            break
        stops += 1
    assert done.returncode == 0, done.stderr[-4000:]
    attempts = [int(p.name.removeprefix("attempt-")) for p in (folder / "logs").glob("attempt-*")]
    return end(folder) | {"attempts": 1 + max(attempts), "stops": stops}


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_random_kills_and_stops(ranks, workers, tmp_path):
    began = time.monotonic()
    variables = {"WORKERS": str(workers), "EPOCHS": "16"}
    whole = run(tmp_path / "whole", ranks, **variables)
    seed = 100 * ranks + workers
    hurt = run(tmp_path / "hurt", ranks, **variables, HURT=json.dumps(hurts(ranks, seed)))
    result = {name: whole[name] == hurt[name] for name in ("weights", "optimizer", "rows", "place")}
    kills = hurt["attempts"] - 1 - hurt["stops"]
    assert all(result.values()), result
    assert (kills, hurt["stops"]) == (KILLS, STOPS)  # none came too late
    keep("exact resume", f"{ranks} ranks, {workers} loader workers", time.monotonic() - began,
         kills=kills, clean_stops=hurt["stops"], differing=0, seed=seed)  # fmt: skip


SCHEDULES = 40


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_any_schedule_of_ranks_sees_each_sample_once(gang, tmp_path):
    began, choice, stages = time.monotonic(), random.Random(7), 0
    for case in range(SCHEDULES):
        size, batch, epochs = choice.randint(1, 60), choice.randint(1, 5), choice.randint(1, 2)
        variables = {"SIZE": str(size), "BATCH": str(batch), "EPOCHS": str(epochs)}
        seen, step, saved = [], 0, ""
        for number, ranks in enumerate([*(choice.randint(1, 4) for _ in range(choice.randint(1, 4))), 0]):
            file = str(tmp_path / f"{case}-{number}.ckpt")
            # On 4 ranks an epoch has at least so many steps left; a stop that does not come is the end.
            step += choice.randint(1, max(1, size // (4 * batch)))
            arguments = ["stop", str(step), file, *([saved] if saved else [])] if ranks else ["end", saved]
            results = gang.ok(ranks or choice.randint(1, 4), "parallel_elastic.py", *arguments, env=variables)
            lines = [line for r in results for line in r.stdout.splitlines() if line.startswith("seen")]
            seen += [int(i) for line in lines for i in line.split()[1:]]
            stages += 1
            if not Path(file).exists():
                break
            saved = file
        assert sorted(seen) == [1000 * e + i for e in range(epochs) for i in range(size)], (case, variables)
    keep("each sample once", "random schedules of 1 to 4 ranks", time.monotonic() - began,
         schedules=SCHEDULES, stages=stages, differing=0)  # fmt: skip


VIRTUAL = 5


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("workers", [0, 2])
def test_virtual_ranks_end_alike_on_any_ranks_and_through_kills(tmp_path, workers):
    """Undisturbed on 1, 2, 3 and 4 ranks; then on 4, 2, 3, ... ranks with a kill or stop in each attempt."""
    began, choice, kills, stops = time.monotonic(), random.Random(11 + workers), 0, 0
    variables = {"VIRTUAL": str(VIRTUAL), "WORKERS": str(workers)}
    for ranks in (1, 2, 3, 4):
        done = launch(*start(tmp_path / f"whole-{ranks}", ranks), **variables)
        assert done.returncode == 0, done.stderr[-4000:]
        assert end(tmp_path / f"whole-{ranks}") == end(tmp_path / "whole-1"), ranks
    for number in range(3):
        folder, sizes = tmp_path / f"hurt-{number}", [4, 2, 3]
        for attempt in range(40):
            ranks = sizes[attempt] if attempt < len(sizes) else choice.randint(1, 4)
            kind = choice.choice(["SIGKILL", "SIGTERM"])
            hurt = json.dumps([None] * attempt + [hurt_at_random(choice, kind, ranks)])
            done = launch(*start(folder, ranks), **variables, HURT=hurt)
            if done.returncode == 0:
                break
            assert done.returncode == {"SIGKILL": 137, "SIGTERM": 75}[kind], done.stderr[-4000:]
            kills, stops = kills + (kind == "SIGKILL"), stops + (kind == "SIGTERM")
        assert end(folder) == end(tmp_path / "whole-1"), number
    assert kills
    assert stops
    keep("virtual ranks", f"1, 2, 3, 4 ranks; 4 -> 2 -> 3 -> ..., {workers} loader workers", time.monotonic() - began,
         kills=kills, clean_stops=stops, differing=0)  # fmt: skip
