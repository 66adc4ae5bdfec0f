"""Pure: the elements of an array or a sweep, from what a person writes: which indices, with which arguments.

`--array 0-9%4` runs the same program ten times. `--sweep lr=1e-3,1e-4 --sweep seed=0:5` is a grid, the last key the
fastest; `--sweep-file runs.jsonl` has a JSON object per line. Each element gets its values as `--lr=1e-3`.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from typing import TYPE_CHECKING, Any

from launcher.backends.slurm_notation import array_indices
from launcher.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

__all__ = ["MOST", "array_text", "choose", "grid", "of_file"]

# More than Slurm can hold in one array (MaxArraySize is at most 4,000,001, and 1001 by default), and more than anybody
# wants to look at: a sweep of this size is a slip of the pen.
MOST = 100_000

_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_.\-]*")
_RANGE = re.compile(r"(-?\d+):(-?\d+)(?::(-?\d+))?")

Arguments = tuple[str, ...]


def grid(texts: Sequence[str]) -> list[Arguments]:
    """The arguments of each element of a grid of `KEY=VALUE,VALUE,...`; `0:5` stands for 0,1,2,3,4. `UsageError`."""
    axes: dict[str, list[str]] = {}
    for text in texts:
        key, equals, values = text.partition("=")
        if not equals or not _KEY.fullmatch(key):
            raise UsageError(
                f"--sweep {text!r}: give KEY=VALUE,VALUE,... or KEY=FIRST:END, like lr=1e-3,1e-4 or seed=0:5"
            )
        if key in axes:
            raise UsageError(f"--sweep {key} is given twice: write its values in one, separated by commas")
        axes[key] = _values(text, values)
    count = math.prod(len(values) for values in axes.values())
    _check_count(count, " x ".join(f"{len(values)} of {key}" for key, values in axes.items()))
    return [
        tuple(f"--{key}={value}" for key, value in zip(axes, combination, strict=True))
        for combination in itertools.product(*axes.values())
    ]


def _values(text: str, values: str) -> list[str]:
    found: list[str] = []
    for value in values.split(","):
        span = _RANGE.fullmatch(value)
        if span is None:
            if not value:
                raise UsageError(f"--sweep {text!r} has an empty value; an empty text is given by --sweep-file")
            found.append(value)
            continue
        first, end, step = int(span[1]), int(span[2]), int(span[3] or 1)
        numbers = range(first, end, step) if step else range(0)
        if not numbers:
            raise UsageError(f"--sweep {text!r}: the range {value} is empty; FIRST:END:STEP stops before END")
        _check_count(len(numbers), value)
        found += map(str, numbers)
    if twice := _twice(found):
        raise UsageError(f"--sweep {text!r}: the value {twice} is given twice, and would run twice")
    return found


def of_file(path: Path) -> list[Arguments]:
    """The arguments of each element of a file with a JSON object per line, `{"lr": 0.1, "name": "a b"}`. `UsageError`.

    Texts are handed on as they are, everything else as JSON writes it: `--flag=true`, `--sizes=[1, 2]`.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--sweep-file {path} cannot be read: {error}") from error
    found: list[Arguments] = []
    seen: dict[Arguments, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        arguments = _of_object(_parse(line, path, number), path, number)
        if (earlier := seen.get(arguments)) is not None:
            raise UsageError(f"--sweep-file {path}, line {number} is the same as line {earlier}, and would run twice")
        seen[arguments] = number
        found.append(arguments)
    _check_count(len(found), f"lines of {path}")
    return found


def _parse(line: str, path: Path, number: int) -> Mapping[str, Any]:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise UsageError(f"--sweep-file {path}, line {number} is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise UsageError(f'--sweep-file {path}, line {number}: give an object like {{"lr": 0.001, "seed": 1}}')
    return value


def _of_object(value: Mapping[str, Any], path: Path, number: int) -> Arguments:
    for key, one in value.items():
        if not _KEY.fullmatch(key):
            raise UsageError(f"--sweep-file {path}, line {number}: {key!r} is no name of an argument")
        if isinstance(one, str) and "\0" in one:
            raise UsageError(f"--sweep-file {path}, line {number}: {key} has a NUL byte, which no argument can hold")
    return tuple(f"--{key}={one if isinstance(one, str) else json.dumps(one)}" for key, one in value.items())


def _check_count(count: int, what: str) -> None:
    if not count:
        raise UsageError(f"the sweep is empty: {what}")
    if count > MOST:
        raise UsageError(f"the sweep has {count} elements ({what}); at most {MOST} are allowed")


def _twice(values: Iterable[str]) -> str | None:
    seen: set[str] = set()
    return next((v for v in values if v in seen or seen.add(v)), None)  # type: ignore[func-returns-value]


def choose(array: str | None, sweep: Sequence[Arguments] | None) -> tuple[dict[int, Arguments], int | None]:
    """Index -> arguments of what is to run, and how many at once (None: no limit). `UsageError`.

    array: `0-9%4`; beside a sweep it chooses elements of it, or with `%4` alone only says how many at once.
    """
    everything = None if sweep is None else dict(enumerate(sweep))
    if array is None:
        return everything or {}, None
    text = array
    if array.startswith("%") and everything is not None:
        text = f"0-{len(everything) - 1}{array}"
    try:
        indices, throttle = array_indices(text)
    except ValueError as error:
        raise UsageError(f"--array {error}") from error
    if len(indices) > MOST:
        raise UsageError(f"--array {array} has {len(indices)} elements; at most {MOST} are allowed")
    if everything is None:
        return dict.fromkeys(indices, ()), throttle
    if max(indices) >= len(everything):
        raise UsageError(f"--array {array}: the sweep has {len(everything)} elements, 0 to {len(everything) - 1}")
    return {index: everything[index] for index in indices}, throttle


def array_text(indices: Iterable[int], throttle: int | None) -> str:
    """Indices as Slurm writes them: 0-2,7%4."""
    parts = []
    numbers = sorted(indices)
    for _, run in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        span = [number for _, number in run]
        parts.append(str(span[0]) if len(span) == 1 else f"{span[0]}-{span[-1]}")
    return ",".join(parts) + ("" if throttle is None else f"%{throttle}")
