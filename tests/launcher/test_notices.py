"""The command of --notify: what it is told, and that a run goes its way whatever becomes of it."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import pytest

from launcher import notices
from launcher.backends import slurm_job
from launcher.backends.slurm_requeue import Ledger, Verdict
from launcher.errors import UsageError
from launcher.gang import Outcome
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


def test_what_is_too_long_for_a_variable_is_whole_on_stdin(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path / "run", spec(tmp_path, "cat > told.json; echo ${#LAUNCH_CAUSE} > told.txt")) as run:
        run.notices.tell("end", cause="x" * 200_000 + "\0")
        assert run.notices.wait() == []
    assert (tmp_path / "told.txt").read_text() == "4096\n"
    assert len(json.loads((tmp_path / "told.json").read_text())["cause"]) == 200_001


def test_a_killed_command_has_no_exit_code(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path / "run", spec(tmp_path, "kill -9 $$")) as run:
        run.notices.tell("end")
        (said,) = run.notices.wait()
        assert "killed by signal 9" in said


def test_ctrl_c_ends_the_waiting_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with RunFolder.open(tmp_path / "run", spec(tmp_path, "mkfifo go; cat go")) as run:
        run.notices.tell("end")
        (pid,) = run.notices.pids
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "join", interrupted)
            (said,) = run.notices.wait()
        os.killpg(pid, signal.SIGKILL)
        assert "is no longer waited for" in said


def test_what_is_put_down_with_a_run_is_not_its_notice(tmp_path: Path) -> None:
    """In a process of its own, whose children are all its own."""
    code = (
        "import subprocess, sys\n"
        "from pathlib import Path\n"
        "from launcher.processes import become_subreaper, end_descendants\n"
        "from launcher.runs import RunFolder\n"
        "from launcher.spec import LaunchSpec, Program\n"
        "become_subreaper()\n"
        "here = Path(sys.argv[1])\n"
        "spec = LaunchSpec(program=Program('script', 'job.py'), cwd=str(here), notify='mkfifo go; (cat go; exit 3)')\n"
        "with RunFolder.open(here / 'run', spec) as run:\n"
        "    run.notices.tell('failure')\n"
        "    rank = subprocess.Popen(['sleep', '600'])\n"
        "    end_descendants(spared=run.notices.pids)\n"
        "    assert rank.wait() is not None\n"
        "    while not (here / 'go').exists():\n"
        "        pass\n"
        "    (here / 'go').write_text('')\n"
        "    print(run.notices.wait())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True, timeout=60
    )
    assert "told of the failure: exit code 3" in done.stdout


def test_an_end_by_an_error_is_told(launch) -> None:
    job = launch.script("print('up')\n")
    conf = "--rdzv-endpoint=127.0.0.1:0", "--rdzv-conf=join_timeout=1,is_host=1"
    failed = launch("--nodes", "2", "--procs", "1", *conf, "--notify", "cat > told.json", job)
    assert failed.returncode != 0
    told = json.loads((launch.cwd / "told.json").read_text())
    assert (told["event"], told["status"], told["exit_code"]) == ("end", "failed", failed.returncode)
    assert "did not come within 1 s" in told["cause"]


class Requeued:
    """A job whose requeue is all that is asked of it. As Slurm's own, it can be told from the order of events alone."""

    class slurm:
        requeue = "scontrol"

    job_id, restart, batch, requeues, stop = "7", 0, True, True, None

    class before:
        job_id, submit = "7", 1.0

    def __init__(self, go: Path) -> None:
        self.go = go

    def failed_nodes(self) -> dict[str, str]:
        return {}

    def requeue(self, _: list[str]) -> None:
        os.kill(os.getpid(), signal.SIGTERM)  # as Slurm sends it then
        self.go.write_text("")


def test_a_requeue_does_not_wait_for_its_notice(tmp_path: Path) -> None:
    """The command waits for the requeue here, which therefore has to come first."""
    os.mkfifo(tmp_path / "go")
    old = signal.getsignal(signal.SIGTERM)
    try:
        with RunFolder.open(tmp_path / "run", spec(tmp_path, "cat go > told; echo done >> told")) as run:
            verdict = Verdict(True, "preempted", Ledger())
            slurm_job._conclude(run, Requeued(tmp_path / "go"), Outcome("stopped", 75, "x"), verdict, print)  # type: ignore[arg-type]
    finally:
        signal.signal(signal.SIGTERM, old)
    assert (tmp_path / "told").read_text() == "done\n"


def test_what_is_no_command(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--notify ' ': give a command for the shell"):
        spec(tmp_path, " ")


def test_a_failure_another_attempt_and_the_end(launch) -> None:
    job = launch.script("import os, sys\nsys.exit(0 if os.environ['LAUNCH_ATTEMPT'] == '1' else 5)\n")
    slow = "sleep 0.5; cat >> told.jsonl; exit 9"  # longer than it takes to put a run down
    launched = launch.ok("--procs", "1", "--max-restarts", "1", "--notify", slow, job)
    lines = [json.loads(line) for line in (launch.cwd / "told.jsonl").read_text().splitlines()]
    assert [(line["event"], line["status"], line["attempt"]) for line in lines] == [
        ("failure", "failed", 0),
        ("end", "finished", 1),
    ]
    assert lines[0]["exit_code"] == 5
    assert lines[0]["fault"] == "user code"
    assert "launch: --notify, told of the end: exit code 9 (notify.log in the run folder)" in launched.stderr
