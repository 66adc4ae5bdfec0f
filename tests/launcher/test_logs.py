"""What ranks print: files byte for byte, console lines whole and prefixed, nobody held up by a slow reader."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

import pytest

from launcher.logs import Console, RankLog, prefix_for

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class Screen(Console):
    """A console that remembers."""

    def __init__(self) -> None:
        super().__init__(lambda: None)
        self.written: list[tuple[int, bytes]] = []

    def write(self, fd: int, data: bytes) -> None:
        self.written.append((fd, data))

    @property
    def text(self) -> bytes:
        return b"".join(data for _, data in self.written)


class Rank:
    """A log, with the write ends of its pipes."""

    def __init__(self, tmp_path: Path, console: Console, **settings) -> None:
        options = {"shown": {1: True, 2: True}, "prefix": b"[0] ", "copies": {}} | settings
        self.log = RankLog(tmp_path / "rank-0.log", console=console, **options)
        self.out, self.err = self.log.open_pipes()
        self.path = self.log.path

    def says(self, data: bytes, fd: int | None = None) -> None:
        os.write(self.out if fd is None else fd, data)
        for pipe in list(self.log.pipes):
            self.log.read(pipe)

    def ends(self) -> None:
        for fd in (self.out, self.err):
            os.close(fd)
        self.log.close()


@pytest.fixture
def screen() -> Iterator[Screen]:
    screen = Screen()
    yield screen
    screen.close()


def test_lines_are_never_torn(tmp_path: Path, screen: Screen) -> None:
    rank = Rank(tmp_path, screen)
    rank.says(b"one\ntw")
    assert screen.text == b"[0] one\n"
    rank.says(b"error\n", rank.err)
    rank.says(b"o\n\nthree\n")
    rank.says(b"unfinished")
    rank.ends()
    assert screen.text == b"[0] one\n[0] error\n[0] two\n[0] \n[0] three\n[0] unfinished\n"
    assert [fd for fd, _ in screen.written] == [1, 2, 1, 1]
    assert rank.path.read_bytes() == b"one\nerror\ntwo\n\nthree\nunfinished\n"
    assert list(rank.log.tail) == ["one", "error", "two", "", "three", "unfinished"]


def test_progress_bars_are_shown_while_they_move(tmp_path: Path, screen: Screen) -> None:
    """A bar that leads its line with \\r, one that ends it so, and Windows' line ends."""
    rank = Rank(tmp_path, screen)
    rank.says(b"\r 10%\r 20%")
    assert screen.text == b"[0] \r[0]  10%\r"
    rank.says(b"\r 30%\ndone\r\n")
    rank.ends()
    assert screen.text == b"[0] \r[0]  10%\r[0]  20%\r[0]  30%\n[0] done\r\n"
    assert rank.path.read_bytes() == b"\r 10%\r 20%\r 30%\ndone\r\n"


def test_a_carriage_return_and_its_newline_may_come_apart(tmp_path: Path, screen: Screen) -> None:
    rank = Rank(tmp_path, screen)
    rank.says(b"a\r")
    rank.says(b"\nb\n")
    rank.ends()
    assert screen.text in (b"[0] a\r\n[0] b\n", b"[0] a\r[0] \n[0] b\n")
    assert rank.path.read_bytes() == b"a\r\nb\n"


def test_bytes_that_are_no_text_and_nul_go_through(tmp_path: Path, screen: Screen) -> None:
    rank = Rank(tmp_path, screen)
    data = bytes(range(256)).replace(b"\r", b"").replace(b"\n", b"") + b"\n"
    rank.says(data)
    rank.ends()
    assert rank.path.read_bytes() == data
    assert screen.text == b"[0] " + data


def test_a_line_without_end_is_passed_on_in_pieces(tmp_path: Path, screen: Screen) -> None:
    rank = Rank(tmp_path, screen)
    writer = threading.Thread(target=os.write, args=(rank.out, b"x" * (3 << 20)))
    writer.start()
    while writer.is_alive():
        rank.log.read(next(iter(rank.log.pipes)))
        assert len(rank.log._partial[1]) <= (1 << 20) + (1 << 16)
    writer.join()
    rank.ends()
    assert rank.path.read_bytes().replace(b"\n", b"") == b"x" * (3 << 20)


def test_hidden_streams_are_kept_and_torchruns_files_are_written(tmp_path: Path, screen: Screen) -> None:
    rank = Rank(tmp_path, screen, shown={1: False, 2: True}, copies={1: tmp_path / "a/0/stdout.log"})
    rank.says(b"to the file\n")
    rank.says(b"to the screen\n", rank.err)
    rank.ends()
    assert screen.text == b"[0] to the screen\n"
    assert rank.path.read_bytes() == b"to the file\nto the screen\n"
    assert (tmp_path / "a/0/stdout.log").read_bytes() == b"to the file\n"


def test_the_last_lines_are_kept(tmp_path: Path, screen: Screen) -> None:
    rank = Rank(tmp_path, screen)
    for chunk in range(50):
        rank.says(b"".join(b"%d\n" % (100 * chunk + i) for i in range(100)))
    rank.ends()
    assert list(rank.log.tail) == [str(i) for i in range(4940, 5000)]


def test_a_grandchild_that_holds_the_pipe_is_not_waited_for(tmp_path: Path, screen: Screen) -> None:
    rank = Rank(tmp_path, screen)
    os.write(rank.out, b"last words")
    rank.log.close()  # the write ends are still open
    assert rank.path.read_bytes() == b"last words\n"
    os.close(rank.out)
    os.close(rank.err)


def test_a_slow_console_holds_up_only_what_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The console's pipe is full and nobody reads: writes are queued up to the limit, then the pipe has to wait."""
    read, write = os.pipe()
    drained = threading.Event()
    console = Console(drained.set, limit=4)
    os.write(write, b"x" * 65536)  # full
    for _ in range(5):
        console.write(write, b"line\n")
    rank, quiet = Rank(tmp_path, console), Rank(tmp_path, console, shown={1: False, 2: False})
    assert all(rank.log.held_up(pipe) for pipe in rank.log.pipes)
    assert not any(quiet.log.held_up(pipe) for pipe in quiet.log.pipes)
    got = b""
    while len(got) < 65536 + 25:
        got += os.read(read, 65536)
    assert drained.wait(10)
    assert not any(rank.log.held_up(pipe) for pipe in rank.log.pipes)
    console.close()
    assert got.endswith(b"line\n" * 5)
    for ended in (rank, quiet):
        ended.ends()
    os.close(read)
    os.close(write)


def test_a_console_whose_reader_left_stops_nothing() -> None:
    read, write = os.pipe()
    os.close(read)
    console = Console(lambda: None)
    for _ in range(3):
        console.write(write, b"to nobody\n")
    console.close()
    os.close(write)


def test_a_full_disk_ends_the_log_and_not_the_rank(tmp_path: Path, screen: Screen) -> None:
    (tmp_path / "rank-0.log").symlink_to("/dev/full")
    rank = Rank(tmp_path, screen)
    rank.says(b"one\n")
    rank.says(b"two\n")
    rank.ends()
    said = f"launch: {rank.path}: No space left on device; its output is lost from here on\n".encode()
    assert [data for fd, data in screen.written if fd == 2] == [said]
    assert [data for fd, data in screen.written if fd == 1] == [b"[0] one\n", b"[0] two\n"]
    assert list(rank.log.tail) == ["one", "two"]


def test_prefixes() -> None:
    where = {"rank": 3, "local_rank": 1, "role": "trainer", "host": "node1"}
    assert prefix_for("[${rank}] ", **where) == b"[3] "
    assert prefix_for("[${role_name}${local_rank}@${hostname}]:", **where) == b"[trainer1@node1]:"
    assert prefix_for("${nothing} 5$ ", **where) == b"${nothing} 5$ "


def test_a_flood_through_a_slow_reader_arrives_whole(launch) -> None:
    """2 ranks, 200 000 lines each: every line is whole, in order, in the file; hidden ranks are only in the file."""
    script = launch.script(
        "import os, sys\n"
        "rank = os.environ['RANK']\n"
        "for i in range(200_000): sys.stdout.write(f'{rank} {i} ' + 'y' * 20 + '\\n')\n"
    )
    job = launch.ok("--procs", "2", "--preload", "json", "--show-ranks", "1", script)
    lines = job.stdout.splitlines()
    assert lines == [f"[1] 1 {i} {'y' * 20}" for i in range(200_000)]
    assert job.run.log(0) == "".join(f"0 {i} {'y' * 20}\n" for i in range(200_000))


def test_torchruns_log_options(launch, tmp_path: Path) -> None:
    script = launch.script(
        "import os, sys\nprint('out', os.environ['RANK'])\nprint('err', os.environ['RANK'], file=sys.stderr)\n"
    )
    job = launch.ok(
        "--procs", "2", "--no-preload", "--log-dir", "logs", "-r", "0:3", "-t", "1:2", "--rdzv-id", "x", script
    )
    folder = launch.cwd / "logs" / job.run.path.name / "attempt_0"
    assert (folder / "0/stdout.log").read_text() == "out 0\n"
    assert (folder / "0/stderr.log").read_text() == "err 0\n"
    assert (folder / "1/stderr.log").read_text() == "err 1\n"
    assert not (folder / "1/stdout.log").exists()
    assert job.stdout == ""
    assert [line for line in job.stderr.splitlines() if not line.startswith("launch:")] == ["[1] err 1"]
