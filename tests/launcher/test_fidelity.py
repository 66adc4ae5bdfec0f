"""A rank is what `python program` would be: the same program is run both ways, and what each saw is compared."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launcher.stacks import SIGNAL

# The interpreter of the `launch` command, under the name that its first line gives it.
_PYTHON = str(Path(sys.executable).with_name("launch").read_text().splitlines()[0].removeprefix("#!"))


def _plain(launch, arguments: list[str], environment: dict[str, str], probe: Path) -> tuple[dict[str, Any], str]:
    """The probe under the plain interpreter, its streams on pipes and stdin on /dev/null like a rank's."""
    done = subprocess.run(
        [_PYTHON, *arguments], cwd=launch.cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        env=environment | {"PROBE": str(probe)}, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads((probe.parent / f"{probe.name}.{environment['RANK']}").read_text()), done.stdout


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {k: v for key, below in value.items() for k, v in _flat(below, f"{path}.{key}").items()} or {path: {}}
    return {path: value}


KINDS = {
    "script": ["probe.py"],
    "link": ["../here/./link.py"],
    "module": ["-m", "package.inner.probe"],
    "package": ["-m", "package"],
    "folder": ["app"],
    "zip": ["./app.zip"],
}


@pytest.fixture
def tree(launch, programs: Path) -> Path:
    """A working directory with the probe as script, as module, as package, as folder and as archive."""
    here = launch.cwd
    for folder in ("package/inner", "app", "elsewhere"):
        (here / folder).mkdir(parents=True)
    for target in ("probe.py", "package/inner/probe.py", "package/__main__.py", "app/__main__.py", "elsewhere/real.py"):
        shutil.copy(programs / "probe.py", here / target)
    for target in ("package/__init__.py", "package/inner/__init__.py"):
        (here / target).touch()
    (here / "link.py").symlink_to("elsewhere/real.py")
    shutil.make_archive(str(here / "app"), "zip", here / "app")
    return here


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.soak if kind in ("link", "folder") else []) for kind in KINDS]
)
def test_a_forked_rank_sees_what_a_fresh_interpreter_sees(launch, tree: Path, tmp_path: Path, kind: str) -> None:
    heavy = kind == "script"
    args = [
        "one",
        "two words",
        *(["--torch"] if heavy else []),
        *(["--processes"] if kind in ("script", "module") else []),
    ]
    how = [] if heavy else ["--preload", "json"]
    unbuffered = kind == "module"
    job = launch.ok(
        "--procs", "2", *how, "--show-ranks", "all", *KINDS[kind], *args, unset=("PYTHONUNBUFFERED",),
        env={"PROBE": str(tmp_path / "probe"), **({"PYTHONUNBUFFERED": "1"} if unbuffered else {})},
    )  # fmt: skip
    ranks = [json.loads((tmp_path / f"probe.{rank}").read_text()) for rank in (0, 1)]
    other, mine = ranks
    environment = mine["own"]["environment"]
    fresh, stdout = _plain(launch, [*KINDS[kind], *args], environment, tmp_path / "fresh")

    wanted, got = _flat(fresh["seen"]), _flat(mine["seen"])
    # Line by line, so that a killed rank has lost nothing (worker.py).
    assert got.pop(".streams.stdout.line_buffering") is not unbuffered
    assert wanted.pop(".streams.stdout.line_buffering") is False
    # By which it tells where it is (watching.py), and where it writes that.
    (stacks,) = (name for name, file in mine["seen"]["files"].items() if file == "memfd" and int(name) >= 200)
    assert got.pop(f".signals.{int(SIGNAL)}") != wanted.pop(f".signals.{int(SIGNAL)}")
    del got[f".files.{stacks}"]
    if not fresh["seen"]["files"]:
        del wanted[".files"]
    assert {k: (v, got.get(k, "missing")) for k, v in wanted.items() if got.get(k, "missing") != v} == {}
    assert got.keys() == wanted.keys()
    assert {k: v for k, v in mine["seen"].items() if not k.startswith("pool")} == other["seen"]

    for name in ("random", "authkey", "temp", "uuid", *(["numpy", "initial_seed"] if heavy else [])):
        assert len({r["own"][name] for r in (mine, other, fresh)}) == 3, name
    assert mine["own"]["session"]
    assert mine["own"]["loaded"] == (["numpy", "torch"] if heavy else [])
    ended = [line for line in stdout.splitlines() if line]
    assert ended[0] == "printed, not flushed"[:20]
    for rank in (0, 1):
        assert job.run.log(rank).splitlines() == ended


def test_loader_workers_start_in_every_way(launch, programs: Path, tmp_path: Path) -> None:
    script = shutil.copy(programs / "probe.py", launch.cwd)
    launch.ok("--procs", "1", script, "--torch", env={"PROBE": str(tmp_path / "probe"), "LOADERS": "yes"})
    own = json.loads((tmp_path / "probe.0").read_text())["own"]
    for method in (None, "fork", "forkserver", "spawn"):
        assert own[f"loader {method}"] == [[0, 1], [4, 9], [16, 25]]


def test_what_the_environment_holds(launch, programs: Path, tmp_path: Path) -> None:
    """Nothing of the launcher's own that a program did not have anyway, under --no-preload as well."""
    shutil.copy(programs / "probe.py", launch.cwd)
    found = {}
    for how in (["--preload", "json"], ["--no-preload"]):
        launch.ok(
            "--procs",
            "2",
            *how,
            "probe.py",
            env={"PROBE": str(tmp_path / "probe")},
            unset=("OMP_NUM_THREADS", "PYTHONUNBUFFERED"),
        )
        found[how[0]] = json.loads((tmp_path / "probe.1").read_text())
    given = {
        "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0",
        "GROUP_WORLD_SIZE": "1", "ROLE_NAME": "default", "ROLE_RANK": "1", "ROLE_WORLD_SIZE": "2", "NODE_RANK": "0",
        "MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_MAX_RESTARTS": "0",
        "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1", "OMP_NUM_THREADS": "1",
        "LAUNCH_ATTEMPT": "0", "LAUNCH_GRACE_S": "30", "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    varies = {"MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_ERROR_FILE", "LAUNCH_RUN_ID", "LAUNCH_RUN_DIR",
              "LAUNCH_PROGRESS"}  # fmt: skip
    for how, probe in found.items():
        environment = probe["own"]["environment"]
        new = {k: v for k, v in environment.items() if os.environ.get(k) != v or k == "PYTHONUNBUFFERED"}
        for name in ("PROBE", "MUSTER_TEST_LAUNCH", "XDG_STATE_HOME", "LC_CTYPE", *varies):
            new.pop(name, None)
        if how == "--no-preload":
            assert new.pop("PYTHONUNBUFFERED") == "1"
        assert new == {k: v for k, v in given.items() if os.environ.get(k) != v}, how
        assert varies <= environment.keys()
    assert found["--preload"]["seen"]["main"] == found["--no-preload"]["seen"]["main"]
    assert found["--preload"]["seen"]["orig_argv"] == found["--no-preload"]["seen"]["orig_argv"]


def test_every_way_to_end(launch, programs: Path) -> None:
    """Exit code and last words of each ending are those of the plain interpreter."""
    listing = subprocess.run(
        [_PYTHON, "-c", "import endings; print(*endings.ENDINGS)"], cwd=programs, capture_output=True, text=True
    )
    endings = listing.stdout.split()
    script = str(programs / "endings.py")
    job = launch("--procs", str(len(endings)), "--preload", "json", script, "all", unset=("PYTHONUNBUFFERED",))
    codes = {
        rank: int(code)
        for code, ranks in job.run.events[-1]["exits"].items()
        for rank in ranks
    }  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    for rank, ending in enumerate(endings):
        plain = subprocess.run(
            [_PYTHON, script, ending], cwd=launch.cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            env=environment, timeout=30,
        )  # fmt: skip
        got, wanted = job.run.log(rank), plain.stdout + plain.stderr
        address = re.compile(r"0x[0-9a-f]+")
        assert sorted(address.sub("@", got).splitlines()) == sorted(address.sub("@", wanted).splitlines()), ending
        assert codes[rank] == plain.returncode, ending


def test_ranks_share_nothing_that_is_random(launch, programs: Path) -> None:
    """Two forked ranks with torch: own seeds, one thread each; a module named launcher beside the script is found."""
    shutil.copy(programs / "meets_itself.py", launch.cwd)
    (launch.cwd / "launcher.py").write_text("WHOSE = 'the user'\n")
    job = launch.ok("--procs", "2", "meets_itself.py", unset=("OMP_NUM_THREADS",), env={"PYTHONWARNINGS": "ignore"})
    one, two = json.loads(job.stdout.removeprefix("[0] "))
    for name in ("random", "numpy", "torch", "seed"):
        assert one[name] != two[name], name
    for rank in (one, two):
        assert rank["launcher"] == "the user"
        assert (rank["threads"], rank["omp"]) == (1, "1")
        assert (rank["cuda"], rank["visible"], rank["elastic"], rank["stdin"]) == (False, 0, True, "")
        assert rank["warn"] == ["ignore"]


def test_one_rank_has_all_processors_and_stdin(launch, programs: Path) -> None:
    shutil.copy(programs / "meets_itself.py", launch.cwd)
    (launch.cwd / "launcher.py").write_text("WHOSE = 'the user'\n")
    (launch.cwd / "input").write_text("from the pipe")
    with open(launch.cwd / "input") as file:
        job = launch.ok("--procs", "1", "meets_itself.py", unset=("OMP_NUM_THREADS",), stdin=file.fileno())
    (one,) = json.loads(job.stdout.removeprefix("[0] "))
    assert one["stdin"] == "from the pipe"
    assert one["omp"] is None
    code = "import torch; print(torch.get_num_threads())"
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    fresh = subprocess.run([_PYTHON, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert one["threads"] == int(fresh.stdout)
