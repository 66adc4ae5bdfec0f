"""The note of where a launch was made: what git says, where git can be put down at any moment."""

from __future__ import annotations

import os
import signal
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from launcher import surroundings
from launcher.spec import LaunchSpec, Program

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture
def git_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Another git on the path."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def does(body: str) -> None:
        (tmp_path / "git").write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / "git").chmod(0o755)

    return does


def test_a_git_that_says_nothing_has_no_commit(tmp_path: Path, git_does: Callable[[str], None]) -> None:
    git_does('case "$*" in *toplevel) echo /x;; *diff*) exit 1;; esac')
    told = surroundings._code(tmp_path)
    assert told is not None
    assert (told["root"], told["commit"], told["edited"]) == ("/x", None, None)


def test_a_git_that_somebody_else_has_waited_for_has_said_nothing(
    tmp_path: Path, git_does: Callable[[str], None]
) -> None:
    git_does("echo half of it")
    assert surroundings._git(tmp_path) == "half of it\n"
    old = signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel waits for it
    try:
        assert surroundings._git(tmp_path) is None
    finally:
        signal.signal(signal.SIGCHLD, old)


def test_the_same_edits_are_kept_once_and_not_without_end(tmp_path: Path, git_does: Callable[[str], None]) -> None:
    git_does('case "$*" in *diff*) exec yes +password=hunter2;; *) echo /x;; esac')  # never ends by itself
    spec = LaunchSpec(program=Program("script", "job.py"), cwd=str(tmp_path))
    for attempt in range(2):
        surroundings.Note(tmp_path, spec, attempt).wait(60)
    assert len(list(tmp_path.glob("surroundings-*.json"))) == 2
    assert len(list(tmp_path.glob("surroundings-*.diff"))) == 1
    told = surroundings.read(tmp_path)
    assert told is not None
    assert told["code"]["cut"]
    assert told["code"]["diff"].startswith("+password=[hidden]\n")


def test_a_note_of_a_snapshot_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "copy.json").write_text("{")
    assert surroundings._kept(SimpleNamespace(code=SimpleNamespace(copy=str(tmp_path / "copy")))) is None
