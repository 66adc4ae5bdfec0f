"""What SECURITY.md states; the rest of its statements name tests elsewhere, which exist."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import torch

import trainer as T
from launcher.backends.slurm import executor
from launcher.request import parse
from launcher.where import Surroundings
from tests.docs.pages import REPO
from trainer.checkpoint import Store, load_checkpoint
from trainer.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

SECRET = "hunter2-of-this-test"


def test_every_test_that_is_named_exists() -> None:
    text = (REPO / "SECURITY.md").read_text()
    named = re.findall(r"`([\w/]+\.py)`::(\w+)", text)
    assert len(named) >= 9
    for file, test in named:
        assert f"def {test}(" in (REPO / "tests" / file).read_text(), (file, test)


class Trap:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.mark),)


class Small(T.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch: torch.Tensor) -> torch.Tensor:
        return self.layer(batch).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.slow
def test_a_checkpoint_runs_no_code(tmp_path: Path) -> None:
    mark, file = tmp_path / "mark", tmp_path / "model.ckpt"
    torch.save({"state_dict": Small().state_dict(), "hyper_parameters": {"x": Trap(mark)}}, file)
    trainer = T.Trainer(max_epochs=1, logger=False, enable_progress_bar=False, enable_checkpointing=False,
                        enable_model_summary=False, default_root_dir=tmp_path)  # fmt: skip
    loads = [
        lambda: Small.load_from_checkpoint(file),
        lambda: trainer.fit(Small(), torch.ones(4, 1), ckpt_path=file),
        lambda: load_checkpoint(file),
        lambda: Small().load_weights(file),
    ]
    for load in loads:
        with pytest.raises(CheckpointError, match=re.escape(str(file))):
            load()
    for command in ("show", "verify"):
        looked = subprocess.run([sys.executable, "-m", "trainer.checkpoint", command, str(file)], cwd=REPO)
        assert looked.returncode in (1, 2)
    with pytest.raises(CheckpointError):
        Store(tmp_path / "store").save({"x": Trap(mark)}, step=1)
    assert not mark.exists()
    # The trap does snap where somebody asks for it.
    load_checkpoint(file, weights_only=False)
    assert mark.exists()


def test_a_batch_script_holds_nothing_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("API_KEY", SECRET)
    (tmp_path / "job.py").write_text("")
    request = parse(["--nodes", "2", "--gpus", "4", "--env", "API_KEY", "job.py"], Surroundings(sbatch=True))
    assert SECRET not in executor(tmp_path / "run", request.spec, os.environ).script(None)
    assert SECRET not in str(request.spec.to_json())


LOOK = """
import os, pathlib, time
assert os.environ["API_KEY"]
seen = b""
for process in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
    try:
        seen += process.read_bytes()
    except OSError:
        pass
print("command lines", len(seen) > 100, os.environ["API_KEY"].encode() in seen)
"""


@pytest.mark.slow
def test_a_secret_of_the_environment_is_written_nowhere(tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text(LOOK)
    done = subprocess.run(
        [sys.executable, "-c", "from launcher.cli import main; main()", "--backend", "local", "--nodes", "2",
         "--procs", "1", "--max-restarts", "1", "--env", "API_KEY", "--show-ranks", "all", "job.py"],
        cwd=tmp_path, env={**os.environ, "API_KEY": SECRET, "PYTHONPATH": str(REPO)},
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("command lines True False") == 2, done.stdout
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or SECRET.encode() not in file.read_bytes(), file
    assert SECRET not in done.stdout + done.stderr
