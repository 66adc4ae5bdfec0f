"""`--notify COMMAND`: a command of the person's own is told of a failure, a requeue and the end of a run.

It is a line for the shell, run in the run's working directory with the facts as LAUNCH_* in its environment and as JSON
on stdin; what it prints goes to `notify.log` in the run folder. It runs beside the run and has LIMIT_S seconds. The run
goes its way whatever becomes of it; how it ended is in events.jsonl.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from launcher.runs import RunFolder

__all__ = ["LIMIT_S", "Notices"]

LIMIT_S = 30.0
_MOST_OF_A_VARIABLE = 4096  # characters; the kernel takes 128 KiB, and stdin has the whole


@dataclass
class _Told:
    """One command that was started, or could not be."""

    event: str
    result: str | None = None
    process: subprocess.Popen[bytes] | None = None
    thread: threading.Thread | None = None


class Notices:
    """Of one run folder. Nothing happens where the run has no command."""

    def __init__(self, run: RunFolder) -> None:
        self._run = run
        self._under_way: list[_Told] = []

    @property
    def pids(self) -> list[int]:
        """Of the commands that may still run: they are no part of the run that is put down."""
        return [told.process.pid for told in self._under_way if told.process is not None and told.result is None]

    def tell(self, event: str, **facts: Any) -> None:
        """Start the command; returns once it runs. event: "failure" (another attempt follows), "requeue" or "end"."""
        run, command = self._run, self._run.spec.notify
        if command is None:
            return
        said = {"event": event, "run_id": run.run_id, "run_dir": str(run.path), "program": run.spec.program.target,
                "host": socket.gethostname(), "time": time.time(), **facts}  # fmt: skip
        told = _Told(event)
        self._under_way.append(told)
        try:
            told.process = _start(command, run.spec.cwd, run.path, said)
        except (OSError, ValueError) as error:
            told.result = f"could not be started: {error}"
            return
        told.thread = threading.Thread(target=_attend, args=(told, said), daemon=True, name=f"notify-{event}")
        told.thread.start()

    def wait(self, seconds: float = LIMIT_S, *, record: bool = True) -> list[str]:
        """Give those under way so much time; Ctrl-C ends the waiting. Returns what a person should hear of how they
        ended. record: whether the run folder is still ours to note it there.
        """
        troubles = []
        deadline = time.monotonic() + seconds
        for told in self._under_way:
            try:
                if told.thread is not None:
                    told.thread.join(max(0.0, deadline - time.monotonic()))
            except KeyboardInterrupt:  # the run has its exit code already
                deadline = time.monotonic()
            result = told.result or "still runs, and is no longer waited for"
            if record:
                self._run.event("notified", of=told.event, result=result)
            if result != "exit code 0":
                troubles.append(f"--notify, told of the {told.event}: {result} (notify.log in the run folder)")
        self._under_way.clear()
        return troubles


def _start(command: str, cwd: str, folder: Path, said: dict[str, Any]) -> subprocess.Popen[bytes]:
    # The token of the agents is nobody else's.
    environment = {name: value for name, value in os.environ.items() if name != "LAUNCH_TOKEN"}
    for name, value in said.items():
        text = "" if value is None else str(value).replace("\0", "")
        environment[f"LAUNCH_{name.upper()}"] = text[:_MOST_OF_A_VARIABLE]
    try:
        log = os.open(folder / "notify.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    except OSError:
        log = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    try:
        # A session of its own: Ctrl-C is for the run, and its end takes along whatever it has started.
        return subprocess.Popen(
            ["/bin/sh", "-c", command], cwd=cwd, env=environment, stdin=subprocess.PIPE, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip
    finally:
        os.close(log)


def _attend(told: _Told, said: dict[str, Any]) -> None:
    process = told.process
    assert process is not None
    try:
        process.communicate(json.dumps(said).encode() + b"\n", timeout=LIMIT_S)
        code = process.returncode
        told.result = f"exit code {code}" if code >= 0 else f"killed by signal {-code}"
    except subprocess.TimeoutExpired:
        told.result = f"ended after {LIMIT_S:g} s"
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
