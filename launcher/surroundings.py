"""Where a launch was made: interpreter, packages, machine, and the code as git knows it; kept for the run's report.

surroundings-<attempt>.json in the run folder, one for each launch, named by its first attempt. It is written beside the
launch's work: packages are told by the names of their folders, in milliseconds; git may take seconds on a slow disk.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.runs import read_json, write_json
from launcher.scrub import scrubbed

if TYPE_CHECKING:
    from launcher.spec import LaunchSpec

__all__ = ["Note", "read"]

_MOST_OF_A_DIFF = 300_000  # characters
_GIT_S = 20.0
_DISTRIBUTION = re.compile(r"^(?P<name>[A-Za-z0-9_.]+)-(?P<version>[^-]+)\.(?:dist|egg)-info$")


class Note:
    """Being written, by a thread."""

    def __init__(self, folder: Path, spec: LaunchSpec, attempt: int) -> None:
        self._thread = threading.Thread(target=_write, args=(folder, spec, attempt), name="launch-note", daemon=True)
        self._thread.start()

    def wait(self, seconds: float) -> None:
        """Until it is written, or for so long: it is only a note."""
        self._thread.join(seconds)


def read(folder: Path) -> dict[str, Any] | None:
    """The newest one of a run; None if there is none."""
    found = [(int(match[1]), path) for path in folder.glob("surroundings-*.json")
             if (match := re.fullmatch(r"surroundings-(\d+)\.json", path.name))]  # fmt: skip
    return read_json(max(found)[1]) if found else None


def _write(folder: Path, spec: LaunchSpec, attempt: int) -> None:
    place = (Path(spec.cwd) / spec.program.target).parent if spec.program.kind == "script" else Path(spec.cwd)
    told = {
        "time": time.time(),
        "attempt": attempt,
        "python": platform.python_version(),
        "executable": sys.executable,
        "system": platform.platform(),
        "cpus": os.cpu_count(),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": _gpus(),
        "packages": _packages(),
        "code": _kept(spec) if spec.code is not None else _code(place),
    }
    with contextlib.suppress(OSError):  # a full disk ends the note, not the run
        write_json(folder / f"surroundings-{attempt}.json", told)


def _gpus() -> list[str]:
    found = []
    for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        with contextlib.suppress(OSError):
            found += re.findall(r"^Model:\s*(.+)$", path.read_text(), re.MULTILINE)
    return found


def _packages() -> dict[str, str]:
    found: dict[str, str] = {}
    for place in sys.path:
        try:
            names = os.listdir(place or ".")  # noqa: PTH208  # names are all that is wanted
        except OSError:
            continue
        for name in names:
            if match := _DISTRIBUTION.match(name):
                found.setdefault(match["name"].replace("_", "-").lower(), match["version"])
    return dict(sorted(found.items()))


def _kept(spec: LaunchSpec) -> dict[str, Any] | None:
    """Of a snapshot, which has noted it when it was made."""
    assert spec.code is not None
    copy = Path(spec.code.copy)
    told = read_json(copy.with_name(copy.name + ".json"))
    try:
        diff = copy.with_name(copy.name + ".diff").read_text(errors="replace")
    except OSError:
        diff = ""
    return told and told | {"diff": scrubbed(diff[:_MOST_OF_A_DIFF]), "cut": len(diff) > _MOST_OF_A_DIFF}


def _code(place: Path) -> dict[str, Any] | None:
    root = _git(place, "rev-parse", "--show-toplevel")
    if root is None:
        return None
    commit, branch = _git(place, "rev-parse", "HEAD"), _git(place, "rev-parse", "--abbrev-ref", "HEAD")
    diff = _git(place, "diff", "HEAD") or ""
    return {
        "root": root.strip(), "commit": commit and commit.strip(), "branch": branch and branch.strip(),
        "edited": bool(diff), "diff": scrubbed(diff[:_MOST_OF_A_DIFF]), "cut": len(diff) > _MOST_OF_A_DIFF,
    }  # fmt: skip


def _git(place: Path, *words: str) -> str | None:
    environ = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")} | {"GIT_OPTIONAL_LOCKS": "0"}
    try:
        done = subprocess.run(
            ["git", "-C", place, *words], capture_output=True, check=False, env=environ, timeout=_GIT_S
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode(errors="replace") if done.returncode == 0 else None
