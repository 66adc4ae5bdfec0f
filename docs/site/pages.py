"""Pages of the site that are made, not written: what `launch --help` says, and the papers in the repository's root."""

from __future__ import annotations

import os
import posixpath
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mkdocs.structure.files import File

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

ROOT = Path(__file__).parents[2]

# A paper of the repository -> its page.
PAPERS = {
    "DESIGN.md": "explanation/house.md",
    "SECURITY.md": "explanation/security.md",
    "CHANGELOG.md": "about/changelog.md",
    "CONTRIBUTING.md": "about/contributing.md",
    "benchmarks/README.md": "about/benchmarks.md",
}
_LINK = re.compile(r"\]\(([^)#\s]+)(#[^)\s]*)?\)")
_MAIN = "import sys; sys.argv[0] = 'launch'; from launcher.cli import main; main()"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Called by mkdocs before it reads the pages."""
    files.append(File.generated(config, "reference/command-line.md", content=command_line()))
    for paper, page in PAPERS.items():
        files.append(File.generated(config, page, content=as_page(paper)))
    return files


def as_page(paper: str) -> str:
    """A paper with its links as they must be on its page; a link to a file that has no page is its name."""

    def at_home(found: re.Match[str]) -> str:
        target, anchor = found[1], found[2] or ""
        if "://" in target:
            return found[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(paper), target))
        page = PAPERS.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else None)
        if page is None:
            return f"](#){{title='{path}'}}"
        return f"]({posixpath.relpath(page, posixpath.dirname(PAPERS[paper]))}{anchor})"

    text = _LINK.sub(at_home, (ROOT / paper).read_text())
    return re.sub(r"\[([^\]]*)\]\(#\)\{title='([^']*)'\}", r"`\2`", text)


def command_line() -> str:
    """Every command's help, as the command itself gives it."""
    from launcher.commands import NAMES

    parts = ["# The command line\n", "## launch\n", _block(help_of())]
    for name, does in sorted({**NAMES, "resume": "go on with a run that is over and has not finished",
                              "retry": "the same; of an array, with its elements"}.items()):  # fmt: skip
        parts += [f"## launch {name}\n", f"{does[0].upper()}{does[1:]}.\n", _block(help_of(name))]
        if name == "ckpt":
            for inner in re.findall(r"^    (\w+)", help_of("ckpt"), re.MULTILINE):
                parts += [f"### launch ckpt {inner}\n", _block(help_of("ckpt", inner))]
    return "\n".join(parts)


def help_of(*words: str) -> str:
    """What `launch WORDS --help` prints on a terminal of 100 columns."""
    told = subprocess.run(
        [sys.executable, "-c", _MAIN, *words, "--help"],
        cwd=ROOT, check=True, capture_output=True, text=True,
        env={**os.environ, "COLUMNS": "100", "NO_COLOR": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    return told.stdout


def _block(text: str) -> str:
    return f"```text\n{text.rstrip()}\n```\n"
