"""Nodes started one by one, by hand or by another scheduler: each process is one node's agent, as with torchrun.

Whoever can bind the endpoint hosts the supervisor; the others' agents connect to it. A node whose endpoint nobody
answers fails with the addresses that it tried: it never forms a world of its own.
"""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import socket
import subprocess
from typing import TYPE_CHECKING, Any

from launcher.errors import UsageError
from launcher.processes import become_subreaper, end_descendants
from launcher.starting import agent_command, spec_pipe, stop_signals
from launcher.supervisor import Supervisor

if TYPE_CHECKING:
    from collections.abc import Callable

    from launcher.gang import Outcome
    from launcher.runs import RunFolder
    from launcher.spec import LaunchSpec, Meeting

__all__ = ["host", "join", "listen"]

DEFAULT_PORT = 29400


def split_endpoint(endpoint: str, default_port: int = DEFAULT_PORT) -> tuple[str, int]:
    """`host`, `host:port`, `[v6]:port` -> host and port."""
    name, port = endpoint, ""
    if endpoint.startswith("["):
        name, _, rest = endpoint[1:].partition("]")
        port = rest.removeprefix(":")
    elif endpoint.count(":") == 1:
        name, _, port = endpoint.partition(":")
    if not name or (port and not port.isdigit()) or (port and int(port) > 65535):
        raise UsageError(f"--rdzv-endpoint {endpoint!r}: give host:port, or [IPv6 address]:port")
    return name, int(port) if port else default_port


def listen(meeting: Meeting) -> socket.socket | None:
    """The endpoint's listening socket if this node is its host, else None.

    The host is the node that says so (`--rdzv-conf is_host=1`, or `--node-rank 0` with a static rendezvous), else
    the one whose own address the endpoint is and that comes first.
    """
    name, port = split_endpoint(meeting.endpoint)
    if meeting.is_host is False:
        return None
    problem: OSError | None = None
    try:
        infos = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)
    except OSError as error:
        infos, problem = [], error
    for family, kind, protocol, _, address in infos:
        sock = socket.socket(family, kind, protocol)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)  # only a host's own address can be bound
            sock.listen(2048)
        except OSError as error:
            sock.close()
            problem = error
            if error.errno == errno.EADDRINUSE and meeting.is_host is None:
                return None  # another node of this host was first
            continue
        return sock
    if meeting.is_host:
        raise UsageError(
            f"this node should host the rendezvous at {name} port {port}, but cannot bind it: {problem}. "
            "The endpoint must be an address of this very host, and the port free"
        )
    return None


def token(meeting: Meeting) -> str:
    """Keeps nodes of different runs apart; a secret only if LAUNCH_TOKEN is given to every node."""
    given = os.environ.get("LAUNCH_TOKEN", "")
    return hashlib.sha256(f"launch:{meeting.run_id}:{given}".encode()).hexdigest()


def host(folder: RunFolder, listener: socket.socket, say: Callable[[str], None]) -> Outcome:
    """Supervise the run from this node, with one agent here and the others coming to `listener`."""
    become_subreaper()
    meeting = folder.spec.meeting
    assert meeting is not None
    with listener:
        return Supervisor(
            folder,
            local=(meeting.node_rank,),
            say=say,
            listener=listener,
            token=token(meeting),
            join_timeout_s=meeting.join_timeout_s,
            where=meeting.endpoint,
        ).work()


def join(spec: LaunchSpec) -> int:
    """Be one node's agent of a run that another node supervises; returns the run's exit code."""
    become_subreaper()
    meeting = spec.meeting
    assert meeting is not None
    name, port = split_endpoint(meeting.endpoint)
    own = spec_pipe(spec.to_json())
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PET_")} | {
        "LAUNCH_TOKEN": token(meeting),
        "LAUNCH_JOIN_TIMEOUT_S": str(meeting.join_timeout_s),
        "LAUNCH_NODE_SPEC_FD": str(own),
        "LAUNCH_STARTER_PID": str(os.getpid()),
    }
    if meeting.node_rank is not None:
        environment["LAUNCH_NODE_RANK"] = str(meeting.node_rank)
    agent = subprocess.Popen(
        agent_command("tcp", name, str(port)), env=environment, cwd=spec.cwd, pass_fds=(own,), start_new_session=True
    )
    os.close(own)

    def pass_on(number: int, _: Any) -> None:
        agent.send_signal(signal.SIGTERM if number == signal.SIGINT else number)

    old = {n: signal.signal(n, pass_on) for n in stop_signals(spec)}
    try:
        code = agent.wait()
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
        end_descendants()
    return 128 - code if code < 0 else code
