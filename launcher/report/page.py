"""A gathered story -> one page of HTML, without network and scripts; whatever comes from the run is escaped."""

from __future__ import annotations

import itertools
import json
import math
import time
from html import escape as escaped
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.commands.table import duration
from launcher.report.charts import LEVELS, Bar, Series, bytes_text, heat_map, lines, number, timeline
from launcher.scrub import arguments, scrubbed

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from launcher.history import Attempt
    from launcher.report.curves import Curve
    from launcher.report.gathering import Checkpoint, Part, Story
    from launcher.samples import Sample
    from launcher.standing import Standing

__all__ = ["of_array", "of_run"]

_BARS = 40  # attempts on the timeline
_CHARTS = 24  # of metrics; more are named
_ROWS, _COLUMNS = 48, 96  # of a heat map
_OVERLAID = 6  # runs in one chart
_APART = 0.03  # ranks that differ by less are one line
_MARKS = 60  # of one attempt
_METRICS = 6  # columns of metrics in the table of an array
_LISTED = 60  # checkpoints
_MIB = 1 << 20
# Of a spec: what is told elsewhere, and what the house needs.
_EVERYWHERE = ("program", "code", "output", "stop_signals", "last_call_s", "role", "notify")  # that has addresses


def of_run(story: Story) -> str:
    """The page of one run."""
    s = story.standing
    sections = [
        _tiles(story),
        _section("Attempts", _attempts(story)),
        _section("Failure", f"<pre>{escape(story.failure)}</pre>" if story.failure else ""),
        _section("Metrics", _metrics(story)),
        _section("Ranks", _ranks(story)),
        _section("Checkpoints", _checkpoints(story)),
        _section("Configuration", _configuration(story)),
        _section("Environment", _environment(story)),
        _section("Code", _code(story)),
    ]
    return _page(s.name, _head(s, story.made), sections, story.made)


def of_array(standing: Standing, parts: Sequence[Part], made: float) -> str:
    """The page of an array: its runs, their parameters and results."""
    sections = [
        _tile_row(
            [("runs", str(len(parts))), *_counts(parts), ("running time", duration(sum(p.ran_s for p in parts)))]
        ),
        _section("Runs", _table_of(parts)),
        _section("Metrics", _overlaid(parts)),
    ]
    return _page(standing.name, _head(standing, made), sections, made)


# ------------------------------------------------------------------------------------------------ the frame


def escape(text: str) -> str:
    """A text of the run's, as text of the page."""
    return escaped(scrubbed(text))


def _page(title: str, head: str, sections: Iterable[str], made: float) -> str:
    when = time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(made))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>{escape(title)}</title>\n<style>{_style()}</style>\n</head>\n<body>\n<main>\n{head}\n"
        + "\n".join(filter(None, sections))
        + f"\n<footer>made by launch report, {escape(when)}</footer>\n</main>\n</body>\n</html>\n"
    )


def _style() -> str:
    return Path(__file__).with_name("style.css").read_text().replace("LEVELS", str(LEVELS))


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>" if body else ""


def _head(s: Standing, made: float) -> str:
    cause = f'<p class="cause">{escape(s.cause)}</p>' if s.cause and s.status != "finished" else ""
    count = s.nodes * s.procs
    ranks = f"{count} rank{'s' if count != 1 else ''} on {s.nodes} node{'s' if s.nodes != 1 else ''}"
    facts = [
        " ".join(arguments(s.program.split(" "))),
        ranks,
        f"job {s.job_id}" if s.job_id else "",
        _when(s.created) if s.created else "",
    ]
    return (
        f'<header><h1>{escape(s.name)} <span class="pill {escape(s.status)}">{escape(s.status)}</span></h1>'
        f"<p>{' &middot; '.join(escape(f) for f in facts if f)}</p>{cause}"
        f'{_still(s, made)}<p class="path">{escape(str(s.folder))}</p></header>'
    )


def _still(s: Standing, made: float) -> str:
    return f"<p>as it was at {escape(_when(made))}</p>" if s.open else ""


def _when(at: float) -> str:
    return time.strftime("%Y-%m-%d\u00a0%H:%M:%S", time.localtime(at))


def _time(at: float, before: str = "") -> str:
    return f"<time>{before}{escape(_when(at))}</time>"


def _tile_row(tiles: Iterable[tuple[str, str]]) -> str:
    shown = "".join(f"<div><b>{escape(value)}</b><small>{escape(name)}</small></div>" for name, value in tiles if value)
    return f'<div class="tiles">{shown}</div>'


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[str] = ()) -> str:
    """Cells are HTML already."""
    kinds = [' class="n"' if name in right else "" for name in head]
    top = "".join(f"<th{kind}>{escape(name)}</th>" for name, kind in zip(head, kinds, strict=True))
    body = "".join(
        f"<tr>{''.join(f'<td{kind}>{cell}</td>' for cell, kind in zip(row, kinds, strict=True))}</tr>" for row in rows
    )
    return (
        f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>' if body else ""
    )


def _facts(facts: Mapping[str, str]) -> str:
    rows = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts.items() if v)
    return f"<dl>{rows}</dl>" if rows else ""


def _folded(title: str, body: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{body}</details>"


# ------------------------------------------------------------------------------------------------ one run


def _tiles(story: Story) -> str:
    past, made = story.history, story.made
    live = [a for a in past.attempts if a.status == "running"]
    ran = past.ran_s + sum(made - a.started for a in live)
    last = next((a.progress for a in reversed(past.attempts) if a.progress is not None), None)
    return _tile_row([
        ("running", duration(ran)),
        ("waiting", duration(past.waited_s) if past.waited_s >= 1 else ""),
        ("goodput", "" if past.goodput is None else f"{past.goodput:.0%}"),
        ("last step", "" if last is None else f"{last.step}"),
        ("steps lost", "" if past.lost_steps is None else f"{past.lost_steps}"),
        ("attempts", str(len(past.attempts))),
        *((f"last {c.name}", number(c.last)) for c in _by_interest(story.curves)[:2] if "loss" in c.name.lower()),
        ("steps/s", _number_or(_rate(story))),
    ])  # fmt: skip


def _number_or(value: float | None) -> str:
    return "" if value is None else number(value)


def _attempts(story: Story) -> str:
    bars = [_bar(story, a) for a in story.history.attempts[-_BARS:]]
    left = len(story.history.attempts) - len(bars)
    more = f"<p>Drawn are the last {len(bars)}; {left} were before them.</p>" if left else ""
    head = ("attempt", "state", "began", "ran", "waited", "steps", "saved", "lost", "on", "why it ended")
    rows = [_attempt_row(story, a) for a in story.history.attempts]
    return timeline(bars) + _key(bars) + more + _table(head, rows, right=head[:1] + head[3:8])


def _key(bars: Sequence[Bar]) -> str:
    kinds = dict.fromkeys(b.kind for b in bars)
    marks = dict.fromkeys(kind for b in bars for _, kind, _ in b.marks)
    shown = [f'<span><i class="key bar {escape(k)}"></i>{escape(k)}</span>' for k in kinds]
    shown += ['<span><i class="key waited"></i>waited</span>'] if any(b.waited >= 1 for b in bars) else []
    shown += [f'<span><i class="key mark {escape(k)}"></i>{escape(k)}</span>' for k in marks]
    return f'<div class="legend">{"".join(shown)}</div>' if bars else ""


def _bar(story: Story, a: Attempt) -> Bar:
    ended = a.ended if a.ended is not None else _seen_until(story, a)
    marks = [(c.at, "checkpoint", f"checkpoint of step {c.step}") for c in story.checkpoints
             if c.at is not None and a.started <= c.at <= ended]  # fmt: skip
    for event in story.events:
        told = str(event.get("told") or event.get("cause") or "")
        if event.get("event") in ("slow", "stacks", "stop") and event.get("attempt") == a.number:
            kind = {"slow": "slow rank", "stacks": "stacks", "stop": "stop"}[event["event"]]
            marks.append((float(event.get("time", 0.0)), kind, scrubbed(f"{kind}: {told}")[:300]))
    told = f"attempt {a.number}, {a.status}: {duration(ended - a.started)}{f'; {a.cause}' if a.cause else ''}"
    return Bar(f"attempt {a.number}", a.status, a.started, ended, scrubbed(told), a.waited_s, sorted(marks)[:_MARKS])


def _seen_until(story: Story, a: Attempt) -> float:
    if a.status == "running":
        return max(story.made, a.started)
    return max([a.started + 1, *(s.at for s in story.samples if s.attempt == a.number)])


def _attempt_row(story: Story, a: Attempt) -> list[str]:
    p = a.progress
    ran = a.ran_s if a.ran_s is not None else _seen_until(story, a) - a.started
    steps = "&ndash;" if p is None else f"{'?' if p.began is None else p.began}&ndash;{p.step}"
    why = [a.cause] if a.cause else []
    hosts = list(dict.fromkeys(a.hosts))
    shown = ", ".join(hosts[:4]) + (f" and {len(hosts) - 4} more" if len(hosts) > 4 else "")
    return [
        str(a.number), f'<span class="pill {escape(a.status)}">{escape(a.status)}</span>', _time(a.started),
        duration(ran), duration(a.waited_s), steps, "&ndash;" if p is None or p.saved is None else str(p.saved),
        "&ndash;" if a.lost_steps is None else str(a.lost_steps), escape(shown),
        "<br>".join(escape(text) for text in (*why, *a.slow.values())),
    ]  # fmt: skip


def _by_interest(found: Sequence[Curve]) -> list[Curve]:
    """Losses first, then scores, then the rest, by name."""

    def rank(curve: Curve) -> tuple[int, str]:
        name = curve.name.lower()
        for place, word in enumerate(("train_loss", "loss", "val", "acc", "lr")):
            if word in name:
                return place, name
        return 9, name

    return sorted(found, key=rank)


def _metrics(story: Story) -> str:
    shown = _by_interest(story.curves)
    charts = [lines(c.name, [Series(c.name, c.points)], x="step", y="", smooth=True) for c in shown[:_CHARTS]]
    speed = _speed(story)
    body = "".join([*charts[:2], speed, *charts[2:]])
    more = [c.name for c in shown[_CHARTS:]]
    rest = f"<p>and {len(more)} more: {escape(', '.join(more[:50]))}</p>" if more else ""
    if not body:
        return "<p>Nothing was logged into the run folder (TensorBoard's event files and metrics.csv are read).</p>"
    return f'<div class="grid">{body}</div>{rest}'


def _speeds(story: Story) -> list[tuple[float, float]]:
    """Steps a second by time since the start, from the record of steps; else from when they were logged."""
    found = []
    before: Sample | None = None
    for sample in story.samples:
        if sample.step is None:
            continue
        if before is not None and before.attempt != sample.attempt:
            found.append((sample.at - story.begin, math.nan))
        elif before is not None and sample.at > before.at:
            made = (sample.step - (before.step or 0)) / (sample.at - before.at)
            if made >= 0:
                found.append((sample.at - story.begin, made))
        before = sample
    if found:
        return found
    starts = [a.started for a in story.history.attempts]
    for curve in _by_interest(story.curves)[:1]:
        timed = list(zip(curve.points, curve.walls, strict=False))
        for ((a, _), at), ((b, _), until) in itertools.pairwise(timed):
            apart = any(at < started <= until for started in starts)
            if apart or (b > a and until > at):
                found.append((until - story.begin, math.nan if apart else (b - a) / (until - at)))
    return found


def _speed(story: Story) -> str:
    points = _speeds(story)
    return lines("Throughput", [Series("Throughput", points)], x="time since the start", y="steps per second",
                 time_axis=True, zero=True) if len(points) > 1 else ""  # fmt: skip


def _rate(story: Story) -> float | None:
    speeds = sorted(v for _, v in _speeds(story) if not math.isnan(v))
    return speeds[len(speeds) // 2] if speeds else None


def _ranks(story: Story) -> str:
    found = [s for s in story.samples if s.rows]
    if not found:
        return ""
    times = [(s.at - s.seconds - story.begin, s.at - story.begin) for s in found]
    parts = []
    waits = any(s.rows.get("own_s") != s.rows.get("step_s") for s in found)
    own = "its own part of each step, without waiting for other ranks" if waits else "time of a step"
    parts.append(_heat(f"Step time of each rank: {own}", found, times, "own_s", _seconds))
    grid = [_spread("Step time", found, times, "step_s", "ms", 1000.0),
            _spread("Memory of a rank", found, times, "rss", "MiB", 1.0),
            _spread("GPU memory of a rank", found, times, "gpu", "MiB", 1.0)]  # fmt: skip
    return "".join(parts) + (f'<div class="grid">{"".join(grid)}</div>' if any(grid) else "")


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.3g} ms" if value >= 1e-3 else f"{value * 1e6:.3g} us"


def _heat(title: str, found: Sequence[Sample], times: Sequence[tuple[float, float]], name: str, text: Any) -> str:
    """At most so many rows and columns: neighbours are told by their worst."""
    have = [(s, t) for s, t in zip(found, times, strict=True) if name in s.rows]
    if not have:
        return ""
    count = max(len(s.rows[name]) for s, _ in have)
    tall, wide = -(-count // _ROWS), -(-len(have) // _COLUMNS)
    groups = [have[i : i + wide] for i in range(0, len(have), wide)]
    spans = [(group[0][1][0], group[-1][1][1]) for group in groups]
    rows: list[list[float | None]] = []
    for top in range(0, count, tall):
        row = []
        for group in groups:
            values = [v for s, _ in group for v in s.rows[name][top : top + tall] if v is not None]
            row.append(max(values, default=None))
        rows.append(row)
    ranks = tall * have[0][0].each
    names = [f"rank {i}" if ranks == 1 else f"{i * ranks}-{(i + 1) * ranks - 1}" for i in range(len(rows))]
    note = "" if ranks == 1 else f"each row: the slowest of {ranks} ranks"
    return heat_map(title, note, names, spans, rows, text)


def _spread(
    title: str, found: Sequence[Sample], times: Sequence[tuple[float, float]], name: str, unit: str, times_: float
) -> str:
    most, middle, least = [], [], []
    for s, (_, until) in zip(found, times, strict=True):
        values = sorted(v * times_ for v in s.rows.get(name, ()) if v is not None)
        if values:
            most.append((until, values[-1]))
            middle.append((until, values[len(values) // 2]))
            least.append((until, values[0]))
    several = any(a - b > _APART * a for (_, a), (_, b) in zip(most, least, strict=True))
    series = (
        [Series("most", most), Series("median", middle), Series("least", least)] if several else [Series(title, most)]
    )
    return lines(title, series, x="time since the start", y=unit, time_axis=True, zero=True)


def _checkpoints(story: Story) -> str:
    if not story.checkpoints:
        return ""
    timed = [c for c in story.checkpoints if c.took_s is not None]
    series = [
        Series("until it was durable", [(float(c.step), c.took_s) for c in timed if c.took_s is not None], apart=True),
        Series(
            "training stood still", [(float(c.step), c.stall_s) for c in timed if c.stall_s is not None], apart=True
        ),
    ]
    sizes = [(float(c.step), c.size / _MIB) for c in story.checkpoints if c.size is not None]
    charts = [
        lines("Time of a save", [s for s in series if s.points], x="step", y="seconds", zero=True),
        lines(
            "Size on disk",
            [Series("Size on disk", sizes, apart=True)] if len(dict(sizes)) > 1 else [],
            x="step",
            y="MiB",
            zero=True,
        ),
    ]
    head = ("step", "durable at", "took", "stall", "size", "name")
    rows = [_checkpoint_row(c) for c in story.checkpoints[-_LISTED:]]
    left = len(story.checkpoints) - len(rows)
    more = f"<p>and {left} before these</p>" if left else ""
    return f'<div class="grid">{"".join(charts)}</div>{_table(head, rows, right=head[:1] + head[2:5])}{more}'


def _checkpoint_row(c: Checkpoint) -> list[str]:
    none = "&ndash;"
    return [
        str(c.step), none if c.at is None else _time(c.at, "" if c.name else "by "),
        none if c.took_s is None else _seconds(c.took_s),
        none if c.stall_s is None else _seconds(c.stall_s), none if c.size is None else bytes_text(c.size),
        escape(c.name) or "<i>removed since</i>",
    ]  # fmt: skip


def _configuration(story: Story) -> str:
    spec = {k: v for k, v in story.spec.items() if k not in _EVERYWHERE}
    command = " ".join([str(story.spec.get("program", {}).get("target", "")), *story.arguments])
    facts = {k.replace("_", " "): _plain(v) for k, v in spec.items() if v}
    return f"<pre>{escape(command)}</pre>{_facts(facts)}"


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    return value if isinstance(value, str) else "yes" if value is True else json.dumps(value)


def _environment(story: Story) -> str:
    here = story.here
    if here is None:
        return ""
    gpus = here["gpus"]
    facts = {
        "Python": f"{here['python']} ({here['executable']})",
        "system": str(here["system"]),
        "processors": str(here["cpus"]),
        "memory": bytes_text(here["memory"]),
        "GPUs": ", ".join(f"{gpus.count(g)} x {g}" for g in dict.fromkeys(gpus)),
        **{name: here["packages"][name] for name in ("torch", "numpy", "muster") if name in here["packages"]},
    }
    rows = [[escape(name), escape(version)] for name, version in here["packages"].items()]
    return _facts(facts) + _folded(f"{len(rows)} packages", _table(("package", "version"), rows))


def _code(story: Story) -> str:
    code = (story.here or {}).get("code")
    if not code:
        return ""
    facts = {"repository": str(code["root"]), "commit": str(code["commit"] or "none yet"),
             "branch": code["branch"] or "", "edited": {True: "yes", False: "no"}.get(code["edited"], "")}  # fmt: skip
    diff = code.get("diff") or ""
    if not diff:
        return _facts(facts)
    shown = "".join(f'<span class="{_diff_kind(line)}">{escape(line)}\n</span>' for line in diff.splitlines())
    cut = "<p>The rest is cut off here.</p>" if code.get("cut") else ""
    count = sum(_diff_kind(line) in ("add", "del") for line in diff.splitlines())
    body = f'<pre class="diff">{shown}</pre>{cut}'
    title = f"difference from the commit: {count} line{'s' if count != 1 else ''}"
    return _facts(facts) + (f"<h3>{title}</h3>{body}" if count <= _LISTED else _folded(title, body))


def _diff_kind(line: str) -> str:
    if line.startswith(("+++", "---", "diff ", "index ")):
        return "file"
    return {"+": "add", "-": "del", "@": "hunk"}.get(line[:1], "same")


# ------------------------------------------------------------------------------------------------ an array


def _counts(parts: Sequence[Part]) -> list[tuple[str, str]]:
    states = [p.standing.status for p in parts]
    return [(state, str(states.count(state))) for state in dict.fromkeys(states)]


def _names_of(parts: Sequence[Part]) -> list[str]:
    """Metrics that most of the runs have."""
    counted: dict[str, int] = {}
    for part in parts:
        for curve in _by_interest(part.curves):
            counted[curve.name] = counted.get(curve.name, 0) + 1
    return sorted(counted, key=lambda name: -counted[name])[:_METRICS]


def _table_of(parts: Sequence[Part]) -> str:
    parameters = list(dict.fromkeys(name for p in parts for name in p.arguments))
    metrics = _names_of(parts)
    best = {name: _best(name, [v for p in parts if (v := _last(p, name)) is not None]) for name in metrics}
    head = ("run", "state", *parameters, *metrics, "ran", "why")
    rows = []
    for p in parts:
        cells = []
        for name in metrics:
            value = _last(p, name)
            shown = "&ndash;" if value is None else escape(number(value))
            cells.append(f"<b>{shown}</b>" if value is not None and value == best[name] else shown)
        s = p.standing
        why = s.cause if s.status not in ("finished", "running") else ""
        rows.append([
            escape(s.name), f'<span class="pill {escape(s.status)}">{escape(s.status)}</span>',
            *(escape(p.arguments.get(name, "")) for name in parameters), *cells, duration(p.ran_s), escape(why),
        ])  # fmt: skip
    note = (
        "<p>Metrics: the last value of each run; in bold the best (the least of losses and errors).</p>"
        if metrics
        else ""
    )
    return _table(head, rows, right=[*metrics, "ran"]) + note


def _last(part: Part, name: str) -> float | None:
    return next((c.last for c in part.curves if c.name == name), None)


def _best(name: str, values: Sequence[float]) -> float | None:
    down = any(word in name.lower() for word in ("loss", "err", "perplex", "mse", "mae"))
    values = [v for v in values if math.isfinite(v)]
    return None if not values else min(values) if down else max(values)


def _rank(value: float, *, down: bool) -> float:
    """The better the less; what is no number comes last."""
    return math.inf if not math.isfinite(value) else value if down else -value


def _overlaid(parts: Sequence[Part]) -> str:
    """A chart for each metric, of the runs that are best by the first of them."""
    metrics = _names_of(parts)
    if not metrics:
        return ""
    first = metrics[0]
    scored = [(v, p) for p in parts if (v := _last(p, first)) is not None]
    down = _best(first, [0.0, 1.0]) == 0.0
    chosen = [p for _, p in sorted(scored, key=lambda item: _rank(item[0], down=down))][:_OVERLAID]
    charts = []
    for name in metrics:
        series = [
            Series(p.standing.name.rpartition("/")[2], c.points) for p in chosen for c in p.curves if c.name == name
        ]
        charts.append(lines(name, series, x="step", y="", smooth=True))
    left = len(parts) - len(chosen)
    more = f"<p>The {len(chosen)} best by {escape(first)}.</p>" if left else ""
    return f'{more}<div class="grid">{"".join(charts)}</div>'
