"""What a machine tells of itself: versions, limits, folders, GPUs. No torch: the answer comes within a second."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.hardware import find_gpus

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["OWN", "gather", "read_nvidia_smi", "required"]

OWN = ("muster", "torch", "numpy")
_NAME = re.compile(r"\s*([A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)(?!\S*://)")
_GPU_FIELDS = (
    "index", "name", "driver_version", "memory.total", "memory.used", "temperature.gpu",
    "ecc.errors.uncorrected.volatile.total", "compute_mode", "mig.mode.current",
)  # fmt: skip
_THROTTLED = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")  # one thing: newer drivers, older ones


def required(cwd: Path) -> dict[str, bool]:
    """The packages that requirements.txt and pyproject.toml in a folder ask for, by name: whether each must be there,
    and not only where its marker says so.
    """
    lines: list[str] = []
    try:
        lines += (cwd / "requirements.txt").read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        pass
    try:
        lines += _of_project((cwd / "pyproject.toml").read_bytes())
    except OSError:
        pass
    # What is no name at the start (-r FILE, -e ., a URL, a comment) has no version to compare.
    named = [(match[1], ";" not in line) for line in lines if (match := _NAME.match(line))]
    return dict(reversed(named))


def _of_project(data: bytes) -> list[str]:
    """Its dependencies, and itself: it need not be installed."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        project = tomllib.loads(data.decode()).get("project", {})
    except (tomllib.TOMLDecodeError, UnicodeDecodeError):
        return []
    if not isinstance(project, dict):
        return []
    own = [f"{project['name']};"] if isinstance(project.get("name"), str) else []
    return own + [text for text in project.get("dependencies", []) if isinstance(text, str)]


def gather(packages: Iterable[str]) -> dict[str, Any]:
    """Everything about this machine that can be told without another one; plain JSON.

    Lengths in bytes, `None` where something is not known: `gpus` where there is no nvidia-smi.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    temporary = tempfile.gettempdir()
    return {
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "executable": sys.executable,
        "machine": platform.machine(),
        "packages": {name: _version(name) for name in packages},
        "files": {"soft": soft, "hard": hard},
        "locked": None if locked == resource.RLIM_INFINITY else locked,
        "rdma": Path("/sys/class/infiniband").is_dir(),
        "shm": _space("/dev/shm"),
        "tmp": {"path": temporary, **(_space(temporary) or {})},
        "gpus": _gpus(),
        "visible": find_gpus().count,
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _space(path: str) -> dict[str, int] | None:
    try:
        usage = shutil.disk_usage(path)
    except OSError:
        return None
    return {"total": usage.total, "free": usage.free}


def _gpus() -> list[dict[str, Any]] | str | None:
    """One entry a GPU; a text if the driver does not answer; None without nvidia-smi."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    said = ""
    for throttled in _THROTTLED:
        query = [tool, f"--query-gpu={','.join((*_GPU_FIELDS, throttled))}", "--format=csv,noheader,nounits"]
        try:
            done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"nvidia-smi: {error}"
        if not done.returncode:
            return read_nvidia_smi(done.stdout)
        said = said or (done.stdout + done.stderr).strip()[:300]
    return f"nvidia-smi: {said}"


def read_nvidia_smi(text: str) -> list[dict[str, Any]] | str:
    """What nvidia-smi printed for `_GPU_FIELDS` and why it slows down; memory in MiB, temperature in degrees Celsius.

    ecc: uncorrected errors since the driver was loaded; mode: who may compute on it; mig: whether it is cut into
    instances; throttle: its bits; None where a GPU does not tell (a container may not be told of its memory, either).
    """
    found = []
    for line in filter(str.strip, text.splitlines()):
        values = [value.strip() for value in line.split(",")]
        if len(values) != len(_GPU_FIELDS) + 1:
            return f"nvidia-smi answered {line!r}"
        index, name, driver, total, used, warm, ecc, mode, mig, throttle = values
        found.append(
            {
                "index": _number(index), "name": name, "driver": driver, "memory": _number(total),
                "used": _number(used), "temperature": _number(warm), "ecc": _number(ecc),
                "mode": None if mode.startswith("[") else mode, "mig": mig == "Enabled", "throttle": _number(throttle),
            }
        )  # fmt: skip
    return found


def _number(text: str) -> int | None:
    try:
        return int(text, 0)
    except ValueError:
        return None  # [N/A], [Not Supported]
