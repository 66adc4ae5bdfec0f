"""How the launcher's own processes are started: fresh interpreters that find it wherever it was installed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.channel import Channel, pair

if TYPE_CHECKING:
    from launcher.spec import LaunchSpec

__all__ = ["agent_command", "launch_apart", "python_command", "spawn_agent", "spec_pipe", "stop_signals"]

_ROOT = str(Path(__file__).resolve().parent.parent)
# The launcher must be found wherever it was installed, and nothing of it may be importable by accident: neither the
# working directory nor the launcher's own folder may stay on sys.path.
# (With PYTHONSAFEPATH python -c puts no working directory first, and nothing may be replaced.)
_BOOTSTRAP = """
import sys
sys.path[: not getattr(sys.flags, "safe_path", False)] = [{root!r}]
from {module} import bootstrap
del sys.path[0]
bootstrap()
"""


def python_command(module: str, *words: str) -> list[str]:
    """A command that runs `bootstrap()` of one of the launcher's own modules in a fresh interpreter."""
    return [sys.executable, "-c", _BOOTSTRAP.format(root=_ROOT, module=module), *words]


def agent_command(*where: str) -> list[str]:
    return python_command("launcher.agent", *where)


def spawn_agent(
    environment: dict[str, str], *, cwd: str, own_session: bool, module: str = "launcher.agent"
) -> tuple[Channel, subprocess.Popen[bytes]]:
    """Start an agent, or what else is started as one, on this machine, connected by a socket pair: no port, no token.

    It must not outlive this process.
    """
    ours, theirs = pair()
    fd = theirs.sock.fileno()
    process = subprocess.Popen(
        python_command(module, "fd", str(fd)),
        pass_fds=(fd,),
        env=environment | {"LAUNCH_STARTER_PID": str(os.getpid())},
        cwd=cwd,
        start_new_session=own_session,
    )
    theirs.close()
    return ours, process


def launch_apart(path: Path) -> subprocess.Popen[bytes]:
    """A launch of its own that goes on with the run, or array, in `path`; it outlives this process. What it says goes
    to launch.log there.
    """
    with open(path / "launch.log", "ab") as log:
        return subprocess.Popen(
            python_command("launcher.cli", "retry", str(path)),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def spec_pipe(data: dict[str, Any]) -> int:
    """A descriptor from which an agent reads its node's own spec."""
    read, write = os.pipe()
    with open(write, "w") as file:
        json.dump(data, file)
    return read


def stop_signals(spec: LaunchSpec) -> set[signal.Signals]:
    """The signals that ask for a stop, less those that whoever started us has ignored: `nohup launch ...`."""
    return {s for name in spec.stop_signals if signal.getsignal(s := signal.Signals[name]) is not signal.SIG_IGN}
