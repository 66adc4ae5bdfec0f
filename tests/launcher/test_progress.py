"""What a run's record says of its attempts: hosts, steps begun at, reached and saved."""

from __future__ import annotations

import socket
import struct

from launcher.progress import PAGE, Beat, Progress

STEPPER = """
import mmap, os, struct, sys
attempt, rank = int(os.environ["LAUNCH_ATTEMPT"]), int(os.environ["RANK"])
with open(os.environ["LAUNCH_PROGRESS"], "r+b") as file:
    page = mmap.mmap(file.fileno(), 128)
struct.pack_into("<Q", page, 0, 0x4D55535445520002)
if attempt == 0:
    struct.pack_into("<Q", page, 8, 7 + rank)      # rank 1 is a step ahead
    struct.pack_into("<Qd", page, 40, 5, 0.25 * (rank + 1))
    sys.exit(3 * rank)
struct.pack_into("<Q", page, 64, 1 + 5)
if attempt == 1:
    os.abort()                                     # before its first step
struct.pack_into("<Q", page, 8, 10)
"""


def test_a_page() -> None:
    assert Progress.of_page(bytes(PAGE)) is None
    page = struct.pack("<QQIIQQQddQ", 0x4D55535445520002, 12, 1, 0, 99, 10**9, 8, 0.5, float("nan"), 5)
    page = page.ljust(PAGE, b"\0")
    assert Beat.of_page(page) == Beat(step=12, phase=1, at=99e-9, own_s=1.0, loss=None)
    assert Progress.of_page(page) == Progress(step=12, began=4, saved=8, save_s=0.5)
    assert Progress(3, began=1).and_of(Progress(2, saved=2, save_s=0.1)) == Progress(3, 1, 2, 0.1)
    assert Progress(3).and_of(None) == Progress(3)


def test_the_record_of_each_attempt_has_its_steps(launch) -> None:
    script = launch.script(STEPPER)
    events = launch.ok("--procs", "2", "--max-restarts", "2", script).run.events
    starts = [e for e in events if e["event"] == "attempt"]
    assert [e["hosts"] for e in starts] == [[socket.gethostname()]] * 3
    first, second, last = (e["progress"] for e in events if e["event"] in ("attempt-failed", "end"))
    assert (first["began"], first["step"], first["saved"]) == (None, 8, 5)
    assert first["save_s"] in (0.25, 0.5)  # rank 0 may be killed before it has written anything
    assert (second["began"], second["step"], second["saved"]) == (5, 5, None)
    assert last == {"step": 10, "began": 5, "saved": None, "save_s": None, "stall_s": None}
