"""The package as users get it: a wheel in an environment of its own, far from the repository."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
TYPED = """\
import launcher
from launcher import Job


def area(width: int, height: int) -> int:
    return width * height


job: Job[int] = launcher.submit(area, 2, 3, procs=1)
results: list[int] = job.results()
"""


def say(*command: str | Path, cwd: Path) -> str:
    # Nothing of the repository, and nobody's own environment: as in a shell where only the new one is active.
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONDONTWRITEBYTECODE")}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_wheel_works_in_an_environment_of_its_own(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("launcher", "trainer"):
        shutil.copytree(REPO / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPO / name, source / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    say(*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", tmp_path, source, cwd=tmp_path)
    (wheel,) = tmp_path.glob("muster-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"launcher/py.typed", "trainer/py.typed"} <= {*names}
    assert {name.split("/")[0].split("-")[0] for name in names} == {"launcher", "trainer", "muster"}

    place = tmp_path / "env"
    venv.create(place)
    python = place / "bin" / "python"
    say(*pip, "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    (site,) = place.glob("lib/python*/site-packages")
    # What it depends on comes from the environment of this test; a path in a .pth brings none of that one's own hooks.
    (site / "theirs.pth").write_text(sysconfig.get_path("purelib") + "\n")

    stated = re.search(r'^version = "(.+)"$', (REPO / "pyproject.toml").read_text(), re.MULTILINE)
    assert stated
    here = tmp_path / "here"
    here.mkdir()
    assert say(place / "bin" / "launch", "--version", cwd=here) == f"launch (muster {stated[1]})\n"
    assert "Usage: launch [options]" in say(place / "bin" / "launch", "--help", cwd=here)
    (here / "job.py").write_text("import trainer as T\nprint(T.Trainer.__name__, T.__file__)\n")
    told = say(place / "bin" / "launch", "--procs", "2", "job.py", cwd=here)
    assert f"[0] Trainer {site}/trainer/__init__.py" in told

    (here / "typed.py").write_text(TYPED)
    mypy = [sys.executable, "-m", "mypy", "--strict", "--python-executable", python, "--cache-dir", tmp_path / "cache"]
    say(*mypy, "typed.py", cwd=here)
    (here / "typed.py").write_text(TYPED.replace("list[int]", "list[str]"))
    wrong = subprocess.run([*mypy, "typed.py"], cwd=here, capture_output=True, text=True, timeout=200)
    assert 'has type "list[int]", variable has type "list[str]"' in wrong.stdout


@pytest.mark.slow
@pytest.mark.parametrize("version", ["3.10", "3.11", "3.12", "3.13"])
def test_every_module_compiles(version: str, tmp_path: Path) -> None:
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    # pyenv's own first: what stands on PATH may be its stand-in for versions that are not switched on.
    python = next(iter(pyenv.glob(f"{version}.*/bin/python3")), None) or shutil.which(f"python{version}")
    if python is None:
        pytest.skip(f"there is no Python {version} here")
    for name in ("launcher", "trainer", "examples"):
        shutil.copytree(REPO / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    say(python, "-W", "error", "-m", "compileall", "-q", tmp_path, cwd=tmp_path)
