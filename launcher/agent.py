"""One agent per node: torch elastic's agent with our workers.

It imports what the ranks will need, forks the zygote while it still has one thread, then lives in torch elastic's
`SimpleElasticAgent.run`: `_invoke_run` is ours, because torch's sleeps between polls and does not see a peer that
left. The supervisor decides who belongs to the gang; its decision reaches torch elastic through `GangRendezvous`, a
`RendezvousHandler`. Every attempt gets a store of its own, held by the agent of node 0 before anybody hears of it:
torch's default reads the last attempt's addresses from the shared one and meets nobody (1 of 10 restarts came back).
"""

from __future__ import annotations

import importlib
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher import worker
from launcher.arrival import connect, first_messages, look_around, own_stdio, parse, tell_why
from launcher.channel import Channel, pair
from launcher.errors import LaunchError, UsageError
from launcher.node import Node
from launcher.processes import (
    become_subreaper,
    die_with_parent,
    outlive_parent,
    start_ticks,
    threads_of,
)
from launcher.pulse import Beating
from launcher.spec import LaunchSpec
from launcher.zygote import serve

if TYPE_CHECKING:
    from launcher.channel import Link

__all__ = ["main"]

# The supervisor says every second that it is there. One that does not stands still, or the way to it is cut, which over
# TCP shows in the kernel: what is left there is a process that was stopped, and that somebody may yet let go on.
_SILENT_S = {"fd": None, "stdio": 10.0, "tcp": 120.0}


def main(argv: list[str]) -> dict[str, Any] | None:
    """Run a node's agent. Returns only in a forked rank, with its order; the agent itself exits.

    argv: `fd N` (a socket inherited from the supervisor), `tcp HOST PORT` (token in LAUNCH_TOKEN), `srun PORT [NODE]`
    (the same, started by the supervisor's srun: Slurm says where it is, and which node this is, if nothing else does),
    or `stdio` (started by the supervisor's ssh, over which all goes).
    LAUNCH_STARTER_PID: the process that started it and must not be outlived. Once an `fd` agent listens to its socket,
    that tells it of the end, and leaves it time to ask its ranks to leave.
    """
    if starter := os.environ.pop("LAUNCH_STARTER_PID", ""):
        die_with_parent(int(starter))
    secret = os.environ.pop("LAUNCH_TOKEN", "")
    base = dict(os.environ)
    join_timeout_s = float(os.environ.pop("LAUNCH_JOIN_TIMEOUT_S", "600"))
    own_spec = os.environ.pop("LAUNCH_NODE_SPEC_FD", "")
    for name in ("LAUNCH_JOIN_TIMEOUT_S", "LAUNCH_NODE_SPEC_FD"):
        base.pop(name, None)
    become_subreaper()
    if argv[0] == "srun":
        place = argv[2] if len(argv) > 2 else os.environ["SLURM_PROCID"]
        base["LAUNCH_NODE_RANK"] = os.environ["LAUNCH_NODE_RANK"] = place
        argv = ["tcp", os.environ["SLURM_LAUNCH_NODE_IPADDR"], argv[1]]
    link: Link | None = None
    node: Node | None = None
    heir: list[str] = []
    try:
        if argv[0] == "fd":
            link = Channel(socket.socket(fileno=int(argv[1])))
        elif argv[0] == "stdio":
            link = own_stdio()
        else:
            link = Channel(connect(argv[1], int(argv[2]), join_timeout_s))
        spec: LaunchSpec | None = None
        if own_spec:
            with open(int(own_spec)) as file:
                spec = LaunchSpec.from_json(parse(file.read()))
        node_rank = os.environ.get("LAUNCH_NODE_RANK")
        base.pop("LAUNCH_NODE_RANK", None)
        link.send(
            {
                "hello": {
                    "token": secret,
                    "host": socket.gethostname(),
                    "pid": os.getpid(),
                    "started": start_ticks(os.getpid()),
                    "now_ns": time.monotonic_ns(),
                    "node_rank": None if node_rank is None else int(node_rank),
                    "procs": None if spec is None else spec.procs,
                    "address": link.local_address,
                }
            }
        )
        welcome, orders = first_messages(link, join_timeout_s)
        if "end" in welcome:  # stopped before it began
            os._exit(int(welcome["end"]["code"]))
        heir = welcome["heir"]
        if spec is None:
            spec = LaunchSpec.from_json(welcome["spec"])
        if argv[0] == "stdio":
            look_around(spec, Path(welcome["run_dir"]), welcome["created"])
        zygote, zygote_pid, order = _fork_zygote(spec, base, link)
        if order is not None:
            return order
        node = Node(
            spec,
            welcome["run_id"],
            Path(welcome["run_dir"]),
            base,
            link,
            zygote,
            zygote_pid,
            orders,
            scheduled=welcome["scheduled"],
            silent_s=_SILENT_S[argv[0]],
            orphan_grace_s=welcome["orphan_grace_s"],
        )
        code = _run(node, listens_to_starter=argv[0] == "fd")
    except LaunchError as error:
        code = error.exit_code
        tell_why(link, error)
    except ConnectionError as error:
        code = 1  # the supervisor is gone; on its own machine it, or whoever killed it, tells the story
        if argv[0] == "tcp":
            where = f"{argv[1]} port {argv[2]}"
            sys.stderr.write(f"launch: agent on {socket.gethostname()}: lost the supervisor at {where}: {error}\n")
        if heir and not (node is not None and node.dismissed):
            sys.stderr.flush()
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # what ended the supervisor is after us too
            os.execve(heir[0], heir, base)
    sys.stderr.flush()
    os._exit(code)


def _fork_zygote(spec: LaunchSpec, base: dict[str, str], link: Link) -> tuple[Channel, int, dict[str, Any] | None]:
    """Preload and fork: the channel to the zygote and its pid; in a forked rank the last value is its order."""
    ours, theirs = pair()
    if spec.procs > 1:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    # numpy's OpenBLAS starts its threads when it is loaded; worker.py gives each rank its number after the fork.
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    if spec.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    preload = () if spec.program.kind == "command" else spec.preload
    path = list(sys.path)
    first = [] if spec.code is None else spec.code.first(path)
    for name in preload:
        sys.path[:] = [spec.entry, *first, *path]
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UsageError(f"--preload {name}: {error}; preload what the ranks import anyway") from error
        finally:
            sys.path[:] = path
        threads = threads_of()
        if len(threads) > 1:
            raise UsageError(
                f"--preload {name} started {len(threads) - 1} thread(s) ({', '.join(threads[1:])}); a process with "
                "threads cannot be forked safely. Leave it out of --preload, or use --no-preload"
            )
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        raise UsageError(
            "a preloaded module initialised CUDA, which does not survive a fork: leave it out of --preload"
        )
    pid = os.fork()
    if pid == 0:
        ours.close()
        link.close()
        return theirs, 0, serve(theirs)
    theirs.close()
    os.environ.clear()
    os.environ.update(base)
    return ours, pid, None


def _run(node: Node, *, listens_to_starter: bool) -> int:
    """The agent after the fork: torch elastic from here on."""
    from launcher.elastic import run_agent  # a second or more of torch

    if listens_to_starter:
        outlive_parent()
    node.beating = Beating(node.link)  # from here on nothing holds a thread up for seconds, as importing torch does
    try:
        return run_agent(node)
    finally:
        node.close()


def bootstrap() -> None:
    """Entry of the agent's interpreter: the agent exits inside `main`; a forked rank comes back here and runs."""
    order = main(sys.argv[1:])
    if order is not None:
        worker.run(order)
