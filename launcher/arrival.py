"""How an agent comes to its supervisor, and what it finds out before anything is started."""

from __future__ import annotations

import dataclasses
import json
import os
import selectors
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.channel import PipeChannel, keep_alive
from launcher.errors import LaunchError, MeetingError, UsageError
from launcher.hardware import find_gpus
from launcher.runs import read_json

if TYPE_CHECKING:
    from launcher.channel import Link, Message
    from launcher.spec import LaunchSpec

__all__ = ["connect", "first_messages", "look_around", "own_stdio", "parse", "tell_why"]


def connect(host: str, port: int, timeout_s: float) -> socket.socket:
    """Reach the supervisor, which may be started minutes later than this node."""
    deadline = time.monotonic() + timeout_s
    tried: dict[str, str] = {}
    while True:
        try:
            infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError as error:
            tried[host] = f"no address: {error}"
            infos = []
        for family, kind, protocol, _, address in infos:
            sock = socket.socket(family, kind, protocol)
            sock.settimeout(10)
            try:
                sock.connect(address)
            except OSError as error:
                tried[str(address[0])] = str(error)
                sock.close()
                continue
            sock.settimeout(None)
            keep_alive(sock)
            return sock
        if time.monotonic() > deadline:
            attempts = "; ".join(f"{address}: {error}" for address, error in tried.items())
            raise MeetingError(
                f"nobody answers at {host} port {port} for {timeout_s:g} s (tried {attempts}). Is node 0 started, "
                "with the same --rdzv-endpoint, and is the port open between the nodes?"
            )
        time.sleep(0.2)


def own_stdio() -> PipeChannel:
    """What sshd gave this process as stdin and stdout, for messages only; what else writes there goes to stderr."""
    reads, writes = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    # Client's address and port, then ours: where ssh reached this host, its peers most likely do too.
    connection = os.environ.get("SSH_CONNECTION", "").split()
    return PipeChannel(reads, writes, connection[2] if len(connection) == 4 else None)


def first_messages(link: Link, timeout_s: float) -> tuple[Message, list[Message]]:
    """The supervisor's welcome, and whatever came right behind it."""
    with selectors.DefaultSelector() as selector:
        selector.register(link, selectors.EVENT_READ)
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            selector.select(deadline - time.monotonic())
            if messages := link.receive():
                if "refused" in messages[0]:
                    link.close()  # the supervisor does not listen any more: why is for this node's own screen
                    raise MeetingError(f"refused by the supervisor: {messages[0]['refused']}")
                return messages[0], messages[1:]
            if link.closed:
                raise ConnectionResetError("the supervisor closed the connection")
    raise MeetingError(f"the supervisor said nothing for {timeout_s:g} s")


def parse(text: str) -> dict[str, Any]:
    data = json.loads(text)
    if not isinstance(data, dict):
        raise UsageError("the node's spec is no JSON object")
    return data


def look_around(spec: LaunchSpec, folder: Path, created: float) -> None:
    """Raise `UsageError` if this host, which is not the launch's, has not what the run needs."""
    assert spec.ssh is not None
    record = read_json(folder / "run.json")
    if (record is None or record["created"] != created) and not spec.ssh.sync:
        raise UsageError(
            f"the run folder {folder} is not the same here: put it on storage that all hosts share (--run DIR), or "
            "give each host a copy of the code and a folder of its own with --sync"
        )
    if spec.device == "gpu" and (found := find_gpus()).count < spec.procs:
        raise UsageError(f"{spec.procs} rank(s) need a GPU each: found {found}")
    dataclasses.replace(spec.program, target=spec.target).check(Path(spec.cwd))


def tell_why(link: Link | None, error: LaunchError) -> None:
    """To the supervisor, whose report names it; to this node's own screen if that cannot be."""
    try:
        if link is None or link.closed:
            raise ConnectionResetError
        link.send({"leaving": {"why": str(error), "code": error.exit_code}})
    except ConnectionError:
        sys.stderr.write(f"launch: agent on {socket.gethostname()}: {error}\n")
