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
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from launcher.runs import RunFolder

__all__ = ["LIMIT_S", "Notices"]

LIMIT_S = 30.0


class Notices:
    """Of one run folder. Nothing happens where the run has no command."""

    def __init__(self, run: RunFolder) -> None:
        self._run = run
        self._under_way: list[tuple[threading.Thread, dict[str, Any]]] = []

    def tell(self, event: str, **facts: Any) -> None:
        """Start the command; returns at once. event: "failure" (another attempt follows), "requeue" or "end"."""
        run, command = self._run, self._run.spec.notify
        if command is None:
            return
        told = {"event": event, "run_id": run.run_id, "run_dir": str(run.path), "program": run.spec.program.target,
                "host": socket.gethostname(), "time": time.time(), **facts}  # fmt: skip
        became: dict[str, Any] = {"event": event}
        thread = threading.Thread(
            target=_run, args=(command, run.spec.cwd, run.path, told, became), daemon=True, name=f"notify-{event}"
        )
        thread.start()
        self._under_way.append((thread, became))

    def wait(self, seconds: float = LIMIT_S) -> list[str]:
        """Give those under way so much time, and record how they ended. Returns what a person should hear of that."""
        troubles = []
        deadline = time.monotonic() + seconds
        for thread, became in self._under_way:
            thread.join(max(0.0, deadline - time.monotonic()))
            result = became.get("result", f"still runs after {seconds:g} s")
            self._run.event("notified", of=became["event"], result=result)
            if result != "exit code 0":
                troubles.append(f"--notify, told of the {became['event']}: {result} (notify.log in the run folder)")
        self._under_way.clear()
        return troubles


def _run(command: str, cwd: str, folder: Path, told: dict[str, Any], became: dict[str, Any]) -> None:
    # The token of the agents is nobody else's.
    environment = {name: value for name, value in os.environ.items() if name != "LAUNCH_TOKEN"}
    environment |= {f"LAUNCH_{name.upper()}": "" if value is None else str(value) for name, value in told.items()}
    try:
        log = os.open(folder / "notify.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    except OSError:
        log = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    try:
        # A session of its own: Ctrl-C is for the run, and its end takes along whatever it has started.
        process = subprocess.Popen(
            ["/bin/sh", "-c", command], cwd=cwd, env=environment, stdin=subprocess.PIPE, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip
    except (OSError, ValueError) as error:
        became["result"] = f"could not be started: {error}"
        return
    finally:
        os.close(log)
    try:
        process.communicate(json.dumps(told).encode() + b"\n", timeout=LIMIT_S)
        became["result"] = f"exit code {process.returncode}"
    except subprocess.TimeoutExpired:
        became["result"] = f"ended after {LIMIT_S:g} s"
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
