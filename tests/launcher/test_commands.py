"""ls, show, logs, wait, cancel on local runs: what the records say, and a run that is asked to leave."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from launcher import commands, history, index, standing
from launcher.arrays import Array
from launcher.commands import table
from launcher.errors import LaunchError, UsageError
from launcher.progress import Progress
from launcher.runs import RunFolder
from launcher.spec import LaunchSpec, Program


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def said(*arguments: str, code: int = 0) -> str:
    """What a command prints, called in this process."""

    @click.command(context_settings={"ignore_unknown_options": True, "help_option_names": []})
    @click.argument("argv", nargs=-1, type=click.UNPROCESSED)
    def call(argv: tuple[str, ...]) -> None:
        sys.exit(commands.run(argv[0], argv[1:]))

    done = CliRunner().invoke(call, arguments)
    if isinstance(done.exception, LaunchError):
        raise done.exception
    assert done.exit_code == code, done.output
    return done.stdout


def make(here: Path, name: str, *, args: tuple[str, ...] = (), procs: int = 2) -> RunFolder:
    run = RunFolder.open(here / "runs" / name, LaunchSpec(Program("script", "job.py", args), str(here), procs=procs))
    index.register(run.path, run.created)
    return run


def tell(run: RunFolder, event: str, at: float, **values: object) -> None:
    with open(run.path / "events.jsonl", "a") as file:
        file.write(json.dumps({"time": at, "event": event} | values) + "\n")


def page(step: int, began: int | None = None, saved: int | None = None) -> dict[str, object]:
    return Progress(step, began, saved, None if saved is None else 0.5).to_json()


def test_the_story_of_a_run(here: Path) -> None:
    """Five attempts: failed, requeued after a wait, killed without a word, failed before its first step, finished."""
    with make(here, "story") as run:
        tell(run, "attempt", 100.0, attempt=0, world_size=2, hosts=["n1", "n2"])
        tell(run, "attempt-failed", 200.0, attempt=0, cause="rank 1 exited with code 3", progress=page(100, 0, 80))
        tell(run, "attempt", 201.0, attempt=1, world_size=2, hosts=["n1"])
        tell(run, "end", 301.0, attempt=1, status="stopped", code=75, cause="preempted", progress=page(150, 80, 150))
        tell(run, "requeued", 301.0)
        tell(run, "attempt", 331.0, attempt=2, world_size=2, hosts=["n3"])
        with open(run.path / "events.jsonl", "a") as file:
            file.write('{"time": 340.0, "ev')  # the power went
        with open(run.path / "events.jsonl", "a") as file:
            file.write("\n")
        tell(run, "attempt", 400.0, attempt=3, world_size=2, hosts=["n3"])
        tell(run, "attempt-failed", 410.0, attempt=3, cause="rank 0 exited with code 1", progress=None)
        tell(run, "attempt", 410.0, attempt=4, world_size=2, hosts=["n3"])
        tell(
            run, "end", 510.0, attempt=4, status="finished", code=0, cause="all ranks exited 0", progress=page(250, 150)
        )
        run.set_state(status="finished", attempt=4, exit_code=0, cause="all ranks exited 0")
    past = history.read(run.path)
    assert [a.status for a in past.attempts] == ["failed", "stopped", "lost", "failed", "finished"]
    assert [a.lost_steps for a in past.attempts] == [20, 0, None, None, 0]
    assert [a.waited_s for a in past.attempts] == [0.0, 1.0, 30.0, 0.0, 0.0]
    assert [a.ran_s for a in past.attempts] == [100.0, 100.0, None, 10.0, 100.0]
    assert past.lost_steps == 20
    # Of 310 s running and 31 s waiting, 80 + 100 + 100 s made steps that count.
    assert past.goodput == pytest.approx(280 / 341)
    text = said("show", "story")
    assert "story  finished" in text
    assert "goodput 82%" in text
    assert "20 steps" in text
    assert "rank 1 exited with code 3" in text
    assert "nobody was left to record its end" in text
    (whole,) = json.loads(said("show", "story", "--json"))
    assert [a["resumed_step"] for a in whole["history"]["attempts"]] == [0, 80, None, None, 150]
    assert all(len(line) <= 80 for line in text.splitlines() if str(here) not in line)


@pytest.mark.parametrize(
    ("end", "lost"),
    [
        ({"status": "failed", "progress": page(70, 0, 50)}, 20),  # from its last save, if it goes on
        ({"status": "failed", "progress": page(70, 40)}, 30),  # it saved nothing: back to where it began
        ({"status": "stopped", "progress": page(70, 40, 70)}, 0),
        ({"status": "stopped", "progress": page(70, 40, 50), "code": 75}, 0),  # code 75: it saved where it stopped
        ({"status": "failed", "progress": None}, None),
    ],
)
def test_what_a_last_attempt_lost(here: Path, end: dict, lost: int | None) -> None:
    with make(here, "r") as run:
        tell(run, "attempt", 100.0, attempt=0, world_size=2)
        tell(run, "end", 200.0, **{"attempt": 0, "code": 1, "cause": "", **end})
    assert history.read(run.path).lost_steps == lost


@pytest.mark.parametrize(
    ("told", "cause", "shown"),
    [
        ("SIGTERM; ranks were killed", "preempted", "preempted; ranks were killed"),
        ("SIGTERM", "unknown", "SIGTERM while Slurm's controller was away"),
        ("SIGTERM", None, "SIGTERM"),
        ("time limit", "preempted", "time limit"),
    ],
)
def test_slurm_says_afterwards_what_a_signal_was_for(here: Path, told: str, cause: str | None, shown: str) -> None:
    with make(here, "r") as run:
        tell(run, "job", 1.0, submitted=0.0)
        tell(run, "attempt", 2.0, attempt=0, world_size=2)
        tell(run, "end", 3.0, attempt=0, status="stopped", code=75, cause=told)
        tell(run, "job-end", 4.0, cause=cause)
        # A life without an attempt says nothing of the one before.
        tell(run, "job", 5.0, submitted=0.0)
        tell(run, "job-end", 6.0, cause="cancelled")
    assert [a.cause for a in history.read(run.path).attempts] == [shown]


def test_an_attempt_that_runs_tells_how_far_it_is(here: Path) -> None:
    with make(here, "r") as run:
        tell(run, "attempt", 1.0, attempt=0, world_size=2)
        run.set_state(status="running", attempt=0, pid=1, pid_start=1, host="another-host", progress=page(35, 0, 30))
        (attempt,) = json.loads(said("show", "r", "--json"))[0]["history"]["attempts"]
        assert (attempt["status"], attempt["last_step"], attempt["lost_steps"]) == ("running", 35, None)
        assert "0-35" in said("show", "r")


def test_how_runs_stand(here: Path) -> None:
    for name, status, code in (("ok", "finished", 0), ("bad", "failed", 3), ("paused", "stopped", 75)):
        with make(here, name) as run:
            run.set_state(status=status, attempt=0, exit_code=code, cause=f"cause of {name}")
    with make(here, "fresh"):
        pass
    with make(here, "elsewhere") as run:
        run.set_state(status="running", attempt=0, pid=1, pid_start=1, host="another-host")
    with make(here, "lost") as run:
        run.set_state(status="running", attempt=2, pid=os.getpid(), pid_start=1, host=os.uname().nodename)
    found = {s["name"]: s for s in json.loads(said("ls", "--json"))}
    assert {name: s["status"] for name, s in found.items()} == {
        "ok": "finished", "bad": "failed", "paused": "stopped", "fresh": "stopped", "elsewhere": "running",
        "lost": "lost",
    }  # fmt: skip
    assert found["elsewhere"]["cause"] == "as another-host recorded it"
    text = said("ls", "bad", "lost")
    assert text.splitlines()[0].split() == ["NAME", "STATE", "JOB", "AGE", "RANKS", "TRY", "WHY"]
    assert "exit 3: cause of bad" in text
    assert said("ls", "-n", "2").count("\n") == 3
    assert "elsewhere" in said("ls", "--open")
    assert said("wait", "ok") == ""
    said("wait", "ok", "bad", "paused", code=3)
    said("wait", "paused", "bad", code=75)
    said("wait", "lost", code=1)
    assert json.loads(said("cancel", "ok", "--json")) == [{"name": "ok", "did": "is over already (finished)"}]
    assert "runs on another-host: say launch cancel there" in said("cancel", "ok", "elsewhere", code=1)
    assert json.loads(said("wait", "elsewhere", "--timeout", "0", "--json", code=124))[0]["status"] == "running"


def test_an_array_is_the_sum_of_its_elements(here: Path) -> None:
    spec = LaunchSpec(Program("script", "job.py", ("--x",)), str(here))
    array = Array.create(here / "runs" / "grid", spec, {i: (f"--lr={i}",) for i in range(4)}, 2)
    index.register(array.path, array.created)
    for number, status in enumerate(("finished", "failed", "running")):
        with array.open(number) as run:
            run.set_state(status=status, attempt=0, exit_code=number, cause="c", pid=os.getpid(),
                          pid_start=standing.start_ticks(os.getpid()), host=os.uname().nodename)  # fmt: skip
    (whole,) = json.loads(said("ls", "--json"))
    assert (whole["status"], whole["cause"]) == ("running", "1 finished, 1 running, 1 stopped, 1 failed")
    assert [e["program"] for e in whole["elements"]][3] == "job.py --x --lr=3"
    assert json.loads(said("show", "grid_1", "--json"))[0]["status"] == "failed"
    assert "never began" in said("ls", "grid")
    assert "1 finished, 1 running, 1 stopped, 1 failed" in said("show", "grid")
    with pytest.raises(UsageError, match="is an array: name one element, like grid_0"):
        said("logs", "grid")
    with pytest.raises(LaunchError, match="has no element 9"):
        said("show", "grid_9")
    # Told to the process that runs the array, which is none.
    assert "no launch works on it any more" in said("cancel", "grid", code=1)


def test_logs(here: Path) -> None:
    with make(here, "talk") as run:
        for attempt, rank, text in ((0, 0, "old\n"), (1, 0, "a\nb\nc\nhalf"), (1, 1, "x\ny\n" * 40000)):
            (run.logs(attempt) / f"rank-{rank}.log").write_text(text)
        run.set_state(status="finished", attempt=1, exit_code=0)
    assert said("logs", "talk", "--attempt", "0") == "old\n"
    assert said("logs", "talk", "-r", "0") == said("logs", "talk", "-r", "0", "-f") == "a\nb\nc\nhalf\n"
    both = said("logs", "talk").splitlines()
    assert both[:5] == ["[0] a", "[0] b", "[0] c", "[0] half", "[1] x"]
    assert len(both) == 4 + 80000
    assert said("logs", "talk", "-n", "2") == "[0] c\n[0] half\n[1] x\n[1] y\n"
    assert json.loads(said("logs", "talk", "-n1", "--json").splitlines()[-1]) == {"attempt": 1, "rank": 1, "line": "y"}
    with pytest.raises(UsageError, match="has no attempt 7; it has 0, 1"):
        said("logs", "talk", "--attempt", "7")
    with pytest.raises(UsageError, match="no log of rank 5; it has those of ranks 0 to 1"):
        said("logs", "talk", "--rank", "5")
    with make(here, "silent"), pytest.raises(UsageError, match="has no logs yet"):
        said("logs", "silent")


def test_lengths_of_time_and_tables() -> None:
    assert [table.duration(s) for s in (None, 0.4, 59, 60, 3599, 3600, 172799, 172800)] == [
        "-", "0s", "59s", "1m00s", "59m59s", "1h00m", "47h59m", "2d00h",
    ]  # fmt: skip
    assert table.lines(("A", "B"), [("1", "long text")], columns=8, right=("A",)) == ["A  B", "1  long…"]


STAGED = """
import os, signal, sys, time
rank, attempt = os.environ["RANK"], int(os.environ["LAUNCH_ATTEMPT"])
print("attempt", attempt, "rank", rank, flush=True)
if attempt == 0:
    sys.exit(5)
signal.signal(signal.SIGTERM, lambda *_: (print("saved", flush=True), os._exit(75)))
print("ready", flush=True)
while True: time.sleep(60)
"""


def test_follow_wait_and_cancel_a_run_that_restarts(launch) -> None:
    script = launch.script(STAGED)
    running = launch.start("--procs", "2", "--max-restarts", "1", "--run", "mine", script)
    running.says("restarting")
    follower = launch.start("logs", "-f", "mine")
    waiter = launch.start("wait", "mine")
    follower.says("ready", times=2)
    assert re.search(r"^mine +running ", launch.ok("ls").stdout, re.MULTILINE)
    assert launch.ok("cancel", "mine").stdout.startswith("mine: asked to save and leave (SIGTERM to pid ")
    assert running.wait().returncode == waiter.wait().returncode == follower.wait().returncode == 75
    for rank in (0, 1):
        assert f"[{rank}] attempt 1 rank {rank}" in follower.stdout
        assert f"[{rank}] saved" in follower.stdout
    shown = launch.ok("show", "mine").stdout
    assert "cancelled by" in shown
    assert "exited with code 5" in shown


def test_a_killed_launch_is_lost(launch) -> None:
    script = launch.script("import time\nprint('up', flush=True)\nwhile True: time.sleep(60)")
    running = launch.start("--no-preload", "--procs", "1", "--run", "mine", script)
    running.says("up")
    running.signal(signal.SIGKILL)
    running.wait()
    running.gone()
    assert launch("wait", "mine").returncode == 1
    assert "lost" in launch.ok("ls").stdout


def test_commands_import_nothing_heavy() -> None:
    code = (
        "import sys, launcher.cli\n"
        "try: launcher.cli.main(sys.argv[1:])\n"
        "finally: print(sorted({'torch', 'submitit', 'rich', 'numpy', 'cloudpickle', 'asyncio'} & set(sys.modules)),"
        " file=sys.stderr)\n"
    )
    for words in (["ls"], ["show", "--help"], ["logs", "--help"], ["wait", "--help"], ["cancel", "--help"]):
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=60)
        assert done.stderr.splitlines()[-1] == "[]", done.stderr
        assert done.returncode == 0


def test_a_reader_that_leaves_is_no_error(here: Path) -> None:
    with make(here, "long") as run:
        (run.logs(0) / "rank-0.log").write_text("line\n" * 200000)
    command = f"'{Path(sys.executable).with_name('launch')}' logs '{run.path}' | head -1"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("line\n", "")
