"""What the pages say that a machine can check: blocks of code, links, headings."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).parents[2]
ROOT_PAPERS = ("README.md", "DESIGN.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "slurm/README.md",
               "benchmarks/README.md")  # fmt: skip

_FENCE = re.compile(r"^```(\w*)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#{1,6} (.+)$", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """One fenced block of a page. title: the file that it is saved as, or ""."""

    page: str
    line: int
    language: str
    title: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def pages() -> list[str]:
    """Every page that people read, by its path in the repository."""
    return [*ROOT_PAPERS, *sorted(str(p.relative_to(REPO)) for p in (REPO / "docs").rglob("*.md"))]


def blocks(page: str) -> list[Block]:
    """The page's fenced blocks, in order."""
    text = (REPO / page).read_text()
    return [
        Block(page, text.count("\n", 0, found.start()) + 1, found[1], found[2] or "", found[3])
        for found in _FENCE.finditer(text)
    ]


def prose(page: str) -> str:
    """The page without its fenced blocks."""
    return _FENCE.sub("", (REPO / page).read_text())


def links(page: str) -> list[str]:
    """What the page links to, pictures too."""
    return [found[1] or found[2] for found in _LINK.finditer(prose(page))]


def anchors(page: str) -> set[str]:
    """The names of its headings, as GitHub and MkDocs make them."""
    return {
        re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower()).strip().replace(" ", "-")
        for heading in _HEADING.findall(prose(page))
    }


def commands(block: Block) -> list[str]:
    """The lines of a bash block that are commands: joined where they go on, without comments."""
    text = re.sub(r"\\\n\s*", " ", block.text)
    return [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]


@dataclass(frozen=True)
class Call:
    """One `$ command` of a console block; said: the lines that must come, `...` standing for anything.

    interrupted_after: how many of these come before Ctrl-C is pressed; None: it is not.
    """

    command: str
    said: tuple[str, ...]
    interrupted_after: int | None = None

    def wanted(self, count: int | None = None) -> re.Pattern[str]:
        """What its output must match; of the first `count` lines, its beginning."""
        lines = self.said if count is None else self.said[:count]
        pattern = ""
        for line in lines:
            if line.strip() == "...":
                pattern += r"(?:.*\n)*?"
            else:
                pattern += r".*?".join(re.escape(part.rstrip() if i else part) for i, part in enumerate(
                    line.rstrip().split("..."))) + r"[ \t]*\n"  # fmt: skip
        return re.compile(pattern + (r"\Z" if count is None else ""))


def calls(block: Block) -> list[Call]:
    """The commands of a console block, each with what it prints."""
    found: list[Call] = []
    for line in block.text.splitlines():
        if line.startswith("$ "):
            found.append(Call(line[2:], ()))
        elif line == "^C":
            last = found[-1]
            found[-1] = Call(last.command, last.said, len(last.said))
        else:
            last = found[-1]
            found[-1] = Call(last.command, (*last.said, line), last.interrupted_after)
    return found
