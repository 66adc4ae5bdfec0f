"""`launch`: the real command in a real process, with a deadline, and nothing of it left afterwards."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PROGRAMS = Path(__file__).parent.parent / "programs"
COMMAND = Path(sys.executable).with_name("launch")
_MARK = "MUSTER_TEST_LAUNCH"  # every process of a launch inherits it, whatever it does to its parents


def until(condition: Callable[[], Any], what: str | Callable[[], str], timeout: float = 30.0) -> Any:
    """The first true value of `condition()`; the test fails, naming `what`, when the deadline passes."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        if time.monotonic() > deadline:
            pytest.fail(f"waited {timeout:g} s in vain for: {what() if callable(what) else what}")
        time.sleep(0.01)
    return value


def alive(pid: int) -> bool:
    """Whether the process still runs (a zombie has ended)."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


@dataclass(frozen=True)
class Record:
    """What a run folder says."""

    path: Path

    def json(self, name: str) -> dict[str, Any]:
        return json.loads((self.path / name).read_text())

    @property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.path / "events.jsonl").read_text().splitlines()]

    def log(self, rank: int, attempt: int = 0) -> str:
        return (
            (self.path / "logs" / f"attempt-{attempt}" / f"rank-{rank}.log")
            .read_bytes()
            .decode(errors="surrogateescape")
        )


class Launched:
    """One `launch` command that was started."""

    def __init__(self, process: subprocess.Popen[bytes], mark: str, out: Path, err: Path, cwd: Path) -> None:
        self.process = process
        self.mark = mark
        self._out, self._err, self.cwd = out, err, cwd

    @property
    def stdout(self) -> str:
        return self._out.read_bytes().decode(errors="surrogateescape")

    @property
    def stderr(self) -> str:
        return self._err.read_bytes().decode(errors="surrogateescape")

    @property
    def output(self) -> str:
        return f"--- stdout\n{self.stdout}\n--- stderr\n{self.stderr}"

    @property
    def returncode(self) -> int:
        assert self.process.returncode is not None
        return self.process.returncode

    @property
    def run(self) -> Record:
        found = re.search(r"folder (\S+)$", self.stderr, re.MULTILINE)
        assert found, f"no run folder was named\n{self.output}"
        return Record(Path(found[1]))

    def processes(self) -> dict[int, str]:
        """All processes of this launch that still run, with their role: launch, agent, zygote, or another's command."""
        found = {}
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if f"{_MARK}={self.mark}".encode() not in Path(f"/proc/{process.pid}/environ").read_bytes():
                    continue
                if process.status() == psutil.STATUS_ZOMBIE:
                    continue
                command = process.cmdline()
                role = " ".join(command)
                if process.pid == self.process.pid:
                    role = "launch"
                elif "launcher.agent" in role:
                    role = "agent" if process.ppid() == self.process.pid else "zygote or rank"
                found[process.pid] = role
        return found

    def of_role(self, role: str) -> list[int]:
        """The pids of one role; the zygote is the agent's child, the ranks are the zygote's."""
        agents = [pid for pid, what in self.processes().items() if what == "agent"]
        if role == "agent":
            return agents
        zygotes = [c.pid for pid in agents for c in psutil.Process(pid).children()]
        if role == "zygote":
            return zygotes
        assert role == "rank"
        return [c.pid for pid in zygotes for c in psutil.Process(pid).children()]

    def says(self, pattern: str, times: int = 1, timeout: float = 40.0) -> list[re.Match[str]]:
        """Wait until stdout and stderr together hold `pattern` so many times."""

        def look() -> list[re.Match[str]] | None:
            found = list(re.finditer(pattern, self.stdout + self.stderr))
            if len(found) < times and self.process.poll() is not None:
                found = list(re.finditer(pattern, self.stdout + self.stderr))
                if len(found) < times:
                    pytest.fail(f"launch left with {self.process.returncode} before saying {pattern!r}\n{self.output}")
            return found if len(found) >= times else None

        return until(look, lambda: f"{pattern!r} {times} time(s)\n{self.output}", timeout)

    def until(self, condition: Callable[[], Any], what: str, timeout: float = 30.0) -> Any:
        return until(condition, lambda: f"{what}\n{self.output}", timeout)

    def signal(self, number: int, pid: int | None = None) -> None:
        os.kill(self.process.pid if pid is None else pid, number)

    def wait(self, timeout: float = 60.0) -> Launched:
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            left = "\n".join(f"{pid} {what}" for pid, what in self.processes().items())
            pytest.fail(f"launch still runs after {timeout:g} s\n{self.output}\n--- processes\n{left}")
        return self

    def gone(self, within_s: float = 3.0) -> None:
        """Every process of this launch is gone."""
        until(lambda: not self.processes(), lambda: f"the end of {self.processes()}\n{self.output}", within_s)


class Launch:
    """`launch(args...)` runs the command to its end; `launch.start(args...)` leaves it running."""

    def __init__(self, cwd: Path) -> None:
        self.cwd = cwd
        self.cwd.mkdir(exist_ok=True)
        self._started: list[Launched] = []

    def start(
        self,
        *arguments: str | os.PathLike[str],
        env: dict[str, str] | None = None,
        cwd: Path | None = None,
        unset: tuple[str, ...] = (),
        stdin: int = subprocess.DEVNULL,
        shell: str | None = None,
    ) -> Launched:
        """`shell`: a command that a shell runs first, in the same process."""
        mark = uuid.uuid4().hex
        environment = {k: v for k, v in os.environ.items() if k not in unset} | {_MARK: mark}
        environment |= {"XDG_STATE_HOME": str(self.cwd.parent / "state")} | (env or {})  # a test lists its own runs
        before = [] if shell is None else ["sh", "-c", f'{shell}; exec "$@"', "sh"]
        count = len(self._started)
        out, err = (self.cwd.parent / f"launch-{count}.{kind}" for kind in ("out", "err"))
        with open(out, "wb") as stdout, open(err, "wb") as stderr:
            process = subprocess.Popen(
                [*before, COMMAND, *arguments], cwd=cwd or self.cwd, env=environment,
                stdin=stdin, stdout=stdout, stderr=stderr,
                start_new_session=True,
            )  # fmt: skip
        launched = Launched(process, mark, out, err, cwd or self.cwd)
        self._started.append(launched)
        return launched

    def __call__(self, *arguments: str | os.PathLike[str], timeout: float = 60.0, **settings: Any) -> Launched:
        launched = self.start(*arguments, **settings).wait(timeout)
        launched.gone()
        return launched

    def ok(self, *arguments: str | os.PathLike[str], timeout: float = 60.0, **settings: Any) -> Launched:
        launched = self(*arguments, timeout=timeout, **settings)
        assert launched.returncode == 0, launched.output
        return launched

    def script(self, text: str, name: str = "job.py") -> Path:
        path = self.cwd / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def close(self) -> None:
        """Kill what is left, and fail if a launch that had ended left anything."""
        left = {}
        for launched in self._started:
            if launched.process.poll() is not None:
                with contextlib.suppress(pytest.fail.Exception):
                    launched.gone()
                left |= launched.processes()
            for _ in range(3):
                for pid in launched.processes():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            launched.process.wait()
        assert not left, f"left behind by a launch that had ended: {left}"


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    launcher = Launch(tmp_path / "here")
    yield launcher
    launcher.close()


@pytest.fixture
def programs() -> Path:
    return PROGRAMS
