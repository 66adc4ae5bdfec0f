"""The transformer of examples/gpt.py learns to write Python, and a killed rank does not keep it from that."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
LAUNCH = str(Path(sys.executable).parent / "launch")
SMALL = ["--batch-size", "8", "--context", "64", "--steps", "60", "--lr", "4e-3"]


def launch(*arguments, cwd):
    done = subprocess.run([LAUNCH, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=300,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.mark.parametrize(
    ("how", "options"),
    [pytest.param("--procs 2", "", marks=pytest.mark.soak, id="ddp"),
     pytest.param("--procs 2", "--strategy fsdp --recompute", marks=pytest.mark.slow, id="fsdp"),
     pytest.param("--backend local --nodes 2 --procs 2", "--strategy hsdp --precision bf16-mixed",
                  marks=pytest.mark.soak, id="hsdp")],
)  # fmt: skip
@pytest.mark.timeout(300)
def test_gpt_learns_and_survives_a_kill(tmp_path, how, options):
    done = launch(*how.split(), "--max-restarts", 1, "--run", "r", ROOT / "tests/programs/example_killed.py",
                  "gpt.py", "0:25", *options.split(), *SMALL, cwd=tmp_path)  # fmt: skip
    loss, entropy = map(float, re.search(r"validation loss (\S+) .* bytes (\S+)", done.stdout).groups())
    assert loss < entropy - 0.3
    assert re.search("rank 1 was killed by SIGKILL.*; restarting", done.stderr)
    assert "fit goes on from" in done.stderr
