"""Hosts on one machine: each has its own network, name, processes, shared memory and /etc/hosts, and nothing else.

A host is a set of kernel namespaces kept alive by one process, its init. The init of a host with processes of its own
is pid 1 in there, so that killing it is the end of everything that ever ran on the host. Neither the bridge nor
anything else shows on this machine's own network, and the kernel removes it all with the last init.

Hosts are found again by the name that their init carries in /proc, so a session that crashed leaves nothing that the
next one could not find.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

SUBNET = "10.77.0"
HEAD = "head"  # the host that holds the bridge


class LabError(Exception):
    """The lab cannot be built or does not behave: says what was tried and what came back."""


def wait_for(condition: Callable[[], object], timeout: float, what: str) -> object:
    """The first true value of `condition()`; `LabError` that names `what` after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise LabError(f"waited {timeout:g} s in vain for {what}")
        time.sleep(0.05)
    return value


def command(*words: str | Path) -> str:
    """Run a command of the machine to its end and return what it printed; `LabError` if it fails."""
    done = subprocess.run(list(map(str, words)), stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        raise LabError(f"{shlex.join(map(str, words))}: exit {done.returncode}: {done.stderr.strip() or done.stdout}")
    return done.stdout


@dataclass(frozen=True)
class Process:
    """A process on a host, with its pid as this machine sees it."""

    pid: int
    command: str


def processes() -> Iterator[int]:
    return (int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit())


def _arguments(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
    except OSError:
        return []


def _namespace(pid: int, kind: str) -> str | None:
    try:
        return str(Path(f"/proc/{pid}/ns/{kind}").readlink())
    except OSError:
        return None


def kill_below(pid: int) -> None:
    """SIGKILL to every descendant of a process."""
    found = _children(pid)
    for child in found:  # grows while it is walked
        found += _children(child)
    for child in found:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)


def _children(pid: int) -> list[int]:
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += map(int, (task / "children").read_text().split())
    return found


@dataclass(frozen=True)
class Host:
    """A running host: `pid` is its init's, as this machine sees it."""

    name: str
    pid: int
    own_pids: bool

    def enter(self, *, cwd: str | Path = "/", environment: dict[str, str] | None = None) -> list[str]:
        """The words to put before a command so that it runs on this host.

        On a host without processes of its own the started process becomes the command itself: same pid, so signals
        reach it. On the others a process stays outside that only waits for it.
        """
        kinds = ["--net", "--uts", "--mount", "--ipc"] + (["--pid", "--time"] if self.own_pids else [])
        words = ["nsenter", "--target", str(self.pid), *kinds, "env", "--chdir", str(cwd)]
        if environment is not None:
            words += ["-i", *(f"{name}={value}" for name, value in environment.items())]
        return words

    def run(self, *words: str | Path) -> str:
        """Run a command on the host to its end and return what it printed; `LabError` if it fails."""
        return command(*self.enter(), *words)

    def processes(self) -> list[Process]:
        """Everything that runs on the host, but its init."""
        kind = "pid" if self.own_pids else "net"
        inside = _namespace(self.pid, kind)
        if inside is None:
            return []
        found = [pid for pid in processes() if pid != self.pid and _namespace(pid, kind) == inside]
        named = [Process(pid, " ".join(words)) for pid in found if (words := _arguments(pid))]
        return sorted(named, key=lambda p: p.pid)

    def alive(self) -> bool:
        return bool(_arguments(self.pid))

    def kill(self) -> None:
        """Power off: every process of the host is gone when this returns."""
        victims = [] if self.own_pids else self.processes()  # processes that others started here
        for pid in (*(p.pid for p in victims), self.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not self.alive(), 10, f"the end of host {self.name}")


class Network:
    """Hosts on one bridge; the first one to add is `HEAD`, which holds it.

    folder: where the files live that the hosts see as theirs. It also tells one network from another in /proc.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _mark(self, name: str) -> str:
        return f"lab-host:{self.folder}:{name}"

    def hosts(self) -> dict[str, Host]:
        """The hosts that run now, whoever started them."""
        found = {}
        for pid in processes():
            words = _arguments(pid)
            if words and words[0].startswith(self._mark("")):
                name = words[0].removeprefix(self._mark(""))
                own = _namespace(pid, "pid") != _namespace(os.getpid(), "pid")
                found[name] = Host(name, pid, own)
        return found

    def write_hosts(self, addresses: dict[str, int]) -> None:
        """What every host reads as /etc/hosts: name -> last number of the address."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lines = ["127.0.0.1 localhost", *(f"{SUBNET}.{number} {name}" for name, number in addresses.items())]
        (self.folder / "hosts").write_text("\n".join(lines) + "\n")
        # Names are in the file or nowhere: no host here reaches a name server, and a query would wait for seconds.
        (self.folder / "nsswitch.conf").write_text("passwd: files\ngroup: files\nshadow: files\nhosts: files\n")

    def add(
        self,
        name: str,
        number: int,
        *,
        own_pids: bool = True,
        binds: Sequence[tuple[Path, str]] = (),
        ahead_s: int = 0,
    ) -> Host:
        """Start a host at SUBNET.`number`; `binds` are (file or folder, the path where the host sees it).

        ahead_s: of its clocks that count from boot; the kernel has no namespaces for the time of day.
        """
        mounts = [(self.folder / "hosts", "/etc/hosts"), (self.folder / "nsswitch.conf", "/etc/nsswitch.conf"), *binds]
        setup = [
            f"hostname {shlex.quote(name)}",
            "mount -t tmpfs tmpfs /dev/shm",
            *(f"mount --bind {shlex.quote(str(source))} {shlex.quote(target)}" for source, target in mounts),
            "ip link set lo up",
            # An init that ignores SIGCHLD reaps every orphan without a line of code.
            "trap '' CHLD",
            f"exec -a {shlex.quote(self._mark(name))} sleep infinity",
        ]
        ahead = ["--time", "--monotonic", str(ahead_s), "--boottime", str(ahead_s)]
        pids = ["--pid", "--fork", "--kill-child", "--mount-proc", *ahead] if own_pids else []
        with open(self.folder / f"host-{name}.log", "w") as log:
            # A child of nobody here: who brings the lab up may leave it up.
            subprocess.run(
                ["setsid", "--fork", "unshare", "--net", "--uts", "--mount", "--ipc", *pids,
                 "bash", "-e", "-c", "\n".join(setup)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/", check=True,
            )  # fmt: skip
        try:
            wait_for(lambda: name in self.hosts(), 10, f"host {name}")
        except LabError as error:
            raise LabError(f"{error}: {(self.folder / f'host-{name}.log').read_text().strip()}") from None
        host = self.hosts()[name]
        self._connect(host, number)
        return host

    def _connect(self, host: Host, number: int) -> None:
        address = f"{SUBNET}.{number}/24"
        if host.name == HEAD:
            host.run("ip", "link", "add", "bridge0", "type", "bridge", "forward_delay", "0")
            host.run("ip", "addr", "add", address, "dev", "bridge0")
            host.run("ip", "link", "set", "bridge0", "up")
            return
        # The link is made beside the bridge and its other end handed over: this machine never has it. A dead host's
        # connections keep its network, and so its end of the old link, for as long as the kernel sends them again.
        if f" {host.name}@" in self._on_bridge("ip", "-o", "link"):
            self._on_bridge("ip", "link", "del", host.name)
        self._on_bridge("ip", "link", "add", host.name, "type", "veth", "peer", "name", "eth0", "netns", str(host.pid))
        self._on_bridge("ip", "link", "set", host.name, "master", "bridge0", "up")
        host.run("ip", "addr", "add", address, "dev", "eth0")
        host.run("ip", "link", "set", "eth0", "up")

    def _on_bridge(self, *words: str) -> str:
        # Only its network is entered: a pid in the command is meant as this machine counts.
        return command("nsenter", "--target", str(self.host(HEAD).pid), "--net", *words)

    def host(self, name: str) -> Host:
        hosts = self.hosts()
        if name not in hosts:
            raise LabError(f"there is no host {name!r} in {self.folder}; running are: {', '.join(hosts) or 'none'}")
        return hosts[name]

    def link_down(self, name: str) -> None:
        """Cut a host's cable: its packets vanish, and nobody is told."""
        self._on_bridge("ip", "link", "set", name, "down")

    def link_up(self, name: str) -> None:
        self._on_bridge("ip", "link", "set", name, "up")

    @contextlib.contextmanager
    def bad_cable(self, name: str, *, delay_s: float = 0.0, loss: float = 0.0) -> Iterator[None]:
        """A host's frames take so long, and get lost with this probability, in each direction."""
        self._on_bridge("ip", "link", "add", f"{name}-a", "type", "veth", "peer", "name", f"{name}-b")
        for end in (f"{name}-a", f"{name}-b"):
            self._on_bridge("ip", "link", "set", end, "up")
        words = [
            "nsenter",
            "--target",
            str(self.host(HEAD).pid),
            "--net",
            sys.executable,
            Path(__file__).parent / "wire.py",
        ]
        wire = subprocess.Popen([*words, name, f"{name}-a", str(delay_s), str(loss)], stdout=subprocess.PIPE)
        try:
            assert wire.stdout is not None
            wire.stdout.readline()
            self._on_bridge("ip", "link", "set", name, "nomaster")
            self._on_bridge("ip", "link", "set", f"{name}-b", "master", "bridge0")
            yield
        finally:
            self._on_bridge("ip", "link", "del", f"{name}-a")
            self._on_bridge("ip", "link", "set", name, "master", "bridge0")
            wire.kill()
            wire.communicate()

    def down(self) -> None:
        """Power every host off."""
        for host in self.hosts().values():
            host.kill()
