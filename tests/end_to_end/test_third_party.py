"""Packages written for Lightning train here with their import lines changed: their source, no alias in sys.modules."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[1] / "programs" / "third_party.py"
REPO = Path(__file__).parents[2]

# Of Lightning's private helpers, and names from deep inside of it: docs/lightning.md says what stands for what.
_DEEP = {
    r"from lightning\.fabric\.utilities\.types import _MAP_LOCATION_TYPE, _PATH": (
        "from typing import Any as _MAP_LOCATION_TYPE, Any as _PATH"
    ),
    r"from lightning\.pytorch\.utilities\.types import STEP_OUTPUT": "from typing import Any as STEP_OUTPUT",
    r"from lightning\.pytorch\.trainer\.states import": "from trainer.state import",
    r"from lightning\.pytorch\.core\.datamodule import": "from trainer import",
    r"from lightning\.pytorch\.utilities\.parsing import get_init_args": (
        "get_init_args = lambda frame: {n: frame.f_locals[n] for n in "
        'inspect.signature(frame.f_locals["__class__"].__init__).parameters if n not in ("self", "kwargs")}'
    ),
}


def rewritten(package: str, folder: Path) -> None:
    """A copy of an installed package whose import lines name the trainer."""
    found = find_spec(package)
    if found is None or found.origin is None:
        pytest.skip(f"{package} is not installed (pip install 'muster[third-party]')")
    shutil.copytree(Path(found.origin).parent, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    for file in (folder / package).rglob("*.py"):
        text = file.read_text()
        for old, new in _DEEP.items():
            text = re.sub(rf"^{old}", new, text, flags=re.MULTILINE)
        text = re.sub(
            r"^(\s*(?:from|import) )(lightning\.pytorch|pytorch_lightning)\b", r"\1trainer", text, flags=re.MULTILINE
        )
        file.write_text(re.sub(r"^(\s*from )lightning(?= import)", r"\1trainer", text, flags=re.MULTILINE))


def train(package: str, folder: Path) -> dict:
    rewritten(package, folder)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", PROGRAM, package], cwd=folder, capture_output=True, text=True, timeout=110,
        check=False, env=os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{REPO}", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    [line] = (line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    result = json.loads(line.removeprefix("RESULT "))
    assert result.pop("lightning") == []
    return result


@pytest.mark.peer
@pytest.mark.soak
def test_lightly(tmp_path):
    result = train("lightly", tmp_path)
    assert len(result["curve"]) == 6
    assert result["curve"][-1] > 0.9
    assert result["neighbours"]["val_knn_top1/dataloader_idx_1"] > 0.9


@pytest.mark.peer
@pytest.mark.soak
def test_pytorch_forecasting(tmp_path):
    result = train("pytorch_forecasting", tmp_path)
    assert result["after"] < 0.5 * result["before"]
    assert result["predicted"] == [28, 28]
