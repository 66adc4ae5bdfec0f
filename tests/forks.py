"""Starts Python programs by forking a process that has imported torch and the trainer, which takes a rank 3 s else.

To a program it is `python program arguments` in a session of its own: an own `__main__`, environment, random state and
end of the interpreter. What stays that of the forked process is the seed of string hashes.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import random
import select
import subprocess
import sys
import tempfile
import types
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
_IMPORTED = (
    "torch", "torch.distributed.checkpoint", "torch.distributed.fsdp", "torch.distributed.tensor", "torch.profiler",
    "torch.utils.data", "trainer.callbacks", "trainer.checkpoint", "trainer.loggers", "trainer.trainer",
)  # fmt: skip


class Forks:
    """The process that is forked; nobody's child, as tests count theirs. Close it."""

    def __init__(self) -> None:
        environment = os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, __file__], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._process.wait()  # it has left its work to its own child

    def start(self, command: list[str], environment: dict[str, str], out: Path, err: Path) -> Fork:
        """Run a program; `out` and `err` are the files that take what it prints."""
        streams = [str(out), str(err)]
        pid = self.ask({"command": command, "folder": str(Path.cwd()), "environment": environment, "streams": streams})
        return Fork(self, pid, os.pidfd_open(pid))

    def ask(self, order: dict) -> int:
        """One exchange with the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError("the process that is forked for ranks has ended; see its error above")
        return int(answer)

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.read()  # until it has closed it
        self._process.stdout.close()


@dataclass
class Fork:
    """A program that was started."""

    forks: Forks
    pid: int
    descriptor: int
    returncode: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code (negative signal number if killed). Raises TimeoutExpired."""
        if self.returncode is None:
            ready, _, _ = select.select([self.descriptor], [], [], timeout)
            if not ready:
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0)
            os.close(self.descriptor)
            self.returncode = self.forks.ask({"reap": self.pid})
        return self.returncode


def serve() -> None:
    """Fork for each order that comes in; returns in each fork once its program has run to its end."""
    for name in _IMPORTED:
        importlib.import_module(name)
    assert len([*Path("/proc/self/task").iterdir()]) == 1, "a process with threads cannot be forked"
    for line in sys.stdin:
        order = json.loads(line)
        if "reap" in order:
            answer = os.waitstatus_to_exitcode(os.waitpid(order["reap"], 0)[1])
        elif (answer := os.fork()) == 0:
            run(**order)
            return
        print(answer, flush=True)
    os._exit(0)  # taking torch apart takes seconds


def run(command: list[str], folder: str, environment: dict[str, str], streams: list[str]) -> None:
    """Become what a fresh interpreter would be, and run a program."""
    os.setsid()
    os.chdir(folder)
    files = [os.open("/dev/null", os.O_RDONLY), *(os.open(path, os.O_WRONLY | os.O_APPEND) for path in streams)]
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None
    random.seed()
    sys.modules["numpy"].random.seed()
    if environment.get("PYTHONFAULTHANDLER"):
        faulthandler.enable()
    program = command[0]
    sys.argv, sys.path[0] = command, str(Path(program).parent)
    main = types.ModuleType("__main__")
    main.__file__ = program
    sys.modules["__main__"] = main
    exec(compile(Path(program).read_bytes(), program, "exec", dont_inherit=True), main.__dict__)


if __name__ == "__main__":
    if os.fork() == 0:
        serve()
