"""What every rank of a job from Python runs: `python -m launcher.call FILE` calls what is pickled in the file.

The result, or the traceback, goes to results/rank-<r>.pkl in the run folder: what `Job.results` reads.
"""

from __future__ import annotations

import os
import pickle
import sys
import traceback
from pathlib import Path
from typing import Any

__all__ = ["main", "result_file"]


def result_file(folder: Path, rank: int) -> Path:
    """Where a rank leaves what its call returned: a pickled ("success", value) or ("error", traceback)."""
    return folder / "results" / f"rank-{rank}.pkl"


def main(path: Path) -> None:
    """Call the function of `path`, and keep what it returns or raises."""
    import cloudpickle

    with open(path, "rb") as file:
        search, call = pickle.load(file)
    # Where the caller finds its modules; what is found without that (in a snapshot of the code) comes first.
    sys.path.extend(place for place in search if place not in sys.path)
    target = result_file(Path(os.environ["LAUNCH_RUN_DIR"]), int(os.environ["RANK"]))
    target.parent.mkdir(exist_ok=True)
    try:
        function, arguments = pickle.loads(call)
        outcome: tuple[str, Any] = ("success", function(*arguments))
        data = cloudpickle.dumps(outcome)
    except Exception:
        _write(target, cloudpickle.dumps(("error", traceback.format_exc())))
        raise
    _write(target, data)


def _write(target: Path, data: bytes) -> None:
    """Whole or not at all: a rank may be killed at any moment."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    temporary.write_bytes(data)
    temporary.replace(target)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
