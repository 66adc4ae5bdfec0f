"""Who is taken for lost, by the clock alone; and a sign that comes whatever else is being waited for."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING

import pytest

from launcher.channel import Channel, PipeChannel, pair
from launcher.pulse import Beating, Presence, Pulse, Ran

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

HERE = {"here": True}


def looks(pulse: Pulse, begin: float, end: float) -> tuple[dict[int, float], dict[int, float]]:
    """All that is told from `begin` to `end`, by one that looks in time."""
    late: dict[int, float] = {}
    silent: dict[int, float] = {}
    now = begin
    while now <= end:
        one, other = pulse.look(now)
        late |= one
        silent |= {node: seconds for node, seconds in other.items() if node not in silent}
        now += 0.25
    return late, silent


def test_a_peer_counts_from_its_first_sign_and_is_late_before_it_is_silent() -> None:
    pulse = Pulse(0.0)
    pulse.heard(7, 0.0, sign=False)  # it is still importing
    assert looks(pulse, 0.25, 60.0) == ({}, {})
    pulse.heard(7, 60.0, sign=True)
    pulse.heard(8, 60.0, sign=True)
    for at in range(61, 70):
        assert looks(pulse, at - 0.75, at) == ({}, {})
        pulse.heard(7, at, sign=True)
        pulse.heard(8, at, sign=False)
    late, silent = looks(pulse, 69.25, 72.9)
    assert (set(late), silent) == ({7, 8}, {})
    pulse.heard(8, 72.9, sign=True)
    late, silent = looks(pulse, 73.0, 73.75)
    assert late == {}
    assert set(silent) == {7}
    assert 4 < silent[7] < 5
    pulse.forget(7)
    assert looks(pulse, 74.0, 74.25) == ({}, {})


def test_who_looks_too_late_does_not_blame_the_others() -> None:
    pulse = Pulse(0.0)
    pulse.heard(0, 0.0, sign=True)
    assert looks(pulse, 0.25, 1.5) == ({}, {})
    assert pulse.look(3601.5) == ({}, {})
    late, silent = looks(pulse, 3601.75, 3608.0)
    assert (set(late), set(silent)) == ({0}, {0})


def test_who_stood_still_and_was_not_given_up_may_forget_it() -> None:
    ran = Ran(0.0)
    for at in range(1, 11):
        assert not ran.stood_still(at)
        ran.on(at)
    assert not ran.stood_still(13.9)
    assert ran.stood_still(14.1)  # and it has just come to look
    ran.on(60.0)
    for at in range(60, 75):
        ran.on(at)
        assert ran.stood_still(at + 0.5)  # the word that it was given up may be on its way
    ran.on(75.0)
    assert not ran.stood_still(75.5)
    assert ran.stood_still(80.0)


def test_signs_come_while_the_main_thread_is_busy_sending_and_tear_no_message() -> None:
    ours, theirs = pair()
    beating = Beating(theirs)
    big = {"console": 1, "text": "x" * 1_000_000}
    sender = threading.Thread(target=lambda: [theirs.send(big) for _ in range(20)])
    sender.start()
    found: list[dict] = []
    while sum("text" in m for m in found) < 20 or not any("beat" in m for m in found):
        found += ours.receive()
    sender.join()
    assert all(m in ({"beat": True}, big) for m in found)
    assert not beating.stood_still
    theirs.close()
    ours.close()


def test_a_broken_way_ends_the_signs_and_nothing_else() -> None:
    reads, writes = os.pipe()
    os.close(reads)
    other, keep = os.pipe()
    link = PipeChannel(other, writes, None)
    Beating(link)
    for thread in threading.enumerate():
        if thread.name == "beat":
            thread.join(10)
            assert not thread.is_alive()
    link.close()
    os.close(keep)


def test_a_loop_that_is_held_up_is_there_and_one_that_stands_still_is_not() -> None:
    ours, theirs = pair()
    presence = Presence()
    presence.add(ours)
    presence.turned(100.0)
    presence.say(101.0)
    presence.say(700.0)
    presence.say(700.5)
    assert theirs.receive() == [HERE, HERE]
    presence.turned(800.0)
    presence.say(801.0)
    presence.discard(ours)
    presence.say(802.0)
    assert theirs.receive() == [HERE]
    ours.close()
    theirs.close()


def test_who_does_not_read_holds_nobody_up_and_gets_every_message_whole() -> None:
    ours, theirs = pair()
    big = {"text": "x" * 1_000_000}
    ours.offer(big)  # more than there is room for: it is cut in two
    for _ in range(3):
        ours.offer(HERE)
    last = threading.Thread(target=lambda: (ours.send({"last": 1}), ours.close()))
    last.start()
    found: list[dict] = []
    while not theirs.closed:
        found += theirs.receive()
    last.join()
    assert found == [big, {"last": 1}]
    theirs.close()


SUPERVISOR = """
import pathlib, socket, sys
from launcher.runs import RunFolder
from launcher.spec import LaunchSpec, Program
from launcher.supervisor import Supervisor

spec = LaunchSpec(Program("module", "json"), "/", nodes=1, procs=1, preload=("json",))
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
with RunFolder.open(pathlib.Path(sys.argv[1]), spec) as run:
    Supervisor(run, local=(), say=print, listener=listener, token="t").work()
"""


@pytest.mark.slow
def test_a_supervisor_that_a_file_system_holds_up_goes_on_saying_that_it_is_there(tmp_path: Path) -> None:
    """Its record of events is a pipe that nobody reads: opening it takes as long as we like."""
    folder = tmp_path / "run"
    with subprocess.Popen([sys.executable, "-c", SUPERVISOR, folder], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        link = Channel(socket.create_connection(("127.0.0.1", int(process.stdout.readline()))))
        link.send({"hello": {"token": "t", "host": "far", "pid": process.pid, "started": 1, "now_ns": 1,
                             "node_rank": 0, "procs": 1, "address": "127.0.0.1"}})  # fmt: skip
        told: list[dict] = []

        def until(done: Callable[[], bool]) -> None:
            deadline = time.monotonic() + 60
            while not done():
                assert time.monotonic() < deadline, told
                assert not link.closed
                select.select([link], [], [], 1)
                told.extend(link.receive())

        until(lambda: any("host" in m for m in told))
        (folder / "events.jsonl").unlink(missing_ok=True)
        os.mkfifo(folder / "events.jsonl")
        link.send({"store": {"addr": "127.0.0.1", "port": 9}, "attempt": 0})
        told.clear()
        until(lambda: told.count(HERE) == 3)
        assert not any("world" in m for m in told)
        with open(folder / "events.jsonl"):
            until(lambda: any("world" in m for m in told))
            link.close()
            process.kill()
