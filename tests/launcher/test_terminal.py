"""`--procs 1` on a terminal keeps the terminal: breakpoint(), Ctrl-C and stdin are the program's own."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

COMMAND = str(Path(sys.executable).with_name("launch"))
_OWN_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""


class Terminal:
    """A command with a terminal of its own."""

    def __init__(self, arguments: list[str], cwd: Path) -> None:
        self.output = b""
        self._master, slave = pty.openpty()
        # setsid and the first open make it the controlling terminal, as a shell's job has it.
        self.process = subprocess.Popen(
            [sys.executable, "-c", _OWN_TERMINAL, *arguments],
            cwd=cwd, stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
        )  # fmt: skip
        os.close(slave)
        os.set_blocking(self._master, False)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        os.close(self._master)

    def types(self, data: bytes) -> None:
        os.write(self._master, data)

    def _take(self) -> None:
        try:
            self.output += os.read(self._master, 65536)
        except BlockingIOError:
            time.sleep(0.01)
        except OSError:
            time.sleep(0.01)  # nobody has the other side open any more

    def says(self, pattern: bytes, timeout: float = 30) -> None:
        deadline = time.monotonic() + timeout
        while not re.search(pattern, self.output):
            if time.monotonic() > deadline:
                pytest.fail(f"waited in vain for {pattern!r}; so far: {self.output.decode(errors='replace')}")
            self._take()

    def ends(self, timeout: float = 30) -> int:
        deadline = time.monotonic() + timeout
        while self.process.poll() is None:
            if time.monotonic() > deadline:
                pytest.fail(f"still runs; so far: {self.output.decode(errors='replace')}")
            self._take()
        self._take()
        return self.process.returncode


@pytest.mark.parametrize("how", [["--preload", "json"], ["--no-preload"]], ids=["forked", "plain"])
def test_the_debugger_stdin_and_ctrl_c_are_the_programs(tmp_path: Path, how: list[str]) -> None:
    """The first Ctrl-C is caught and the program goes on; the second ends it, and launch dies of it as python would."""
    (tmp_path / "job.py").write_text(
        "import os, signal, sys, time\n"
        "secret = 6 * 7\n"
        "breakpoint()\n"
        "answer = input('your name? ')\n"
        "print('hello', answer, os.isatty(0), sys.stdout.isatty(), os.getsid(0) == os.getsid(os.getppid()))\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # the debugger has put its own there
        "for turn in range(2):\n"
        "    try:\n"
        "        print('waiting', turn, flush=True)\n"
        "        time.sleep(60)\n"
        "    except KeyboardInterrupt:\n"
        "        print('caught', turn, flush=True)\n"
        "        if turn: raise\n"
    )
    with Terminal([COMMAND, "--procs", "1", *how, "job.py"], tmp_path) as terminal:
        terminal.says(rb"\(Pdb\) ")
        terminal.types(b"p secret + 1\n")
        terminal.says(rb"\r\n43\r\n")
        terminal.types(b"c\n")
        terminal.says(rb"your name\? ")
        terminal.types(b"ada\n")
        terminal.says(rb"waiting 0")
        assert b"hello ada True True True" in terminal.output
        terminal.types(b"\x03")
        terminal.says(rb"waiting 1")
        terminal.types(b"\x03")
        assert terminal.ends() == 130
        assert terminal.output.count(b"caught") == 2
        # Said once, by the program itself; there is no log to name.
        assert terminal.output.count(b"KeyboardInterrupt") == 1
        assert b"log:" not in terminal.output
        assert re.search(
            rb"rank 0 of 1 on \S+ \(local rank 0, pid \d+\) failed: it was killed by SIGINT\s*$", terminal.output
        )


def test_ctrl_c_on_several_ranks_asks_them_to_leave(tmp_path: Path, programs: Path) -> None:
    with Terminal(
        [COMMAND, "--procs", "2", "--no-preload", "--show-ranks", "all", str(programs / "patient.py"), "leave75"],
        tmp_path,
    ) as terminal:
        # A rank that has no handler yet would die of the signal.
        terminal.says(rb"rank [01] is ready[\s\S]*rank [01] is ready")
        terminal.types(b"\x03")
        assert terminal.ends() == 75
        assert b"SIGINT: asking the ranks to save and leave" in terminal.output
