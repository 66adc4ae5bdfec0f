"""The run folder: one launch at a time, taken up again, never another's."""

from __future__ import annotations

import dataclasses
import json
import os
import stat
from pathlib import Path

import pytest

from launcher import runs
from launcher.errors import RunError, UsageError
from launcher.runs import RunFolder
from launcher.spec import LaunchSpec, Program


@pytest.fixture
def spec(tmp_path: Path) -> LaunchSpec:
    return LaunchSpec(Program("script", "job.py", ("--lr", "0.1")), str(tmp_path), procs=2)


def test_names_and_folders(tmp_path: Path) -> None:
    assert runs.resolve("first", tmp_path) == tmp_path / "runs" / "first"
    assert runs.resolve("./first", tmp_path) == tmp_path / "first"
    assert runs.resolve("/data/x", tmp_path) == Path("/data/x")
    assert runs.resolve("..", tmp_path) == tmp_path.parent
    for bad in ("", "a b", "-x", ".hidden", "ä", "a" * 129, "x\n"):
        with pytest.raises(UsageError, match="a folder is written with a slash"):
            runs.resolve(bad, tmp_path)
    names = {runs.new_name(Program("module", "package.train")) for _ in range(50)}
    assert len(names) > 45
    assert all(name.startswith("train-") and runs.resolve(name, tmp_path) for name in names)
    assert Program("script", "dir/my job (2).py").stem == "my-job-2"
    assert Program("script", "???.py").stem == "run"


def test_a_run_is_made_and_taken_up_again(tmp_path: Path, spec: LaunchSpec) -> None:
    path = tmp_path / "deep" / "run"
    with RunFolder.open(path, spec) as run:
        assert run.state() == {"status": "new", "attempt": -1}
        run.set_state(status="running", attempt=0)
        run.event("started", n=1)
        created = run.created
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    other = dataclasses.replace(spec, procs=4, program=Program("script", "job.py", ("--lr", "0.2")))
    with RunFolder.open(path, other) as run:  # resumed on more ranks
        assert (run.spec, run.created) == (other, created)
        assert run.state()["attempt"] == 0
        run.set_state(exit_code=75)
        assert run.state() == {**run.state(), "status": "running", "attempt": 0, "exit_code": 75}
        run.event("ended", n=2)
    with RunFolder.open(path, None) as run:
        assert run.spec == other
    assert [json.loads(line)["event"] for line in (path / "events.jsonl").read_text().splitlines()] == [
        "started",
        "ended",
    ]
    assert not [p for p in path.iterdir() if p.name.endswith(".tmp")]


def test_one_launch_at_a_time(tmp_path: Path, spec: LaunchSpec) -> None:
    with RunFolder.open(tmp_path / "run", spec):
        for again in (spec, None):
            with pytest.raises(RunError, match=rf"is being worked on by pid {os.getpid()} on "):
                RunFolder.open(tmp_path / "run", again)
    RunFolder.open(tmp_path / "run", spec).close()


def test_what_is_not_ours_is_left_alone(tmp_path: Path, spec: LaunchSpec) -> None:
    foreign = tmp_path / "data"
    foreign.mkdir()
    (foreign / "precious").write_text("x")
    with pytest.raises(RunError, match="exists and is not a run folder"):
        RunFolder.open(foreign, spec)
    assert [p.name for p in foreign.iterdir()] == ["precious"]
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunError):
        RunFolder.open(tmp_path / "file", spec)
    with pytest.raises(RunError, match="nothing to resume"):
        RunFolder.open(tmp_path / "none", None)
    assert not (tmp_path / "none").exists()


def test_a_run_of_another_program_is_not_taken_over(tmp_path: Path, spec: LaunchSpec) -> None:
    RunFolder.open(tmp_path / "run", spec).close()
    for other in (
        dataclasses.replace(spec, program=Program("script", "other.py")),
        dataclasses.replace(spec, program=Program("module", "job")),
        dataclasses.replace(spec, cwd="/"),
    ):
        with pytest.raises(RunError, match=r"is a run of job.py in .*choose another --run name"):
            RunFolder.open(tmp_path / "run", other)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 99, "spec": {}}', '{"version": 1, "spec": {"x": 1}}'])
def test_records_that_cannot_be_read_are_an_error(tmp_path: Path, spec: LaunchSpec, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises((RunError, UsageError)):
        RunFolder.open(tmp_path, spec)
    assert (tmp_path / "run.json").read_text() == text


def test_a_record_is_replaced_whole(tmp_path: Path, spec: LaunchSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state.json"
    runs.write_json(path, {"n": 1})
    with pytest.raises(TypeError):
        runs.write_json(path, {"n": object()})
    assert runs.read_json(path) == {"n": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["state.json"]


# ------------------------------------------------------------------------------------------- by the command


def test_stop_resume_finish(launch, programs) -> None:
    """Stopped with 75, resumed by name, stopped by itself, then finished; a finished run is not run again."""
    job = launch.start("--procs", "1", "--no-preload", "--run", "mine", programs / "patient.py", "leave75",
                       "--attempts", "1")  # fmt: skip
    job.says("rank 0 is ready in attempt 0")
    busy = launch("resume", "mine")
    assert busy.returncode == 2
    assert f"run mine is being worked on by pid {job.process.pid} on " in busy.stderr
    job.signal(15)
    assert job.wait().returncode == 75
    assert job.stderr.splitlines()[-1].endswith("go on with: launch resume mine")
    assert job.run.path == launch.cwd / "runs" / "mine"
    elsewhere = launch.cwd / "elsewhere"
    elsewhere.mkdir()
    again = launch.ok("resume", "../runs/mine", cwd=elsewhere)
    assert "run mine, attempt 1: 1 rank on 1 node" in again.stderr
    assert "rank 0 is ready in attempt 1" in again.stdout
    assert again.run.log(0, attempt=0)
    assert again.run.log(0, attempt=1)
    for arguments in (["resume", "mine"], ["--procs", "1", "--run", "mine", str(programs / "patient.py"), "leave75"]):
        done = launch.ok(*arguments)
        assert "run mine is finished already" in done.stderr
        assert done.stdout == ""
    assert not (job.run.path / "logs" / "attempt-2").exists()
    missing = launch("resume", "yours")
    assert missing.returncode == 2
    assert "there is no run 'yours'" in missing.stderr
    assert "the latest are mine;" in missing.stderr


def test_a_record_that_cannot_be_written_is_told_once_and_comes_later(tmp_path: Path, spec: LaunchSpec) -> None:
    path = tmp_path / "run"
    said: list[str] = []
    with RunFolder.open(path, spec) as run:
        run.bear(said.append)
        run.event("first")
        (path / "events.jsonl").rename(path / "kept")
        (path / "events.jsonl").symlink_to("/dev/full")
        run.event("lost", n=1)
        run.event("lost", n=2)
        run.set_state(status="running", attempt=3)
        assert run.gaps == (
            "the record of this run is incomplete: events.jsonl could not be written (No space left on device)"
        )
        (path / "kept").replace(path / "events.jsonl")
        run.event("last")
        assert run.gaps is None
    assert len(said) == 1
    assert said[0].startswith(f"{path}/events.jsonl cannot be written: No space left on device. The run goes on")
    lines = (path / "events.jsonl").read_text().splitlines()
    assert [json.loads(line)["event"] for line in lines] == ["first", "lost", "lost", "last"]


def test_before_a_run_begins_its_record_must_be_written(tmp_path: Path, spec: LaunchSpec) -> None:
    path = tmp_path / "run"
    with RunFolder.open(path, spec) as run:
        (path / "events.jsonl").symlink_to("/dev/full")
        with pytest.raises(OSError, match="No space left"):
            run.event("job")
    (path / "run.lock").unlink()
    (path / "run.lock").symlink_to("/dev/full")
    with pytest.raises(RunError, match=r"run cannot be written: .*; make room, or give another with --run"):
        RunFolder.open(path, spec)
