"""A list of machines without a scheduler: this process supervises, and the system's own ssh starts an agent on each.

All messages go through ssh: no port, no token, nothing that a firewall or another user could get at. The user's ssh
configuration holds, with its aliases, jump hosts and keys; a connection is made once per host and run.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from launcher.channel import Channel, pair
from launcher.errors import LaunchError, UsageError
from launcher.processes import become_subreaper
from launcher.starting import python_command
from launcher.supervisor import Supervisor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from launcher.gang import Outcome
    from launcher.runs import RunFolder
    from launcher.spec import LaunchSpec

__all__ = ["Machines", "run"]

# What makes the interpreter and its libraries the same as here. Values reach the other side through ssh alone.
TRAVELLING = re.compile(
    r"PATH|LD_LIBRARY_PATH|VIRTUAL_ENV|CONDA_(PREFIX|DEFAULT_ENV)|(PYTHON|NCCL_|GLOO_|TORCH|OMP_|MKL_|PL_TRAINER_)\w*"
)
# Any login shell reads this word as it is, and all else comes behind it: one line of Python, not a command line for all
# users of the host to see.
_FIRST = "import os;exec(b''.join(iter(lambda:os.read(0,1),bytes([10]))))"
_SECOND = """
import os, sys
environment, cwd, command = {data!r}
os.environ.update(environment)
try:
    os.chdir(cwd)
    os.execv(command[0], command)
except OSError as error:
    sys.exit(f"launch: {{error.filename or cwd}}: {{error.strerror}} on this host")
"""
_CONNECT_S = 10
_AT_ONCE = 16
# What ssh says where the other side was just too busy: sshd takes 10 logins at a time and drops more by chance.
_BUSY = re.compile(
    r"kex_exchange_identification|Connection (closed|reset) by|ssh_exchange_identification|banner exchange"
)
_STORY = 12


class Machines:
    """The hosts of a spec. folder: where ssh's own words go; sockets: an empty folder of this run's own; module: whose
    `bootstrap` is started there.
    """

    def __init__(self, spec: LaunchSpec, folder: Path, sockets: Path, module: str = "launcher.agent") -> None:
        assert spec.ssh is not None
        self.names: Sequence[str] = spec.ssh.hosts
        self._spec = spec
        self._env = spec.ssh.env
        self._folder = folder
        self._sockets = sockets
        self._module = module
        self._shares: dict[str, bool] = {}
        self._said: dict[int, int] = {}  # where in its file the latest way to a node began
        folder.mkdir(mode=0o700, exist_ok=True)

    # ------------------------------------------------------------------------------------------ for the supervisor

    def start(self, node: int, environment: dict[str, str]) -> tuple[Channel, subprocess.Popen[bytes]]:
        travels = {n: v for n, v in environment.items() if TRAVELLING.fullmatch(n) or n in self._env}
        travels["LAUNCH_NODE_RANK"] = str(node)
        return self._python(node, travels, self._spec.cwd, python_command(self._module, "stdio"))

    def fence(self, node: int, pid: int, started: int) -> subprocess.Popen[bytes]:
        link, process = self._python(node, {}, "/", python_command("launcher.fence", str(pid), str(started)))
        link.close()
        return process

    def _python(
        self, node: int, environment: dict[str, str], cwd: str, command: list[str]
    ) -> tuple[Channel, subprocess.Popen[bytes]]:
        ours, theirs = pair()
        with self._story(node) as log:
            self._said[node] = log.tell()
            process = subprocess.Popen(
                [*self._ssh(node), f"exec {shlex.quote(sys.executable)} -c {shlex.quote(_FIRST)}"],
                stdin=theirs.fileno(), stdout=theirs.fileno(), stderr=log, start_new_session=True,
            )  # fmt: skip
        theirs.close()
        text = _SECOND.format(data=(environment, cwd, command))
        with contextlib.suppress(ConnectionError):  # ssh has already left, and says why
            ours.sock.sendall(f"exec({text!r})\n".encode(errors="surrogateescape"))
        return ours, process

    def why(self, node: int, code: int) -> str:
        said = self._words(node)
        if code == 127:
            return f"there is no {sys.executable}: install the same environment at the same place ({said})"
        if "No module named 'launcher" in said:
            return f"{sys.executable} has no launcher: install the same environment at the same place"
        how = f"ssh ended with code {code}" if code >= 0 else f"ssh was killed by signal {-code}"
        if code == 255:
            how = "no longer answers" if not said else ""
        return ": ".join(filter(None, [how, said]))

    def passing(self, node: int, code: int) -> bool:
        return code == 255 and _BUSY.search(self._words(node)) is not None

    # ------------------------------------------------------------------------------------------ files

    def send(self, files: Path, nodes: Sequence[int]) -> None:
        """Unpack a tar file at / on other hosts, and make the working directory there. Raises `UsageError`."""
        self._on_all(nodes, f"mkdir -p {shlex.quote(self._spec.cwd)} && tar -C / -xf -", files)

    def missing(self, path: Path) -> list[int]:
        """The nodes on which there is no such file. Raises `UsageError` with those that cannot be reached."""
        nodes = range(len(self.names))
        found = self._on_all(nodes, f"test -e {shlex.quote(str(path))} || echo absent", None)
        return [node for node, said in zip(nodes, found, strict=True) if said]

    def fetch(self, path: Path, nodes: Iterable[int]) -> None:
        """Bring a folder of other hosts here, of several at once; files that are here stay. Raises `LaunchError` that
        names those whose folder is not here, once all others are.
        """
        path.mkdir(mode=0o700, exist_ok=True)

        def came(node: int) -> bool:
            words = [*self._ssh(node), f"cd {shlex.quote(str(path))} && tar -cf - ."]
            with subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as source:
                done = subprocess.run(
                    ["tar", "-C", path, "--skip-old-files", "-xf", "-"], stdin=source.stdout, check=False
                )
            return source.returncode == done.returncode == 0

        asked = list(nodes)
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            absent = [self.names[node] for node, here in zip(asked, pool.map(came, asked), strict=True) if not here]
        if absent:
            raise LaunchError(f"{path} of {', '.join(absent)} could not be brought here")

    def _on_all(self, nodes: Sequence[int], line: str, stdin: Path | None) -> list[bytes]:
        """Run a line of sh on hosts side by side; what each printed."""

        def on(node: int) -> bytes | LaunchError:
            with open(os.devnull if stdin is None else stdin, "rb") as source:
                done = subprocess.run(
                    [*self._ssh(node), f"exec sh -c {shlex.quote(line)}"],
                    stdin=source,
                    capture_output=True,
                    check=False,
                )
            if done.returncode:
                said = done.stderr.decode(errors="replace").strip() or f"ssh ended with code {done.returncode}"
                return UsageError(f"{self.names[node]}: {said}")
            return done.stdout

        with ThreadPoolExecutor(_AT_ONCE) as pool:
            found = list(pool.map(on, nodes))
        problems = [str(one) for one in found if isinstance(one, LaunchError)]
        if problems:
            raise UsageError("; ".join(problems))
        return [one for one in found if isinstance(one, bytes)]

    # ------------------------------------------------------------------------------------------ ssh

    def _ssh(self, node: int) -> list[str]:
        options = {
            "BatchMode": "yes",
            "ConnectTimeout": str(_CONNECT_S),
            "ServerAliveInterval": "1",
            "ServerAliveCountMax": "4",
        }
        name = self.names[node]
        if name not in self._shares:
            self._shares[name] = _shares(name)
        if not self._shares[name]:
            options |= {"ControlMaster": "auto", "ControlPath": f"{self._sockets}/%C", "ControlPersist": "10"}
        return ["ssh", "-T", *(word for k, v in options.items() for word in ("-o", f"{k}={v}")), "--", name]

    def _log(self, node: int) -> Path:
        return self._folder / f"node-{node}.log"

    def _story(self, node: int) -> BinaryIO:
        try:
            return open(self._log(node), "ab")
        except OSError:  # a full disk: no reason not to go there
            return open(os.devnull, "ab")

    def _words(self, node: int) -> str:
        """What ssh and the host said on the latest way there, the last lines."""
        try:
            with open(self._log(node), "rb") as log:
                log.seek(self._said.get(node, 0))
                lines = log.read().decode(errors="replace").strip().splitlines()
        except FileNotFoundError:
            return ""
        return "; ".join(line.strip() for line in lines[-_STORY:])


def _shares(name: str) -> bool:
    """Whether the user has connections of their own to share, perhaps because a login takes a second factor."""
    done = subprocess.run(["ssh", "-G", "--", name], capture_output=True, text=True, check=False)
    return bool(re.search(r"^controlpath (?!none$)", done.stdout, re.MULTILINE))


def run(folder: RunFolder, say: Callable[[str], None]) -> Outcome:
    """Run all nodes on the hosts of the spec. To be called in a process of its own, as `local.run`."""
    become_subreaper()
    spec = folder.spec
    assert spec.ssh is not None
    # Paths of sockets hold 107 bytes, and 40 of them are ssh's hash.
    with tempfile.TemporaryDirectory(prefix="launch-", dir="/tmp") as sockets:
        machines = Machines(spec, folder.path / "ssh", Path(sockets))
        apart = _bring(machines, folder, say) if spec.ssh.sync else []
        supervisor = Supervisor(folder, local=tuple(range(spec.places)), say=say, fleet=machines)
        try:
            return supervisor.work()
        finally:
            try:
                machines.fetch(folder.path / "logs", apart)
            except (LaunchError, OSError) as error:
                say(f"{error}; they are still there")


def _bring(machines: Machines, folder: RunFolder, say: Callable[[str], None]) -> list[int]:
    """Copy the code to hosts that do not share the run folder; returns these nodes."""
    mark = folder.path / f"mark-{os.getpid()}"
    mark.touch()
    try:
        apart = machines.missing(mark)
    finally:
        mark.unlink()
    if apart:
        assert folder.spec.code is not None
        with tempfile.NamedTemporaryFile(suffix=".tar") as file:
            copy = folder.spec.code.copy.lstrip("/")
            subprocess.run(["tar", "-C", "/", "-cf", file.name, copy], check=True)
            say(f"copying {Path(file.name).stat().st_size / 1e6:.1f} MB of code to {len(apart)} host(s)")
            machines.send(Path(file.name), apart)
    return apart
