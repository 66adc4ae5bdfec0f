"""Pure: machines as a person lists them, `a,b:4,node[1-8]` or a hostfile, as MPI's users write them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from launcher.backends import slurm_notation
from launcher.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

__all__ = ["Host", "parse"]

_FORM = "give names like a,b:4,user@node[1-8], or @FILE with one `host slots=N` a line"
_V6 = re.compile(r"\[([0-9A-Fa-f:.]*:[0-9A-Fa-f:.%\w]*)\]")


@dataclass(frozen=True)
class Host:
    """name: what ssh takes (an alias of its configuration, a name, an address, with or without `user@`); slots: how
    many ranks it has room for, None if nobody said.
    """

    name: str
    slots: int | None = None


def parse(text: str, cwd: Path) -> tuple[Host, ...]:
    """The hosts of `--hosts`, each once, in the order in which they are first named.

    One that is named several times has as many slots, as in the files that batch systems write. Raises `UsageError`.
    """
    if text.startswith("@"):
        return _each_once(_of_file(cwd / text[1:]))
    return _each_once(host for word in re.split(r",(?![^\[]*\])", text) for host in _of_word(word.strip(), "--hosts"))


def _of_file(path: Path) -> Iterable[Host]:
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--hosts @{path}: {error}; a hostfile has one `host slots=N` a line") from error
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        where = f"{path} line {number}"
        named = list(_of_word(words[0], where))
        for word in words[1:]:
            key, _, value = word.partition("=")
            if key in ("max_slots", "max-slots"):
                continue  # how far MPI may overbook a host, which is never done here
            if key != "slots" or not value.isdecimal() or int(value) < 1:
                raise UsageError(f"{where}: {word!r} is not understood; {_FORM}")
            named = [Host(host.name, int(value)) for host in named]
        yield from named


def _of_word(word: str, where: str) -> Iterable[Host]:
    names: tuple[str, ...]
    slots: int | None = None
    bare = _V6.match(word)
    if bare is not None:
        names, rest = (bare[1],), word[bare.end() :]
    elif word.count(":") > 1:
        names, rest = (word,), ""  # an IPv6 address as it is
    else:
        name, colon, number = word.partition(":")
        rest = colon + number
        try:
            names = slurm_notation.hosts(name)
        except ValueError as error:
            raise UsageError(f"{where}: {error}; {_FORM}") from error
    if rest:
        if not re.fullmatch(r":[1-9]\d*", rest):
            raise UsageError(f"{where}: {word!r}: after the colon comes the number of ranks; {_FORM}")
        slots = int(rest[1:])
    if not names or any(not name or name.startswith("-") for name in names):
        raise UsageError(f"{where}: {word!r} names no host; {_FORM}")
    return [Host(name, slots) for name in names]


def _each_once(hosts: Iterable[Host]) -> tuple[Host, ...]:
    found: dict[str, Host] = {}
    for host in hosts:
        before = found.get(host.name)
        if before is None:
            found[host.name] = host
        else:
            found[host.name] = Host(host.name, (before.slots or 1) + (host.slots or 1))
    if not found:
        raise UsageError(f"--hosts names no host; {_FORM}")
    return tuple(found.values())
