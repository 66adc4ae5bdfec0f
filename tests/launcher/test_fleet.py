"""Who of a fleet is started when: by waves, and again; and what lost agents left is ended."""

from __future__ import annotations

import subprocess
from typing import Any

import pytest

from launcher import fleet
from launcher.errors import MeetingError


class Hosts:
    """Machines that nobody goes to."""

    names = tuple(f"host{i}" for i in range(100))

    def why(self, node: int, code: int) -> str:
        return f"code {code}"

    def passing(self, node: int, code: int) -> bool:
        return code == 255


@pytest.fixture
def roll() -> Any:
    return fleet.Roll(Hosts())  # type: ignore[arg-type]  # none is started here


def test_hosts_are_started_in_waves_and_each_that_came_or_did_not_makes_room(roll):
    roll.call(range(100))
    first = roll.due()
    assert first == list(range(32))
    assert roll.due() == []
    assert 5 < roll.wait_s() <= 10  # until one of those takes too long
    roll.came(0)
    roll.stayed_away(1, 1, hopeless=None)
    assert roll.wait_s() == 0
    assert roll.due() == [32, 33]
    for node in range(2, 100):
        roll.due()
        roll.came(node)
    assert roll.due() == []
    assert roll.wait_s() is None
    with pytest.raises(MeetingError, match=r"1 of 100 hosts did not come\n  host1: code 1"):
        roll.check([1])


def test_a_host_that_takes_long_holds_nobody_up(roll, monkeypatch):
    roll.call(range(40))
    assert len(roll.due()) == 32
    monkeypatch.setattr(fleet, "_SLOW_S", 0.0)
    assert roll.wait_s() == 0
    assert roll.due() == list(range(32, 40))


def test_a_login_that_was_dropped_is_tried_again(roll, monkeypatch):
    roll.call([0])
    assert roll.due() == [0]
    roll.stayed_away(0, 255, hopeless=None)
    assert 0 < roll.wait_s() <= 1
    roll.check([0])  # it may still come
    later = fleet.time.monotonic() + 2
    monkeypatch.setattr(fleet.time, "monotonic", lambda: later)
    assert roll.due() == [0]
    roll.check([0])  # it is on its way, and what happened before does not tell how that ends


class Fenced(Hosts):
    """Whoever is fenced: by `true` if that works, else by `false`."""

    def __init__(self):
        self.works = True
        self.fenced = []
        self.process = None

    def fence(self, node: int, pid: int, started: int) -> subprocess.Popen[bytes]:
        self.fenced.append((node, pid, started))
        self.process = subprocess.Popen(["true" if self.works else "false"])
        return self.process


def test_each_agent_that_a_node_loses_is_ended_until_that_is_known_to_be_done():
    hosts = Fenced()
    remains = fleet.Remains(hosts)  # type: ignore[arg-type]  # it only fences

    hosts.works = False
    remains.lost(1, 100, 7, given_up=subprocess.Popen(["true"]))
    hosts.process.wait(30)
    hosts.works = True
    remains.end(1)  # a new agent has come, and is lost when the first one's end is known
    hosts.process.wait(30)
    remains.lost(1, 200, 8, given_up=subprocess.Popen(["true"]))
    hosts.process.wait(30)
    remains.end(1)
    assert hosts.fenced == [(1, 100, 7), (1, 100, 7), (1, 200, 8)]
    remains.close(0)
