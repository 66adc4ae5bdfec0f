"""`launch show`: one run, its attempts, and what they add up to."""

from __future__ import annotations

import json
import textwrap
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import click

from launcher import history
from launcher.commands import Runs, look_at, options
from launcher.commands.ls import rows
from launcher.commands.table import duration, lines, width
from launcher.failure import RankExit, RootCause, render
from launcher.faults import Fault
from launcher.history import History
from launcher.progress import Progress
from launcher.runs import read_json

if TYPE_CHECKING:
    from collections.abc import Sequence

    from launcher.history import Attempt
    from launcher.standing import Standing

__all__ = ["failure_text", "past", "run"]

COMMAND = click.Command(
    "show",
    params=[Runs(), click.Option(["--json", "as_json"], is_flag=True, help="one JSON array")],
    help="Show runs: how each stands, its attempts, why they ended, which steps were lost, time and goodput.",
)


def run(argv: Sequence[str]) -> int:
    """Exit code: 0."""
    o = options(COMMAND, argv)
    found, note = look_at(o["runs"])
    if o["as_json"]:
        click.echo(json.dumps([_json(standing) for standing in found], indent=1))
        return 0
    if note:
        click.echo(f"launch: {note}", err=True)
    click.echo("\n\n".join("\n".join(_text(standing)) for standing in found))
    return 0


def _json(standing: Standing) -> dict[str, object]:
    if standing.elements:
        return standing.to_json()
    return standing.to_json() | {
        "history": past(standing).to_json(),
        "avoids": _avoided(standing),
        "failure": read_json(standing.folder / "failure.json") if standing.status == "failed" else None,
    }


def _text(s: Standing) -> list[str]:
    columns = width() or 80
    why = f": {s.cause}" if s.cause else ""
    code = f" (exit {s.code})" if s.code else ""
    text = textwrap.wrap(f"{s.name}  {s.status}{code}{why}", columns, subsequent_indent="  ", break_on_hyphens=False)
    facts = {"program": s.program, "folder": str(s.folder), "ranks": _ranks(s)}
    if s.job_id is not None:
        facts["job"] = s.job_id
    facts["created"] = (
        f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(s.created))}, {duration(time.time() - s.created)} ago"
    )
    if s.elements:
        return [*text, *_facts(facts), "", *rows(s.elements, width())]
    if spares := (read_json(s.folder / "state.json") or {}).get("spares"):
        facts["spares"] = f"{', '.join(spares)} standing by"
    if avoided := _avoided(s):
        facts["avoids"] = "; ".join(f"{host} ({why})" for host, why in avoided.items())
    story = past(s)
    if story.attempts:
        facts["time"] = _times(story)
    if story.lost_steps is not None:
        facts["lost"] = f"{story.lost_steps} step{'s' if story.lost_steps != 1 else ''}"
    text += _facts(facts)
    if story.attempts:
        text += ["", *_attempts(story, columns)]
    if s.status == "failed" and (report := failure_text(s)):
        text += ["", report]
    return text


def past(s: Standing) -> History:
    """Its history; of an attempt that runs, with where it was half a minute ago at most."""
    past = history.read(s.folder)
    live = (read_json(s.folder / "state.json") or {}).get("progress")
    if s.status != "running" or live is None or not past.attempts or past.attempts[-1].ended is not None:
        return past
    return History((*past.attempts[:-1], replace(past.attempts[-1], progress=Progress(**live))))


def _avoided(s: Standing) -> dict[str, str]:
    """Hosts that the run does not go to again, and why."""
    ledger = (read_json(s.folder / "state.json") or {}).get("ledger", {})
    return ledger.get("excluded") or {}


def _ranks(s: Standing) -> str:
    nodes = f"{s.nodes} node{'s' if s.nodes != 1 else ''}"
    if (least := (read_json(s.folder / "run.json") or {}).get("spec", {}).get("least")) is not None:
        nodes += f", or as few as {least}"
    each = f", in each of {len(s.elements)} elements" if s.elements else ""
    return f"{s.nodes * s.procs} on {nodes}{each}"


def _facts(facts: dict[str, str]) -> list[str]:
    return [f"  {name:<8}{value}" for name, value in facts.items()]


def _times(past: History) -> str:
    last = past.attempts[-1]
    running = time.time() - last.started if last.ended is None and last.status == "running" else 0.0
    text = f"{duration(past.ran_s + running)} running, {duration(past.waited_s)} waiting"
    return text if past.goodput is None else f"{text}, goodput {past.goodput:.0%}"


def _attempts(past: History, columns: int) -> list[str]:
    head = ("ATTEMPT", "STATE", "RAN", "WAITED", "STEPS", "SAVED", "LOST", "ON")
    table = lines(head, [_row(a) for a in past.attempts], columns=columns, right=head[2:7])
    text = table[:1]
    for line, attempt in zip(table[1:], past.attempts, strict=True):
        text.append(line)
        told = [attempt.cause] if attempt.cause and attempt.status != "finished" else []
        for why in (*told, *attempt.slow.values()):
            text += textwrap.wrap(why, columns, initial_indent=" " * 9, subsequent_indent=" " * 9)
    return text


def _row(a: Attempt) -> tuple[str, ...]:
    step = a.progress
    steps = "-" if step is None else f"{'?' if step.began is None else step.began}-{step.step}"
    saved = "-" if step is None or step.saved is None else str(step.saved)
    lost = "-" if a.lost_steps is None else str(a.lost_steps)
    ran = a.ran_s if a.status != "running" else time.time() - a.started
    hosts = ",".join(dict.fromkeys(a.hosts))
    return str(a.number), a.status, duration(ran), duration(a.waited_s), steps, saved, lost, hosts


def failure_text(s: Standing) -> str:
    """The report that stood on the screen when it failed."""
    record = read_json(s.folder / "failure.json")
    if record is None:
        return ""
    fault = "" if record.get("fault") is None else str(Fault(**record["fault"]))
    if record.get("first") is None:
        return f"class of fault: {fault}" if fault else ""
    cause = RootCause(RankExit.from_json(record["first"]), tuple(record["followers"]), record["left_early"])
    return render(cause, s.nodes * s.procs, fault)
