"""`launch top`: what the ranks of a run do and take right now."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import socket
import sys
import time
from typing import TYPE_CHECKING, Any

import click

from launcher.commands import Runs, options
from launcher.commands.asking import call, running
from launcher.commands.table import duration, lines
from launcher.errors import RunError
from launcher.runs import read_json
from launcher.stacks import numbers
from launcher.vitals import ANSWER, REQUEST

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from launcher.standing import Standing

__all__ = ["run", "screen"]

_RENEW_S = 10.0
_CALL_S = 20.0  # a supervisor that has not written anything for so long is called again: it may be another one
_LOOK_S = 0.25
_ANSWER_S = 30.0
_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-Z\\-_])")
_STYLES = {"!": "red", "*": "yellow"}  # by the marks of failed and of slow ranks

COMMAND = click.Command(
    "top",
    params=[
        Runs(many=False),
        click.Option(["--once"], is_flag=True, help="one block of plain text, as where nobody looks"),
        click.Option(["--json", "as_json"], is_flag=True, help="what was told, as one JSON object"),
    ],
    help="Watch the ranks of a run that runs: steps, steps per second, the time since the last step, memory (of all "
    "processes of a rank; shared pages count in each), GPU use, the last line. Who failed or is behind comes first. "
    "Ends with the run, or by Ctrl-C, which leaves the run alone. Exit code: 0; 2 if nobody answers.",
)


def run(argv: Sequence[str]) -> int:
    """Exit code: see the help."""
    o = options(COMMAND, argv)
    standing = running(o["runs"], "can be watched")
    watch = _Watch(standing)
    if o["as_json"] or o["once"] or not sys.stdout.isatty():
        answer = watch.wait(2)  # the first one knows no rates
        if o["as_json"]:
            click.echo(json.dumps(answer, indent=1))
        else:
            columns, _ = shutil.get_terminal_size((100, 24))
            click.echo("\n".join(screen(standing.name, answer, columns, len(answer["rows"]) + 8)))
        return 0
    with contextlib.suppress(KeyboardInterrupt):
        _live(standing, watch)
    return 0


class _Watch:
    """Asks for what is told of a run and reads it, as long as it is used."""

    def __init__(self, standing: Standing) -> None:
        self._standing = standing
        self._who = f"{os.getpid()}@{socket.gethostname()}-{secrets.token_hex(4)}"
        self._signals = 0
        self._renewed = self._called = self._heard = 0.0
        self._answer: dict[str, Any] | None = None

    def look(self) -> dict[str, Any] | None:
        """The newest answer; None if there is none yet."""
        now = time.monotonic()
        with contextlib.suppress(OSError, ValueError):  # not there yet, or just being written
            answer = json.loads((self._standing.folder / ANSWER).read_bytes())
            # What was written before we asked may be left from somebody who watched before.
            if self._signals and (self._answer is None or answer["time"] != self._answer["time"]):
                self._answer, self._heard = answer, now
        if now - max(self._heard, self._called) > _CALL_S or not self._signals:
            self._call(now)
        elif now - self._renewed > _RENEW_S:
            self._renew(now)
        return self._answer

    def wait(self, number: int) -> dict[str, Any]:
        """The answer after so many questions of ours. Raises `RunError` if there is none."""
        self.look()
        seen: set[float] = set()
        deadline = time.monotonic() + _ANSWER_S
        while time.monotonic() < deadline:
            answer = self.look()
            if answer is not None:
                seen.add(answer["time"])
                if len(seen) >= number:
                    return answer
            time.sleep(0.05)
        raise RunError(
            f"run {self._standing.name} did not answer within {_ANSWER_S:g} s: its supervisor is busy or gone"
        )

    def _renew(self, now: float) -> None:
        self._renewed = now
        request = {"who": self._who, "signals": self._signals, "time": time.time()}
        (self._standing.folder / REQUEST).write_text(json.dumps(request))

    def _call(self, now: float) -> None:
        """Write first, then signal: by what is written the supervisor knows what the signal is for."""
        self._called = now
        self._signals += 1
        self._renew(now)
        call(self._standing, "launch top")


def _live(standing: Standing, watch: _Watch) -> None:
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console = Console(highlight=False)

    def shown(text: Sequence[str]) -> Text:
        found = Text(no_wrap=True, overflow="crop")
        for number, line in enumerate(text):
            style = "bold" if number == 0 else "reverse" if line.startswith("  RANK ") else _STYLES.get(line[:1], "")
            found.append(f"{line}\n", style)
        return found

    with Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            answer = watch.look()
            width, height = console.size
            text = [f"{standing.name}: asked its supervisor"] if answer is None else screen(
                standing.name, answer, width, height
            )  # fmt: skip
            live.update(shown(text), refresh=True)
            status = (read_json(standing.folder / "state.json") or {}).get("status")
            if status != "running":
                break
            time.sleep(_LOOK_S)
    click.echo(f"{standing.name} is {status}; launch show {standing.name} tells the rest")


def screen(name: str, answer: dict[str, Any], columns: int, height: int) -> list[str]:
    """One picture, in lines of at most `columns`, at most `height` of them."""
    rows = answer["rows"]
    slow = set(answer["slow"])
    text = [_cut(line, columns) for line in _head(name, answer)]
    room = max(1, height - len(text) - 3)
    shown = rows[:room]
    kinds = [kind for kind in _COLUMNS if kind[0] != "GPU" or any("gpu" in row for row in rows)]
    head = [title for title, _ in kinds]
    body = [[cell(row) for _, cell in kinds] for row in shown]
    right = ("RANK", "STEP", "STEP/S", "AGE", "MEMORY")
    table = lines(["  RANK", *head[1:]], [_marked(row, cells, slow) for row, cells in zip(shown, body, strict=True)],
                  columns=columns, right=("  RANK", *right))  # fmt: skip
    text += ["", *table]
    left = answer["ranks"] - len(shown)
    if left > 0:
        text.append(_cut(f"  and {left} more, none of them behind these", columns))
    return text


def _marked(row: dict[str, Any], cells: list[str], slow: set[int]) -> list[str]:
    mark = "!" if row.get("exit") else "*" if row["rank"] in slow else " "
    return [f"{mark}{cells[0]:>5}", *cells[1:]]


def _head(name: str, a: dict[str, Any]) -> list[str]:
    facts = [f"{name}  attempt {a['attempt']}", a["phase"], _ranks(a["ranks"], len(a["hosts"]))]
    if a["step"]:
        low, high = a["step"]
        facts.append(f"step {high}" if low == high else f"steps {low} to {high}")
    if a["rate"]:
        facts.append(f"{_number(a['rate'])} steps/s")
    facts.append(f"{_bytes(a['rss'])} memory")
    text = [", ".join(facts)]
    if a["silent_nodes"]:
        text.append(f"node {numbers(a['silent_nodes'])} did not answer")
    if a["slow"]:
        text.append(f"rank {numbers(a['slow'])} (*) holds up the others; launch show {name} tells by how much")
    return text


def _ranks(ranks: int, nodes: int) -> str:
    return f"{ranks} rank{'s' if ranks != 1 else ''} on {nodes} node{'s' if nodes != 1 else ''}"


def _state(row: dict[str, Any]) -> str:
    return f"exit {row['exit']}" if "exit" in row else str(row.get("phase") or "runs")


def _gpu(row: dict[str, Any]) -> str:
    gpu = row.get("gpu")
    if gpu is None:
        return "-"
    use = "?" if gpu["use"] is None else f"{gpu['use']}%"
    return f"{use} {_bytes(gpu['used'])}/{_bytes(gpu['total'])}"


def _line(row: dict[str, Any]) -> str:
    """What stands there after a bar was drawn over it, without colours and the like."""
    plain = _ESCAPES.sub("", str(row.get("line", ""))).rstrip("\r").rpartition("\r")[2]
    return "".join(c if c.isprintable() else " " for c in plain)


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _bytes(count: int) -> str:
    size = float(count)
    for unit in ("B", "K", "M", "G"):
        if size < 1000:
            return f"{size:.0f}{unit}" if size >= 10 or unit == "B" else f"{size:.1f}{unit}"
        size /= 1024
    return f"{size:.1f}T"


def _cut(line: str, columns: int) -> str:
    return line if len(line) <= columns else line[: columns - 1] + "…"


def _age(row: dict[str, Any]) -> str:
    age = row.get("age_s")
    return "-" if age is None else f"{age:.1f}s" if age < 10 else duration(age)


_COLUMNS: tuple[tuple[str, Callable[[dict[str, Any]], str]], ...] = (
    ("RANK", lambda row: str(row["rank"])),
    ("HOST", lambda row: str(row["host"]).partition(".")[0][:14]),
    ("STATE", _state),
    ("STEP", lambda row: "-" if row.get("step") is None else str(row["step"])),
    ("STEP/S", lambda row: "-" if row.get("rate") is None else _number(row["rate"])),
    ("AGE", _age),
    ("MEMORY", lambda row: _bytes(row["rss"])),
    ("GPU", _gpu),
    ("LAST LINE", _line),
)
