"""How the doctor reaches machines: as a run on them would, by the same ssh, the same srun, the same interpreter."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.backends import slurm_notation
from launcher.backends.ssh import Machines
from launcher.doctor.examination import Ways
from launcher.spec import LaunchSpec, Program, Ssh
from launcher.starting import python_command, spawn_agent

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from launcher.channel import Channel

__all__ = ["by_spec", "by_srun", "by_ssh", "here"]

_NODE = "launcher.doctor.node"


@contextlib.contextmanager
def here(cwd: str) -> Iterator[Ways]:
    """The machine that this process is on."""

    def start(_: int) -> tuple[Channel, subprocess.Popen[bytes]]:
        return spawn_agent(dict(os.environ), cwd=cwd, own_session=True, module=_NODE)

    yield Ways([socket.gethostname()], start)


@contextlib.contextmanager
def by_ssh(hosts: Sequence[str], cwd: str, env: Sequence[str] = ()) -> Iterator[Ways]:
    """A list of machines, with the variables that travel to a run on them."""
    spec = LaunchSpec(
        Program("module", _NODE), cwd, nodes=len(hosts), ssh=Ssh(tuple(hosts), (1,) * len(hosts), tuple(env))
    )
    # Paths of sockets hold 107 bytes, and 40 of them are ssh's hash.
    with tempfile.TemporaryDirectory(prefix="launch-", dir="/tmp") as folder:
        machines = Machines(spec, Path(folder, "said"), Path(folder), module=_NODE)
        yield Ways(
            hosts, lambda number: machines.start(number, dict(os.environ)), why=machines.why, passing=machines.passing
        )


@contextlib.contextmanager
def by_srun(environ: Mapping[str, str], cwd: str, nodes: int | None = None) -> Iterator[Ways]:
    """The nodes of the allocation that this process has, or the first `nodes` of them."""
    names = slurm_notation.hosts(environ["SLURM_JOB_NODELIST"])[:nodes]

    def start_all(port: int, token: str) -> subprocess.Popen[bytes]:
        cpus = environ.get("SLURM_CPUS_PER_TASK")
        words = ["srun", f"--nodes={len(names)}", f"--ntasks={len(names)}", "--ntasks-per-node=1",
                 "--distribution=block", *([f"--cpus-per-task={cpus}"] if cpus else []), "--export=ALL", "--input=none",
                 "--mpi=none", "--kill-on-bad-exit=0", f"--chdir={cwd}"]  # fmt: skip
        return subprocess.Popen(
            [*words, *python_command(_NODE, "srun", str(port))],
            env={**environ, "LAUNCH_TOKEN": token},
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )

    yield Ways(names, start_all=start_all)


def by_spec(spec: LaunchSpec) -> contextlib.AbstractContextManager[Ways]:
    """Where a run is about to start."""
    if spec.ssh is not None:
        return by_ssh(spec.ssh.hosts, spec.cwd, spec.ssh.env)
    if spec.slurm is not None:
        return by_srun(os.environ, spec.cwd, spec.nodes)
    return here(spec.cwd)
