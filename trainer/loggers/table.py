"""The table that `validate` and `test` print."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


def text_table(headers: Mapping[str, str], rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as text; `headers` maps each column's title to its alignment, "<" or ">"."""
    widths = [max([len(title), *(len(row[i]) for row in rows)]) for i, title in enumerate(headers)]
    aligns = list(headers.values())

    def line(cells: Sequence[str]) -> str:
        return " | ".join(f"{c:{a}{w}}" for c, a, w in zip(cells, aligns, widths, strict=True)).rstrip()

    rule = "-" * (sum(widths) + 3 * (len(widths) - 1))
    return "\n".join([line(list(headers)), rule, *map(line, rows)])


def results_table(results: Sequence[Mapping[str, float]], stage: str) -> str:
    """One row per metric, one column per loader."""
    names = list(dict.fromkeys(name for result in results for name in result))
    columns = [f"loader {i}" for i in range(len(results))] if len(results) > 1 else ["value"]
    rows = [[name, *(f"{r[name]:.6g}" if name in r else "" for r in results)] for name in names]
    return text_table({f"{stage} metric": "<"} | dict.fromkeys(columns, ">"), rows)


def print_results(results: Sequence[Mapping[str, float]], stage: str) -> None:
    """Print the table, unless nothing was logged."""
    if any(results):
        print(results_table(results, stage), flush=True)  # noqa: T201 - what verbose=True asks for
