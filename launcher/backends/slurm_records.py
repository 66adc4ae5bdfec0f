"""Pure: what Slurm's tools say of jobs, read from their pinned text, and one answer made of several sources.

The formats are pinned by option and environment (no `--json`: its layout changes between releases), so a person's
SQUEUE_FORMAT or time zone does not change what is read here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from launcher.backends import slurm_notation as notation
from launcher.errors import ClusterError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

__all__ = [
    "OVER",
    "SACCT",
    "SCONTROL",
    "SQUEUE",
    "JobRecord",
    "merge",
    "query_environment",
    "read_sacct",
    "read_scontrol",
    "read_squeue",
]

# States that a job does not leave by itself. Not here: COMPLETING (its processes still die) and every word that a
# later Slurm may add, so that an unknown state is never taken for an end.
OVER = frozenset(
    {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED",
     "TIMEOUT"}
)  # fmt: skip

_SQUEUE_FIELDS = ("%i", "%A", "%T", "%V", "%S", "%e", "%l", "%N", "%r")
_SACCT_FIELDS = ("JobID", "JobIDRaw", "State", "Submit", "Start", "End", "Timelimit", "NodeList", "ExitCode", "Reason")

# `--states=all`: also jobs that ended less than MinJobAge ago. Not `--array`: of an array with a step (`0-70:2`)
# squeue 22.05 then leaves the last pending element out; `1_[0-70:2%3]` is one row, and taken apart here.
SQUEUE = ("squeue", "--noheader", "--states=all", "--format=" + "|".join(_SQUEUE_FIELDS))
# `--duplicates`: one row for each life of a requeued job.
SACCT = ("sacct", "--noheader", "--parsable2", "--allocations", "--duplicates", "--format=" + ",".join(_SACCT_FIELDS))
SCONTROL = ("scontrol", "show", "job")

# Which line of `scontrol show job` a value is taken from. Lines with free text (Comment, WorkDir, ...) are never read:
# a comment "JobState=FAILED" says nothing about the job.
_SCONTROL_LINES = {"JobState", "Requeue", "RunTime", "SubmitTime", "StartTime", "PreemptTime", "PreemptEligibleTime",
                   "Partition", "NodeList"}  # fmt: skip
_NO_INDEX = "4294967294"  # Slurm's NO_VAL
_SCONTROL_HEAD = re.compile(r"JobId=(\d+)(?: ArrayJobId=(\d+) ArrayTaskId=(\S+))?")


@dataclass(frozen=True)
class JobRecord:
    """One job, or one element of an array, in one of its lives, as one source knows it. Times: seconds since 1970.

    job_id: as a person writes it (`12`, `12_3`); raw_id: the element's own number once it has one. start and end: when
    it started and ended, or will by its limits. preempted: since when it is being preempted. exit_code, signal: of
    the batch script. None: this source does not say, or there is none (limit_s: no limit).
    """

    job_id: str
    raw_id: str
    state: str
    source: str
    reason: str = ""
    submit: float | None = None
    start: float | None = None
    end: float | None = None
    preempted: float | None = None
    limit_s: float | None = None
    restarts: int | None = None
    nodes: tuple[str, ...] = ()
    partition: str = ""
    exit_code: int | None = None
    signal: int | None = None

    @property
    def over(self) -> bool:
        return self.state in OVER


def query_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment in which the tools answer in the formats that this module reads."""
    kept = {k: v for k, v in environ.items() if not k.startswith(("SQUEUE_", "SACCT_", "SCONTROL_"))}
    # Without BITSTR_LEN=0 a long list of array indices is cut after 64 bytes.
    return kept | {"SLURM_TIME_FORMAT": "%s", "SLURM_BITSTR_LEN": "0", "LC_ALL": "C.UTF-8"}


def read_squeue(text: str) -> dict[str, JobRecord]:
    """Job id -> record, of what `SQUEUE` printed. Raises `ClusterError` if it is in another format."""
    found = {}
    for line in filter(None, text.splitlines()):
        values = _row(line, len(_SQUEUE_FIELDS), "squeue")
        job_id, raw_id, state, submit, start, end, limit, nodes, reason = values
        with _Reading("squeue", line):
            record = JobRecord(
                job_id=job_id,
                raw_id=raw_id,
                state=state,
                source="controller",
                reason=_word(reason),
                submit=notation.moment(submit),
                start=notation.moment(start),
                end=notation.moment(end),
                limit_s=notation.duration(limit),
                nodes=notation.hosts(nodes),
            )
            found.update({one: replace(record, job_id=one) for one in notation.job_ids(job_id)})
    return found


def read_sacct(text: str) -> dict[str, tuple[JobRecord, ...]]:
    """Job id -> its lives, the latest last, of what `SACCT` printed. Raises `ClusterError` on another format."""
    found: dict[str, list[JobRecord]] = {}
    for line in filter(None, text.splitlines()):
        values = _row(line, len(_SACCT_FIELDS), "sacct")
        job_id, raw_id, state, submit, start, end, limit, nodes, code, reason = values
        with _Reading("sacct", line):
            exit_code, signal = notation.exit_code(code)
            record = JobRecord(
                job_id=job_id,
                raw_id=raw_id,
                state=state.split()[0],  # "CANCELLED by 1000"
                source="accounting",
                reason=_word(reason),
                submit=notation.moment(submit),
                start=notation.moment(start),
                end=notation.moment(end),
                limit_s=notation.duration(limit),
                nodes=notation.hosts(nodes),
                exit_code=exit_code,
                signal=signal,
            )
            for one in notation.job_ids(job_id):
                found.setdefault(one, []).append(replace(record, job_id=one))
    # A requeue makes a new submit time; the sort is stable, so lives of one second stay as sacct lists them.
    return {job: tuple(sorted(lives, key=lambda r: r.submit or 0.0)) for job, lives in found.items()}


def read_scontrol(text: str) -> dict[str, JobRecord]:
    """Job id -> record, of what `scontrol show job` printed. Raises `ClusterError` if it is in another format."""
    found = {}
    for head, values in _scontrol_blocks(text):
        job, array, index = head.groups()
        with _Reading("scontrol", head.string):
            exit_code, signal = notation.exit_code(values.get("ExitCode", "0:0"))
            record = JobRecord(
                job_id=job,
                raw_id=job,
                state=values["JobState"],
                source="controller",
                reason=_word(values.get("Reason", "")),
                submit=notation.moment(values.get("SubmitTime", "")),
                start=notation.moment(values.get("StartTime", "")),
                end=notation.moment(values.get("EndTime", "")),
                preempted=notation.moment(values.get("PreemptTime", "")),
                limit_s=notation.duration(values.get("TimeLimit", "")),
                restarts=int(values["Restarts"]) if "Restarts" in values else None,
                nodes=notation.hosts(values.get("NodeList", "")),
                partition=values.get("Partition", ""),
                exit_code=exit_code,
                signal=signal,
            )
            if array is None or index == _NO_INDEX:
                ids: tuple[str, ...] = (array or job,)
            else:
                ids = notation.job_ids(f"{array}_[{index}]")
            found.update({one: replace(record, job_id=one) for one in ids})
    return found


def _scontrol_blocks(text: str) -> Iterator[tuple[re.Match[str], dict[str, str]]]:
    head: re.Match[str] | None = None
    values: dict[str, str] = {}
    for line in text.splitlines():
        if (start := _SCONTROL_HEAD.match(line)) is not None:
            if head is not None:
                yield head, values
            head, values = start, {}
        elif head is not None and line.startswith("   ") and line.split("=")[0].strip() in _SCONTROL_LINES:
            for name, value in re.findall(r"([A-Za-z][A-Za-z/:]*)=(\S*)", line):
                values.setdefault(name, value)
    if head is not None:
        yield head, values


def _row(line: str, width: int, tool: str) -> list[str]:
    values = [value.strip() for value in line.split("|")]
    if len(values) != width:
        raise ClusterError(f"{tool} answered {line!r}: {len(values)} columns where {width} were asked for")
    return values


def _word(reason: str) -> str:
    return "" if reason in ("None", "(null)") else reason


class _Reading:
    """Turns what a value is not into an error that shows the whole line."""

    def __init__(self, tool: str, line: str) -> None:
        self._what = f"{tool} answered {line!r}"

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: object) -> None:
        if isinstance(value, KeyError):
            raise ClusterError(f"{self._what}, without {value.args[0]}") from value
        if isinstance(value, (ValueError, IndexError)):
            raise ClusterError(f"{self._what}, which this version cannot read: {value}") from value


def merge(
    job_id: str,
    *,
    controller: Mapping[str, JobRecord] | None,
    accounting: Mapping[str, Sequence[JobRecord]] | None,
    own: JobRecord | None = None,
) -> JobRecord:
    """What is true of a job, from up to three sources; None for a source that is absent or did not answer.

    controller: `read_squeue` or `read_scontrol`, asked *after* accounting, else a job submitted in between looks lost.
    own: what the run folder recorded of this job.

    The controller is right about every job that it still knows. It forgets one MinJobAge (300 s) after its end; from
    then on accounting tells, unless it missed the end (slurmdbd was down): a job that only accounting takes for alive,
    while the controller answers and does not know it, is over. Then our own record tells how, and without one the
    state is LOST, unless it is an element of an array whose others accounting has: it was cancelled before it started,
    without a trace. Nobody knows the job at all: UNKNOWN.
    """
    lives = (accounting or {}).get(job_id, ())
    last = lives[-1] if lives else None
    now = None if controller is None else controller.get(job_id)
    if now is not None:
        if now.over and now.exit_code is None:
            # squeue has no exit codes. An earlier life's must not pass for this one's.
            ended = next((r for r in (last, own) if r is not None and r.state == now.state), None)
            if ended is not None:
                return replace(now, exit_code=ended.exit_code, signal=ended.signal)
        return now
    if last is not None and last.over:
        if controller is None and (last.state, last.exit_code, last.signal) == ("FAILED", 0, 0):
            # Accounting says this for a moment of jobs that end in another way (22.05: COMPLETED a second later).
            return replace(last, state="COMPLETING", exit_code=None, signal=None)
        return last
    if own is not None and own.over:
        return own
    rest = (controller or {}).get(job_id.split("_")[0])
    if rest is not None:
        # `scancel --user` makes one row `6` of the elements of `6_[0-9]` that had not started.
        return replace(rest, job_id=job_id)
    array = job_id.partition("_")[0] + "_"
    if controller is not None and last is None and any(one.startswith(array) for one in accounting or ()):
        # Accounting has every element that began, and nobody knows this one, which is no longer in the queue.
        return JobRecord(
            job_id=job_id, raw_id=job_id, state="CANCELLED", source="accounting", reason="cancelled before it started"
        )
    known = last or own
    if known is None:
        return JobRecord(job_id=job_id, raw_id=job_id, state="UNKNOWN", source="")
    if controller is None:
        return known
    return replace(known, state="LOST", reason="Slurm no longer knows the job, and nobody recorded its end")
