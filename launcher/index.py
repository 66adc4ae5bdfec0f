"""A person's runs, wherever their folders are: what `launch ls`, and a bare name or job id, are looked up in.

One small file per run below `$XDG_STATE_HOME/launch/runs`, put there whole by a rename: home folders are shared between
hosts, where appending to one file is not safe. It only points; what is true of a run stands in its folder. So a lost
index loses nothing, and an entry whose folder is gone is passed over.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.errors import UsageError
from launcher.runs import default_root

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Entry", "Found", "entries", "find", "is_run", "place", "register"]

_FORGOTTEN_AFTER_S = 30 * 86400.0
_FILE = re.compile(r"\d{12,}-[0-9a-f]{12}\.json")
_JOB = re.compile(r"(?P<name>\d+)(?:_(?P<index>\d+))?")
_ELEMENT = re.compile(r"(?P<name>.+)_(?P<index>\d+)")


@dataclass(frozen=True)
class Entry:
    """One run, or one array of runs. jobs: what it was submitted as, the last one last; none without a scheduler."""

    folder: Path
    created: float
    jobs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Found:
    """What a text names: a run's folder, or an array's, of which `index` is one element."""

    folder: Path
    index: int | None = None


def place() -> Path:
    """The folder of the index. Raises `OSError` where there is no home."""
    state = os.environ.get("XDG_STATE_HOME", "")
    # The specification: a relative path is invalid and to be ignored.
    if state.startswith("/"):
        return Path(state, "launch", "runs")
    try:
        return Path.home() / ".local" / "state" / "launch" / "runs"
    except RuntimeError as error:
        raise OSError(str(error)) from error


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run or of an array of runs."""
    return (folder / "run.json").is_file() or (folder / "array.json").is_file()


def register(folder: Path, created: float, job_id: str | None = None) -> str | None:
    """Enter a run, or its next job; returns why that was not possible, which is no reason not to run.

    To be called by who holds the run's lock. created: as its own record says, so that it stays one entry.
    """
    key = hashlib.sha256(os.fsencode(folder)).hexdigest()[:12]
    try:
        index = place()
        index.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = index / f"{int(created * 1000):015d}-{key}.json"
        known = _read(path)
        jobs = [j for j in (known.jobs if known is not None else ()) if j != job_id]
        data = {"folder": str(folder), "created": created, "jobs": [*jobs, *([job_id] if job_id else [])]}
        temporary = index / f".{key}.{os.getpid()}.tmp"
        temporary.write_text(json.dumps(data) + "\n")
        temporary.replace(path)
    except OSError as error:
        return f"launch ls will not show this run: {error}; XDG_STATE_HOME can name another place for its index"
    return None


def entries() -> Iterator[Entry]:
    """All runs whose folders are there, the newest first. Read as far as is asked for."""
    try:
        index = place()
        names = sorted((name for name in os.listdir(index) if _FILE.fullmatch(name)), reverse=True)  # noqa: PTH208
    except OSError:
        return
    for name in names:
        entry = _read(index / name)
        if entry is None:
            continue
        if is_run(entry.folder):
            yield entry
        elif time.time() - entry.created > _FORGOTTEN_AFTER_S:
            # A younger one may be on a file system that is not mounted just now.
            with contextlib.suppress(OSError):
                (index / name).unlink()


def _read(path: Path) -> Entry | None:
    try:
        data = json.loads(path.read_text())
        return Entry(Path(data["folder"]), float(data["created"]), tuple(map(str, data["jobs"])))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def find(text: str, cwd: Path) -> Found:
    """The run that a person means by a folder, a name, a job id, or either of the last two with `_INDEX`.

    A text with a slash is a folder; a name below `runs/` here wins over one of the same name elsewhere. Raises
    `UsageError` if there is none, or more than one.
    """
    if "/" in text or text in (".", ".."):
        folder = (cwd / text).resolve()
        if is_run(folder):
            return Found(folder)
        raise UsageError(f"{folder} is not the folder of a run")
    if is_run(default_root(cwd) / text):
        return Found(default_root(cwd) / text)
    known = list(entries())
    if (job := _JOB.fullmatch(text)) is not None:
        of_job = [e.folder for e in known if job["name"] in e.jobs or text in e.jobs]
        if of_job:
            return Found(_only(of_job, text), _index(job))
    named = [e.folder for e in known if e.folder.name == text]
    if named:
        return Found(_only(named, text))
    if (element := _ELEMENT.fullmatch(text)) is not None:
        here = default_root(cwd) / element["name"]
        arrays = [here] if is_run(here) else [e.folder for e in known if e.folder.name == element["name"]]
        arrays = [folder for folder in arrays if (folder / "array.json").is_file()]
        if arrays:
            return Found(_only(arrays, text), _index(element))
    recent = ", ".join(e.folder.name for e in known[:5])
    raise UsageError(
        f"there is no run {text!r}; give a name, a job id or a folder (with a slash)"
        + (f"; the latest are {recent}" if recent else "") + "; launch ls lists them"
    )  # fmt: skip


def _index(match: re.Match[str]) -> int | None:
    return None if match["index"] is None else int(match["index"])


def _only(folders: list[Path], text: str) -> Path:
    if len(folders) > 1:
        raise UsageError(f"{text!r} names {len(folders)} runs: give the folder, one of {', '.join(map(str, folders))}")
    return folders[0]
