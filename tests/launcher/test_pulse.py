"""Who is taken for lost, by the clock alone; and a sign that comes whatever else is being waited for."""

from __future__ import annotations

import os
import threading

from launcher.channel import PipeChannel, pair
from launcher.pulse import Beating, Pulse


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
