"""Blocks that are read and not run here: every one is of a kind that some test checks, and every option exists."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from launcher import commands as subcommands
from launcher import jobs
from launcher.launching import RETRY
from launcher.request import parse
from launcher.where import Surroundings
from tests.docs.pages import blocks, commands, pages
from trainer import prove
from trainer.checkpoint import __main__ as ckpt

if TYPE_CHECKING:
    import click

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

LOGIN_NODE = Surroundings(sbatch=True)
INSIDE_A_JOB = Surroundings(sbatch=True, job="4711", nodes=2)
ALL = [block for page in pages() for block in blocks(page)]
SHELL = [b for b in ALL if b.language == "bash" and not b.title]
MAKEFILE = Path(__file__).parents[2] / "Makefile"
# What stands in our pages and is not ours to parse.
FOREIGN = {"pip", "docker", "python", "eval", "source", "echo", ".venv/bin/tensorboard", "sbatch", "git", "cd", "ssh"}


def test_every_block_is_of_a_kind_that_is_checked() -> None:
    known = {"bash", "console", "python", "toml", "json", "text", "diff", ""}
    assert [str(b) for b in ALL if b.language not in known] == []
    assert [str(b) for b in ALL if b.language == "" and re.search(r"^\s*(\$ )?launch ", b.text, re.MULTILINE)] == []


@pytest.mark.parametrize("page", sorted({b.page for b in SHELL}))
def test_commands_are_understood(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "apptainer").touch(mode=0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "of this machine")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "of this machine")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7")
    monkeypatch.setattr(prove, "prove_resume", lambda *_, **__: prove.Proof(()))
    for block in (b for b in SHELL if b.page == page):
        for line in commands(block):
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words = words[1:]
            if words[0] == "launch":
                understood(words[1:], tmp_path)
            elif words[0] == "torchrun":
                _stand_in(words, tmp_path)
                parse(words[1:], Surroundings())
            elif words[0] == "make":
                assert re.search(rf"^{words[1]}:", MAKEFILE.read_text(), re.MULTILINE), line
            elif words[0] == "docker":
                understood(words[words.index("launch") + 1 :], tmp_path)
            else:
                assert words[0] in FOREIGN, f"{block}: {line}"


def understood(words: list[str], here: Path) -> None:
    """The options are those of the command; files that are named stand there empty."""
    name = words[0]
    if name == "ckpt":
        ckpt._parser().parse_args(words[1:])
    elif name == "drill":
        prove.main(words[1:])
    elif name in ("resume", "retry"):
        _parsed(RETRY, words[1:])
    elif name in subcommands.NAMES:
        _parsed(__import__(f"launcher.commands.{name}", fromlist=["COMMAND"]).COMMAND, words[1:])
    elif name not in ("--version", "--help"):
        _stand_in(words, here)
        inside = not any(w in words for w in ("--nodes", "--hosts", "--backend", "--nnodes", "-d", "--dry-run"))
        parse(words, INSIDE_A_JOB if inside and "--gpus" in words and "--sweep" not in words else LOGIN_NODE)


def _parsed(command: click.Command, words: list[str]) -> None:
    with command.make_context("launch", words):
        pass


def _stand_in(words: list[str], here: Path) -> None:
    for word in words:
        if word.endswith((".py", ".jsonl")) and not (here / word).exists():
            (here / word).parent.mkdir(parents=True, exist_ok=True)
            (here / word).write_text('{"lr": 1}\n' if word.endswith("l") else "")
        elif word.startswith("@"):
            (here / word[1:]).write_text("a slots=4\nb slots=4\n")
        elif word == "package.train":
            (here / "package").mkdir(exist_ok=True)
            (here / "package" / "__init__.py").write_text("")
            (here / "package" / "train.py").write_text("")


def test_the_rest_is_well_formed() -> None:
    for block in ALL:
        if block.language == "toml":
            tomllib.loads(block.text)
        elif block.language == "json":
            assert [json.loads(line) for line in block.text.splitlines()]
        elif block.language == "python":
            for call in ast.walk(ast.parse(block.text)):
                # Jobs that this machine cannot run are asked for by options that exist.
                if isinstance(call, ast.Call) and ast.unparse(call.func) in ("launcher.submit", "launcher.map_array"):
                    options = {k.arg: ast.literal_eval(k.value) for k in call.keywords if k.arg is not None}
                    if "array" in options:  # map_array puts the indices before it
                        options["array"] = f"0-9{options['array']}"
                    jobs._request({"backend": "slurm", **options} if "gpus" in options else options)
