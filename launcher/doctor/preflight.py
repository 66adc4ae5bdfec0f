"""`--preflight`: the doctor's look at the machines of a run, right before it begins there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from launcher.doctor.examination import Place, examine
from launcher.doctor.facts import required
from launcher.doctor.verdicts import judge, table
from launcher.doctor.ways import by_spec

if TYPE_CHECKING:
    from collections.abc import Callable

    from launcher.spec import LaunchSpec

__all__ = ["preflight"]


def preflight(spec: LaunchSpec, folder: Path, say: Callable[[str], None]) -> str | None:
    """Tell how the machines are; returns why the run is not to begin on them. Raises `MeetingError` if none is there.

    folder: the run's own.
    """
    place = Place(
        None if spec.ssh is not None and spec.ssh.sync else folder,
        spec.master_port or 0,
        {"gpu": spec.procs, "cpu": 0, "any": None}[spec.device],
        required(Path(spec.cwd)),
    )
    with by_spec(spec) as ways:
        findings = judge(examine(ways, place, say), place)
    for line in table(findings, None):
        say(line)
    bad = [finding.check for finding in findings if finding.status == "bad"]
    return f"preflight: {', '.join(bad)}: bad, as told above" if bad else None
