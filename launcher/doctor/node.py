"""The doctor's hands on one machine: does what it is told over one connection, and answers.

It is started the way an agent is (`fd N`, `stdio`, `srun PORT`), needs no torch, and ends with its connection.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import select
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from launcher.arrival import connect, own_stdio
from launcher.channel import Channel
from launcher.doctor import facts
from launcher.processes import become_subreaper, die_with_parent, end_descendants
from launcher.starting import python_command

if TYPE_CHECKING:
    from launcher.channel import Link, Message

__all__ = ["bootstrap"]

_JOIN_S = 60.0
_ANSWER_S = 5.0  # another machine's answer to a connection; what is filtered never answers
_AT_ONCE = 16
_SEEN_S = 10.0  # NFS shows a new file when its cache of the folder is 3 to 60 s old; a run looks at its own later
_STREAM_BYTES = 256 << 20
_STREAM_S = 0.5
_PIECE = bytes(1 << 20)


def bootstrap() -> None:
    """Entry of the interpreter."""
    if starter := os.environ.pop("LAUNCH_STARTER_PID", ""):
        die_with_parent(int(starter))
    become_subreaper()
    how = sys.argv[1:]
    number = None
    link: Link
    if how[0] == "fd":
        link = Channel(socket.socket(fileno=int(how[1])))
    elif how[0] == "stdio":
        link = own_stdio()
    else:
        link = Channel(connect(os.environ["SLURM_LAUNCH_NODE_IPADDR"], int(how[1]), _JOIN_S))
        number = int(os.environ["SLURM_PROCID"])
    token = os.environ.pop("LAUNCH_TOKEN", "")
    hands = Hands(link)
    try:
        link.send({"hello": {"token": token, "node": number, "address": link.local_address}})
        hands.work()
    except ConnectionError:
        pass  # who called for the doctor has left
    finally:
        hands.close()
        end_descendants()
    os._exit(0)


class Hands:
    """Orders in, answers out: each order is a message `{name: arguments}`, and so is its answer."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._port = Port()
        self._children: list[tuple[subprocess.Popen[bytes], IO[bytes]]] = []  # each with what it says to stderr

    def work(self) -> None:
        """Until the other end closes. Raises `ConnectionError`."""
        while not self._link.closed:
            select.select([self._link], [], [])
            for message in self._link.receive():
                for name, arguments in message.items():
                    self._link.send({name: getattr(self, f"do_{name}")(**arguments)})

    def close(self) -> None:
        self._port.close()
        for child, _ in self._children:
            child.kill()

    # ------------------------------------------------------------------------------------------ one machine

    def do_facts(self, packages: list[str], port: int, key: str) -> Message:
        """What this machine is; opens the port on which the others are to find it."""
        try:
            opened: Message = {"port": self._port.open(port, key)}
        except OSError as error:
            opened = {"port": None, "error": f"port {port}: {error.strerror}"}
        return facts.gather(packages) | {"opened": opened}

    def do_clock(self) -> Message:
        return {"now_s": time.time()}

    def do_write(self, folder: str, name: str) -> Message:
        """A file of our own in the shared folder, under a lock as the run folder's is."""
        path = Path(folder, name)
        text = secrets.token_hex(8)
        try:
            path.parent.mkdir(mode=0o700, exist_ok=True)
            with open(path, "w") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            return {"error": f"{error.strerror} ({error.filename or path})", "text": None}
        return {"error": None, "text": text}

    def do_read(self, folder: str, name: str, text: str) -> Message:
        """Whether another machine's file is here as it was written, and after how long."""
        began = time.monotonic()
        path, problem = Path(folder, name), ""
        while True:
            try:
                found = path.read_text()
                if found == text:
                    return {"error": None, "seconds": time.monotonic() - began}
                problem = "it holds something else"
            except OSError as error:
                problem = str(error.strerror)
            if time.monotonic() - began > _SEEN_S:
                return {"error": problem, "seconds": None}
            time.sleep(0.1)

    def do_forget(self, folder: str, name: str) -> Message:
        path = Path(folder, name)
        with contextlib.suppress(OSError):
            path.unlink()
        with contextlib.suppress(OSError):
            path.parent.rmdir()  # the last one
        return {}

    # ------------------------------------------------------------------------------------------ two machines

    def do_reach(self, peers: list[tuple[int, str, int]], key: str) -> Message:
        """Connect to each of the others, in the order given; why it failed, by the other's number."""

        def on(peer: tuple[int, str, int]) -> tuple[str, str | None]:
            number, address, port = peer
            try:
                with socket.create_connection((address, port), timeout=_ANSWER_S) as sock:
                    sock.sendall(f"{key}?".encode())
                    answer = sock.recv(1)
            except OSError as error:
                return str(number), f"{address} port {port}: {error.strerror or error}"
            return str(number), None if answer == b"!" else f"{address} port {port}: somebody else answers there"

        with ThreadPoolExecutor(_AT_ONCE) as pool:
            return {"failed": {number: why for number, why in pool.map(on, peers) if why is not None}}

    def do_stream(self, address: str, port: int, key: str) -> Message:
        """Send to one other machine for a while; bytes a second as they arrived there."""
        sent = 0
        try:
            with socket.create_connection((address, port), timeout=_ANSWER_S) as sock:
                sock.sendall(f"{key}<".encode())
                began = time.monotonic()
                while sent < _STREAM_BYTES and time.monotonic() - began < _STREAM_S:
                    sent += sock.send(_PIECE)
                sock.shutdown(socket.SHUT_WR)
                answer = sock.recv(1)  # comes when all has arrived
                seconds = time.monotonic() - began
        except OSError as error:
            return {"error": str(error.strerror or error), "rate": None}
        if answer != b"!":
            return {"error": "the connection ended early", "rate": None}
        return {"error": None, "rate": sent / seconds}

    # ------------------------------------------------------------------------------------------ all machines

    def do_host(self, order: dict[str, Any]) -> Message:
        """Start the all-reduce's first rank, which holds the store; where that is."""
        child = self._start(order)
        assert child.stdout is not None
        line = child.stdout.readline()
        if not line:
            return {"error": self._last_words(self._children[-1]), "port": None}
        return {"error": None, "port": json.loads(line)["port"]}

    def do_reduce(self, orders: list[dict[str, Any]], within_s: float) -> Message:
        """Start this machine's other ranks and wait for all; what the first of the machine measured."""
        for order in orders:
            self._start(order)
        deadline = time.monotonic() + within_s
        while any(child.poll() is None for child, _ in self._children):
            if time.monotonic() > deadline:
                return {"error": f"it did not end within {within_s:g} s", "measured": None}
            if failed := [child for child in self._children if child[0].poll()]:
                return {"error": self._last_words(failed[0]), "measured": None}
            if select.select([self._link], [], [], 0.05)[0]:
                self._link.receive()  # there is nothing to hear now but the end
                if self._link.closed:
                    raise ConnectionResetError
        if failed := [child for child in self._children if child[0].returncode]:
            return {"error": self._last_words(failed[0]), "measured": None}
        first = self._children[0][0].stdout
        assert first is not None
        return {"error": None, "measured": json.loads(first.read().splitlines()[-1])}

    def _start(self, order: dict[str, Any]) -> subprocess.Popen[bytes]:
        said = tempfile.TemporaryFile()  # noqa: SIM115  # as long as the child
        child = subprocess.Popen(
            python_command("launcher.doctor.collective", json.dumps(order)),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=said,
            env=os.environ | {"OMP_NUM_THREADS": "1", "LAUNCH_STARTER_PID": str(os.getpid())},
        )
        self._children.append((child, said))
        return child

    @staticmethod
    def _last_words(child: tuple[subprocess.Popen[bytes], IO[bytes]]) -> str:
        """The last line that a child left, which is over."""
        process, said = child
        process.wait()
        said.seek(0)
        lines = said.read().decode(errors="replace").strip().splitlines()
        return lines[-1][:300] if lines else f"a rank ended with code {process.returncode} and without a word"


class Port:
    """Where the other machines' connections are answered: `?` at once, `<` when all that follows has come."""

    def __init__(self) -> None:
        self._listener: socket.socket | None = None
        self._key = b""

    def open(self, port: int, key: str) -> int:
        """Listen on a port, or a free one for 0, and answer who knows the key. Raises `OSError`."""
        self._key = key.encode()
        family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
        self._listener = socket.create_server(
            ("", port), family=family, backlog=1024, dualstack_ipv6=family == socket.AF_INET6
        )
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()
        return int(self._listener.getsockname()[1])

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(sock,), daemon=True).start()

    def _answer(self, sock: socket.socket) -> None:
        with contextlib.suppress(OSError), sock:
            sock.settimeout(60)
            head = b""
            while len(head) <= len(self._key):
                if not (piece := sock.recv(len(self._key) + 1 - len(head))):
                    return
                head += piece
            if not secrets.compare_digest(head[:-1], self._key):
                return
            buffer = bytearray(1 << 20)
            while head[-1:] == b"<" and sock.recv_into(buffer):
                pass
            sock.sendall(b"!")

    def close(self) -> None:
        if self._listener is not None:
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
