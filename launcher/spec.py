"""LaunchSpec: everything that a person asked for, checked once, frozen, and JSON both ways."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from launcher.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["Code", "LaunchSpec", "Meeting", "Output", "Program", "Slurm", "Ssh", "keeps_terminal"]

RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True)
class Program:
    """What each rank runs: a Python script, a Python module (`-m`), or any command (`--no-python`)."""

    kind: Literal["script", "module", "command"]
    target: str
    args: tuple[str, ...] = ()

    def check(self, cwd: Path) -> None:
        """Raise `UsageError` if it cannot be started from `cwd`."""
        if self.kind == "script":
            path = cwd / self.target
            if not path.exists():
                similar = sorted(p.name for p in path.parent.glob("*.py"))[:8] if path.parent.is_dir() else []
                there = f"; Python files there: {', '.join(similar)}" if similar else ""
                raise UsageError(f"there is no script {self.target!r} (looked for {path}){there}")
            if path.is_file() and path.suffix == ".py":
                try:
                    compile(path.read_bytes(), str(path), "exec", dont_inherit=True)
                except (SyntaxError, ValueError) as error:
                    raise UsageError(f"{self.target} does not compile: {error}") from error
            elif path.is_dir() and not (path / "__main__.py").is_file():
                raise UsageError(f"{self.target} is a folder without __main__.py; name a script, or use -m package")
        elif self.kind == "command":
            if shutil.which(self.target) is None:
                raise UsageError(f"--no-python: there is no program {self.target!r} on PATH, or it is not executable")
        elif not all(part.isidentifier() for part in self.target.split(".")):
            raise UsageError(f"-m {self.target!r} is no module name; for a file leave -m out")

    @property
    def stem(self) -> str:
        """A short name for runs of this program."""
        name = self.target.rsplit(".", 1)[-1] if self.kind == "module" else Path(self.target).stem
        return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "run"


@dataclass(frozen=True)
class Output:
    """What of the ranks' output is shown, and what is written besides the run folder's own logs.

    `tee` and `redirects` map a local rank (-1: every one) to torchrun's bits: 1 stdout, 2 stderr, 3 both.
    """

    show_ranks: tuple[int, ...] | None = (0,)
    tee: dict[int, int] = field(default_factory=dict)
    redirects: dict[int, int] = field(default_factory=dict)
    local_ranks_filter: tuple[int, ...] = ()
    log_dir: str | None = None
    prefix: str = "[${rank}] "

    def streams(self, table: dict[int, int], local_rank: int) -> int:
        return table.get(local_rank, table.get(-1, 0))

    def shown(self, rank: int, local_rank: int, stream: int) -> bool:
        """Whether `stream` (1 stdout, 2 stderr) of a rank goes to the console."""
        if self.local_ranks_filter and local_rank not in self.local_ranks_filter:
            return False
        if self.streams(self.tee, local_rank) & stream:
            return True
        if self.streams(self.redirects, local_rank) & stream:
            return False
        # torchrun's --local-ranks-filter and --tee choose for themselves; --show-ranks is our own default.
        return bool(self.local_ranks_filter) or self.show_ranks is None or rank in self.show_ranks


@dataclass(frozen=True)
class Meeting:
    """Where the agents of nodes that were started one by one meet (`--rdzv-endpoint`, `--node-rank`, PET_*)."""

    endpoint: str
    node_rank: int | None
    run_id: str
    is_host: bool | None = None
    join_timeout_s: float = 600.0


@dataclass(frozen=True)
class Code:
    """A copy of the repository `root`, from which the program and its imports come instead."""

    root: str
    copy: str

    def moved(self, path: str) -> str:
        """Where `path` is in the copy; itself if it is not below the root, or was not copied."""
        if path == self.root or path.startswith(self.root + "/"):
            copied = self.copy + path[len(self.root) :]
            if os.path.exists(copied):  # noqa: PTH110  # a .venv in the repository is not in the copy
                return copied
        return path

    def first(self, path: Iterable[str]) -> list[str]:
        """Of the folders on a search path, those in the copy that must come first."""
        return [moved for one in path if one and (moved := self.moved(one)) != one]


@dataclass(frozen=True)
class Slurm:
    """What a run asks of Slurm, and how it goes on there.

    options: sbatch's, by their long names (True: an option without a value); setup: shell lines before the launcher.
    requeue: after a stop the same job runs again ("yes"), a new job goes on ("resubmit"), or nothing does ("no").
    max_timeouts: time limits to go on after (None: as many as there is progress between them); stop_lead_s: how long
    before the time limit the ranks are told (None: as long as saves were seen to take).
    """

    options: dict[str, str | int | bool] = field(default_factory=dict)
    setup: tuple[str, ...] = ()
    requeue: Literal["yes", "resubmit", "no"] = "yes"
    max_timeouts: int | None = None
    stop_lead_s: float | None = None

    def __post_init__(self) -> None:
        if self.max_timeouts is not None and self.max_timeouts < 0:
            raise UsageError(f"--max-timeouts is {self.max_timeouts}; it must be a whole number >= 0")
        if self.stop_lead_s is not None and not self.stop_lead_s >= 0:
            raise UsageError(f"--stop-lead is {self.stop_lead_s!r}; it must be a number of seconds >= 0")


@dataclass(frozen=True)
class Ssh:
    """Machines that are reached by ssh, in the order of the nodes.

    hosts: as ssh takes them; slots: ranks on each; env: variables that travel there, by name: their values are written
    nowhere; sync: each gets a copy of the code, and a run folder of its own where it does not share this one.
    """

    hosts: tuple[str, ...]
    slots: tuple[int, ...]
    env: tuple[str, ...] = ()
    sync: bool = False


@dataclass(frozen=True)
class LaunchSpec:
    """One launch, checked on construction.

    nodes: how many make an attempt, at most; least: how many do so if there are no more (None: all); spares: how many
    more stand by, to take the place of one that is lost; last_call_s: how long nodes are waited for once the least are
    there, and others that have come before a run is interrupted for them. procs: ranks per node; device: what `procs`
    counts ("gpu": one GPU each, "cpu": GPUs are hidden from the ranks, "any": the environment is left alone, torchrun's
    `--nproc-per-node N`).
    grace_s: seconds from SIGTERM to SIGKILL after a stop request (None: until the scheduler's deadline, 30 where there
    is none). hang_timeout_s: seconds without a step after which ranks count as hung (None: learned; 0: never).
    preflight: whether the machines are looked at before each time that the run begins on them. notify: a shell line
    that is told of failures, requeues and the end.
    """

    program: Program
    cwd: str
    nodes: int = 1
    least: int | None = None
    spares: int = 0
    last_call_s: float = 5.0
    procs: int = 1
    device: Literal["gpu", "cpu", "any"] = "any"
    max_restarts: int = 0
    grace_s: float | None = None
    hang_timeout_s: float | None = None
    preflight: bool = False
    notify: str | None = None
    preload: tuple[str, ...] = ("torch",)
    output: Output = field(default_factory=Output)
    meeting: Meeting | None = None
    slurm: Slurm | None = None
    ssh: Ssh | None = None
    code: Code | None = None
    role: str = "default"
    local_addr: str | None = None
    master_port: int | None = None
    stop_signals: tuple[str, ...] = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT")
    virtual_local_rank: bool = False
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, least in (("nodes", 1), ("procs", 1), ("max_restarts", 0), ("spares", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise UsageError(f"{name.replace('_', '-')} is {value!r}; it must be a whole number >= {least}")
        if self.least is not None and not 1 <= self.least <= self.nodes:
            raise UsageError(f"nodes is {self.least}:{self.nodes}; give MIN:MAX with 1 <= MIN <= MAX")
        if not self.last_call_s >= 0:
            raise UsageError(f"last_call_timeout is {self.last_call_s!r}; it must be a number of seconds >= 0")
        if self.grace_s is not None and not self.grace_s >= 0:
            raise UsageError(f"--grace is {self.grace_s!r}; it must be a number of seconds >= 0")
        if self.hang_timeout_s is not None and not self.hang_timeout_s >= 0:
            raise UsageError(f"--hang-timeout is {self.hang_timeout_s!r}; it must be a number of seconds, or off")
        if self.master_port is not None and not 0 <= self.master_port <= 65535:
            raise UsageError(f"--master-port {self.master_port}: give a port from 1 to 65535, or 0 for a free one")
        if self.notify is not None and (not self.notify.strip() or "\0" in self.notify):
            raise UsageError(f'--notify {self.notify!r}: give a command for the shell, like "mail -s done me"')
        for name in self.preload:
            if not all(part.isidentifier() for part in name.split(".")):
                raise UsageError(f"--preload {name!r} is no module name; give names like torch,torchvision")
        for name in self.stop_signals:
            if name not in signal.Signals.__members__ or name in ("SIGKILL", "SIGSTOP"):
                raise UsageError(f"--signals-to-handle: {name!r} is no signal that can be handled")
        if self.ssh is not None and not self.places == len(self.ssh.hosts) == len(self.ssh.slots):
            raise UsageError(f"{self.places} nodes on {len(self.ssh.hosts)} hosts with {len(self.ssh.slots)} slots")
        if not Path(self.cwd).is_absolute():
            raise UsageError(f"the working directory {self.cwd!r} is not absolute")

    @property
    def target(self) -> str:
        """What to run: the program as it was named, or its copy in the snapshot."""
        if self.code is None or self.program.kind == "module":
            return self.program.target
        if self.program.kind == "command" and "/" not in self.program.target:
            return self.program.target
        path = str((Path(self.cwd) / self.program.target).resolve())
        moved = self.code.moved(path)
        return self.program.target if moved == path else moved

    @property
    def entry(self) -> str:
        """The folder that the interpreter puts first on sys.path."""
        if self.program.kind == "script":
            return str((Path(self.cwd) / self.target).parent)
        return self.cwd if self.code is None else self.code.moved(self.cwd)

    @property
    def places(self) -> int:
        """How many nodes can be there at once, spares among them."""
        return self.nodes + self.spares

    @property
    def elastic(self) -> bool:
        """Whether the run goes on without a node that is lost."""
        return self.places > (self.nodes if self.least is None else self.least)

    @property
    def slots(self) -> tuple[int, ...]:
        """Ranks on each node, spares among them."""
        return (self.procs,) * self.places if self.ssh is None else self.ssh.slots

    @property
    def world_size(self) -> int:
        """Ranks of an attempt, at most."""
        return sum(self.slots[: self.nodes])

    @property
    def grace(self) -> float:
        """Seconds from SIGTERM to SIGKILL where nobody else sets a deadline."""
        return 30.0 if self.grace_s is None else self.grace_s

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> LaunchSpec:
        """The spec that `to_json` wrote; `UsageError` if the record is of another version of the launcher."""
        try:
            fields = dict(data)
            program = dict(fields.pop("program"))
            program["args"] = tuple(program["args"])
            output = dict(fields.pop("output"))
            for name in ("tee", "redirects"):
                output[name] = {int(k): v for k, v in output[name].items()}
            output["local_ranks_filter"] = tuple(output["local_ranks_filter"])
            output["show_ranks"] = None if output["show_ranks"] is None else tuple(output["show_ranks"])
            meeting = fields.pop("meeting")
            slurm, ssh, code = fields.pop("slurm"), fields.pop("ssh"), fields.pop("code")
            if ssh is not None:
                ssh = Ssh(**ssh | {name: tuple(ssh[name]) for name in ("hosts", "slots", "env")})
            if slurm is not None:
                slurm = Slurm(**slurm | {"setup": tuple(slurm["setup"])})
            for name in ("preload", "stop_signals"):
                fields[name] = tuple(fields[name])
            return cls(
                program=Program(**program),
                output=Output(**output),
                meeting=None if meeting is None else Meeting(**meeting),
                slurm=slurm,
                ssh=ssh,
                code=None if code is None else Code(**code),
                **fields,
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"this record was not written by this version of launch: {error}") from error


def keeps_terminal(spec: LaunchSpec) -> bool:
    """One rank on a terminal keeps it: no new session, no pipes, so that breakpoint() and Ctrl-C are the program's."""
    return spec.places == spec.procs == 1 and spec.ssh is None and all(os.isatty(fd) for fd in (0, 1, 2))
