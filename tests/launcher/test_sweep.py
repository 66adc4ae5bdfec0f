"""The elements of arrays and sweeps: which, with which arguments; and what is none."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher import sweep
from launcher.backends.slurm_notation import array_indices
from launcher.errors import RunError, UsageError

if TYPE_CHECKING:
    from pathlib import Path


def test_a_grid() -> None:
    assert sweep.grid(["lr=1e-3,1e-4", "seed=0:3"]) == [
        (f"--lr={lr}", f"--seed={seed}") for lr in ("1e-3", "1e-4") for seed in range(3)
    ]
    assert sweep.grid(["model.width=10:0:-5,7"]) == [("--model.width=10",), ("--model.width=5",), ("--model.width=7",)]
    assert sweep.grid(["name=a b", "x=k=v"]) == [("--name=a b", "--x=k=v")]


@pytest.mark.parametrize(
    ("texts", "error"),
    [
        (["lr"], "give KEY=VALUE"),
        (["--lr=1"], "give KEY=VALUE"),
        (["=1"], "give KEY=VALUE"),
        (["lr="], "empty value"),
        (["lr=1,,2"], "empty value"),
        (["lr=1,2,1"], "the value 1 is given twice"),
        (["seed=0:3,2"], "the value 2 is given twice"),
        (["lr=1", "lr=2"], "given twice"),
        (["seed=3:3"], "range 3:3 is empty"),
        (["seed=0:9:0"], "is empty"),
        (["seed=0:200000"], "at most 100000"),
        (["a=0:1000", "b=0:1000"], "1000000 elements .1000 of a x 1000 of b."),
    ],
)
def test_what_is_no_grid(texts, error) -> None:
    with pytest.raises(UsageError, match=error):
        sweep.grid(texts)


def test_a_file(tmp_path: Path) -> None:
    file = tmp_path / "runs.jsonl"
    file.write_text('{"lr": 0.1, "name": "a b", "flag": true}\n\n{"sizes": [1, 2], "none": null, "empty": ""}\n')
    assert sweep.of_file(file) == [
        ("--lr=0.1", "--name=a b", "--flag=true"),
        ("--sizes=[1, 2]", "--none=null", "--empty="),
    ]
    for text, error in (
        ("", "the sweep is empty"),
        ('{"a": 1', "line 1 is no JSON"),
        ("[1]", "line 1: give an object"),
        ('{"a": 1}\n{"a": 1}', "line 2 is the same as line 1"),
        ('{"a b": 1}', "'a b' is no name of an argument"),
        ('{"a": "x\\u0000"}', "NUL"),
    ):
        file.write_text(text)
        with pytest.raises(UsageError, match=error):
            sweep.of_file(file)
    with pytest.raises(UsageError, match="cannot be read"):
        sweep.of_file(tmp_path / "none")


def test_which_elements() -> None:
    three = sweep.grid(["a=0:3"])
    assert sweep.choose("1-3%2", None) == ({1: (), 2: (), 3: ()}, 2)
    assert sweep.choose(None, three) == (dict(enumerate(three)), None)
    assert sweep.choose("%2", three) == (dict(enumerate(three)), 2)
    assert sweep.choose("0,2", three) == ({0: three[0], 2: three[2]}, None)
    for array, error in (("0-3", "the sweep has 3 elements, 0 to 2"), ("x", "is no array"), ("%0", "whole number >= 1"),
                         ("2-1", "holds no index"), ("0-100000", "at most 100000")):  # fmt: skip
        with pytest.raises(UsageError, match=error):
            sweep.choose(array, three)


@given(st.sets(st.integers(0, 300), min_size=1), st.none() | st.integers(1, 50))
def test_indices_as_slurm_writes_them(indices, throttle) -> None:
    assert array_indices(sweep.array_text(indices, throttle)) == (tuple(sorted(indices)), throttle)


# ------------------------------------------------------------------------------------------------ run here

ELEMENT = """
import os, pathlib, sys, time
index, here = os.environ["LAUNCH_ARRAY_INDEX"], pathlib.Path.cwd()
assert os.environ["LAUNCH_ARRAY_COUNT"] in "24" and not any(n.startswith("SLURM_") for n in os.environ)
print("args", sys.argv[1:], flush=True)
(here / f"begun-{index}").touch()
if "--stage=wait" in sys.argv:
    while True: time.sleep(60)
if "--b=y" in sys.argv and not (here / "mended").exists(): sys.exit(7)
"""


@pytest.mark.slow
def test_a_sweep_runs_here_and_its_failed_elements_again(launch) -> None:
    script = launch.script(ELEMENT)
    words = ["--backend", "local", "--no-preload", "--run", "grid", "--sweep", "b=x,y", "--array", "%2", script]
    done = launch(*words, "--first=a b")
    assert done.returncode == 7
    assert "1 finished, 1 did not: grid_1; go on with: launch retry grid" in done.stderr
    assert "[0] args ['--first=a b', '--b=x']" in done.stdout
    found = {s["name"]: s["status"] for s in json.loads(launch.ok("ls", "--json", "grid").stdout)}
    assert found == {"grid_0": "finished", "grid_1": "failed"}
    assert launch("wait", "grid").returncode == 7
    assert "args ['--first=a b', '--b=y']" in launch.ok("logs", "grid_1").stdout
    again = launch(*words)
    assert again.returncode == RunError.exit_code
    assert "is not empty" in again.stderr
    (launch.cwd / "mended").touch()
    retried = launch.ok("retry", "grid", "--failed").stderr
    assert "grid_1 finished" in retried
    assert "grid_0" not in retried
    assert "nothing to do" in launch.ok("retry", "grid").stderr


def test_cancelling_an_array_stops_what_runs_and_begins_nothing(launch) -> None:
    script = launch.script(ELEMENT)
    running = launch.start(
        "--backend", "local", "--no-preload", "--run", "many", "--array", "0-3%2", script, "--stage=wait"
    )
    begun = [launch.cwd / f"begun-{index}" for index in range(4)]
    running.until(lambda: begun[0].exists() and begun[1].exists(), "two elements to run")
    assert "2 running, 2 waiting" in launch.ok("ls").stdout
    assert "many: asked to save and leave" in launch.ok("cancel", "many").stdout
    running.wait()
    assert running.returncode == 128 + 15
    running.gone()
    assert not begun[2].exists()
    assert "4 stopped" in launch.ok("ls").stdout
    assert "cancelled by" in launch.ok("show", "many_1").stdout
