"""Where a launch was made: interpreter, packages, machine, and the code as git knows it; kept for the run's report.

surroundings-<attempt>.json in the run folder, one for each launch, named by its first attempt; the edits that git knows
of stand beside it, once for all launches with the same ones: surroundings-<hash>.diff. It is written beside the
launch's work: packages are told by the names of their folders, in milliseconds; git may take seconds on a slow disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.errors import RunError
from launcher.processes import kill_tree
from launcher.runs import read_json, write_json
from launcher.scrub import scrubbed

if TYPE_CHECKING:
    from launcher.spec import LaunchSpec

__all__ = ["Note", "read"]

_MOST_OF_A_DIFF = 300_000  # bytes of git's, characters of a snapshot's
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
    told = read_json(max(found)[1]) if found else None
    if told is not None and (code := told.get("code")) and code["diff"]:
        try:
            code["diff"] = (folder / code["diff"]).read_text(errors="replace")
        except OSError:
            code["diff"] = ""
    return told


def _write(folder: Path, spec: LaunchSpec, attempt: int) -> None:
    place = (Path(spec.cwd) / spec.program.target).parent if spec.program.kind == "script" else Path(spec.cwd)
    told: dict[str, Any] = {
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
        if (code := told["code"]) and code["diff"]:
            code["diff"] = _put(folder, code["diff"])
        write_json(folder / f"surroundings-{attempt}.json", told)


def _put(folder: Path, diff: str) -> str:
    """Keep it in a file; returns its name."""
    data = diff.encode(errors="replace")
    path = folder / f"surroundings-{hashlib.sha256(data).hexdigest()[:12]}.diff"
    if not path.exists():
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            temporary.write_bytes(data)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    return path.name


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
    try:
        told = read_json(copy.with_name(copy.name + ".json"))
    except RunError:
        return None
    try:
        diff = copy.with_name(copy.name + ".diff").read_text(errors="replace")
    except OSError:
        diff = ""
    return told and told | {"diff": scrubbed(diff[:_MOST_OF_A_DIFF]), "cut": len(diff) > _MOST_OF_A_DIFF}


def _code(place: Path) -> dict[str, Any] | None:
    root = _line(place, "--show-toplevel")
    if root is None:
        return None
    # A person's own way to show differences may be a program with a window.
    diff = _git(place, "diff", "--no-ext-diff", "--no-textconv", "HEAD")
    return {
        "root": root, "commit": _line(place, "HEAD"), "branch": _line(place, "--abbrev-ref", "HEAD"),
        "edited": None if diff is None else bool(diff), "diff": scrubbed((diff or "")[:_MOST_OF_A_DIFF]),
        "cut": len(diff or "") > _MOST_OF_A_DIFF,
    }  # fmt: skip


def _line(place: Path, *words: str) -> str | None:
    said = _git(place, "rev-parse", *words)
    return None if said is None else said.strip() or None


def _git(place: Path, *words: str) -> str | None:
    """The beginning of what git says; None if it fails, or is put down with the run."""
    environ = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")} | {"GIT_OPTIONAL_LOCKS": "0"}
    try:
        git = subprocess.Popen(
            ["git", "-C", place, *words],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environ,
        )  # fmt: skip
    except OSError:
        return None
    assert git.stdout is not None
    limit = threading.Timer(_GIT_S, kill_tree, [git.pid])
    limit.start()
    with git.stdout:
        said = git.stdout.read(_MOST_OF_A_DIFF + 1)
    try:
        _, status = os.waitpid(git.pid, 0)
        git.returncode = os.waitstatus_to_exitcode(status)
    except ChildProcessError:  # who puts a run down has waited for it; Popen.wait would call that success
        git.returncode = -signal.SIGKILL
    finally:
        limit.cancel()
    # One that has more to say finds nobody to hear it.
    return said.decode(errors="replace") if git.returncode == 0 or len(said) > _MOST_OF_A_DIFF else None
