"""LaunchSpec: valid from birth, the same after JSON."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.errors import UsageError
from launcher.spec import LaunchSpec, Meeting, Output, Program

if TYPE_CHECKING:
    from pathlib import Path

SPEC = LaunchSpec(Program("script", "job.py"), "/tmp")

names = st.from_regex(r"[a-z_][a-z0-9_]{0,8}", fullmatch=True)
bits = st.dictionaries(st.integers(-1, 9), st.integers(0, 3), max_size=3)
specs = st.builds(
    LaunchSpec,
    program=st.builds(
        Program, st.sampled_from(["script", "module", "command"]), st.text(min_size=1), st.lists(st.text()).map(tuple)
    ),
    cwd=st.text().map(lambda t: "/" + t),
    nodes=st.integers(1, 999),
    procs=st.integers(1, 99),
    device=st.sampled_from(["gpu", "cpu", "any"]),
    max_restarts=st.integers(0, 99),
    grace_s=st.floats(0, 1e9),
    preload=st.lists(names, max_size=3).map(tuple),
    output=st.builds(
        Output,
        show_ranks=st.none() | st.lists(st.integers(0, 9)).map(tuple),
        tee=bits, redirects=bits, local_ranks_filter=st.lists(st.integers(0, 9)).map(tuple),
        log_dir=st.none() | st.text(), prefix=st.text(),
    ),
    meeting=st.none()
    | st.builds(Meeting, st.text(), st.none() | st.integers(0, 9), st.text(), st.none() | st.booleans()),
    stop_signals=st.lists(st.sampled_from(["SIGTERM", "SIGUSR1"])).map(tuple),
    virtual_local_rank=st.booleans(),
    environment=st.dictionaries(st.text(), st.text(), max_size=3),
)  # fmt: skip


@given(specs)
def test_json_both_ways(spec: LaunchSpec) -> None:
    assert LaunchSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


@pytest.mark.parametrize(
    "damage", [{"program": None}, {"nodes": "2"}, {"unknown": 1}, {"output": {}}, {"grace_s": "long"}]
)
def test_records_of_other_versions_are_refused(damage: dict) -> None:
    with pytest.raises(UsageError):
        LaunchSpec.from_json(SPEC.to_json() | damage)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"nodes": 0}, "nodes is 0"),
        ({"procs": 1.5}, "procs is 1.5"),
        ({"max_restarts": -1}, "max-restarts is -1"),
        ({"grace_s": float("nan")}, "--grace is nan"),
        ({"preload": ("a.b", "c d")}, "'c d' is no module name"),
        ({"stop_signals": ("SIGSTOP",)}, "'SIGSTOP'"),
        ({"cwd": "here"}, "'here' is not absolute"),
    ],
)
def test_wrong_from_birth_is_impossible(change: dict, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        dataclasses.replace(SPEC, **change)
    assert says in str(caught.value)


def test_a_spec_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SPEC.nodes = 2  # type: ignore[misc]


@pytest.mark.parametrize(
    ("output", "wanted"),
    [
        # (rank, local rank) of two nodes with two ranks each: which of stdout, stderr are shown
        (Output(), {0: 3, 1: 0, 2: 0, 3: 0}),
        (Output(show_ranks=None), {0: 3, 1: 3, 2: 3, 3: 3}),
        (Output(show_ranks=(3,)), {0: 0, 1: 0, 2: 0, 3: 3}),
        (Output(show_ranks=()), {0: 0, 1: 0, 2: 0, 3: 0}),
        (Output(tee={-1: 2}), {0: 3, 1: 2, 2: 2, 3: 2}),
        (Output(redirects={-1: 3}), {0: 0, 1: 0, 2: 0, 3: 0}),
        (Output(redirects={-1: 3}, tee={1: 1}), {0: 0, 1: 1, 2: 0, 3: 1}),
        (Output(local_ranks_filter=(1,)), {0: 0, 1: 3, 2: 0, 3: 3}),
        (Output(local_ranks_filter=(1,), tee={-1: 3}), {0: 0, 1: 3, 2: 0, 3: 3}),
    ],
)
def test_what_is_shown(output: Output, wanted: dict[int, int]) -> None:
    got = {
        rank: sum(stream for stream in (1, 2) if output.shown(rank, rank % 2, stream)) for rank in range(4)
    }  # fmt: skip
    assert got == wanted


def test_programs(tmp_path: Path) -> None:
    (tmp_path / "a.sh").write_text("not python: (((")
    (tmp_path / "b.py").write_bytes(b"# -*- coding: latin-1 -*-\nx = '\xe4'\n")
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "__main__.py").touch()
    for program in (
        Program("script", "a.sh"), Program("script", "b.py"), Program("script", str(tmp_path / "b.py")),
        Program("script", "app"), Program("module", "a.b_c"), Program("command", "sh"), Program("command", "/bin/sh"),
    ):  # fmt: skip
        program.check(tmp_path)
    (tmp_path / "nul.py").write_bytes(b"x = '\0'\n")
    for program in (Program("script", "nul.py"), Program("module", "a/b.py"), Program("command", "./a.sh")):
        with pytest.raises(UsageError):
            program.check(tmp_path)
