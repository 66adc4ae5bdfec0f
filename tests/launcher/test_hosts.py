"""Machines as a person lists them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from launcher.errors import UsageError
from launcher.hosts import Host, parse
from launcher.request import parse as parse_request
from launcher.where import Surroundings


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("a", [Host("a")]),
        ("b,a:4", [Host("b"), Host("a", 4)]),
        ("me@node[08-10]:2,x", [Host("me@node08", 2), Host("me@node09", 2), Host("me@node10", 2), Host("x")]),
        ("a,a,a:2", [Host("a", 4)]),
        ("10.0.0.1:8", [Host("10.0.0.1", 8)]),
        ("fe80::1,[2001:db8::2]:4", [Host("fe80::1"), Host("2001:db8::2", 4)]),
    ],
)
def test_lists(text: str, hosts: list[Host]) -> None:
    assert list(parse(text, Path())) == hosts


def test_hostfiles(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("# ours\nb slots=2 max_slots=4\n\na # the old one\nc:3\nb\n")
    assert parse("@f", tmp_path) == (Host("b", 3), Host("a"), Host("c", 3))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "names no host"),
        ("a,,b", "names no host"),
        ("-oProxyCommand=x", "names no host"),
        ("a:0", "number of ranks"),
        ("a:x", "number of ranks"),
        ("node[3-1]", "no list of numbers"),
        ("@nowhere", "nowhere"),
        ("@empty", "names no host"),
        ("@odd", "line 2: 'slots=x'"),
    ],
)
def test_what_is_no_list(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("# nobody\n")
    (tmp_path / "odd").write_text("a\nb slots=x\n")
    with pytest.raises(UsageError, match=re.escape(says)):
        parse(text, tmp_path)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--hosts", "a,b", "--nodes", "3"], "names 2"),
        (["--hosts", "a:2", "--procs", "4"], "a has 2 slot"),
        (["--hosts", "a", "--gpus", "all"], "on other hosts it must be a number"),
        (["--hosts", "a", "--partition", "p"], "--partition: not with --hosts"),
        (["--hosts", "a", "--rdzv-endpoint", "a:1"], "not with --hosts"),
        (["--hosts", "a", "--array", "0-3"], "not on --hosts"),
        (["--hosts", "a", "--backend", "slurm"], "leave one of them out"),
        (["--hosts", "a", "--sync", "--no-snapshot"], "--no-snapshot"),
        (["--backend", "ssh"], "say where with --hosts"),
        (["--sync"], "no --hosts"),
        (["--hosts", "a", "--env", "NOT_SET_ANYWHERE"], "no such variable"),
        (["--env", "1=2"], "NAME=VALUE"),
    ],
)
def test_what_contradicts_hosts(words: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "job.py").write_text("")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=re.escape(says)):
        parse_request([*words, "job.py"], Surroundings(sbatch=True))


def test_slots_and_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "job.py").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TOKEN_OF_MINE", "hush")
    words = ["--hosts", "a:2,b,c", "--nodes", "2", "--env", "TOKEN_OF_MINE", "--env", "X=1", "job.py"]
    request = parse_request(words, Surroundings(sbatch=True))
    spec = request.spec
    assert request.where == "hosts"
    assert spec.ssh is not None
    assert (spec.ssh.hosts, spec.slots, spec.world_size, spec.ssh.env) == (("a", "b"), (2, 1), 3, ("TOKEN_OF_MINE",))
    assert spec.environment == {"X": "1"}
    assert "hush" not in str(spec.to_json())
    assert type(spec).from_json(spec.to_json()) == spec
