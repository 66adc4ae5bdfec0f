"""The doctor's rounds: all machines are asked side by side, and what they answer makes one report.

Nobody is asked about the others one by one: each machine reaches out to all others by itself, and the pairs whose
bandwidth is measured change places in rounds, so that every machine sends to one and hears from one at a time.
"""

from __future__ import annotations

import contextlib
import hmac
import math
import secrets
import selectors
import socket
import statistics
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from launcher.channel import Channel, address_towards, is_loopback, keep_alive
from launcher.doctor import facts
from launcher.errors import MeetingError
from launcher.processes import reap

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from launcher.channel import Link, Message

__all__ = ["Machine", "Place", "Report", "Ways", "examine", "pairings"]

_JOIN_S = 90.0
_ANSWER_S = 60.0
_ENDS_WITHIN_S = 5.0  # a process whose connection has ended
_CLOCK_ROUNDS = 5
_REDUCE_S = 90.0
_STARTS_AT_ONCE = 32
_TRIES = 10
ALL_PAIRS_UP_TO = 33  # machines: beyond, each is paired with 32 others, near and far
_SLOW = 0.33  # of the median: measured again, alone


@dataclass
class Machine:
    """What was found on one machine. `gone`: why nothing more was; None for what was not tried."""

    name: str
    gone: str | None = None
    facts: dict[str, Any] | None = None
    address: str | None = None
    clock_s: tuple[float, float] | None = None  # ahead of ours, and by how much that may be wrong
    written: dict[str, Any] | None = None
    read: dict[str, Any] | None = None
    unreached: dict[int, str] = field(default_factory=dict)


@dataclass
class Report:
    """What was found. rates: bytes a second from one machine to another, by their numbers; reduced: by all of them."""

    here: dict[str, Any]
    machines: list[Machine]
    rates: dict[tuple[int, int], float] = field(default_factory=dict)
    reduced: dict[str, Any] | None = None


@dataclass(frozen=True)
class Place:
    """What a run will ask of the machines.

    folder: shared, None if there need be none; port: of the store (0: a free one); gpus: on each machine, 0 for none,
    None for as many as there are; packages: by name, whether they must be there.
    """

    folder: Path | None
    port: int = 0
    gpus: int | None = None
    packages: dict[str, bool] = field(default_factory=dict)


@dataclass(frozen=True)
class Ways:
    """How the machines are reached: by `start(number)` each, or all by one process (`start_all(port, token)`), after
    which they come by themselves. why: the reason why a way has ended with a code; passing: whether that may pass.
    """

    names: Sequence[str]
    start: Callable[[int], tuple[Channel, subprocess.Popen[bytes]]] | None = None
    start_all: Callable[[int, str], subprocess.Popen[bytes]] | None = None
    why: Callable[[int, int], str] = lambda _, code: f"it ended with code {code}"
    passing: Callable[[int, int], bool] = lambda _, __: False


@dataclass
class _Hands:
    link: Link
    process: subprocess.Popen[bytes] | None = None
    number: int | None = None


def pairings(count: int) -> list[int]:
    """The distances between machine i and the one that it sends to, (i + distance) % count, one a round."""
    if count <= ALL_PAIRS_UP_TO:
        return list(range(1, count))
    powers = [1 << i for i in range(int(math.log2(count - 1)) + 1)]
    even = [round(1 + i * (count - 2) / (ALL_PAIRS_UP_TO - 2)) for i in range(ALL_PAIRS_UP_TO - 1)]
    return sorted({*powers, *even})


def examine(ways: Ways, place: Place, say: Callable[[str], None]) -> Report:
    """Look at all machines. Raises `MeetingError` if not one of them can be reached."""
    packages = [*facts.OWN, *(p for p in place.packages if p not in facts.OWN)]
    report = Report(facts.gather(packages), [Machine(name) for name in ways.names])
    with _Ward(ways, report) as ward:
        say(f"reaching {len(ways.names)} machine{'s' if len(ways.names) > 1 else ''}")
        ward.gather()
        if not ward.present:
            told = "; ".join(f"{m.name}: {m.gone}" for m in report.machines[:20])
            raise MeetingError(f"none of the machines could be examined: {told}")
        _look(ward, report, packages, place)
        if len(ward.present) > 1:
            say("connecting each with each")
            _connect(ward, report)
        say("an all-reduce")
        _reduce(ward, report, place)
    return report


def _look(ward: _Ward, report: Report, packages: list[str], place: Place) -> None:
    machines = report.machines
    order = {"packages": packages, "port": place.port, "key": ward.key}
    for number, answer in ward.ask("facts", dict.fromkeys(ward.present, order)).items():
        machines[number].facts = answer
    for _ in range(_CLOCK_ROUNDS):
        for number in ward.present:
            _compare_clock(ward, machines[number], number)
    if place.folder is not None:
        _share(ward, machines, str(place.folder))


def _share(ward: _Ward, machines: list[Machine], folder: str) -> None:
    names = {number: f"doctor-{ward.key}/machine-{number}" for number in ward.present}
    own = {number: {"folder": folder, "name": name} for number, name in names.items()}
    try:
        for number, answer in ward.ask("write", own).items():
            machines[number].written = answer
        # Each reads its neighbour's: as many reads as machines, not their square.
        wrote = [n for n in ward.present if (machines[n].written or {}).get("text")]
        reads = {
            n: {"folder": folder, "name": names[other], "text": (machines[other].written or {})["text"]}
            for n, other in zip(wrote, [*wrote[1:], *wrote[:1]], strict=True)
        }
        for number, answer in ward.ask("read", reads).items():
            machines[number].read = answer
    finally:
        ward.ask("forget", own)


def _compare_clock(ward: _Ward, machine: Machine, number: int) -> None:
    began, before = time.monotonic(), time.time()
    answer = ward.ask("clock", {number: {}}).get(number)
    taken = time.monotonic() - began
    if answer is not None and (machine.clock_s is None or taken / 2 < machine.clock_s[1]):
        machine.clock_s = answer["now_s"] - (before + taken / 2), taken / 2


def _connect(ward: _Ward, report: Report) -> None:
    """All pairs: can they reach each other, and how fast."""
    machines = report.machines
    ward.settle_addresses()
    where = {
        n: (machines[n].address or "", opened["port"])
        for n in ward.present
        if (opened := (machines[n].facts or {}).get("opened", {})).get("port") is not None and machines[n].address
    }
    ready = list(where)
    orders = {}
    for at, number in enumerate(ready):
        # Each begins with the one behind it, so that nobody is the first of all.
        order = [*ready[at + 1 :], *ready[:at]]
        orders[number] = {"peers": [(n, *where[n]) for n in order], "key": ward.key}
    wait_s = _ANSWER_S + 0.5 * len(ready)
    for number, answer in ward.ask("reach", orders, wait_s).items():
        machines[number].unreached = {int(n): why for n, why in answer["failed"].items()}
    for distance in pairings(len(ready)):
        pairs = {ready[i]: ready[(i + distance) % len(ready)] for i in range(len(ready))}
        _stream(ward, report, pairs, where)
    if report.rates:
        usual = statistics.median(report.rates.values())
        # Whatever else went on at that moment is not there twice.
        for pair in [pair for pair, rate in report.rates.items() if rate < _SLOW * usual][:64]:
            _stream(ward, report, dict([pair]), where)


def _stream(ward: _Ward, report: Report, pairs: dict[int, int], where: dict[int, tuple[str, int]]) -> None:
    orders = {
        a: {"address": where[b][0], "port": where[b][1], "key": ward.key}
        for a, b in pairs.items()
        if a in ward.present and b in ward.present and b not in report.machines[a].unreached
    }
    for number, answer in ward.ask("stream", orders).items():
        if answer["rate"] is None:
            report.machines[number].unreached[pairs[number]] = answer["error"]
        else:
            pair = number, pairs[number]
            report.rates[pair] = max(answer["rate"], report.rates.get(pair, 0.0))


def _reduce(ward: _Ward, report: Report, place: Place) -> None:
    """A sum over all machines, with the collective library that their ranks will use."""
    present = ward.present
    if not present:
        return  # all were lost meanwhile
    machines = [report.machines[n] for n in present]
    found = [m.facts or {} for m in machines]
    if absent := [m.name for m, f in zip(machines, found, strict=True) if f.get("packages", {}).get("torch") is None]:
        report.reduced = {"skipped": f"there is no torch on {', '.join(absent[:8])}"}
        return
    if cut := [m.name for m in machines if m.unreached]:
        report.reduced = {"skipped": f"not all reach each other: {', '.join(cut[:8])}"}
        return
    counts = [min(f["visible"], len(f["gpus"])) if isinstance(f.get("gpus"), list) else 0 for f in found]
    each = min(counts) if place.gpus is None else min(place.gpus, *counts)
    backend, ranks = ("nccl", each) if each else ("gloo", 1)
    size = ranks * len(present)
    address = "127.0.0.1" if len(present) == 1 else machines[0].address
    common = {"size": size, "backend": backend, "address": address, "within_s": _REDUCE_S}
    first = present[0]
    # Its own port, if one was asked for, is held by the machine's answering side.
    hosted = ward.ask("host", {first: {"order": {**common, "rank": 0, "device": 0, "port": 0}}}, _REDUCE_S)
    answer = hosted.get(first, {"error": "it no longer answers", "port": None})
    if answer["port"] is None:
        report.reduced = {"failed": {first: answer["error"]}, "backend": backend, "size": size}
        return
    orders = {}
    for at, number in enumerate(present):
        own = [
            {**common, "rank": at * ranks + i, "device": i, "port": answer["port"]}
            for i in range(1 if number == first else 0, ranks)
        ]
        orders[number] = {"orders": own, "within_s": _REDUCE_S}
    answers = ward.ask("reduce", orders, _REDUCE_S + 10)
    failed = {n: a["error"] for n, a in answers.items() if a["error"] is not None}
    failed |= {n: "it no longer answers" for n in present if n not in answers}
    measured = next((a["measured"] for a in answers.values() if a["measured"] is not None), None)
    report.reduced = {"failed": failed, "backend": backend, "size": size, **(measured or {})}


class _Ward:
    """The machines as they are reached: one connection each, one order at a time, nobody waited for too long."""

    def __init__(self, ways: Ways, report: Report) -> None:
        self.key = secrets.token_hex(8)
        self._ways = ways
        self._machines = report.machines
        self._token = secrets.token_hex(16)
        self._selector = selectors.DefaultSelector()
        self._ahead: list[tuple[float, int]] = []  # when each is to be started, the next one last
        self._tries: dict[int, int] = {}
        self._coming: list[_Hands] = []
        self._here: dict[int, _Hands] = {}
        self._all: subprocess.Popen[bytes] | None = None
        self._listener: socket.socket | None = None
        self._answers: dict[int, Message] = {}
        self._awaited: set[int] = set()

    def __enter__(self) -> _Ward:
        return self

    def __exit__(self, *_: object) -> None:
        hands = [*self._coming, *self._here.values()]
        for one in hands:
            one.link.close()
        for process in [*(one.process for one in hands), self._all]:
            if process is not None:
                reap(process, _ENDS_WITHIN_S)
        if self._listener is not None:
            self._listener.close()
        self._selector.close()

    @property
    def present(self) -> list[int]:
        """The machines that answer, in order."""
        return sorted(self._here)

    # ------------------------------------------------------------------------------------------ coming

    def gather(self) -> None:
        """Start the way to every machine, some at once, until each has come or will not."""
        self._ahead = [(0.0, number) for number in reversed(range(len(self._machines)))]
        deadline = time.monotonic() + _JOIN_S
        if self._ways.start_all is not None:
            self._ahead = []
            self._listener = socket.create_server(("", 0), backlog=4096)
            self._listener.setblocking(False)
            self._selector.register(self._listener, selectors.EVENT_READ)
            self._all = self._ways.start_all(self._listener.getsockname()[1], self._token)
        while time.monotonic() < deadline:
            while self._ahead and len(self._coming) < _STARTS_AT_ONCE and self._ahead[-1][0] <= time.monotonic():
                self._start(self._ahead.pop()[1])
                deadline = time.monotonic() + _JOIN_S
            if not self._coming and not self._ahead and (self._all is None or self._all_came()):
                break
            self._turn(0.2)
        for number, machine in enumerate(self._machines):
            if number not in self._here and machine.gone is None:
                machine.gone = f"it has not come within {_JOIN_S:g} s"

    def _start(self, number: int) -> None:
        assert self._ways.start is not None
        link, process = self._ways.start(number)
        self._await(_Hands(link, process, number))

    def _all_came(self) -> bool:
        return len(self._here) == len(self._machines) or (self._all is not None and self._all.poll() is not None)

    def settle_addresses(self) -> None:
        """Whoever is reached by its own loopback is this very host, and has another address on the way to others."""
        machines = [self._machines[n] for n in self.present]
        afar = [m.address for m in machines if m.address is not None and not is_loopback(m.address)]
        for machine in machines:
            if afar and machine.address is not None and is_loopback(machine.address):
                with contextlib.suppress(OSError):
                    machine.address = address_towards(afar[0])

    # ------------------------------------------------------------------------------------------ asking

    def ask(self, what: str, orders: dict[int, Message], within_s: float = _ANSWER_S) -> dict[int, Message]:
        """Give machines an order each and wait for all answers; who gives none in time is given up."""
        self._answers, self._awaited = {}, {number for number in orders if number in self._here}
        for number in sorted(self._awaited):
            with contextlib.suppress(ConnectionError):  # its end is on the way, as the end of the connection
                self._here[number].link.send({what: orders[number]})
        deadline = time.monotonic() + within_s
        while self._awaited:
            if (left := deadline - time.monotonic()) <= 0:
                for number in sorted(self._awaited):
                    self._lose(self._here[number], f"no answer within {within_s:g} s ({what})")
                break
            self._turn(left)
        return self._answers

    def _await(self, hands: _Hands) -> None:
        self._coming.append(hands)
        self._selector.register(hands.link, selectors.EVENT_READ, hands)

    def _turn(self, timeout_s: float) -> None:
        for key, _ in self._selector.select(timeout_s):
            hands: _Hands | None = key.data
            if hands is None:
                self._accept()
                continue
            for message in hands.link.receive():
                if "hello" in message:
                    self._greet(hands, message["hello"])
                elif hands.number in self._here:
                    self._answers[hands.number] = next(iter(message.values()))
                    self._awaited.discard(hands.number)
            if hands.link.closed:
                self._lose(hands, None)

    def _accept(self) -> None:
        assert self._listener is not None
        with contextlib.suppress(OSError):
            sock, _ = self._listener.accept()
            keep_alive(sock)
            self._await(_Hands(Channel(sock)))

    def _greet(self, hands: _Hands, hello: dict[str, Any]) -> None:
        if hands.process is None:
            if not hmac.compare_digest(str(hello["token"]), self._token):
                hands.link.closed = True
                return
            hands.number = int(hello["node"])
        assert hands.number is not None
        self._coming.remove(hands)
        self._here[hands.number] = hands
        self._machines[hands.number].address = hello["address"]

    def _lose(self, hands: _Hands, why: str | None) -> None:
        self._selector.unregister(hands.link)
        hands.link.close()
        if hands in self._coming:
            self._coming.remove(hands)
        code = None if hands.process is None else reap(hands.process, _ENDS_WITHIN_S)
        if hands.number is None:
            return
        came = self._here.pop(hands.number, None) is not None
        self._awaited.discard(hands.number)
        if not came and code is not None and self._ways.passing(hands.number, code):
            tries = self._tries[hands.number] = self._tries.get(hands.number, 0) + 1
            if tries < _TRIES:  # a jump host that is too busy drops some logins
                self._ahead.insert(0, (time.monotonic() + 1.0, hands.number))
                return
        if why is None:
            why = "its connection was lost" if code is None else self._ways.why(hands.number, code)
        self._machines[hands.number].gone = why
