"""A real Slurm cluster on this machine: a controller, a login node and three compute nodes.

    python tests/lab/lab.py up|down|status|shell

The hosts are those of netns.py. Slurm's files, accounting database and munge socket live in one folder that the hosts
see as /etc/slurm; nothing of this machine's own is written, and `down` leaves nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import re
import secrets
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from netns import HEAD, Host, LabError, Network, Process, kill_below, wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Lab", "LabError", "Settings", "Sharing", "why_not"]

FOLDER = Path(os.environ.get("MUSTER_LAB", "/tmp/muster-lab"))
_PROGRAMS = ("slurmctld", "slurmdbd", "slurmd", "mariadbd", "mariadb-install-db", "munged", "ip", "nsenter", "sbatch")
_SBIN = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_CGROUPS = ("freezer", "memory", "cpuset", "devices")


@dataclass(frozen=True)
class Settings:
    """What may differ between labs; times in seconds.

    grace: notice that a preempted job of partition `main` gets; kill_wait: from SIGTERM to SIGKILL; cred_expire: how
    long Slurm holds a requeued job (its default is 120), but also how soon a launch must reach its node, which took
    more than 5 on a busy machine; extra: further lines of slurm.conf.
    """

    nodes: int = 3
    accounting: bool = True
    proctrack: str = "linuxproc"
    cred_expire: int = 10
    kill_wait: int = 5
    grace: int = 20
    min_job_age: int = 300
    slurmd_timeout: int = 10
    extra: tuple[str, ...] = ()

    @property
    def node_names(self) -> tuple[str, ...]:
        return tuple(f"node{i}" for i in range(1, self.nodes + 1))


def why_not(settings: Settings | None = None) -> str | None:
    """Why the lab cannot run here, or None if it can."""
    if os.geteuid() != 0:
        return "the Slurm lab needs root (it makes network namespaces)"
    missing = [name for name in _PROGRAMS if shutil.which(name, path=_SBIN) is None]
    if missing:
        return f"the Slurm lab needs {', '.join(missing)}: run tests/lab/install.sh"
    if settings is not None and settings.proctrack == "cgroup" and not Path("/sys/fs/cgroup/freezer").is_dir():
        return "proctrack/cgroup: the lab sets up cgroup v1 (freezer) only, which this kernel does not mount"
    return None


class Lab:
    """A running cluster. `Lab.up` makes one, `down` ends it."""

    def __init__(self, settings: Settings, folder: Path = FOLDER) -> None:
        self.settings = settings
        self.folder = folder
        self.network = Network(folder)

    # ---------------------------------------------------------------------------------------- up and down

    @classmethod
    def up(cls, settings: Settings | None = None, folder: Path = FOLDER) -> Lab:
        """Start the cluster and return when every node is idle. What a crashed session left is removed first."""
        lab = cls(settings or Settings(), folder)
        if reason := why_not(lab.settings):
            raise LabError(reason)
        lab.down()
        try:
            lab._start()
        except BaseException:
            lab.down()
            raise
        return lab

    @classmethod
    def running(cls, folder: Path = FOLDER) -> Lab | None:
        """The cluster that runs in `folder`, if there is one."""
        try:
            values = json.loads((folder / "settings.json").read_text())
        except FileNotFoundError:
            return None
        lab = cls(Settings(**values | {"extra": tuple(values["extra"])}), folder)
        return lab if HEAD in lab.network.hosts() else None

    def _start(self) -> None:
        names = self.settings.node_names
        self.folder.mkdir(mode=0o755, parents=True)
        for name in ("etc", "state", "spool", "log", "munge"):
            (self.folder / name).mkdir(mode=0o755)
        self._write_configuration()
        self.network.write_hosts({HEAD: 1, "login": 2} | {name: 10 + i for i, name in enumerate(names, 1)})
        head = self._add(HEAD)
        database = self._start_database(head) if self.settings.accounting else None
        self._add("login")
        for name in names:
            self._add(name)
        self._start_munge(head)
        if database is not None:
            self._finish_accounting(head, database)
        self.start_slurmctld()
        for name in names:
            self.start_slurmd(name)
        self.wait_idle()
        (self.folder / "settings.json").write_text(json.dumps(asdict(self.settings)))

    def _add(self, name: str) -> Host:
        number = {HEAD: 1, "login": 2}.get(name) or 10 + int(name.removeprefix("node"))
        binds = [(self.folder / "etc", "/etc/slurm")]
        if name in self.settings.node_names and self.settings.proctrack == "cgroup":
            for kind in _CGROUPS:  # each node sees a cgroup of its own as the root, as if the machine were its own
                cgroup = self._cgroup(kind, name)
                cgroup.mkdir(parents=True, exist_ok=True)
                if kind == "cpuset":
                    _inherit_cpuset(cgroup)
                binds.append((cgroup, f"/sys/fs/cgroup/{kind}"))
        return self.network.add(name, number, own_pids=name != "login", binds=binds)

    def _cgroup(self, kind: str, *node: str) -> Path:
        return Path("/sys/fs/cgroup", kind, self.folder.name, *node)

    def down(self) -> None:
        """End the cluster: no process, namespace, mount, cgroup or file of it is left."""
        self.network.down()
        for kind in _CGROUPS:
            top = self._cgroup(kind)
            for folder in sorted(top.rglob("*"), key=lambda p: len(p.parts), reverse=True) if top.is_dir() else ():
                if folder.is_dir():
                    _remove_cgroup(folder)
            if top.is_dir():
                _remove_cgroup(top)
        if self.folder.is_dir():
            shutil.rmtree(self.folder)

    # ---------------------------------------------------------------------------------------- configuration

    def _write_configuration(self) -> None:
        etc = self.folder / "etc"
        for gpu in range(4):
            # Slurm hands out only what is a device: four names of /dev/null.
            os.mknod(self.folder / f"gpu{gpu}", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        (etc / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[0-3]\n")
        (etc / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupMountpoint=/sys/fs/cgroup\n")
        (etc / "slurm.conf").write_text(self._slurm_conf())
        (etc / "first_job_id.conf").write_text("FirstJobId=1\n")
        if self.settings.accounting:
            text = f"""\
AuthType=auth/munge
AuthInfo=socket={self.folder}/munge/socket
DbdHost={HEAD}
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StorageUser=root
StorageLoc=slurm_acct_db
SlurmUser=root
LogFile={self.folder}/log/slurmdbd.log
PidFile={self.folder}/slurmdbd.pid
"""
            (etc / "slurmdbd.conf").write_text(text)
            (etc / "slurmdbd.conf").chmod(0o600)
        key = self.folder / "munge" / "key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))

    def _slurm_conf(self) -> str:
        s, folder = self.settings, self.folder
        storage = "accounting_storage/none"
        if s.accounting:
            # "Pass" is how Slurm calls the munge socket of this one connection.
            storage = f"accounting_storage/slurmdbd\nAccountingStorageHost={HEAD}"
            storage += f"\nAccountingStoragePass={folder}/munge/socket"
        nodes = "\n".join(f"NodeName={name} CPUs=4 RealMemory=4000 Gres=gpu:4 State=UNKNOWN" for name in s.node_names)
        extra = "\n".join(s.extra)
        return f"""\
ClusterName=lab
Include {folder}/etc/first_job_id.conf
SlurmctldHost={HEAD}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire={s.cred_expire}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
ProctrackType=proctrack/{s.proctrack}
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
SlurmdParameters=config_overrides
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout={s.slurmd_timeout}
InactiveLimit=0
KillWait={s.kill_wait}
MinJobAge={s.min_job_age}
MaxArraySize=10001
MaxJobCount=20000
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=2,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
GresTypes=gpu
AccountingStorageType={storage}
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=10 GraceTime={s.grace}
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=100 PreemptMode=OFF
{extra}
"""

    # ---------------------------------------------------------------------------------------- daemons

    def _start_munge(self, head: Host) -> None:
        folder = self.folder / "munge"
        head.run("munged", f"--key-file={folder}/key", f"--socket={folder}/socket", f"--pid-file={folder}/pid",
                 f"--log-file={folder}/log", f"--seed-file={folder}/seed", "--num-threads=2", "--force")  # fmt: skip

    def _start_database(self, head: Host) -> subprocess.Popen[str]:
        """Make an empty database; it takes 2 s, so other things are begun meanwhile."""
        data = self.folder / "database"
        return subprocess.Popen(
            [*head.enter(), "mariadb-install-db", "--no-defaults", f"--datadir={data}", "--user=root",
             "--auth-root-authentication-method=normal", "--skip-test-db", "--skip-name-resolve",
             "--innodb-log-file-size=4M", "--innodb-flush-log-at-trx-commit=0"],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def _finish_accounting(self, head: Host, database: subprocess.Popen[str]) -> None:
        output, _ = database.communicate(timeout=60)
        if database.returncode:
            raise LabError(f"mariadb-install-db: exit {database.returncode}: {output}")
        head.run(
            "bash", "-c",
            f"setsid --fork mariadbd --no-defaults --user=root --datadir={self.folder}/database "
            f"--socket={self.folder}/database.socket --bind-address=127.0.0.1 --skip-name-resolve "
            "--innodb-buffer-pool-size=64M --innodb-log-file-size=4M --innodb-flush-log-at-trx-commit=0 "
            f"--innodb-lock-wait-timeout=900 </dev/null >{self.folder}/log/mariadb.log 2>&1",
        )  # fmt: skip
        wait_for(lambda: self._listens(head, 3306), 30, "the accounting database")
        self.start_slurmdbd()
        self.run("sacctmgr", "-i", "add", "cluster", "lab")

    @staticmethod
    def _listens(host: Host, port: int) -> bool:
        test = f"exec 3<>/dev/tcp/127.0.0.1/{port}"
        return subprocess.run([*host.enter(), "bash", "-c", test], capture_output=True, check=False).returncode == 0

    def start_slurmdbd(self) -> None:
        head = self.network.host(HEAD)
        head.run("slurmdbd")
        wait_for(lambda: self._listens(head, 6819), 30, "slurmdbd to listen")

    def stop_slurmdbd(self) -> None:
        self._kill(HEAD, "slurmdbd")

    def start_slurmctld(self) -> None:
        head = self.network.host(HEAD)
        head.run("slurmctld")
        wait_for(lambda: self.try_run("scontrol", "ping").returncode == 0, 30, "slurmctld to answer")

    def kill_slurmctld(self) -> None:
        self._kill(HEAD, "slurmctld")
        # It may have forgotten the last ids that it gave when it comes back, and a node that has seen a job end
        # refuses another one of the same id: every life begins higher.
        path = self.folder / "etc" / "first_job_id.conf"
        path.write_text(f"FirstJobId={int(path.read_text().partition('=')[2]) + 100_000}\n")

    def shut_down_slurmctld(self) -> None:
        """End it as its administrator does: it saves its state first."""
        self.run("scontrol", "shutdown", "slurmctld")
        wait_for(lambda: not self._runs(HEAD, "slurmctld"), 20, "the end of slurmctld")

    def restart_slurmctld(self) -> None:
        self.kill_slurmctld()
        self.start_slurmctld()

    def start_slurmd(self, node: str) -> None:
        (self.folder / "spool" / node).mkdir(exist_ok=True)
        self.network.host(node).run("slurmd")

    def kill_slurmd(self, node: str) -> None:
        """SIGKILL to a node's daemon alone; the steps that it started live on."""
        self._kill(node, "slurmd")

    def _kill(self, host: str, program: str) -> None:
        """SIGKILL to every process whose program has this very name."""
        victims = [p.pid for p in self.network.host(host).processes() if Path(p.command.split()[0]).name == program]
        if not victims:
            raise LabError(f"no {program} runs on {host}")
        for pid in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in victims), 10, f"the end of {program}")

    # ---------------------------------------------------------------------------------------- trouble

    def kill_node(self, node: str) -> None:
        """Power off: cable first, so that no peer is told."""
        self.network.link_down(node)
        self.network.host(node).kill()

    def boot_node(self, node: str) -> None:
        """Power on again after `kill_node`."""
        self._add(node)
        self.start_slurmd(node)

    def link_down(self, node: str) -> None:
        self.network.link_down(node)

    def link_up(self, node: str) -> None:
        self.network.link_up(node)

    def node_processes(self, node: str) -> list[Process]:
        """Who runs on a node besides its slurmd: steps, ranks, and whatever got away from them."""
        found = self.network.host(node).processes()
        return [p for p in found if Path(p.command.split()[0]).name != "slurmd"]

    def preempt(self, job: str, seconds: int = 1) -> str:
        """Have the urgent partition take all nodes of `job` for a moment; returns the other job's id."""
        nodes = self.job(job)["NodeList"]
        return self.sbatch("--partition=urgent", "--exclusive", f"--nodelist={nodes}", "--output=/dev/null",
                           "--job-name=urgent", f"--wrap=sleep {seconds}")  # fmt: skip

    # ---------------------------------------------------------------------------------------- a user's commands

    def environment(self, extra: dict[str, str] | None = None) -> dict[str, str]:
        """A login's environment: this process's, without what an outer job or test runner says."""
        foreign = ("SLURM", "SBATCH", "SRUN", "SALLOC", "SQUEUE", "SACCT", "PYTEST_")
        own = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        # A test's private TMPDIR is gone when the test is; a job's need not be.
        own.pop("TMPDIR", None)
        return own | {"PATH": f"{Path(sys.executable).parent}:{_SBIN}"} | (extra or {})

    def words(self, *words: str | Path, cwd: str | Path = "/", environment: dict[str, str] | None = None) -> list[str]:
        """The argument list that runs `words` on the login node."""
        host = self.network.host("login")
        return [*host.enter(cwd=cwd, environment=self.environment(environment)), *map(str, words)]

    def try_run(
        self,
        *words: str | Path,
        cwd: str | Path = "/",
        environment: dict[str, str] | None = None,
        stdin: str = "",
        timeout: float = 60,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on the login node to its end, whatever that is."""
        return subprocess.run(
            self.words(*words, cwd=cwd, environment=environment),
            input=stdin, capture_output=True, text=True, timeout=timeout, check=False,
        )  # fmt: skip

    def run(self, *words: str | Path, **settings: Any) -> str:
        """Run a command on the login node and return its stdout; `LabError` unless it exits 0."""
        done = self.try_run(*words, **settings)
        if done.returncode:
            raise LabError(f"{shlex.join(map(str, words))}: exit {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout

    def popen(
        self, *words: str | Path, cwd: str | Path = "/", environment: dict[str, str] | None = None, **settings: Any
    ) -> subprocess.Popen[Any]:
        """Start a command on the login node; its pid is the command's own, the caller ends it."""
        return subprocess.Popen(self.words(*words, cwd=cwd, environment=environment), **settings)

    def sbatch(self, *words: str | Path, **settings: Any) -> str:
        """Submit; the new job's id."""
        return self.run("sbatch", "--parsable", *words, **settings).strip().split(";")[0]

    def job(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says; empty if slurmctld no longer knows the job."""
        done = self.try_run("scontrol", "--oneliner", "show", "job", job)
        if done.returncode:
            return {}
        return dict(re.findall(r"(\S+?)=(\S*)", done.stdout.splitlines()[0]))

    def state(self, job: str) -> str:
        return self.job(job).get("JobState", "UNKNOWN")

    def wait_state(self, job: str, *states: str, timeout: float = 60) -> dict[str, str]:
        """Wait until a job is in one of the states; its record then."""
        try:
            wait_for(lambda: self.state(job) in states, timeout, f"job {job} to be {' or '.join(states)}")
        except LabError as error:
            raise LabError(f"{error}; it is {self.job(job)}") from None
        return self.job(job)

    def sacct(self, job: str) -> list[dict[str, str]]:
        """One row per job, step and requeue, as accounting knows them."""
        columns = "JobID,State,ExitCode,NodeList,Submit,Start,End"
        text = self.run("sacct", "--parsable2", "--duplicates", "--noheader", f"--format={columns}", "-j", job)
        return [dict(zip(columns.split(","), line.split("|"), strict=True)) for line in text.splitlines()]

    def queue(self) -> list[str]:
        """The ids of all jobs that are not over."""
        return self.run("squeue", "--noheader", "--array", "--format=%i").split()

    def node_states(self) -> dict[str, str]:
        """Node -> Slurm's short state: idle, alloc, comp, down*, ..."""
        lines = self.run("sinfo", "--noheader", "--Node", "--partition=main", "--format=%N %t").splitlines()
        return dict(line.split() for line in lines)

    def wait_idle(self, timeout: float = 60) -> None:
        try:
            wait_for(lambda: set(self.node_states().values()) == {"idle"}, timeout, "every node to be idle")
        except LabError as error:
            raise LabError(f"{error}; they are {self.node_states()}, jobs: {self.queue()}") from None

    # ---------------------------------------------------------------------------------------- between tests

    def reset(self) -> list[str]:
        """Cancel every job, repair every host, and name what was still running on the nodes after that."""
        hosts = self.network.hosts()
        for node in self.settings.node_names:
            if node not in hosts:
                self.boot_node(node)
            else:
                self.network.link_up(node)
                if not self._runs(node, "slurmd"):
                    self.start_slurmd(node)
        if self.settings.accounting and not self._runs(HEAD, "slurmdbd"):
            self.start_slurmdbd()
        if not self._runs(HEAD, "slurmctld"):
            self.start_slurmctld()
        if self.queue():
            self.run("scancel", "--user=root")
        # A step that ignores SIGTERM would hold up the next test for KillWait seconds (scancel --signal=KILL too), and
        # a slurmctld that was killed may have forgotten its jobs. Only what slurmstepd knows is killed: what got away
        # from it is a leak to tell of.
        for node in self.settings.node_names:
            for process in self.node_processes(node):
                if process.command.startswith("slurmstepd"):
                    kill_below(process.pid)
        wait_for(lambda: not self.queue(), 60, "the queue to empty")
        left = []
        for node in self.settings.node_names:
            deadline = time.monotonic() + 3
            while (found := self.node_processes(node)) and time.monotonic() < deadline:
                time.sleep(0.05)  # a step's last breath
            for process in found:
                # A slurmstepd without a process tries for a minute to tell a cluster that was away of its end.
                if not process.command.startswith("slurmstepd"):
                    left.append(f"process on {node}: {process.command}")
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
        for node, state in self.node_states().items():
            if state.startswith(("drain", "drng", "down", "fail")):
                self.run("scontrol", "update", f"NodeName={node}", "State=RESUME")
        self.wait_idle()
        return left

    def _runs(self, host: str, program: str) -> bool:
        return any(Path(p.command.split()[0]).name == program for p in self.network.host(host).processes())


def _inherit_cpuset(cgroup: Path) -> None:
    """A new cpuset has no CPU until it is told."""
    for folder in (cgroup.parent, cgroup):
        for name in ("cpuset.cpus", "cpuset.mems"):
            (folder / name).write_text((folder.parent / name).read_text())


def _remove_cgroup(folder: Path) -> None:
    def gone() -> bool:
        with contextlib.suppress(OSError):  # its last process is still leaving
            folder.rmdir()
        return not folder.exists()

    wait_for(gone, 5, f"{folder} to be removed")


class Sharing:
    """How several test processes use one lab: each has it for a test at a time, and the last to leave ends it.

    One lock file; byte 0 is shared by all who may use the lab, byte 1 is held by the one whose turn it is. The kernel
    lets go of both when a process dies.
    """

    def __init__(self, folder: Path = FOLDER) -> None:
        self._folder = folder
        self._path = folder.with_name(folder.name + ".lock")
        self._fd: int | None = None

    def join(self) -> None:
        while self._fd is None:
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.lockf(fd, fcntl.LOCK_SH, 1, 0)
            with contextlib.suppress(FileNotFoundError):
                # The last to leave removes the file: a lock on a file without a name keeps nobody out.
                if os.fstat(fd).st_ino == self._path.stat().st_ino:
                    self._fd = fd
                    return
            os.close(fd)

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Have the lab to oneself. Waits in the kernel, which is fair; the test's own timeout is the deadline."""
        assert self._fd is not None
        fcntl.lockf(self._fd, fcntl.LOCK_EX, 1, 1)
        try:
            yield
        finally:
            fcntl.lockf(self._fd, fcntl.LOCK_UN, 1, 1)

    def leave(self) -> None:
        assert self._fd is not None
        with self.turn():  # else two who leave at once would each take the other for one who stays
            try:
                fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 0)
            except (BlockingIOError, PermissionError):
                fcntl.lockf(self._fd, fcntl.LOCK_UN, 1, 0)
            else:
                Lab(Settings(), self._folder).down()
                self._path.unlink()
        os.close(self._fd)
        self._fd = None


def main() -> int:
    parser = argparse.ArgumentParser(prog="lab.py", description="A Slurm cluster of 3 nodes on this machine.")
    parser.add_argument("command", choices=["up", "down", "status", "shell"])
    parser.add_argument("--no-accounting", action="store_true")
    parser.add_argument("--proctrack", choices=["linuxproc", "cgroup", "pgid"], default="linuxproc")
    parser.add_argument("--cred-expire", type=int, default=10, metavar="S", help="Slurm's own default is 120")
    parser.add_argument("--grace", type=int, default=20, metavar="S")
    o = parser.parse_args()
    # Not the tests' folder: both labs can be up at once, and a test session ends only its own.
    folder = FOLDER.with_name(FOLDER.name + "-by-hand")
    try:
        lab = Lab.running(folder)
        if o.command == "down":
            Lab(Settings(), folder).down()
            return 0
        if o.command == "status" and lab is None:
            print("down")
            return 1
        if lab is None:
            settings = Settings(
                accounting=not o.no_accounting, proctrack=o.proctrack, cred_expire=o.cred_expire, grace=o.grace
            )
            lab = Lab.up(settings, folder)
        print(lab.run("sinfo", "--long"), end="")
        if o.command == "shell":
            return subprocess.call(lab.words("bash", "-i", cwd=Path.cwd(), environment={"PS1": "login$ "}))
    except LabError as error:
        print(f"lab: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
