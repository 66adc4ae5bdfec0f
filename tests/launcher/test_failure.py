"""Which exit is the cause: a table of what happened and who is to be named."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from launcher.failure import RankExit, exception_in, find_root, read_error_file, render

if TYPE_CHECKING:
    from pathlib import Path

PEER = "[../gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:45209"


def at(rank: int, code: int, ended: int, *, raised: int | None = None, says: str | None = None, asked: bool = False,
       tail: tuple[str, ...] = (), node: int = 0) -> RankExit:  # fmt: skip
    error = None if says is None else {"type": "RuntimeError", "message": says, "traceback": f"Traceback\n{says}"}
    if error is not None and raised is not None:
        error["monotonic_ns"] = raised  # type: ignore[assignment]
    return RankExit(rank, rank, node, "host", 100 + rank, code, ended, asked, f"/logs/{rank}", error, tail)


TABLE = [
    ("nothing", [at(0, 0, 1), at(1, 75, 2)], None),
    ("one", [at(0, 0, 1), at(1, 3, 2)], (1, (), False)),
    ("earliest end", [at(0, 3, 9), at(1, 4, 8), at(2, 5, 7)], (2, (1, 0), False)),
    ("exception before end", [at(0, 1, 9, raised=1, says="x"), at(1, 1, 8, raised=2, says="y")], (0, (1,), False)),
    ("microseconds", [at(0, 1, 2001, says="x", raised=1001), at(1, 1, 2000, says="y", raised=1000)], (1, (0,), False)),
    ("follower first on the clock", [at(0, 1, 1, says=PEER), at(1, -9, 5)], (1, (0,), False)),
    ("follower by its last words", [at(0, 134, 1, tail=("terminate called", PEER)), at(1, 7, 5)], (1, (0,), False)),
    ("abort by its last words", [at(0, -6, 1, tail=(PEER,)), at(1, 7, 5)], (1, (0,), False)),
    ("old words are no excuse", [at(0, 1, 1, tail=(PEER, *["step"] * 20)), at(1, 7, 5)], (0, (1,), False)),
    ("killed is never a follower", [at(0, -9, 5, tail=(PEER,)), at(1, 1, 1, says=PEER)], (0, (1,), False)),
    ("left with success", [at(0, 1, 5, raised=1, says=PEER), at(1, 0, 2)], (1, (0,), True)),
    ("left for later", [at(0, 1, 5, raised=4, says=PEER), at(1, 75, 2), at(2, 1, 6, says=PEER)], (1, (0, 2), True)),
    ("only followers", [at(0, 1, 6, says=PEER), at(1, 1, 5, says=PEER)], (1, (0,), False)),
    ("asked to leave and left", [at(0, 1, 1, says="x"), at(1, -15, 2, asked=True)], (0, (), False)),
    ("asked and broke then", [at(0, 1, 3, says=PEER), at(1, 1, 4, says="in cleanup", asked=True)], (0, (), False)),
    ("only broke when asked", [at(0, 75, 1, asked=True), at(1, 1, 4, says="disk full", asked=True)], (1, (), False)),
    ("asked, success is no desertion", [at(0, 0, 5, asked=True), at(1, 1, 3, says=PEER)], (1, (), False)),
    ("raised, and stopped on its way out", [at(0, 1, 3, raised=2, says=PEER), at(1, -15, 5, raised=1, says="assert",
     )], (1, (0,), False)),
    ("143 after being asked", [at(0, 143, 5, asked=True), at(1, -9, 3)], (1, (), False)),
]  # fmt: skip


@pytest.mark.parametrize(("exits", "wanted"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE])
def test_root(exits: list[RankExit], wanted: tuple[int, tuple[int, ...], bool] | None) -> None:
    for order in (exits, exits[::-1]):
        root = find_root(order)
        assert (None if root is None else (root.exit.rank, root.followers, root.left_early)) == wanted


@pytest.mark.parametrize(
    "says",
    [
        PEER,
        "[/tmp/gloo/transport/tcp/pair.cc:547] Connection reset by peer [127.0.0.1]:1",
        "[..] Timed out waiting 1800000ms for recv operation to complete",
        "Broken pipe",
        "NCCL error in: ProcessGroupNCCL.cpp:10, remote process exited or there was a network error, NCCL version 2.27",
        "recvValue failed on SocketImpl(fd=3, remote=[localhost]:2): Failed to recv, got 0 bytes.",
        "Gloo connectFullMesh failed with [..] no error",
        "The client socket has failed to connect to any network address: Connection refused",
        "[Rank 3] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=5, ...) ran for 600010",
        "[PG ID 0 Rank 1] Process group watchdog thread terminated with exception: NCCL error: remote process exited",
        "[PG ID 0 Rank 1] ProcessGroupNCCL's watchdog got stuck for 480 seconds without making progress",
        "[Rank 0]: Rank 2 failed to pass monitoredBarrier in 30000 ms",
        "The client socket has timed out after 60000ms while trying to connect to (10.0.0.2, 4000).",
        "NCCL communicator encountered error set by ProcessGroupNCCL: collective timeout",
        "Socket closed [10.0.0.3]:4000",
        "Read timeout [10.0.0.3]:4000",
        "Remote peer closed the connection.",
    ],
)
def test_what_torch_says_of_a_lost_peer(says: str) -> None:
    assert at(0, 1, 0, says=says).lost_peer


@pytest.mark.parametrize(
    "says",
    ["no such label: 17", "CUDA out of memory", "shapes cannot be multiplied", "",
     "Process group watchdog thread terminated with exception: CUDA error: device-side assert triggered",
     'Connection was closed before we received a valid response from endpoint URL: "http://s3/b"'],
)  # fmt: skip
def test_what_is_a_fault_of_ones_own(says: str) -> None:
    assert not at(0, 1, 0, says=says).lost_peer


@pytest.mark.parametrize(("code", "exit_code"), [(3, 3), (-9, 137), (-11, 139), (255, 255)])
def test_exit_codes(code: int, exit_code: int) -> None:
    root = find_root([at(0, code, 1)])
    assert root is not None
    assert root.exit_code == exit_code


def test_json_and_clocks() -> None:
    ended = at(3, -9, 5, raised=4, says="x", tail=("a", "b"))
    assert RankExit.from_json(json.loads(json.dumps(ended.to_json()))) == ended
    moved = ended.on_clock(1000)
    assert (moved.ended_ns, moved.failed_ns) == (1005, 1004)
    assert (ended.ended_ns, ended.failed_ns) == (5, 4)
    assert at(0, 1, 5).on_clock(-5).ended_ns == 0


def test_error_files(tmp_path: Path) -> None:
    """Ours, and what torch's @record writes; anything else is no record."""
    path = tmp_path / "error.json"
    assert read_error_file(path) is None
    for text in ("", "[]", "{}", "{", '{"message": 3}', "null"):
        path.write_text(text)
        assert read_error_file(path) is None
    path.write_text(json.dumps({"message": "plain words"}))
    assert read_error_file(path) == {"type": "", "message": "plain words", "traceback": "plain words"}
    path.write_text(json.dumps({
        "message": {"message": "ValueError: a: b", "extraInfo": {"py_callstack": "Traceback...", "timestamp": "1"}}
    }))  # fmt: skip
    assert read_error_file(path) == {"type": "ValueError", "message": "a: b", "traceback": "Traceback..."}


def test_an_exception_that_an_interpreter_of_its_own_printed() -> None:
    lines = ["step 3", "Traceback (most recent call last):", '  File "job.py", line 3, in <module>', "    fail()",
             "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", "[W101] destroyed"]  # fmt: skip
    found = exception_in(lines)
    assert found is not None
    assert (found["type"], found["message"]) == (
        "torch.OutOfMemoryError", "CUDA out of memory. Tried to allocate 2 GiB",
    )  # fmt: skip
    assert found["traceback"].splitlines() == lines[1:5]
    bare = exception_in(["Traceback (most recent call last):", '  File "x"', "AssertionError"])
    assert bare is not None
    assert (bare["type"], bare["message"]) == ("AssertionError", "")
    for nothing in ([], ["step 3"], ["Traceback (most recent call last):", '  File "x"']):
        assert exception_in(nothing) is None


def test_a_rank_that_was_stopped_on_its_way_out_is_told_by_its_exception() -> None:
    """Its exit code was that of our own SIGTERM, and the report named that."""
    root = find_root([at(0, 1, 3, raised=2, says=PEER), at(1, -15, 5, raised=1, says="boom")])
    assert root is not None
    assert root.exit_code == 1
    assert render(root, 2).splitlines()[0].endswith("failed first: it raised RuntimeError: boom")


def test_the_report() -> None:
    many = [at(r, 1, 10 + r, says=PEER) for r in range(1, 40)]
    root = find_root([at(0, -11, 1, tail=tuple(f"line {i}" for i in range(60))), *many])
    assert root is not None
    lines = render(root, 40).splitlines()
    assert lines[0] == "rank 0 of 40 on host (local rank 0, pid 100) failed first: it was killed by SIGSEGV"
    assert lines[1].startswith("after it failed: ranks 1, 2, 3,")
    assert lines[1].endswith("16, ...")
    assert "  line 59" in lines
    assert "  line 39" not in lines
    assert lines[-1] == "log: /logs/0"
    alone = find_root([at(0, 1, 1, says="x")])
    assert alone is not None
    assert render(alone, 1).splitlines() == [
        "rank 0 of 1 on host (local rank 0, pid 100) failed: it exited with code 1 (RuntimeError: x)",
        "", "Traceback", "x", "",
        "log: /logs/0",
    ]  # fmt: skip
