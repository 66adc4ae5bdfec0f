"""Defaults from files: which one wins, where it came from, and what no file may say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from launcher import config, options
from launcher.errors import UsageError
from launcher.request import parse
from launcher.where import Surroundings


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project with a folder below, a home, a site file; the working directory is the folder below."""
    here = tmp_path / "project" / "deep"
    here.mkdir(parents=True)
    (here / "job.py").write_text("pass")
    (tmp_path / "home" / ".config" / "launch").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.setenv("LAUNCH_SITE_CONFIG", str(tmp_path / "site.toml"))
    monkeypatch.chdir(here)
    return tmp_path


def write(project: Path, *, pyproject: str = "", launch: str = "", user: str = "", site: str = "") -> None:
    texts = {"project/pyproject.toml": pyproject, "project/launch.toml": launch,
             "home/.config/launch/config.toml": user, "site.toml": site}  # fmt: skip
    for name, text in texts.items():
        if text:
            (project / name).write_text(text)


def test_the_nearer_file_wins_and_the_command_line_over_all(project, monkeypatch) -> None:
    write(
        project,
        pyproject="[tool.launch]\ngrace = 4\nshow-ranks = 'all'\n[tool.other]\nx = 1",
        launch="grace = 5.5",
        user="grace = 6\nmax_failures = 2\npreload = 'torch,numpy'",
        site="grace = 7\nmax-failures = 3\npartition = 'gpu'\nmem = 16",
    )
    found = config.load(options.PARAMETERS, Path.cwd(), {"HOME": str(project / "home"),
                                                        "LAUNCH_SITE_CONFIG": str(project / "site.toml")})  # fmt: skip
    assert {name: (d.value, d.file.name) for name, d in found.items()} == {
        "grace": (5.5, "launch.toml"), "show_ranks": ("all", "pyproject.toml"),
        "max_restarts": (2, "config.toml"), "preload": ("torch,numpy", "config.toml"),
        "partition": ("gpu", "site.toml"), "mem": ("16", "site.toml"),
    }  # fmt: skip
    spec = parse(["job.py"]).spec
    assert (spec.grace_s, spec.max_restarts, spec.preload) == (5.5, 2, ("torch", "numpy"))
    assert spec.output.show_ranks is None
    monkeypatch.setenv("PET_MAX_RESTARTS", "9")
    spec = parse(["--grace", "1", "--no-preload", "job.py"]).spec
    assert (spec.grace_s, spec.max_restarts, spec.preload) == (1.0, 9, ())


def test_one_of_a_group_takes_back_the_others(project) -> None:
    write(project, user="procs = 3", site="gpus = 8")
    assert parse(["job.py"]).spec.procs == 3
    assert parse(["--nproc-per-node", "2", "job.py"]).spec.procs == 2


def test_defaults_for_slurm_submit_nothing_by_themselves(project) -> None:
    login, inside = Surroundings(sbatch=True), Surroundings(sbatch=True, job="7", nodes=2)
    write(project, site="partition = 'gpu'\nsetup = ['module load cuda']\nrequeue = 'no'\n"
                        "[sbatch]\ngres-flags = 'enforce-binding'\nexclusive = true\nlicenses = 'a:1'\n",
          user="sbatch = ['licenses=b:2']")  # fmt: skip
    assert parse(["job.py"], login).where == "here"
    request = parse(["--nodes", "2", "--sbatch", "nice=5", "job.py"], login)
    assert request.where == "job"
    assert request.spec.slurm is not None
    wanted = {"partition": "gpu", "gres-flags": "enforce-binding", "exclusive": True, "licenses": "b:2", "nice": "5"}
    assert wanted.items() <= request.spec.slurm.options.items()
    assert (request.spec.slurm.setup, request.spec.slurm.requeue) == (("module load cuda",), "no")
    write(project, launch="backend = 'slurm'")
    assert parse(["job.py"], login).where == "job"
    assert parse(["job.py"], inside).where == "allocation"
    assert parse(["--backend", "local", "job.py"], login).where == "here"
    with pytest.raises(UsageError, match=r"no sbatch on .*; --backend local runs here"):
        parse(["job.py"], Surroundings())


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("graze = 1", "'graze' is no default that can be set; allowed are .*grace.*sbatch"),
        ("nodes = 2", "'nodes' is no default"),
        ("rdzv-endpoint = 'x'", "'rdzv-endpoint' is no default"),
        ("procs = '4'", "procs = '4': give a whole number"),
        ("procs = true", "procs = true: give a whole number"),
        ("procs = 1.5", "procs = 1.5: give a whole number"),
        ("grace = 'long'", "grace = 'long': give a number"),
        ("no-preload = 1", "no-preload = 1: give true or false"),
        ("requeue = 'perhaps'", "requeue = 'perhaps': give one of 'yes', 'resubmit', 'no'"),
        ("setup = 'x'", "setup = 'x': give a list of texts"),
        ("sbatch = [1]", "give a list of texts, or a table"),
        ("sbatch = {x = [1]}", "the values are texts, numbers, or true"),
        ("partition = ['a']", "give a text"),
        ("max-failures = 1\nmax-restarts = 2", "said twice, under both of its names"),
        ("grace = = 1", "is no TOML"),
    ],
)
def test_what_no_file_may_say(project, text, error) -> None:
    write(project, user=text)
    with pytest.raises(UsageError, match=error) as caught:
        parse(["job.py"])
    assert str(project / "home/.config/launch/config.toml") in str(caught.value)


def test_launch_config_tells_where_from(project) -> None:
    write(project, launch="grace = 5", site="partition = 'gpu'\nno-preload = true")
    command = Path(sys.executable).with_name("launch")
    done = subprocess.run([command, "config"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    table = [line.split() for line in done.stdout.splitlines()]
    assert table[0] == ["OPTION", "VALUE", "FROM"]
    assert ["grace", "5.0", str(project / "project/launch.toml")] in table
    assert ["no-preload", "true", str(project / "site.toml")] in table
    assert [str(project / "home/.config/launch/config.toml"), "(not", "there)"] in table
    done = subprocess.run([command, "config", "--json"], capture_output=True, text=True, timeout=60)
    assert json.loads(done.stdout)["defaults"]["partition"] == {"value": "gpu", "file": str(project / "site.toml")}
