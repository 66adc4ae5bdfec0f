"""Completion as the shells ask for it: commands, options, runs, and files where a program or its arguments stand."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launcher import index

LAUNCH = Path(sys.executable).with_name("launch")


def complete(*words: str) -> list[str]:
    """What is offered for the last word, as click's script for bash asks."""
    variables = {"_LAUNCH_COMPLETE": "bash_complete", "COMP_WORDS": "\n".join(words), "COMP_CWORD": str(len(words) - 1)}
    done = subprocess.run([LAUNCH], env=os.environ | variables, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


def test_what_can_stand_where(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    run = tmp_path / "runs" / "first-run"
    run.mkdir(parents=True)
    (run / "run.json").touch()
    index.register(run, 5e9, "4711")
    assert complete("launch", "lo") == ["plain,logs"]
    assert complete("launch", "re") == ["plain,report", "plain,resume", "plain,retry"]
    assert complete("launch", "--sweep") == ["plain,--sweep", "plain,--sweep-file"]
    assert complete("launch", "--requeue", "re") == ["plain,resubmit"]
    assert complete("launch", "tra") == ["file,tra"]
    assert complete("launch", "job.py", "--") == ["file,--"]
    assert complete("launch", "logs", "--fo") == ["plain,--follow"]
    for command in ("show", "retry"):
        assert complete("launch", command, "f") == ["plain,first-run"]
    assert complete("launch", "show", "47") == ["plain,4711"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_script_for_each_shell(shell) -> None:
    done = subprocess.run([LAUNCH, "completion", shell], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "_LAUNCH_COMPLETE" in done.stdout
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=done.stdout, text=True, check=True, timeout=60)
    wrong = subprocess.run([LAUNCH, "completion", "csh"], capture_output=True, text=True, timeout=60)
    assert wrong.returncode == 2
    assert "'bash', 'zsh', 'fish'" in wrong.stderr
