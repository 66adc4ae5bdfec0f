"""What runs is the code as it was: edits included, ignored files not, from any folder, by any kind of program."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
from pathlib import Path

import pytest

from launcher import snapshot
from launcher.errors import UsageError
from launcher.runs import RunFolder
from launcher.spec import LaunchSpec, Program

PROGRAM = """
import json, os, subprocess, sys
import beside, package.part, lib.inner
code = "import package.part as p; print(p.VALUE)"
child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
print(json.dumps({"values": [VALUE, beside.VALUE, package.part.VALUE, lib.inner.VALUE, child.stdout.strip()],
                  "cwd": os.getcwd(), "data": open("data.bin").read(), "argv": sys.argv[1:]}))
"""


def git(folder: Path, *words: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "protocol.file.allow=always"]
    return subprocess.run(["git", "-C", folder, *identity, *words], check=True, capture_output=True, text=True).stdout


def value(text: str) -> str:
    return f"VALUE = {text!r}\n"


@pytest.fixture
def repo(tmp_path):
    """A repository with a submodule, a package, an ignored file, an edit, an untracked file, a run folder."""
    root, other = tmp_path / "repo", tmp_path / "other"
    for folder in (root / "package", other):
        folder.mkdir(parents=True)
    git(other, "init", "-q")
    (other / "inner.py").write_text(value("committed"))
    git(other, "add", "-A")
    git(other, "commit", "-qm", "inner")
    git(root, "init", "-q")
    (root / ".gitignore").write_text("*.bin\n")
    (root / "job.py").write_text("VALUE = 'committed'\n" + PROGRAM)
    (root / "beside.py").write_text(value("committed"))
    (root / "package" / "part.py").write_text(value("committed"))
    (root / "gone.py").write_text("")
    git(root, "submodule", "-q", "add", str(other), "lib")
    git(root, "add", "-A")
    git(root, "commit", "-qm", "first")
    (root / "beside.py").write_text(value("edited"))
    (root / "gone.py").unlink()
    (root / "new.py").write_text(value("untracked"))
    (root / "new.py").chmod(0o755)
    (root / "link").symlink_to("new.py")
    (root / "data.bin").write_text("live")
    (root / "runs" / "old").mkdir(parents=True)
    (root / "runs" / "old" / "run.lock").touch()
    (root / "runs" / "old" / "weights").touch()
    return root


def take(root: Path, folder: Path, program: Program | None = None) -> Path:
    spec = LaunchSpec(program or Program("script", "job.py"), str(root))
    found = snapshot.survey(spec, print, insist=True)
    assert found is not None
    return Path(found.copy(folder).copy)


def test_what_is_kept(repo: Path, tmp_path: Path) -> None:
    copy = take(repo, tmp_path / "run")
    kept = {str(p.relative_to(copy)) for p in copy.rglob("*") if not p.is_dir()}
    assert kept == {
        ".gitignore",
        ".gitmodules",
        "job.py",
        "beside.py",
        "package/part.py",
        "lib/inner.py",
        "new.py",
        "link",
    }
    assert (copy / "beside.py").read_text() == value("edited")
    assert os.readlink(copy / "link") == "new.py"  # noqa: PTH115
    assert os.access(copy / "new.py", os.X_OK)
    record = json.loads((tmp_path / "run" / "code.json").read_text())
    assert record["commit"] == git(repo, "rev-parse", "HEAD").strip()
    assert record["edited"] is True
    assert "+VALUE = 'edited'" in (tmp_path / "run" / "code.diff").read_text()
    assert take(repo, tmp_path / "run").name == "code-2"


def test_too_large_names_the_largest(repo: Path, tmp_path: Path) -> None:
    with open(repo / "weights.pt", "wb") as file:
        file.truncate(snapshot.MOST_BYTES + 1)
    with pytest.raises(UsageError, match=r"50 MB.*weights.pt \(50.0 MB\).*--no-snapshot"):
        take(repo, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_without_git(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = LaunchSpec(Program("script", "job.py"), str(tmp_path))
    assert snapshot.survey(spec, print, insist=False) is None
    assert "is in no git repository" in capsys.readouterr().out
    with pytest.raises(UsageError, match="git init makes it one"):
        snapshot.survey(spec, print, insist=True)


def test_an_editable_install_is_warned_of(repo: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    record = tmp_path / "site" / "mine-1.0.dist-info" / "direct_url.json"
    record.parent.mkdir(parents=True)
    record.write_text(json.dumps({"url": repo.as_uri(), "dir_info": {"editable": True}}))
    monkeypatch.setattr("site.getsitepackages", lambda: [str(tmp_path / "site")])
    take(repo, tmp_path / "run")
    assert "mine is installed in editable mode" in capsys.readouterr().out
    (tmp_path / "site" / "mine.pth").write_text(f"{repo}\n")  # that folder on sys.path is redirected
    take(repo, tmp_path / "run")
    assert "editable" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("program", "preload"), [(Program("script", "job.py", ("--x", "a b")), ("torch",)), (Program("module", "job"), ())]
)
def test_program_and_imports_come_from_the_snapshot(launch, repo: Path, program: Program, preload) -> None:
    """Changed since, the live code is not looked at; data is."""
    (repo / "job.py").write_text("VALUE = 'kept'\n" + PROGRAM)
    path = launch.cwd / "runs" / "r"
    spec = LaunchSpec(program, str(repo), preload=preload)
    with RunFolder.open(path, spec) as run:
        found = snapshot.survey(spec, print, insist=True)
        assert found is not None
        run.change_spec(dataclasses.replace(spec, code=found.copy(path)))
    (repo / "job.py").unlink()
    (repo / "package" / "part.py").write_text(value("live"))
    (repo / "beside.py").unlink()
    (repo / "lib" / "inner.py").write_text(value("live"))
    done = launch.ok("resume", "r", env={"PYTHONPATH": str(repo)})
    said = json.loads(done.stdout.split("[0] ", 1)[1])
    assert said["values"] == ["kept", "edited", "committed", "committed", "committed"]
    assert (said["cwd"], said["data"], said["argv"]) == (str(repo), "live", list(program.args))
