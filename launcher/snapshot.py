"""The code as it is now, kept for a job that begins later, and for every time that it begins again.

Kept are the files that git lists: tracked ones with their uncommitted edits, and untracked ones that are not ignored.
Programs and imports come from the copy; the working directory, and data in it, stay where they are.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import site
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from launcher.errors import RunError, UsageError
from launcher.runs import read_json, write_json
from launcher.spec import Code, LaunchSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["MOST_BYTES", "Survey", "kept", "survey"]

MOST_BYTES = 50_000_000


def kept(folder: Path) -> Code | None:
    """The snapshot that the run in `folder` has already; None if it has none, or there is no run."""
    record = read_json(folder / "run.json")
    return None if record is None else LaunchSpec.from_json(record["spec"]).code


@dataclass(frozen=True)
class Survey:
    """What a snapshot will hold: files below `root`, the repository."""

    root: Path
    names: tuple[str, ...]

    def copy(self, folder: Path) -> Code:
        """Copy the files to `folder`/code. Raises `RunError` if that cannot be.

        code.json has the commit, code.diff what differs from it in tracked files. A run that is launched again by hand
        gets code-2 of that day; retries and requeues keep what they have.
        """
        free = (folder / (f"code-{number}" if number > 1 else "code") for number in itertools.count(1))
        copy = next(path for path in free if not path.exists())
        try:
            _copy(self.root, self.names, copy)
            _record(self.root, copy)
        except OSError as error:
            shutil.rmtree(copy, ignore_errors=True)
            raise RunError(f"the snapshot {copy} cannot be written: {error}") from error
        return Code(str(self.root), str(copy))


def survey(spec: LaunchSpec, say: Callable[[str], None], *, insist: bool) -> Survey | None:
    """Look for the repository that the program is in; None, and a word of it, if it is in none.

    insist: the person asked for a snapshot, so that having none is an error. Raises `UsageError` also if the files are
    too large. What a snapshot cannot hold (editable installs that lead to the live code) is said.
    """
    cwd = Path(spec.cwd)
    place = (cwd / spec.program.target).resolve().parent if spec.program.kind == "script" else cwd
    root = _root_of(place)
    if root is None:
        why = f"{place} is in no git repository, so there is no snapshot of the code"
        if insist:
            raise UsageError(f"--snapshot: {why}; git init makes it one")
        say(f"{why}: the job runs it as it is then")
        return None
    names = _names(root)
    sizes = {name: (root / name).lstat().st_size for name in names}
    if sum(sizes.values()) > MOST_BYTES:
        _refuse(root, sizes)
    for name, where in _editable_installs(root):
        say(f"{name} is installed in editable mode from {where}: what the job imports of it is the live code, not the "
            "snapshot's, unless it lies beside the program")  # fmt: skip
    return Survey(root, tuple(names))


def _git(root: Path, *words: str) -> bytes | None:
    """What git prints; None if it fails, or is not there."""
    environ = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    try:
        done = subprocess.run(["git", "-C", root, *words], capture_output=True, check=False, env=environ)
    except FileNotFoundError:
        return None
    return done.stdout if done.returncode == 0 else None


def _root_of(place: Path) -> Path | None:
    answer = _git(place, "rev-parse", "--show-toplevel")
    return None if not answer else Path(os.fsdecode(answer.rstrip(b"\n")))


def _names(root: Path) -> list[str]:
    """The files to keep, below `root`; those of submodules too, those of run folders not."""
    answer = _git(root, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    listed = dict.fromkeys(os.fsdecode(name) for name in (answer or b"").split(b"\0") if name)
    runs = {os.path.dirname(name) for name in listed if os.path.basename(name) == "run.lock"}  # noqa: PTH119, PTH120
    names = []
    for name in listed:
        path = root / name
        if any(name.startswith(run + "/") for run in runs):
            continue
        if path.is_dir() and not path.is_symlink():
            names += [f"{name.rstrip('/')}/{below}" for below in _names(path)]  # a submodule
        elif path.is_symlink() or path.is_file():  # not: deleted, a socket
            names.append(name)
    return names


def _refuse(root: Path, sizes: dict[str, int]) -> None:
    largest = sorted(sizes.items(), key=lambda item: -item[1])[:5]
    listing = ", ".join(f"{name} ({size / 1e6:.1f} MB)" for name, size in largest)
    raise UsageError(
        f"the files that git lists in {root} are {sum(sizes.values()) / 1e6:.0f} MB, and a snapshot of the code holds "
        f"{MOST_BYTES / 1e6:.0f}; the largest: {listing}. Add data to .gitignore, or run "
        "the live code with --no-snapshot"
    )


def _copy(root: Path, names: Sequence[str], copy: Path) -> None:
    copy.mkdir(parents=True)
    for parent in {(copy / name).parent for name in names}:
        parent.mkdir(parents=True, exist_ok=True)
    for name in names:
        shutil.copy2(root / name, copy / name, follow_symlinks=False)


def _record(root: Path, copy: Path) -> None:
    commit = _git(root, "rev-parse", "HEAD")
    branch = _git(root, "rev-parse", "--abbrev-ref", "HEAD")
    diff = _git(root, "diff", "--binary", "HEAD") or b""
    copy.with_name(copy.name + ".diff").write_bytes(diff)
    write_json(
        copy.with_name(copy.name + ".json"),
        {
            "root": str(root),
            "commit": None if commit is None else commit.decode().strip(),
            "branch": None if branch is None else branch.decode().strip(),
            "edited": bool(diff),
        },
    )


def _editable_installs(root: Path) -> list[tuple[str, Path]]:
    """Distributions whose files are in `root` and that are not found by way of sys.path, which is redirected."""
    found = []
    for packages in map(Path, {*site.getsitepackages(), site.getusersitepackages()}):
        for record in packages.glob("*.dist-info/direct_url.json"):
            try:
                data = json.loads(record.read_text())
                where = Path(unquote(urlsplit(data["url"]).path))
                editable = data["dir_info"]["editable"] is True
            except (OSError, ValueError, KeyError):
                continue
            if editable and where.is_relative_to(root) and not _on_path(packages, where):
                found.append((record.parent.name.partition("-")[0], where))
    return sorted(found)


def _on_path(packages: Path, where: Path) -> bool:
    """Whether a .pth file puts the folder, or its src, on sys.path; else a finder of its own leads to it."""
    wanted = {str(where), str(where / "src")}
    return any(wanted & set(path.read_text(errors="replace").splitlines()) for path in packages.glob("*.pth"))
