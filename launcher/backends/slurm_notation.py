"""Pure: how Slurm writes hosts, job ids, times and exit codes. Every function raises `ValueError` on what it is not."""

from __future__ import annotations

import re

__all__ = ["array_indices", "duration", "exit_code", "format_duration", "hosts", "job_ids", "moment"]

_RANGE = re.compile(r"(\d+)(?:-(\d+)(?::(\d+))?)?")
_GROUP = re.compile(r"\[([^\[\]]*)\]")
_DURATION = re.compile(
    r"(?:(?P<days>\d+)-(?P<dh>\d+)(?::(?P<dm>\d+)(?::(?P<ds>\d+))?)?"
    r"|(?P<h>\d+):(?P<hm>\d+):(?P<hs>\d+)"
    r"|(?P<m>\d+)(?::(?P<s>\d+))?)"
)
# Slurm's words for "there is none" or "not known"; which of them a tool uses differs between tools and releases.
_NO_DURATION = {"", "UNLIMITED", "INFINITE", "Partition_Limit", "NOT_SET", "N/A", "INVALID", "(null)"}
_NO_MOMENT = {"", "Unknown", "None", "N/A", "(null)", "NONE"}
_NO_HOSTS = {"", "(null)", "None assigned", "None", "N/A"}


def hosts(text: str) -> tuple[str, ...]:
    """The hosts of a list like `gpu[01-03,7],login`, in the list's own order, which is the order of Slurm's ranks."""
    if text in _NO_HOSTS:
        return ()
    found: list[str] = []
    for word in re.split(r",(?![^\[]*\])", text):
        names = [""]
        end = 0
        for group in _GROUP.finditer(word):
            plain = word[end : group.start()]
            names = [name + plain + number for name in names for number in _padded(group[1], text)]
            end = group.end()
        rest = word[end:]
        if not word or "[" in rest or "]" in rest or any(c.isspace() for c in word):
            raise ValueError(f"{text!r} is no list of hosts; one looks like node[1-3,7],login")
        found += [name + rest for name in names]
    return tuple(found)


def _padded(ranges: str, text: str) -> list[str]:
    """`08-10,12` -> 08 09 10 12: as many digits as the first number of each range is written with."""
    found = []
    for part in ranges.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise ValueError(f"{text!r}: [{ranges}] is no list of numbers and ranges like [1-3,7]")
        width = len(match[1])
        found += [f"{number:0{width}d}" for number in range(int(match[1]), int(match[2] or match[1]) + 1)]
    return found


def array_indices(text: str) -> tuple[tuple[int, ...], int | None]:
    """The indices and the throttle of an array: `0-6:3,9%2` -> ((0, 3, 6, 9), 2)."""
    ranges, percent, limit = text.partition("%")
    if percent and (not limit.isdecimal() or int(limit) < 1):
        raise ValueError(f"{text!r}: after % comes how many elements may run at once, a whole number >= 1")
    indices: dict[int, None] = {}
    for part in ranges.split(","):
        match = _RANGE.fullmatch(part)
        if match is None:
            raise ValueError(f"{text!r} is no array; give indices and ranges like 0-9, 0-9%4, 1,3,5 or 0-20:5")
        first, last, step = int(match[1]), int(match[2] or match[1]), int(match[3] or 1)
        if last < first or step < 1:
            raise ValueError(f"{text!r}: the range {part} holds no index; the lower end comes first, a step is >= 1")
        indices.update(dict.fromkeys(range(first, last + 1, step)))
    return tuple(indices), int(limit) if percent else None


def job_ids(text: str) -> tuple[str, ...]:
    """The jobs that one id stands for: `12` and `12_3` for themselves, `12_[0-2%4]` for three elements."""
    match = re.fullmatch(r"(\d+)_\[([^\]]*)\]", text)
    if match is not None:
        return tuple(f"{match[1]}_{index}" for index in array_indices(match[2])[0])
    if re.fullmatch(r"\d+(?:_\d+|\+\d+)?", text) is None:
        raise ValueError(f"{text!r} is no job id; one looks like 12, 12_3 or 12_[0-9]")
    return (text,)


def duration(text: str) -> float | None:
    """Seconds of `90`, `90:00` (both minutes), `1:30:00`, `2-12`, `2-12:30`, `2-12:30:00`; None if without limit."""
    if text in _NO_DURATION:
        return None
    match = _DURATION.fullmatch(text)
    if match is None:
        raise ValueError(
            f"{text!r} is no length of time; give minutes, minutes:seconds, hours:minutes:seconds, days-hours, "
            "days-hours:minutes or days-hours:minutes:seconds"
        )
    part = {name: int(value) for name, value in match.groupdict(default="0").items()}
    hours = part["days"] * 24 + part["dh"] + part["h"]
    minutes = hours * 60 + part["dm"] + part["hm"] + part["m"]
    return float(minutes * 60 + part["ds"] + part["hs"] + part["s"])


def format_duration(seconds: float) -> str:
    """Seconds as days-hours:minutes:seconds, which every tool of Slurm reads."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return f"{days}-{hour:02d}:{minute:02d}:{second:02d}"


def moment(text: str) -> float | None:
    """A time as seconds since the epoch (what SLURM_TIME_FORMAT=%s makes Slurm write); None if there is none."""
    if text in _NO_MOMENT:
        return None
    if not text.isdecimal():
        raise ValueError(f"{text!r} is no time in seconds; was SLURM_TIME_FORMAT=%s set for the command?")
    # Slurm writes the epoch itself where it means "never".
    return float(text) or None


def exit_code(text: str) -> tuple[int, int]:
    """`3:0` -> (3, 0): the code, and the signal that ended the process (0: none)."""
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if match is None:
        raise ValueError(f"{text!r} is no exit code of Slurm's; one looks like 1:0")
    return int(match[1]), int(match[2])
