"""Programs written for others run unmodified under `launch`, and ours under others' launchers."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAMS = Path(__file__).parent.parent / "programs"
BIN = Path(sys.executable).parent


def need(package):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed (pip install 'muster[peers]')")


def run(command, cwd, timeout=170):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.slow
def test_torchrun_script_gives_the_same_model_under_both(tmp_path):
    """Bit for bit: the same ranks, the same environment, the same result."""
    import torch

    program = str(PROGRAMS / "foreign_ddp.py")
    models, printed = [], []
    for name, command in (
        ("launch", [str(BIN / "launch"), "--standalone", "--nproc_per_node=2"]),
        # Without a log folder of its own torchrun leaves one in TMPDIR.
        ("torchrun", [str(BIN / "torchrun"), "--standalone", "--nproc_per_node=2", f"--log-dir={tmp_path}/logs"]),
    ):
        folder = tmp_path / name
        folder.mkdir()
        printed.append(run([*command, program, str(folder)], folder))
        models.append(torch.load(folder / "model.pt", weights_only=True))
    assert "on 2 ranks" in printed[0]
    assert all(torch.equal(models[0][key], models[1][key]) for key in models[1])


@pytest.mark.peer
def test_lightning_script(tmp_path):
    need("lightning")
    printed = run(
        [str(BIN / "launch"), "--procs", "2", str(PROGRAMS / "foreign_lightning.py"), str(tmp_path)], tmp_path
    )
    assert "steps 16 on 2 ranks" in printed


@pytest.mark.peer
def test_accelerate_script(tmp_path):
    need("accelerate")
    printed = run([str(BIN / "launch"), "--procs", "2", str(PROGRAMS / "foreign_accelerate.py")], tmp_path)
    assert "steps 8 on 2 ranks" in printed
