"""Fixtures for every test, first of all the leak police.

After each test no process, thread, socket, temporary file or environment variable may be left behind, and no
process group may stay initialised; otherwise the test fails and the leak is named. Nothing is cleaned up silently
on a test's behalf, except that leaked children are killed so that one leak does not fail the tests after it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from tests.forks import Fork, Forks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PROGRAMS = Path(__file__).parent / "programs"
REPO = Path(__file__).parent.parent

# Rank and launcher variables of an outer job would steer the code under test.
_FOREIGN = ("LAUNCH_", "TORCHELASTIC_", "PET_", "SLURM_", "SBATCH_", "SUBMITIT_")
_FOREIGN_NAMES = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"}
for _name in list(os.environ):
    if _name.startswith(_FOREIGN) or _name in _FOREIGN_NAMES:
        del os.environ[_name]
os.environ.setdefault("OMP_NUM_THREADS", "1")
# lightning writes this one when it is imported.
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"


def poll_until(condition: Callable[[], object], timeout: float = 20.0, what: str = "condition") -> object:
    """Return the first true value of `condition()`; fail the test, naming `what`, after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            pytest.fail(f"waited {timeout} s in vain for: {what}")
        time.sleep(0.01)


# ---------------------------------------------------------------------------------------------- leak police


def _children() -> dict[int, str]:
    found = {}
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            found[child.pid] = " ".join(child.cmdline()) or child.name()
    return found


def _sockets() -> set[str]:
    found = set()
    for fd in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            target = str(fd.readlink())
            if target.startswith("socket:"):
                found.add(target)
    return found


def _group_initialised() -> bool:
    torch_distributed = sys.modules.get("torch.distributed")
    return bool(
        torch_distributed is not None and torch_distributed.is_available() and torch_distributed.is_initialized()
    )


@pytest.fixture(autouse=True)
def leak_police(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Fail the test that leaves something behind, and say what."""
    # A private TMPDIR per worker: other programs of this machine write to /tmp at will.
    private = tmp_path_factory.getbasetemp() / "tmpdir"
    private.mkdir(exist_ok=True)
    tempfile.tempdir = None
    os.environ["TMPDIR"] = str(private)
    # torch's compiler makes a folder in TMPDIR and names it in the environment as soon as parts of it are imported.
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path_factory.getbasetemp() / "inductor")
    os.environ["XDG_STATE_HOME"] = str(tmp_path_factory.getbasetemp() / "state")  # launch's index of runs
    os.environ["XDG_CONFIG_HOME"] = str(tmp_path_factory.getbasetemp() / "config")  # nobody's own defaults
    os.environ["LAUNCH_SITE_CONFIG"] = ""
    environment = dict(os.environ)
    children, threads, sockets, files = (
        _children(),
        set(threading.enumerate()),
        _sockets(),
        {p.name for p in private.iterdir()},
    )
    handlers = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)}
    yield
    leaks: list[str] = []

    def settle(look: Callable[[], object], seconds: float = 2.0) -> object:
        """The leak that is still there after a moment: a dying thread or child is not one."""
        deadline = time.monotonic() + seconds
        while (found := look()) and time.monotonic() < deadline:
            time.sleep(0.02)
        return found

    left = settle(lambda: {p: c for p, c in _children().items() if p not in children})
    assert isinstance(left, dict)
    for pid, command in left.items():
        leaks.append(f"process {pid}: {command}")
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    dangling = settle(lambda: [t for t in threading.enumerate() if t not in threads and not _harmless(t)])
    leaks += [f"thread {t.name}" for t in dangling]  # type: ignore[attr-defined]
    if _group_initialised():
        leaks.append("torch.distributed process group")
        sys.modules["torch.distributed"].destroy_process_group()
    leaks += [f"socket {s}" for s in settle(lambda: _sockets() - sockets)]  # type: ignore[attr-defined]
    leaks += [f"temporary file {private / f}" for f in {p.name for p in private.iterdir()} - files]
    now = dict(os.environ)
    for name in sorted(environment.keys() | now.keys()):
        if name != "PYTEST_CURRENT_TEST" and environment.get(name) != now.get(name):
            leaks.append(f"environment variable {name}: {environment.get(name)!r} -> {now.get(name)!r}")
            if name in environment:
                os.environ[name] = environment[name]
            else:
                os.environ.pop(name, None)
    for number, handler in handlers.items():
        if signal.getsignal(number) is not handler:
            leaks.append(f"handler of {signal.Signals(number).name}: {signal.getsignal(number)}")
            signal.signal(number, handler)
    if leaks:
        pytest.fail("left behind by this test:\n  " + "\n  ".join(leaks), pytrace=False)


def _harmless(thread: threading.Thread) -> bool:
    # tqdm's monitor and torch's autograd pin thread are one per process, for the process's life.
    return thread.name == "tqdm_monitor" or type(thread).__name__ == "TMonitor"


# ------------------------------------------------------------------------------------------------- gangs


@dataclass(frozen=True)
class RankResult:
    """One finished rank: exit code (negative signal number if killed) and all that it printed."""

    rank: int
    returncode: int
    stdout: str
    stderr: str


def free_port() -> int:
    """A port that was free a moment ago (the ranks' store binds it a moment later)."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class Gang:
    """Starts real gloo ranks without our launcher. Even and odd ranks hash strings differently, as anywhere else."""

    def __init__(self, folder: Path, forks: list[Forks]) -> None:
        self.folder = folder
        self.forks = forks
        self.count = 0

    def __call__(
        self, n: int, program: str | Path, *args: str, env: dict[str, str] | None = None, timeout: float = 60
    ) -> list[RankResult]:
        path = Path(program) if Path(program).is_absolute() else PROGRAMS / program
        port, self.count = free_port(), self.count + 1
        ranks: list[tuple[Fork, list[Path]]] = []
        try:
            for rank in range(n):
                variables = os.environ | {
                    "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n),
                    "GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                    "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO),
                    "PYTHONFAULTHANDLER": "1",  # a rank that aborts says where
                } | (env or {})  # fmt: skip
                streams = [self.folder / f"gang{self.count}-{rank}.{kind}" for kind in ("out", "err")]
                for stream in streams:
                    stream.touch()
                forks = self.forks[rank % len(self.forks)]
                ranks.append((forks.start([str(path), *args], variables, *streams), streams))
            deadline = time.monotonic() + timeout
            for rank, (process, _) in enumerate(ranks):
                try:
                    process.wait(max(0.1, deadline - time.monotonic()))
                except subprocess.TimeoutExpired:
                    outputs = "\n".join(self._tail(r, s) for r, (_, s) in enumerate(ranks))
                    pytest.fail(f"rank {rank} of {path.name} still runs after {timeout} s\n{outputs}")
            return [
                RankResult(rank, process.wait(), *(stream.read_text() for stream in streams))
                for rank, (process, streams) in enumerate(ranks)
            ]
        finally:
            for process, _ in ranks:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def ok(
        self, n: int, program: str | Path, *args: str, env: dict[str, str] | None = None, timeout: float = 60
    ) -> list[RankResult]:
        """The same, and every rank must exit 0."""
        results = self(n, program, *args, env=env, timeout=timeout)
        bad = [r for r in results if r.returncode]
        if bad:
            pytest.fail("\n".join(f"rank {r.rank} exited {r.returncode}\n{r.stdout}\n{r.stderr}" for r in bad))
        return results

    @staticmethod
    def _tail(rank: int, streams: list[Path]) -> str:
        return f"--- rank {rank}\n" + "\n".join(stream.read_text()[-2000:] for stream in streams)


@pytest.fixture(scope="session")
def forks() -> Iterator[list[Forks]]:
    """Processes that have imported torch, to be forked."""
    both = [Forks(), Forks()]
    yield both
    for one in both:
        one.close()


@pytest.fixture
def gang(tmp_path: Path, forks: list[Forks]) -> Gang:
    """Start real gloo ranks: `gang.ok(2, "program.py", "--flag")`."""
    return Gang(tmp_path, forks)
