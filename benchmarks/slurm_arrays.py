"""On a real Slurm: an array of 1,000 held elements, submitted, listed, shown, cancelled. Needs root, the lab.

    python benchmarks/slurm_arrays.py [--elements 1000] [--rounds 5] [--json FILE]

For each command: its own seconds (from its start to its end, less what its calls of Slurm's tools took), theirs, and
how many there were. Medians.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests" / "lab"))

from facts import facts, tell  # noqa: E402

from lab import FOLDER, Lab, Settings  # noqa: E402

LAUNCH = Path(sys.executable).with_name("launch")
TOOLS = ("squeue", "sacct", "scontrol", "sbatch", "scancel")


def wrap_tools(lab: Lab, folder: Path) -> Path:
    """Tools of Slurm that note how long each call took, before the real ones on PATH."""
    folder.mkdir()
    for tool in TOOLS:
        real = lab.run("bash", "-c", f"command -v {tool}").strip()
        text = f'#!/bin/bash\nbegan=$EPOCHREALTIME\n{real} "$@"\ncode=$?\n'
        text += f'echo "{tool} $began $EPOCHREALTIME" >> {folder}/calls\nexit $code\n'
        (folder / tool).write_text(text)
        (folder / tool).chmod(0o755)
    return folder


def measure(lab: Lab, cwd: Path, tools: Path, *words: str) -> dict[str, float | int]:
    (tools / "calls").write_text("")
    environment = {
        "PATH": f"{tools}:{os.environ['PATH']}:/usr/sbin:/sbin", "XDG_STATE_HOME": str(cwd / "state"),
        "LAUNCH_SITE_CONFIG": "",
    }  # fmt: skip
    command = lab.words(LAUNCH, *words, cwd=cwd, environment=environment)
    began = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    whole = time.perf_counter() - began
    calls = [line.split() for line in (tools / "calls").read_text().splitlines()]
    theirs = sum(float(end) - float(start) for _, start, end in calls)
    return {"own_s": whole - theirs, "slurm_s": theirs, "calls": len(calls)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--elements", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", metavar="FILE")
    o = parser.parse_args()
    before = facts()
    folder = FOLDER.with_name(FOLDER.name + "-benchmark")
    lab = Lab.up(Settings(), folder)
    rounds: dict[str, list[dict[str, float | int]]] = {}
    try:
        with tempfile.TemporaryDirectory() as here:
            cwd = Path(here)
            (cwd / "job.py").write_text("")
            tools = wrap_tools(lab, cwd / "tools")
            for number in range(o.rounds):
                name = f"many-{number}"
                submit = ["--procs", "1", "--no-snapshot", "--sbatch", "hold", "--run", name]
                submit += ["--array", f"0-{o.elements - 1}%50", "job.py"]
                for what, words in (("submit", submit), ("ls", ["ls"]), ("ls ARRAY", ["ls", name]),
                                    ("show ELEMENT", ["show", f"{name}_7"]), ("cancel", ["cancel", name])):  # fmt: skip
                    rounds.setdefault(what, []).append(measure(lab, cwd, tools, *words))
    finally:
        lab.down()
    medians = {
        what: {key: round(statistics.median(one[key] for one in found), 3) for key in found[0]}
        for what, found in rounds.items()
    }
    tell(before | {"elements": o.elements, "medians": medians}, o.json)


if __name__ == "__main__":
    main()
