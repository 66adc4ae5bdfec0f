"""The lab as fixtures: one cluster for the whole session, handed to each test clean and taken back clean."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import machines
from machines import Call, Machines

from lab import Lab, LabError, Settings, Sharing, why_not

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Lab tests come last and by their lab's settings, so that few labs are built.

    They wait for each other anyway: under --dist loadgroup one worker has them all, and the others do not wait.
    """

    def order(item: pytest.Item) -> tuple[bool, str]:
        if not item.get_closest_marker("lab"):
            return False, ""
        if "lab" not in item.fixturenames:  # type: ignore[attr-defined]  # pytest.Function has it
            return True, "~"  # it makes and ends labs of its own
        call = getattr(item, "callspec", None)
        return True, repr(call.params.get("lab", "")) if call is not None else ""

    items.sort(key=order)
    for item in items:
        if item.get_closest_marker("lab"):
            item.add_marker(pytest.mark.xdist_group("lab"))


def _skip_or_fail(reason: str) -> None:
    # Where the lab must run, a skip would pass for a success: MUSTER_REQUIRE=lab,ssh,s3
    if "lab" in os.environ.get("MUSTER_REQUIRE", "").split(","):
        pytest.fail(f"MUSTER_REQUIRE asks for the lab, but {reason}", pytrace=False)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def sharing() -> Iterator[Sharing]:
    if reason := why_not():
        _skip_or_fail(reason)
    sharing = Sharing()
    sharing.join()
    yield sharing
    sharing.leave()


@pytest.fixture
def cluster(sharing: Sharing) -> Iterator[Callable[[Settings], Lab]]:
    """`cluster(settings)`: the running lab if it has these settings, else a new one in its place."""

    def with_settings(settings: Settings) -> Lab:
        if reason := why_not(settings):
            pytest.skip(reason)
        now = Lab.running()
        return now if now is not None and now.settings == settings else Lab.up(settings)

    with sharing.turn():
        yield with_settings


@pytest.fixture
def lab(request: pytest.FixtureRequest, cluster: Callable[[Settings], Lab]) -> Iterator[Lab]:
    """The lab with every node idle; `@pytest.mark.parametrize("lab", [Settings(...)], indirect=True)` for another one.

    After the test its jobs are cancelled, and whatever is left running on a node then fails it.
    """
    lab = cluster(getattr(request, "param", None) or Settings())
    yield lab
    try:
        left = lab.reset()
    except LabError as error:
        lab.down()  # the next test gets a new one
        pytest.fail(f"the lab did not come to rest: {error}", pytrace=False)
    if left:
        pytest.fail("left behind on the lab:\n  " + "\n  ".join(left), pytrace=False)


# ------------------------------------------------------------------------------------------------ without a scheduler


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    """Machines with sshd, one set for all tests of a module."""
    if reason := machines.why_not():
        if "ssh" in os.environ.get("MUSTER_REQUIRE", "").split(","):
            pytest.fail(f"MUSTER_REQUIRE asks for ssh, but {reason}", pytrace=False)
        pytest.skip(reason)
    found = Machines(tmp_path_factory.mktemp("machines"))
    found.up()
    yield found
    found.down()


@pytest.fixture(name="machines")
def healed_machines(started: Machines) -> Iterator[Machines]:
    """The machines, all reachable, and nothing that was launched left on them afterwards."""
    yield started
    for name in machines.NAMES:
        started.network.link_up(name)
    started.wait_empty("launcher", 60, "the end of everything that was launched")


@pytest.fixture
def launched(machines: Machines, tmp_path: Path) -> Iterator[Callable[..., Call]]:
    """`launched(*words)`: a `launch` on the head in tmp_path, which all machines see."""
    calls: list[Call] = []

    def begin(*words: str | Path, cwd: Path = tmp_path, **environment: str) -> Call:
        calls.append(Call(machines, cwd, *words, **environment))
        return calls[-1]

    yield begin
    for one in calls:
        if one.process.poll() is None:
            one.signal(signal.SIGKILL)
            one.process.communicate(timeout=30)
