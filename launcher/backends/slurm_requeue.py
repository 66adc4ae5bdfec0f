"""Pure: whether a run goes on after one of its jobs' lives, and what that life is counted as."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from launcher.backends.slurm_stop import Stop
    from launcher.gang import Outcome
    from launcher.progress import Progress
    from launcher.spec import Slurm

__all__ = ["Ledger", "Verdict", "decide"]

# Lives that may end one after the other without a newer checkpoint, where the run itself did not ask to go on.
_FRUITLESS = 2


@dataclass(frozen=True)
class Ledger:
    """What a run has used up of its budgets since a person last started it.

    failures: restarts after ranks failed; timeouts: time limits; fruitless: lives in a row that left no newer
    checkpoint; saved: the newest checkpoint's step; save_s: how long it took; failure: the last one (see Gang);
    excluded: hosts to be avoided, and why.
    """

    failures: int = 0
    timeouts: int = 0
    fruitless: int = 0
    saved: int | None = None
    save_s: float | None = None
    failure: str | None = None
    excluded: dict[str, str] | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Verdict:
    """again: whether the run is to go on, and Slurm is to be asked for that unless it has done so itself (`by_slurm`);
    why: one sentence for people; ledger: what counts from now on.
    """

    again: bool
    why: str
    ledger: Ledger
    by_slurm: bool = False


def decide(
    outcome: Outcome,
    stop: Stop | None,
    ledger: Ledger,
    slurm: Slurm,
    *,
    failures: int,
    progress: Progress | None,
    lost: dict[str, str],
    by_user_signal: bool = False,
) -> Verdict:
    """What comes after `outcome`.

    stop: what Slurm was stopping the job for; failures: restarts so far; progress: of the last attempt; lost: hosts
    whose agents went away without being asked, with how, when that is why the run ended; by_user_signal: SIGUSR1 or
    SIGUSR2 stopped it, by which people and `sbatch --signal` ask a job to save and go on later.
    """
    now = _counted(ledger, failures, progress, left_cleanly=outcome.code == 75)
    if outcome.status == "finished":
        return Verdict(False, outcome.cause, now)
    cause = "" if stop is None else stop.cause
    if cause == "cancelled":
        return Verdict(False, "the job was cancelled", now)
    if stop is not None and stop.requeued:
        return Verdict(True, _word(cause), now, by_slurm=True)
    if slurm.requeue == "no":
        return Verdict(False, f"{cause or outcome.cause}; --requeue no", now)
    if cause in ("preempted", "requeued"):
        return Verdict(True, _word(cause), now)
    if cause == "time limit":
        now = replace(now, timeouts=now.timeouts + 1)
        if slurm.max_timeouts is not None:
            used = f"the time limit was reached, {now.timeouts} of --max-timeouts {slurm.max_timeouts}"
            return Verdict(now.timeouts <= slurm.max_timeouts, used, now)
        # Code 75 is the program's own word that it can go on.
        return _while_fruitful(
            ledger, now, "the time limit was reached", said_so=outcome.code == 75 and progress is None
        )
    if cause == "unknown":
        # Slurm goes on with the job and knows no reason for its SIGTERM: it had one before it was restarted.
        why = "stopped while Slurm's controller was away"
        return _while_fruitful(ledger, now, why, said_so=outcome.code == 75 and progress is None)
    if outcome.status == "failed" and lost:
        what = "; ".join(f"{host}: {how}" for host, how in lost.items())
        return _while_fruitful(ledger, now, what, said_so=False)
    if outcome.code == 75 and (cause == "" or by_user_signal):
        return _while_fruitful(ledger, now, outcome.cause, said_so=progress is None)
    if cause == "node failure":
        return Verdict(True, "a node failed", now)
    return Verdict(False, outcome.cause, now)


def _counted(ledger: Ledger, failures: int, progress: Progress | None, *, left_cleanly: bool) -> Ledger:
    saved = None
    if progress is not None:
        # With code 75 a program says that it saved where it stopped; what it began at somebody had saved.
        saved = (progress.step if left_cleanly else progress.saved) or progress.began
    newer = saved is not None and saved > (ledger.saved or 0)
    return replace(
        ledger,
        failures=failures,
        saved=saved if newer else ledger.saved,
        save_s=ledger.save_s if progress is None or progress.save_s is None else progress.save_s,
        fruitless=0 if newer else ledger.fruitless,
    )


def _while_fruitful(ledger: Ledger, now: Ledger, why: str, *, said_so: bool) -> Verdict:
    if said_so or now.saved != ledger.saved:
        return Verdict(True, why, now)
    now = replace(now, fruitless=now.fruitless + 1)
    if now.fruitless <= _FRUITLESS:
        return Verdict(True, why, now)
    said = f"{why}; {now.fruitless} times in a row without a newer checkpoint, so it is not tried again"
    return Verdict(False, said, now)


def _word(cause: str) -> str:
    return {"preempted": "preempted", "requeued": "requeued by somebody", "node failure": "a node failed"}[cause]
