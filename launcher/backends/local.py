"""The local machine: one agent, or several as a rehearsal of a cluster."""

from __future__ import annotations

from typing import TYPE_CHECKING

from launcher.processes import become_subreaper
from launcher.spec import keeps_terminal
from launcher.supervisor import Supervisor

if TYPE_CHECKING:
    from collections.abc import Callable

    from launcher.gang import Outcome
    from launcher.runs import RunFolder

__all__ = ["run"]


def run(folder: RunFolder, say: Callable[[str], None]) -> Outcome:
    """Run all nodes here. To be called in a process of its own: at the end everything below the process is killed."""
    become_subreaper()
    spec = folder.spec
    return Supervisor(folder, local=tuple(range(spec.places)), say=say, own_session=not keeps_terminal(spec)).work()
