"""What the ranks print: pipes -> a file per rank and attempt, whole prefixed lines on the console, last lines kept."""

from __future__ import annotations

import contextlib
import errno
import os
import queue
import re
import select
import threading
from collections import deque
from string import Template
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from launcher.channel import Link

__all__ = ["NO_ROOM", "Console", "Forwarded", "RankLog", "Relay"]

# What a disk says that a run is not to die of: full, of one's quota too, broken, or made read-only since.
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS}

_CHUNK = 1 << 16
# A program that never ends its line must not grow our memory: such a line is passed on in pieces of this size.
_LONGEST_LINE = 1 << 20
_LINE = re.compile(rb"[^\r\n]*(?:\r\n|\n|\r)")


class Console:
    """Writes whole lines to the launch's own stdout and stderr from one thread, so that a paused terminal or a slow
    pipe holds up neither the agent nor the ranks whose output is only logged.

    `full` tells the reader to leave the pipes of shown ranks alone for a while; `on_drained` is called from the
    thread when there is room again.
    """

    def __init__(
        self,
        on_drained: Callable[[], None],
        *,
        limit: int = 256,
        write: Callable[[int, memoryview], int] = os.write,
    ) -> None:
        self._write = write
        self._queue: queue.SimpleQueue[tuple[int, bytes] | None] = queue.SimpleQueue()
        self._limit = limit
        self._on_drained = on_drained
        self._starved = False
        self._thread: threading.Thread | None = None

    @property
    def full(self) -> bool:
        if self._queue.qsize() < self._limit:
            return False
        self._starved = True
        return True

    def write(self, fd: int, data: bytes) -> None:
        if self._thread is None:
            # Started with the first line and not before: the zygote must be forked while there is one thread.
            self._thread = threading.Thread(target=self._drain, name="launch-console", daemon=True)
            self._thread.start()
        self._queue.put((fd, data))

    def _drain(self) -> None:
        broken: set[int] = set()
        while (item := self._queue.get()) is not None:
            fd, data = item
            view = memoryview(data)
            while view and fd not in broken:
                try:
                    view = view[self._write(fd, view) :]
                except BlockingIOError:  # noqa: PERF203
                    # Somebody else made the shared terminal non-blocking; wait until it takes more.
                    threading.Event().wait(0.01)
                except OSError:
                    broken.add(fd)  # `launch ... | head`: the reader left; files still get everything
            if self._starved and self._queue.qsize() < self._limit // 2:
                self._starved = False
                self._on_drained()

    def close(self, timeout_s: float = 5.0) -> None:
        """Write out what is queued; give up on a console that takes nothing for `timeout_s`."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join(timeout_s)
            self._thread = None


class Forwarded:
    """Brings console lines to the supervisor as messages; so many bytes at most are on the way that neither a loud rank
    nor a paused terminal keeps other messages waiting.
    """

    _WINDOW = 1 << 20
    _PIECE = 1 << 16

    def __init__(self, link: Link) -> None:
        self._link = link
        self._away = 0
        self._closed = False
        self._changed = threading.Condition()

    def write(self, fd: int, view: memoryview) -> int:
        """What Console takes for os.write."""
        piece = bytes(view[: self._PIECE])
        if len(piece) < len(view):
            # Between two pieces come those of other hosts: a piece holds whole lines, or is one that is very long.
            end = max(piece.rfind(b"\n"), piece.rfind(b"\r")) + 1
            piece = piece[:end] if end else bytes(view)
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._away < self._WINDOW)
            self._away += len(piece)
        # A character may be cut in two; each half travels as what it is.
        self._link.send({"console": fd, "text": piece.decode(errors="surrogateescape")})
        return len(piece)

    def shown(self, size: int) -> None:
        """The supervisor has taken so many bytes."""
        with self._changed:
            self._away -= size
            self._changed.notify_all()

    def open(self) -> None:
        """Hold nothing back any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


class Relay:
    """Shows what agents forward. A line that the console has no room for is taken all the same, and only then is its
    sender let go on: so much at most waits here for each agent.
    """

    def __init__(self, on_drained: Callable[[], None]) -> None:
        self._console = Console(on_drained)
        self._owed: list[tuple[Link, int]] = []

    def take(self, link: Link, fd: int, text: str) -> None:
        data = text.encode(errors="surrogateescape")
        self._console.write(2 if fd == 2 else 1, data)
        self._owed.append((link, len(data)))
        self.settle()

    def settle(self) -> None:
        """Let the senders go on if there is room."""
        if self._owed and not self._console.full:
            owed, self._owed = self._owed, []
            for link, size in owed:
                with contextlib.suppress(OSError):  # its end is on the way
                    link.send({"shown": size})

    def close(self) -> None:
        """Write out what is there."""
        self._console.close()


class RankLog:
    """The output of one rank in one attempt."""

    def __init__(
        self,
        path: Path,
        *,
        console: Console,
        shown: dict[int, bool],
        prefix: bytes,
        copies: dict[int, Path],
        keep: int = 60,
    ) -> None:
        """`shown` and `copies` are by stream: 1 stdout, 2 stderr; `copies` are torchrun's separate files."""
        self.path = path
        self.tail: deque[str] = deque(maxlen=keep)
        self.pipes: dict[int, int] = {}  # read end -> stream
        self._console = console
        self._shown = shown
        self._prefix = prefix
        self._partial = {1: b"", 2: b""}
        self._broken = {-1}
        self._file = self._open(path)
        self._copies = {stream: self._open(copy) for stream, copy in copies.items()}

    def _open(self, path: Path) -> int:
        """-1 on a disk that takes nothing more."""
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            self._tell_lost(error)
            return -1

    def open_pipes(self) -> tuple[int, int]:
        """Make the pipes; the write ends (stdout, stderr) are the caller's to hand on and close."""
        ends = []
        for stream in (1, 2):
            read, write = os.pipe2(os.O_CLOEXEC)
            os.set_blocking(read, False)
            self.pipes[read] = stream
            ends.append(write)
        return ends[0], ends[1]

    def held_up(self, pipe: int) -> bool:
        """Whether this pipe must wait until the console has room."""
        return self._shown[self.pipes[pipe]] and self._console.full

    def read(self, pipe: int, rounds: int = 16) -> bool:
        """Take what is in the pipe, at most `rounds` chunks: one loud rank starves nobody. False at its end."""
        stream = self.pipes[pipe]
        for _ in range(rounds):
            try:
                data = os.read(pipe, _CHUNK)
            except BlockingIOError:
                return True
            if not data:
                self._flush(stream)
                del self.pipes[pipe]
                os.close(pipe)
                return False
            self._take(stream, data)
            if len(data) < _CHUNK // 4 or self.held_up(pipe):
                return True
        return True

    def _take(self, stream: int, data: bytes) -> None:
        if stream in self._copies:
            self._write(self._copies[stream], data)
        data = self._partial[stream] + data
        end = data.rfind(b"\n") + 1
        # A progress bar ends its lines with \r: shown at once, kept in the file with what follows.
        end = max(end, data.rfind(b"\r", end) + 1)
        if not end and len(data) > _LONGEST_LINE:
            end = len(data)
        self._partial[stream] = data[end:]
        if end:
            self._emit(stream, data[:end])

    def _write(self, fd: int, data: bytes) -> None:
        """A full disk ends the log, and says so on the console, but not the training."""
        if fd in self._broken:
            return
        try:
            _write_all(fd, data)
        except OSError as error:
            self._broken.add(fd)
            self._tell_lost(error)

    def _tell_lost(self, error: OSError) -> None:
        self._console.write(2, f"launch: {self.path}: {error.strerror}; its output is lost from here on\n".encode())

    def _flush(self, stream: int) -> None:
        rest, self._partial[stream] = self._partial[stream], b""
        if rest:
            self._emit(stream, rest + b"\n")

    def _emit(self, stream: int, lines: bytes) -> None:
        self._write(self._file, lines)
        self.tail.extend(lines[-16384:].decode(errors="replace").splitlines())
        if self._shown[stream]:
            if not lines.endswith((b"\n", b"\r")):
                lines += b"\n"
            self._console.write(stream, _prefixed(lines, self._prefix))

    def close(self) -> None:
        """Drain and close; a grandchild that still holds a pipe open is not waited for."""
        for pipe in list(self.pipes):
            stream = self.pipes[pipe]
            while self.read(pipe, rounds=1024) and _has_data(pipe):
                pass
            if pipe in self.pipes:
                self._flush(stream)
                del self.pipes[pipe]
                os.close(pipe)
        for fd in {self._file, *self._copies.values()} - {-1}:
            os.close(fd)
        self._copies = {}


def _prefixed(lines: bytes, prefix: bytes) -> bytes:
    """Lines that all have ends, each with `prefix` before it."""
    if b"\r" in lines:
        return b"".join([prefix + line for line in _LINE.findall(lines)])
    # 28 us for 64 KiB of short lines in place of 750: most of what a rank that floods the console cost.
    return prefix + lines[:-1].replace(b"\n", b"\n" + prefix) + b"\n"


def prefix_for(template: str, *, rank: int, local_rank: int, role: str, host: str) -> bytes:
    """Torchrun's `--log-line-prefix-template`, and our own default `[${rank}] `."""
    values = {"rank": rank, "local_rank": local_rank, "role_name": role, "hostname": host}
    return Template(template).safe_substitute(values).encode()


def _has_data(pipe: int) -> bool:
    return bool(select.select([pipe], [], [], 0)[0])


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
