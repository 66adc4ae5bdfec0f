"""Pure: numbers -> inline SVG. Colours are classes, which the page's style fills in for light and dark.

Texts are escaped here. A chart is drawn in its own units and scales with the page; a full-width one is drawn twice, for
wide and for narrow pages, so that letters stay readable.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from launcher.commands.table import duration

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

__all__ = ["LEVELS", "Bar", "Series", "bytes_text", "heat_map", "lines", "number", "timeline"]

_MOST, _LEAST = 1e300, 1e-300
_POINTS = 400  # of a line: more than pixels that differ
_DOTTED = 40  # so few points are drawn as points too
_SMOOTHED = 80  # so many that go up and down are drawn faintly, and their moving average over them
_TIMES_ITS_RANGE = 6  # all the ways up and down together, where a line is more noise than course
LEVELS = 9
_STEPS_S = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 21600, 43200, 86400)


@dataclass(frozen=True)
class Series:
    """A line: what it is called, and its points by x; it is broken where a value is no number. apart: points alone."""

    name: str
    points: Sequence[tuple[float, float]]
    apart: bool = False


@dataclass(frozen=True)
class Bar:
    """A stretch of time on the timeline. marks: moments in it, with what happened."""

    name: str
    kind: str
    begin: float
    end: float
    told: str
    waited: float = 0.0
    marks: Sequence[tuple[float, str, str]] = ()


def number(value: float) -> str:
    """Three digits, as a person writes them."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e9:
        return f"{value / 1e9:.3g}G"
    if size >= 1e6:
        return f"{value / 1e6:.3g}M"
    if size >= 1e4:
        return f"{value / 1e3:.3g}k"
    return f"{value:.0f}" if size >= 1000 else f"{value:.3g}"


def bytes_text(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if size >= 10 or unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def _ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers from `low` to `high`, about so many."""
    raw = (high - low) / max(1, count)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _time_ticks(span: float, count: int) -> list[float]:
    raw = span / max(1, count)
    step = next((s for s in _STEPS_S if s >= raw), math.ceil(raw / 86400) * 86400)
    return [i * step for i in range(int(span / step) + 1)]


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The least and the greatest of each stretch: no spike is lost."""
    if len(points) <= _POINTS:
        return list(points)
    size = math.ceil(2 * len(points) / _POINTS)
    found: list[tuple[float, float]] = []
    for at in range(0, len(points), size):
        part = points[at : at + size]
        low, high = min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])
        found += sorted({low, high})
    return found


def _finite(point: tuple[float, float]) -> bool:
    """Whether it can be drawn: sums and differences of such points are numbers, too."""
    return all(abs(value) < _MOST for value in point)


def _stretches(points: Sequence[tuple[float, float]]) -> Iterator[list[tuple[float, float]]]:
    """Between the points that are none."""
    for there, group in itertools.groupby(points, _finite):
        if there:
            yield list(group)


def _noisy(points: Sequence[tuple[float, float]]) -> bool:
    values = [y for _, y in points]
    way = sum(abs(b - a) for a, b in itertools.pairwise(values))
    return len(points) >= _SMOOTHED and way > _TIMES_ITS_RANGE * (max(values) - min(values))


def _averaged(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Each with those before it, the nearest counting most: a fortieth of the line."""
    keep, found, value = 1 - 40 / max(41, len(points)), [], points[0][1]
    for at, (x, y) in enumerate(points):
        share = max(1 - keep, 1 / (at + 1))  # the first ones are a plain mean
        value += share * (y - value)
        found.append((x, value))
    return found


def _as_one(low: float, high: float) -> bool:
    """Too near to each other to be told apart on an axis."""
    return high - low <= max(_LEAST, 1e-12 * max(abs(low), abs(high)))


def _range(values: Sequence[float], *, zero: bool) -> tuple[float, float]:
    low, high = (min(0.0, *values) if zero else min(values)), max(values)
    if _as_one(low, high):
        low, high = (min(0.0, 2 * low), max(0.0, 2 * high)) if max(abs(low), abs(high)) > _LEAST else (-1.0, 1.0)
    room = 0.04 * (high - low)
    return (low if zero and low == 0 else low - room), high + room


def lines(
    title: str,
    series: Sequence[Series],
    *,
    x: str,
    y: str,
    time_axis: bool = False,
    zero: bool = False,
    smooth: bool = False,
    text: Callable[[float], str] = number,
) -> str:
    """A chart of lines over one x axis; empty without a finite point. zero: the y axis begins at 0; smooth: many points
    that go up and down are shown by their moving average, too.
    """
    kept = [s for s in series if any(map(_finite, s.points))]
    if not kept:
        return ""
    width, height, left, right, top, bottom = 460, 250, 52, 14, 12, 40
    known = [p for s in kept for p in s.points if _finite(p)]
    x0, x1 = min(a for a, _ in known), max(a for a, _ in known)
    x0 = min(0.0, x0) if time_axis else x0
    if _as_one(x0, x1):
        room = max(1.0, 1e-6 * abs(x0))
        x0, x1 = x0 - room, x1 + room
    y0, y1 = _range([b for _, b in known], zero=zero)

    def at(a: float, b: float) -> tuple[float, float]:
        return (
            left + (a - x0) / (x1 - x0) * (width - left - right),
            top + (y1 - b) / (y1 - y0) * (height - top - bottom),
        )

    parts = []
    for value in _ticks(y0, y1, 5):
        _, py = at(x0, value)
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{py:.1f}" y2="{py:.1f}"/>')
        parts.append(
            f'<text class="tick" x="{left - 6}" y="{py + 4:.1f}" text-anchor="end">{escape(text(value))}</text>'
        )
    places = _time_ticks(x1, 5) if time_axis else _ticks(x0, x1, 5)
    marked = {duration(t) if time_axis else number(t): t for t in places}
    for shown, value in marked.items():
        px, _ = at(value, y0)
        parts.append(f'<text class="tick" x="{px:.1f}" y="{height - bottom + 17}" text-anchor="middle">{shown}</text>')
    parts.append(f'<line class="axis" x1="{left}" x2="{width - right}" y1="{height - bottom}" y2="{height - bottom}"/>')
    for i, one in enumerate(kept):
        stretches = list(_stretches(one.points))
        noisy = smooth and any(map(_noisy, stretches))
        for several, kind in ((stretches, " faint"), (map(_averaged, stretches), "")) if noisy else ((stretches, ""),):
            if one.apart:
                continue
            path = "".join("M" + "L".join("{:.1f} {:.1f}".format(*at(*p)) for p in _thinned(s)) for s in several)
            parts.append(f'<path class="line s{i % 6}{kind}" d="{path}"><title>{escape(one.name)}</title></path>')
        if one.apart or len(one.points) <= _DOTTED:
            for a, b in itertools.chain.from_iterable(stretches):
                px, py = at(a, b)
                where = duration(a) if time_axis else number(a)
                parts.append(
                    f'<circle class="dot s{i % 6}" cx="{px:.1f}" cy="{py:.1f}" r="2.6">'
                    f"<title>{escape(one.name)}: {escape(text(b))} at {where}</title></circle>"
                )
    parts.append(f'<text class="label" x="{width - right}" y="{height - 6}" text-anchor="end">{escape(x)}</text>')
    legend = ""
    if len(kept) > 1 or kept[0].name != title:
        legend = "".join(f'<span><i class="key s{i % 6}"></i>{escape(one.name)}</span>' for i, one in enumerate(kept))
        legend = f'<div class="legend">{legend}</div>'
    head = f"<figcaption><b>{escape(title)}</b>{f' <small>{escape(y)}</small>' if y else ''}</figcaption>"
    drawn = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
    return f"<figure>{head}{legend}{drawn}</figure>"


def heat_map(
    title: str,
    note: str,
    names: Sequence[str],
    times: Sequence[tuple[float, float]],
    values: Sequence[Sequence[float | None]],
    text: Callable[[float], str],
) -> str:
    """Rows by time, darker for more. times: from, to, in seconds; values: one row for each name, one value a time."""
    known = sorted(v for row in values for v in row if v is not None)
    if not known or not times:
        return ""
    low, high = known[0], known[min(len(known) - 1, int(0.99 * len(known)))]
    high = high if high > low else low * 1.5 + 1e-12

    def level(value: float) -> int:
        return max(0, min(LEVELS - 1, int((value - low) / (high - low) * LEVELS)))

    def draw(width: int, name: str) -> str:
        left, top, bottom = 66, 4, 36
        row_height = max(4.0, min(26.0, 320 / len(names)))
        height = top + bottom + row_height * len(names)
        begin, end = times[0][0], max(b for _, b in times)

        def at(t: float) -> float:
            return left + (t - begin) / max(1e-9, end - begin) * (width - left - 10)

        parts = []
        every = math.ceil(len(names) / 14)
        for i, (label, row) in enumerate(zip(names, values, strict=True)):
            y = top + i * row_height
            if i % every == 0:
                parts.append(
                    f'<text class="tick" x="{left - 6}" y="{y + row_height / 2 + 4:.1f}" text-anchor="end">'
                    f"{escape(label)}</text>"
                )
            parts += [
                f'<rect class="h{lev}" x="{at(a):.1f}" y="{y:.1f}" width="{max(0.8, at(b) - at(a)):.1f}" '
                f'height="{row_height - (1 if row_height > 6 else 0):.1f}"><title>{escape(label)}, {duration(a)}: '
                f"{escape(text(worst))}</title></rect>"
                for a, b, lev, worst in _runs(times, row, level)
            ]
        for t in _time_ticks(end - begin, 4 if width < 600 else 8):
            parts.append(
                f'<text class="tick" x="{at(begin + t):.1f}" y="{height - bottom + 18:.1f}" text-anchor="middle">'
                f"{duration(begin + t)}</text>"
            )
        parts.append(
            f'<text class="label" x="{width - 10}" y="{height - 4:.1f}" text-anchor="end">time since the start</text>'
        )
        return (
            f'<svg class="{name}" viewBox="0 0 {width} {height:.0f}" role="img" aria-label="{escape(title)}">'
            f"{''.join(parts)}</svg>"
        )

    scale = "".join(f'<i class="key h{i}"></i>' for i in range(LEVELS))
    legend = f'<div class="legend"><span>{escape(text(low))} {scale} {escape(text(high))}</span></div>'
    head = f"<figcaption><b>{escape(title)}</b> <small>{escape(note)}</small></figcaption>"
    return f'<figure class="full">{head}{legend}{draw(1080, "wide")}{draw(440, "narrow")}</figure>'


def _runs(
    times: Sequence[tuple[float, float]], row: Sequence[float | None], level: Callable[[float], int]
) -> Iterator[tuple[float, float, int, float]]:
    """Neighbours of one level as one, without gaps between lines of the record: from, to, level, the worst."""
    now: list[float] | None = None
    for (a, b), value in zip(times, row, strict=True):
        if value is None:
            if now is not None:
                yield now[0], now[1], int(now[2]), now[3]
            now = None
            continue
        if now is not None and now[2] == level(value) and a - now[1] < 1.0:
            now[1], now[3] = b, max(now[3], value)
            continue
        if now is not None:
            yield now[0], now[1], int(now[2]), now[3]
        now = [a, b, level(value), value]
    if now is not None:
        yield now[0], now[1], int(now[2]), now[3]


def timeline(bars: Sequence[Bar]) -> str:
    """Attempts one below the other over one axis of time, with what was waited before each, and moments in them."""
    if not bars:
        return ""
    begin, end = min(b.begin - b.waited for b in bars), max(b.end for b in bars)
    span = max(1.0, end - begin)

    def draw(width: int, name: str) -> str:
        left, row, bottom = 84, 30, 36
        height = 6 + row * len(bars) + bottom

        def at(t: float) -> float:
            return left + (t - begin) / span * (width - left - 12)

        parts = []
        for t in _time_ticks(span, 4 if width < 600 else 8):
            x = at(begin + t)
            parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="4" y2="{height - bottom}"/>')
            parts.append(
                f'<text class="tick" x="{x:.1f}" y="{height - bottom + 18}" text-anchor="middle">{duration(t)}</text>'
            )
        for i, bar in enumerate(bars):
            y = 6 + i * row
            parts.append(f'<text class="tick" x="{left - 8}" y="{y + 17}" text-anchor="end">{escape(bar.name)}</text>')
            if bar.waited >= 1:
                x = at(bar.begin - bar.waited)
                parts.append(
                    f'<rect class="waited" x="{x:.1f}" y="{y + 8}" width="{at(bar.begin) - x:.1f}" height="7" rx="3">'
                    f"<title>waited {duration(bar.waited)}</title></rect>"
                )
            parts.append(
                f'<rect class="bar {escape(bar.kind)}" x="{at(bar.begin):.1f}" y="{y}" '
                f'width="{max(2.0, at(bar.end) - at(bar.begin)):.1f}" height="22" rx="4">'
                f"<title>{escape(bar.told)}</title></rect>"
            )
            for moment, kind, told in bar.marks:
                x = at(min(max(moment, bar.begin), bar.end))
                parts.append(
                    f'<path class="mark {escape(kind)}" d="M{x:.1f} {y + 25}l-4 7h8z" transform="translate(0 -3)">'
                    f"<title>{escape(told)}</title></path>"
                )
        parts.append(
            f'<text class="label" x="{width - 12}" y="{height - 4}" text-anchor="end">'
            "time since it was asked for</text>"
        )
        head = f'<svg class="{name}" viewBox="0 0 {width} {height}" role="img" aria-label="Attempts">'
        return f"{head}{''.join(parts)}</svg>"

    return f'<figure class="full">{draw(1080, "wide")}{draw(440, "narrow")}</figure>'
