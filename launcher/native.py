"""Where ranks are below Python, told by py-spy where that is installed: which C or C++ function waits, and for what.

faulthandler (see stacks.py) tells Python's frames alone. py-spy holds a process for a tenth of a second while it reads
them all. gdb would do too, but holds it for 8 s and more while it loads the symbols of torch (2.15: 8 s of processor
time), which a run that only looks slow does not deserve.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.stacks import Group, merged, where

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

__all__ = ["WITHIN_S", "Frames", "Search", "frames", "spy"]

WITHIN_S = 10.0  # a node's ranks together; reading the symbols of torch takes 0.6 to 1.3 s beside other work
_RANKS = 8  # of a node
_AT_ONCE = 4
_UNNAMED = re.compile(r"^0x[0-9a-f]+$")
# What everything waits in, and the way from Python to C.
_PLUMBING = re.compile(
    r"^(?:libc|libpthread|libstdc\+\+|libm|libffi|ld-linux|linux-vdso|_ctypes|libpython|python)[-.\d]"
)
_LONGEST = 80  # of a C++ function's name


@dataclass(frozen=True)
class Frames:
    """Of one process. place: below Python, in a few words, empty if its main thread is in Python; text: all threads,
    as faulthandler would write them with the frames below Python among them.
    """

    place: str
    text: str


def spy() -> str | None:
    """py-spy's path: of this environment, or the one on PATH."""
    return shutil.which("py-spy", path=str(Path(sys.executable).parent)) or shutil.which("py-spy")


def frames(told: Sequence[Mapping[str, Any]], pid: int) -> Frames:
    """What `py-spy dump --native --json` tells of a process."""
    place, text = "", []
    for thread in sorted(told, key=lambda t: t["os_thread_id"] != pid):
        main = thread["os_thread_id"] == pid
        name = f"{thread['thread_id']:#x} [{thread['thread_name'] or ''}]"
        text.append(f"{'Current thread' if main else 'Thread'} {name} (most recent call first):")
        for frame in thread["frames"]:
            if frame["module"] is None:
                text.append(f'  File "{frame["filename"]}", line {frame["line"]} in {frame["name"]}')
            else:
                text.append(f"  Native {Path(frame['module']).name} in {frame['name']}")
        if main:
            place = _place(thread["frames"])
        text.append("")
    return Frames(place, "\n".join(text))


def _place(stack: Sequence[Mapping[str, Any]]) -> str:
    """The innermost function that has a name, and the library that called it."""
    below: list[tuple[str, str]] = []
    for frame in stack:
        if frame["module"] is None:
            break
        if not _UNNAMED.match(frame["name"]):
            below.append((_short(frame["name"]), Path(frame["module"]).name))
    if not below:
        return ""
    inner, _ = below[0]
    caller = next(((name, library) for name, library in below if not _PLUMBING.match(library)), None)
    if caller is None:
        return inner
    name, library = caller
    return f"{name} ({library})" if name == inner else f"{inner}, called by {name} ({library})"


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST else name[: _LONGEST - 1] + "…"


class Search:
    """Below Python, of the ranks of one node, by threads; nobody waits for it. woken: called once, from a thread, when
    it is over.

    groups: one for each rank. Of those at the same place in Python the first is looked at; of those that have not
    answered, each. lacking: why there is nothing to tell, if so.
    """

    def __init__(self, name: str, node: int, groups: Sequence[Group], pids: Mapping[int, int]) -> None:
        self.name = name
        self.node = node
        self.groups = list(groups)
        self.lacking = ""
        self.over = False
        self._pids = pids

    def start(self, woken: Callable[[], None]) -> None:
        def work() -> None:
            try:
                self._look()
            finally:
                self.over = True
                woken()

        threading.Thread(target=work, name="launch-native", daemon=True).start()

    def _look(self) -> None:
        tool = spy()
        if tool is None:
            self.lacking = "py-spy is not installed there: pip install py-spy"
            return
        seen: set[str] = set()
        chosen: list[int] = []
        for at, group in enumerate(self.groups):
            if group.stands_still or (group.sample and group.where in seen):
                continue
            seen.add(group.where)
            chosen.append(at)
        chosen = chosen[:_RANKS]
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            for at, told in zip(chosen, pool.map(lambda at: self._ask(tool, at), chosen), strict=True):
                if isinstance(told, str):
                    self.lacking = told
                    continue
                group = self.groups[at]
                there = group.where if group.sample else where(told.text)
                natives = ((told.place, group.ranks),) if told.place else ()
                self.groups[at] = replace(group, where=there, sample=told.text, natives=natives)

    def _ask(self, tool: str, at: int) -> Frames | str:
        (rank,) = self.groups[at].ranks
        command = [tool, "dump", "--native", "--json", "--pid", str(self._pids[rank])]
        within_s = WITHIN_S * _AT_ONCE / _RANKS
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=within_s, check=False
            )
            return frames(json.loads(done.stdout), self._pids[rank])
        except subprocess.TimeoutExpired:
            return f"py-spy did not answer within {within_s:g} s"
        except OSError as error:
            return f"py-spy: {error}"
        except (ValueError, KeyError, TypeError):
            said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
            return f"py-spy: {'; '.join(said[:3])[:300] or f'it left with code {done.returncode}'}"

    def whole(self, host: str) -> str:
        """All that was found, for a file."""
        return "".join(f"rank {g.ranks[0]} on {host}: {g.where}{g.below}\n{g.sample}\n" for g in self.groups)

    def told(self) -> dict[str, Any]:
        """For the supervisor: what tells the ranks apart."""
        return {"groups": [g.to_json() for g in merged(self.groups)], "lacking": self.lacking}
