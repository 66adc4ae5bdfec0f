"""A newcomer's first hour, with nothing but a fresh clone and its README: what is typed there works as it is told.

`make run` itself is not done again here (it fetches torch); what it calls is.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.docs.pages import REPO, blocks

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = [pytest.mark.slow, pytest.mark.timeout(500)]


class Newcomer:
    """Types commands in the folder of the clone."""

    def __init__(self, clone: Path, home: Path) -> None:
        self.clone = clone
        self._environment = {
            **os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(clone),
            "HOME": str(home), "XDG_STATE_HOME": str(home / "state"), "OMP_NUM_THREADS": "1",
        }  # fmt: skip

    def types(self, line: str, code: int = 0) -> str:
        """What a command says; it must end with this exit code, and with no traceback."""
        return self._ended(self._start(line), line, code)

    def interrupts(self, line: str, when: Callable[[], bool], code: int = 75) -> str:
        """The same, and Ctrl-C is pressed as soon as something is so."""
        process = self._start(line)
        deadline = time.monotonic() + 120
        while not when():
            assert process.poll() is None, self._ended(process, line, code)
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGINT)
        return self._ended(process, line, code)

    def _start(self, line: str) -> subprocess.Popen[str]:
        return subprocess.Popen(["bash", "-c", f"exec {line}"], cwd=self.clone, env=self._environment, text=True,
                                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                start_new_session=True)  # fmt: skip

    @staticmethod
    def _ended(process: subprocess.Popen[str], line: str, code: int) -> str:
        said, _ = process.communicate(timeout=200)
        assert process.returncode == code, f"$ {line}\n{said}"
        assert "Traceback" not in said, said
        return said


@pytest.fixture
def newcomer(tmp_path: Path) -> Newcomer:
    clone = tmp_path / "muster"
    subprocess.run(["git", "clone", "--quiet", "--depth", "1", REPO.as_uri(), clone], check=True)
    # What is not committed yet is part of what is tested.
    subprocess.run(["cp", "-r", *(REPO / name for name in ("README.md", "launcher", "trainer")), clone], check=True)
    (script,) = [b for b in blocks("README.md") if b.language == "python" and "class Classifier" in b.text]
    (clone / "job.py").write_text(script.text)
    return Newcomer(clone, tmp_path)


def test_the_first_hour(newcomer: Newcomer) -> None:
    assert "epoch 5/5" in newcomer.types("python job.py")
    runs = newcomer.clone / "runs"

    # Stopped by hand on two ranks, and on again.
    def trains() -> bool:
        return any((runs / "first" / "checkpoints").glob("*.ckpt"))

    said = newcomer.interrupts("launch --procs 2 --run first examples/digits.py --epochs 8 --batch-size 32", trains)
    assert "go on with: launch resume first" in said
    said = newcomer.types("launch resume first")
    assert re.search(r"fit goes on from \S+resume-step=\d+", said)
    assert float(re.search(r"test accuracy (\S+)%", said)[1]) > 60
    assert "launch: run first finished" in said

    # What there is to see of it.
    assert re.search(r"^first +finished", newcomer.types("launch ls"), re.MULTILINE)
    assert re.search(r"^1 +finished", newcomer.types("launch show first"), re.MULTILINE)
    assert "test accuracy" in newcomer.types("launch logs first --rank 0")
    page = Path(newcomer.types("launch report first").strip().splitlines()[-1])
    assert page.read_text().rstrip().endswith("</html>")
    assert "whole" in newcomer.types("launch ckpt verify runs/first/checkpoints")

    # A sweep, and what is said where something is wrong.
    said = newcomer.types("launch --backend local --procs 1 --run sweep --sweep epochs=1,2 examples/digits.py")
    assert "launch: array sweep finished" in said
    assert len(re.findall(r"^sweep_\d +finished", newcomer.types("launch ls sweep"), re.MULTILINE)) == 2
    assert "there is no command 'shwo'" in newcomer.types("launch shwo first", code=2)
