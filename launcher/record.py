"""What a run's attempts were and how they ended, written into its folder; the last words on a failure."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any

from launcher.errors import LaunchError
from launcher.failure import render
from launcher.gang import Outcome

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from launcher.gang import Gang
    from launcher.progress import Progress
    from launcher.runs import RunFolder

__all__ = ["attempt_begins", "attempt_over", "end_told", "errors_told", "report", "run_over", "told"]


def attempt_begins(run: RunFolder, attempt: int, world_size: int, hosts: Sequence[str], spares: Sequence[str]) -> None:
    """hosts: in the order of the ranks; spares: those that stand by."""
    run.set_state(attempt=attempt, progress=None, spares=list(spares))
    more = {"spares": list(spares)} if spares else {}
    run.event("attempt", attempt=attempt, hosts=list(hosts), world_size=world_size, **more)


def attempt_over(
    run: RunFolder, attempt: int, said: dict[str, Any], outcome: Outcome | None, progress: Progress | None
) -> None:
    """Another attempt follows. said: the gang's word on it; outcome: None if nothing failed."""
    run.event(
        "attempt-failed" if outcome is not None else "attempt-left",
        attempt=attempt,
        status=said["status"],
        cause=said["cause"],
        exits=said["exits"],
        progress=None if progress is None else progress.to_json(),
    )
    if outcome is not None:
        _failure(run, attempt, outcome)
        run.notices.tell("failure", **told(outcome, attempt))


def run_over(run: RunFolder, gang: Gang, outcome: Outcome, progress: Progress | None) -> None:
    if outcome.status == "failed":
        _failure(run, gang.attempt, outcome)
    run.event(
        "end",
        status=outcome.status,
        code=outcome.code,
        cause=outcome.cause,
        attempt=gang.attempt,
        exits=gang.exit_codes(),
        progress=None if progress is None else progress.to_json(),
    )
    run.set_state(status=outcome.status, exit_code=outcome.code, cause=outcome.cause, spares=[])


def end_told(run: RunFolder, outcome: Outcome, say: Callable[[str], None], **more: Any) -> None:
    """Tell the person's own command that the run has ended, once nothing of it is left, and give it its time."""
    run.notices.tell("end", **told(outcome, int(run.state()["attempt"])), **more)
    for trouble in run.notices.wait():
        say(trouble)


@contextlib.contextmanager
def errors_told(run: RunFolder, say: Callable[[str], None]) -> Iterator[None]:
    """Have a run that ends by an error told of as ended, too."""
    try:
        yield
    except LaunchError as error:
        end_told(run, Outcome("failed", error.exit_code, str(error)), say)
        raise


def told(outcome: Outcome, attempt: int) -> dict[str, Any]:
    """What a notice says of an outcome."""
    fault = None if outcome.fault is None else outcome.fault.kind
    return {"status": outcome.status, "cause": outcome.cause, "fault": fault, "exit_code": outcome.code,
            "attempt": attempt}  # fmt: skip


def _failure(run: RunFolder, attempt: int, outcome: Outcome) -> None:
    root = outcome.root
    run.write(
        "failure.json",
        {
            "cause": outcome.cause,
            "attempt": attempt,
            "time": time.time(),
            "fault": None if outcome.fault is None else outcome.fault.to_json(),
            "exit_code": outcome.code if root is None else root.exit_code,
            "first": None if root is None else root.exit.to_json(),
            "left_early": root is not None and root.left_early,
            "followers": [] if root is None else list(root.followers),
        },
    )


def report(outcome: Outcome, run: RunFolder) -> str:
    """The last words on the screen after a failure."""
    if outcome.root is not None:
        return render(outcome.root, outcome.world_size, "" if outcome.fault is None else str(outcome.fault))
    fault = "" if outcome.fault is None else f"\nclass of fault: {outcome.fault.kind}"
    return f"{outcome.cause}{fault}\n\nlogs: {run.path / 'logs'}"
