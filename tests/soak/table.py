"""The table of the large counts, `benchmarks/results/soak.md`: one row per suite and case, the newest run's."""

from __future__ import annotations

import fcntl
import os
import platform
import subprocess
import time
from pathlib import Path

import torch

REPO = Path(__file__).resolve().parents[2]
TABLE = REPO / "benchmarks" / "results" / "soak.md"
_HEAD = """# Large counts

Written by `make soak`, one row per suite and case: that of the newest run without a failure.

| suite | case | counted | seconds | when | commit | machine |
| --- | --- | --- | ---: | --- | --- | --- |
"""


def keep(suite: str, case: str, seconds: float, **counted: object) -> None:
    """Write a row in the place of the one with the same suite and case. To be called when all has held."""
    # The table itself does not make the tree another one.
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    commit = _git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")
    machine = f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}"
    figures = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in counted.items())
    cells = [suite, case, figures, f"{seconds:.0f}", time.strftime("%Y-%m-%d"), commit, machine]
    row = f"| {' | '.join(cells)} |"
    TABLE.parent.mkdir(exist_ok=True)
    with open(TABLE, "a+") as table:
        fcntl.flock(table, fcntl.LOCK_EX)  # several workers of pytest may come at once
        table.seek(0)
        rows = table.read().removeprefix(_HEAD).splitlines()
        others = [line for line in rows if not line.startswith(f"| {suite} | {case} |")]
        table.truncate(0)
        table.write(_HEAD + "\n".join(sorted([*others, row])) + "\n")


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=REPO, check=False).stdout.strip()
