"""Messages between the launcher's own processes: JSON objects over a stream socket, descriptors alongside.

One frame is a 4-byte big-endian length and that many bytes of UTF-8 JSON. On Unix sockets file descriptors may travel
with a frame. Nothing is ever unpickled, so a stranger on the port can at worst be refused.
"""

from __future__ import annotations

import array
import contextlib
import errno
import ipaddress
import json
import os
import select
import socket
import struct
import threading
from collections import deque
from typing import Any

Message = dict[str, Any]
_LENGTH = struct.Struct("!I")
_MAX_FRAME = 64 << 20
_MAX_FDS = 64
# What keep-alive ends a connection with, where a process that dies closes it.
_SILENCE = (errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.EHOSTDOWN, errno.ENETUNREACH)


def _frame(message: Message) -> bytes:
    body = json.dumps(message, separators=(",", ":")).encode()
    return _LENGTH.pack(len(body)) + body


class Link:
    """One end of a connection. Sending blocks until the kernel has taken the frame; receiving never blocks. Several
    threads may send.

    Raises `ConnectionError` from `send` when the other end is gone; `receive` then returns what was still complete
    and sets `closed`. `unreachable`: not the other process ended, but its host or the way to it no longer answers.
    """

    def __init__(self) -> None:
        self.closed = False
        self.unreachable = False
        self._sending = threading.Lock()
        self._buffer = bytearray()
        self._fds: deque[int] = deque()

    def fileno(self) -> int:
        raise NotImplementedError

    def _write(self, frame: memoryview, fds: tuple[int, ...]) -> None:
        raise NotImplementedError

    def _read(self) -> bytes:
        """What is there, empty at the end; `BlockingIOError` if nothing is."""
        raise NotImplementedError

    @property
    def local_address(self) -> str | None:
        """Of this host, on the way to the other end; None if there is none."""
        raise NotImplementedError

    def send(self, message: Message, fds: tuple[int, ...] = ()) -> None:
        frame = _frame(message | {"fds": len(fds)} if fds else message)
        with self._sending:
            self._write(memoryview(frame), fds)

    def receive(self) -> list[Message]:
        """All complete messages that have arrived; a message sent with descriptors holds them as `fds`."""
        try:
            while not self.closed:
                data = self._read()
                self.closed = not data
                self._buffer += data
        except BlockingIOError:
            pass
        except OSError as error:
            self.closed = True
            self.unreachable = error.errno in _SILENCE
        return self._complete()

    def _complete(self) -> list[Message]:
        messages = []
        while len(self._buffer) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer)
            if length > _MAX_FRAME:
                self.closed = True
                break
            end = _LENGTH.size + length
            if len(self._buffer) < end:
                break
            try:
                message = json.loads(bytes(self._buffer[_LENGTH.size : end]))
            except (ValueError, RecursionError):
                self.closed = True
                break
            del self._buffer[:end]
            if not isinstance(message, dict):
                self.closed = True
                break
            if "fds" in message:
                count = message["fds"]
                if not isinstance(count, int) or not 0 < count <= len(self._fds):
                    self.closed = True
                    break
                message["fds"] = [self._fds.popleft() for _ in range(count)]
            messages.append(message)
        return messages

    def close(self) -> None:
        self.closed = True
        while self._fds:
            os.close(self._fds.popleft())


class Channel(Link):
    """A connection by a socket."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__()
        self.sock = sock
        self._rest = b""  # of a frame that `offer` could send a part of

    def fileno(self) -> int:
        return self.sock.fileno()

    @property
    def local_address(self) -> str | None:
        return None if self.sock.family == socket.AF_UNIX else str(self.sock.getsockname()[0])

    def offer(self, message: Message) -> None:
        """Send without waiting, or not at all: where another thread sends just now, or the other end has so much to
        read that there is no room. Raises `OSError` when the other end is gone.
        """
        if not self._sending.acquire(blocking=False):
            return
        try:
            frame = self._rest or _frame(message)
            with contextlib.suppress(BlockingIOError):
                self._rest = frame[self.sock.send(frame, socket.MSG_DONTWAIT) :]
        finally:
            self._sending.release()

    def _write(self, frame: memoryview, fds: tuple[int, ...]) -> None:
        if self._rest:
            self.sock.sendall(self._rest)
            self._rest = b""
        if fds:
            sent = self.sock.sendmsg([frame], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])
            frame = frame[sent:]
        if frame:
            self.sock.sendall(frame)

    def _read(self) -> bytes:
        # The socket itself blocks, for the sake of a thread that sends meanwhile.
        if self.sock.family != socket.AF_UNIX:
            return self.sock.recv(1 << 16, socket.MSG_DONTWAIT)
        data, ancillary, _, _ = self.sock.recvmsg(1 << 16, socket.CMSG_SPACE(_MAX_FDS * 4), socket.MSG_DONTWAIT)
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds = array.array("i")
                fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
                self._fds.extend(fds)
        return data

    def close(self) -> None:
        with self._sending:  # else the number of the socket could be another file's when a thread comes to send
            super().close()
            self.sock.close()


class PipeChannel(Link):
    """A connection by two descriptors, as sshd gives them to a command. Descriptors do not travel with its frames."""

    def __init__(self, reads: int, writes: int, local_address: str | None) -> None:
        super().__init__()
        self._reads, self._writes, self._local_address = reads, writes, local_address
        os.set_blocking(reads, False)

    def fileno(self) -> int:
        return self._reads

    @property
    def local_address(self) -> str | None:
        return self._local_address

    def _write(self, frame: memoryview, fds: tuple[int, ...]) -> None:
        assert not fds
        while frame:
            try:
                frame = frame[os.write(self._writes, frame) :]
            except BlockingIOError:  # noqa: PERF203  # both may be one socket, so this one does not block either
                select.select([], [self._writes], [])

    def _read(self) -> bytes:
        return os.read(self._reads, 1 << 16)

    def close(self) -> None:
        super().close()
        for descriptor in {self._reads, self._writes} - {-1}:
            os.close(descriptor)
        self._reads = self._writes = -1


def pair() -> tuple[Channel, Channel]:
    """Two connected ends for a parent and its child."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    return Channel(ours), Channel(theirs)


def keep_alive(sock: socket.socket) -> None:
    """Have the kernel notice a dead peer or link within 4 s; torch's keep-alive takes 15 s, Slurm's 300 s."""
    if sock.family == socket.AF_UNIX:
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 4000)


def is_loopback(address: str) -> bool:
    """Whether an IP address means the host itself and nothing to others."""
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def address_towards(other: str) -> str:
    """The IP address of this host on the way to another IP address. Raises `OSError` if there is no way."""
    family, _, _, _, where = socket.getaddrinfo(other, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.connect(where)  # nothing is sent
        return str(sock.getsockname()[0])
