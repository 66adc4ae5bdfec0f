"""Every page is done as a reader would: files saved, Python run, commands typed, their output compared."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.docs.pages import REPO, Block, Call, blocks, calls, pages

FIRST = "docs/tutorials/digits.md"  # the other tutorials go on with its files
RUN = [p for p in pages() if p != "README.md" and any(b.language in ("python", "console") for b in blocks(p))]
DEADLINE_S = 250


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", RUN)
def test_page(page: str, tmp_path: Path) -> None:
    if page.startswith("docs/tutorials/"):
        for block in blocks(FIRST):
            if block.title:
                (tmp_path / block.title).write_text(block.text)
    do(page, tmp_path)


def do(page: str, here: Path) -> None:
    """What the page says, in a folder."""
    script = here / "block.py"
    todo = blocks(page)
    for number, block in enumerate(todo):
        if block.title:
            (here / block.title).write_text(block.text)
        elif block.language == "python":
            # Those that follow each other share an interpreter: torch's import is most of their time.
            with script.open("a") as file:
                file.write(block.text)
            if not any(b.language == "python" for b in todo[number + 1 : number + 2]):
                run(Call(f"{sys.executable} block.py", ("...",)), block, here, compared=False)
                script.unlink()
        elif block.language == "console":
            for call in calls(block):
                run(call, block, here)


def run(call: Call, block: Block, here: Path, *, compared: bool = True) -> None:
    """Type one command; its output must be what the page says, with `...` for whatever comes."""
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": f"{REPO}:{here}",
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
    }
    out = here / "output.txt"
    with open(out, "wb") as file:
        process = subprocess.Popen(
            ["bash", "-c", call.command], cwd=here, env=environment, stdin=subprocess.DEVNULL, stdout=file,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    deadline = time.monotonic() + DEADLINE_S
    pressed = call.interrupted_after is None
    try:
        while process.poll() is None:
            if not pressed and call.wanted(call.interrupted_after).match(out.read_text()):
                os.killpg(process.pid, signal.SIGINT)
                pressed = True
            assert time.monotonic() < deadline, f"{block}: {call.command} goes on for ever\n{out.read_text()}"
            time.sleep(0.02)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    said = out.read_text()
    said += "" if said.endswith("\n") or not said else "\n"
    if compared:
        assert pressed, f"{block}: {call.command} ended before Ctrl-C\n{said}"
        if call.wanted().match(said) is None:
            pytest.fail(f"{block}: $ {call.command}\n{said}", pytrace=False)
    else:
        assert process.returncode == 0, f"{block}\n{said}"
