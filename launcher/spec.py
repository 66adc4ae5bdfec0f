"""LaunchSpec: everything that a person asked for, checked once, frozen, and JSON both ways."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from launcher.errors import UsageError

__all__ = ["LaunchSpec", "Meeting", "Output", "Program", "keeps_terminal"]

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
class LaunchSpec:
    """One launch, checked on construction.

    nodes: how many agents; procs: ranks per node; device: what `procs` counts ("gpu": one GPU each, "cpu": GPUs are
    hidden from the ranks, "any": the environment is left alone, torchrun's `--nproc-per-node N`).
    grace_s: seconds from SIGTERM to SIGKILL after a stop request.
    """

    program: Program
    cwd: str
    nodes: int = 1
    procs: int = 1
    device: Literal["gpu", "cpu", "any"] = "any"
    max_restarts: int = 0
    grace_s: float = 30.0
    preload: tuple[str, ...] = ("torch",)
    output: Output = field(default_factory=Output)
    meeting: Meeting | None = None
    role: str = "default"
    local_addr: str | None = None
    master_port: int | None = None
    stop_signals: tuple[str, ...] = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT")
    virtual_local_rank: bool = False
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, least in (("nodes", 1), ("procs", 1), ("max_restarts", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise UsageError(f"{name.replace('_', '-')} is {value!r}; it must be a whole number >= {least}")
        if not self.grace_s >= 0:
            raise UsageError(f"--grace is {self.grace_s!r}; it must be a number of seconds >= 0")
        for name in self.preload:
            if not all(part.isidentifier() for part in name.split(".")):
                raise UsageError(f"--preload {name!r} is no module name; give names like torch,torchvision")
        for name in self.stop_signals:
            if name not in signal.Signals.__members__ or name in ("SIGKILL", "SIGSTOP"):
                raise UsageError(f"--signals-to-handle: {name!r} is no signal that can be handled")
        if not Path(self.cwd).is_absolute():
            raise UsageError(f"the working directory {self.cwd!r} is not absolute")

    @property
    def world_size(self) -> int:
        return self.nodes * self.procs

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
            for name in ("preload", "stop_signals"):
                fields[name] = tuple(fields[name])
            return cls(
                program=Program(**program),
                output=Output(**output),
                meeting=None if meeting is None else Meeting(**meeting),
                **fields,
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"this record was not written by this version of launch: {error}") from error


def keeps_terminal(spec: LaunchSpec) -> bool:
    """One rank on a terminal keeps it: no new session, no pipes, so that breakpoint() and Ctrl-C are the program's."""
    return spec.procs == 1 and spec.nodes == 1 and all(os.isatty(fd) for fd in (0, 1, 2))
