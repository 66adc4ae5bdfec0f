"""Machines with a real sshd and no scheduler, on one machine: see netns.py."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from pathlib import Path

import psutil
from job import LAUNCH
from netns import HEAD, Host, LabError, Network, command, wait_for

NAMES = ("ada", "bob", "cyd")
HEADS_NUMBER = 1


def why_not() -> str | None:
    """Why there can be no machines here; None if there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    absent = [word for word in ("sshd", "ssh", "ssh-keygen", "ip", "nsenter", "unshare") if shutil.which(word) is None]
    return f"{', '.join(absent)} not found; tests/lab/install.sh installs them" if absent else None


class Machines:
    """`head`, where `launch` is called, and NAMES, which it reaches by ssh. All see one file system, but for /srv,
    which is each machine's own.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.network = Network(folder)

    def up(self) -> None:
        folder, network = self.folder, self.network
        numbers = {HEAD: HEADS_NUMBER, **{name: 11 + i for i, name in enumerate(NAMES)}}
        network.write_hosts(numbers)
        Path("/run/sshd").mkdir(exist_ok=True)
        Path("/srv").mkdir(exist_ok=True)
        for key in ("user", "host"):
            command("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key)
        public = (folder / "host.pub").read_text()
        (folder / "known_hosts").write_text(
            "".join(f"{name},10.77.0.{n} {public}" for name, n in numbers.items()) + f"localhost {public}"
        )
        # A person's configuration: an alias, a jump host, a machine that nobody has the key of.
        (folder / "ssh_config").write_text(
            f"Host far far-*\n HostName cyd\n ProxyJump ada\nHost stranger\n HostName bob\n User nobody\n"
            f"Host *\n IdentityFile {folder}/user\n IdentitiesOnly yes\n UserKnownHostsFile {folder}/known_hosts\n"
        )
        (folder / "sshd_config").write_text(
            f"HostKey {folder}/host\nAuthorizedKeysFile {folder}/user.pub\nStrictModes no\nUsePAM no\n"
            "PermitRootLogin yes\nPasswordAuthentication no\nPidFile none\nMaxStartups 3:60:10\nListenAddress 0.0.0.0\n"
        )
        for name, number in numbers.items():
            self.start(name, number)

    def start(self, name: str, number: int) -> None:
        """Switch a machine on; the clocks of cyd are 2 s ahead."""
        disk = self.folder / f"disk-{name}"
        disk.mkdir(exist_ok=True)
        binds = [(self.folder / "ssh_config", "/etc/ssh/ssh_config"), (disk, "/srv")]
        self.network.add(name, number, binds=binds, ahead_s=2 if name == "cyd" else 0)
        self.serve(name)

    def serve(self, name: str) -> None:
        """Start a machine's sshd."""
        host = self.host(name)
        sshd = shutil.which("sshd")
        assert sshd is not None
        with open(self.folder / f"sshd-{name}.log", "ab") as log:
            # Without -D: it becomes a child of the machine's init.
            subprocess.run(
                [*host.enter(), sshd, "-f", self.folder / "sshd_config", "-E", self.folder / f"sshd-{name}.log"],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=True,
            )  # fmt: skip
        wait_for(lambda: self.daemon(name), 10, f"sshd of {name}")

    def daemon(self, name: str) -> bool:
        return any("sshd" in p.command for p in self.host(name).processes())

    def host(self, name: str) -> Host:
        return self.network.host(name)

    def popen(
        self, *words: str | Path, cwd: Path, environment: dict[str, str] | None = None, at: str = HEAD, **settings
    ) -> subprocess.Popen:
        """Start a command on a machine. To signal it, find it among the machine's processes: a process stays outside
        that only waits for it.
        """
        keep = {n: os.environ[n] for n in ("PATH", "HOME", "LANG", "TMPDIR") if n in os.environ}
        enter = self.host(at).enter(cwd=cwd, environment=keep | (environment or {}))
        return subprocess.Popen([*enter, *map(str, words)], **settings)

    def agents(self, name: str, role: str = "agent") -> list[int]:
        """Pids of what runs of launches on a machine: its agents, the zygotes below them, or the ranks below those."""
        ours = {p.pid for p in self.host(name).processes() if "from launcher.agent" in p.command}

        def depth(pid: int) -> int:
            above = psutil.Process(pid).ppid()
            return 1 + depth(above) if above in ours else 0

        found = []
        for pid in sorted(ours):
            with contextlib.suppress(psutil.NoSuchProcess):
                if depth(pid) == ("agent", "zygote", "rank").index(role):
                    found.append(pid)
        return found

    def left(self, needle: str, at: tuple[str, ...] = (HEAD, *NAMES)) -> list[str]:
        """Commands on these machines that have `needle` in them."""
        return [
            f"{name}: {p.command[:150]}"
            for name in at
            if name in self.network.hosts()
            for p in self.host(name).processes()
            if needle in p.command
        ]

    def wait_empty(self, needle: str, timeout: float, what: str, at: tuple[str, ...] = (HEAD, *NAMES)) -> None:
        """Wait until no command on these machines has `needle` in it; `LabError` that names those that have."""
        try:
            wait_for(lambda: not self.left(needle, at), timeout, what)
        except LabError as error:
            raise LabError(f"{error}; there is {'; '.join(self.left(needle, at))}") from None

    def down(self) -> None:
        self.network.down()
        with contextlib.suppress(OSError):
            shutil.rmtree(self.folder)


class Call:
    """A `launch` on the head, with run folder `job`."""

    def __init__(self, machines: Machines, cwd: Path, *words: str | Path, **environment: str) -> None:
        self.machines = machines
        self.folder = cwd / "runs" / "job"
        own = {"OMP_NUM_THREADS": "1", "XDG_STATE_HOME": str(cwd / "state"), **environment}
        self.process = machines.popen(
            LAUNCH, "--run", "job", "--show-ranks", "all", *words, cwd=cwd, environment=own,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def end(self, timeout: float = 100) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=timeout)
        return self.process.returncode, out, err

    def ups(self, count: int) -> None:
        """Until so many ranks more have said that they are there."""
        while count:
            line = self.process.stdout.readline()
            assert line, self.process.stderr.read()
            count -= line.endswith("up\n")

    def signal(self, number: int) -> None:
        words = str(LAUNCH)
        (found,) = (p for p in self.machines.host(HEAD).processes() if words in p.command)
        os.kill(found.pid, number)
