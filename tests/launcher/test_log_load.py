"""Ranks that print as fast as they can: the benchmark's own check that no line is lost or torn."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "log_load.py"


@pytest.mark.slow
def test_no_line_of_ranks_that_flood_files_and_console_is_lost_or_torn(tmp_path: Path) -> None:
    words = [BENCHMARK, "--ranks", "8", "--mb", "4", "--rate", "0", "--show", "all", "--folder", tmp_path]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout)["result"]
    assert (result["written: MB"], result["shown on the console: ranks"]) == (32, 8)
