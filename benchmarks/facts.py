"""What a kept result needs to be compared with another: the commit, the machine, how busy it was."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from pathlib import Path

import torch


def facts() -> dict:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True,
                            cwd=Path(__file__).parent).stdout.strip()  # fmt: skip
    return {
        "commit": commit,
        "machine": f"{os.cpu_count()} cores, {platform.platform()}",
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads",
        "load before": round(os.getloadavg()[0], 2),
    }


def tell(report: dict, path: str | None) -> None:
    """Print a report, and keep it in a file if one is named."""
    text = json.dumps(report, indent=1)
    print(text)
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(text + "\n")
