"""The command of --notify: what it is told, and that a run goes its way whatever becomes of it."""

from __future__ import annotations

import json
import stat
from typing import TYPE_CHECKING

import pytest

from launcher import notices
from launcher.errors import UsageError
from launcher.runs import RunFolder
from launcher.spec import LaunchSpec, Program

if TYPE_CHECKING:
    from pathlib import Path


def spec(cwd: Path, command: str) -> LaunchSpec:
    return LaunchSpec(program=Program("script", "job.py"), cwd=str(cwd), notify=command)


def told(run: RunFolder) -> list[dict]:
    lines = [json.loads(line) for line in (run.path / "events.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == "notified"]


def test_facts_come_as_variables_and_as_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAUNCH_TOKEN", "of the agents")
    facts = "$LAUNCH_EVENT $LAUNCH_STATUS ($LAUNCH_FAULT) $LAUNCH_EXIT_CODE $LAUNCH_TOKEN"
    command = f'cat > told.json; echo "{facts}" > told.txt'
    with RunFolder.open(tmp_path / "run", spec(tmp_path, command)) as run:
        run.notices.tell("end", status="failed", cause='rank 1 said: it\'s "over"', fault=None, exit_code=3)
        assert run.notices.wait() == []
        assert [line["result"] for line in told(run)] == ["exit code 0"]
    assert (tmp_path / "told.txt").read_text() == "end failed () 3 \n"
    facts = json.loads((tmp_path / "told.json").read_text())
    assert facts["event"] == "end"
    assert facts["run_dir"] == str(tmp_path / "run")
    assert facts["cause"] == 'rank 1 said: it\'s "over"'
    assert facts["fault"] is None


@pytest.mark.parametrize(
    ("command", "result"),
    [("echo no such address >&2; exit 4", "exit code 4"), ("sleep 100 & wait", "ended after 0.2 s"),
     ("nothing-of-this-name", "exit code 127")],
)  # fmt: skip
def test_its_failure_is_told_and_harms_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, result: str
) -> None:
    monkeypatch.setattr(notices, "LIMIT_S", 0.2 if "sleep" in command else 30.0)
    with RunFolder.open(tmp_path / "run", spec(tmp_path, command)) as run:
        run.notices.tell("failure", attempt=0)
        (said,) = run.notices.wait(30)
        assert said == f"--notify, told of the failure: {result} (notify.log in the run folder)"
        assert [line["result"] for line in told(run)] == [result]
        assert stat.S_IMODE((run.path / "notify.log").stat().st_mode) == 0o600
        assert ("no such address" in (run.path / "notify.log").read_text()) == ("address" in command)


def test_a_folder_that_is_gone_is_no_reason_to_raise(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path / "run", spec(tmp_path / "gone", "true")) as run:
        run.notices.tell("end")
        (said,) = run.notices.wait()
        assert "could not be started: [Errno 2]" in said


def test_what_is_no_command(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--notify ' ': give a command for the shell"):
        spec(tmp_path, " ")


def test_a_failure_another_attempt_and_the_end(launch) -> None:
    job = launch.script("import os, sys\nsys.exit(0 if os.environ['LAUNCH_ATTEMPT'] == '1' else 5)\n")
    launched = launch.ok("--procs", "1", "--max-restarts", "1", "--notify", "cat >> told.jsonl; exit 9", job)
    lines = [json.loads(line) for line in (launch.cwd / "told.jsonl").read_text().splitlines()]
    assert [(line["event"], line["status"], line["attempt"]) for line in lines] == [
        ("failure", "failed", 0),
        ("end", "finished", 1),
    ]
    assert lines[0]["exit_code"] == 5
    assert lines[0]["fault"] == "user code"
    assert "launch: --notify, told of the end: exit code 9 (notify.log in the run folder)" in launched.stderr
