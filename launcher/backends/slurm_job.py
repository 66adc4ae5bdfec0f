"""Inside a job: the body of the batch script, and a launch in an allocation that somebody else made.

The body takes the place of the batch script's shell. It starts one agent per node by one srun, learns from Slurm why
and until when the job is being stopped, and at the end decides whether the run goes on, and sees to that exactly once.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher import index
from launcher.backends.slurm_records import SCONTROL, JobRecord, query_environment, read_scontrol
from launcher.backends.slurm_requeue import Ledger, Verdict, decide
from launcher.backends.slurm_stop import Stop, grace_of_partition, kill_wait_of_config, lead, why
from launcher.backends.slurm_tools import AwayError, ask
from launcher.errors import ClusterError, LaunchError, MeetingError
from launcher.failure import signal_name
from launcher.gang import Outcome
from launcher.processes import become_subreaper
from launcher.record import end_told, report, told
from launcher.runs import RunFolder
from launcher.starting import agent_command, python_command
from launcher.supervisor import Supervisor

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from launcher.spec import LaunchSpec

__all__ = ["Job", "bootstrap", "command", "run"]

# Slurm is asked in a hurry: processes are being killed.
_HURRY_S = 5.0
# How long a controller may be away: a restart takes seconds, the failover to another one minutes.
_AWAY_S = 600.0
# What a person's own command has once the job is requeued, which ends this process soon.
_AFTER_REQUEUE_S = 5.0


@dataclass(frozen=True)
class _Now:
    """The job as `scontrol show job` tells of it."""

    record: JobRecord
    batch: bool
    requeues: bool


class Job:
    """The job that this process is in. Raises `ClusterError` if slurmctld does not say what it is."""

    def __init__(self, spec: LaunchSpec, folder: Path, save_s: float | None = None) -> None:
        assert spec.slurm is not None
        self.job_id = self._name = os.environ["SLURM_JOB_ID"]
        if "SLURM_ARRAY_TASK_ID" in os.environ:
            # The last element of an array has the array's own number, by which Slurm understands all elements.
            self._name = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
        self.restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        self.stop: Stop | None = None
        self.signal: int | None = None  # what came with the stop
        self._spec = spec
        self._folder = folder
        self.slurm = spec.slurm
        self._save_s = save_s
        self._environ = query_environment(os.environ)
        now = self._patiently(self._ask)
        self.before, self.batch, self.requeues = now.record, now.batch, now.requeues
        self._nodes = min(spec.places, len(self.before.nodes)) if spec.elastic else spec.nodes
        partition = self._patiently(lambda: self._tool("scontrol", "show", "partition", self.before.partition))
        self._grace_s = grace_of_partition(partition)
        self._kill_wait_s = kill_wait_of_config(self._patiently(lambda: self._tool("scontrol", "show", "config")))

    def _tool(self, *words: str, timeout_s: float = 60.0) -> str:
        return ask(*words, environ=self._environ, timeout_s=timeout_s)

    def _patiently(self, call: Callable[[], Any], timeout_s: float = 60.0, away_s: float = _AWAY_S) -> Any:
        """Try again for `timeout_s` where Slurm refuses, for `away_s` where nobody answers."""
        began = time.monotonic()
        while True:
            try:
                return call()
            except ClusterError as error:  # noqa: PERF203  # twice a second
                if time.monotonic() - began > (away_s if isinstance(error, AwayError) else timeout_s):
                    raise
                time.sleep(0.5)

    def _ask(self) -> _Now:
        text = self._tool(*SCONTROL, self._name, timeout_s=_HURRY_S)
        for record in read_scontrol(text).values():
            if record.raw_id == self.job_id:
                flags = re.search(r"^   Requeue=(\d+) .*\bBatchFlag=(\d+)", text, re.MULTILINE)
                requeue, batch = flags.groups() if flags else ("0", "0")
                return _Now(record, batch == "1", requeue == "1")
        raise ClusterError(f"scontrol show job {self._name} answered {text!r}")

    # ------------------------------------------------------------------------------------------ for the supervisor

    def start_agents(self, port: int, environment: dict[str, str]) -> subprocess.Popen[bytes]:
        # The run goes on when an agent is lost, or all agents go.
        lost = ["--kill-on-bad-exit=0", "--no-kill", "--wait=0"] if self._spec.elastic else ["--kill-on-bad-exit=1"]
        return self._srun(environment, self._nodes, lost, "srun", str(port))

    def start_agent(self, node: int, port: int, environment: dict[str, str]) -> subprocess.Popen[bytes]:
        # The lost agent's step goes on on the other nodes, and has this node's processors too.
        where = ["--overlap", f"--nodelist={self.before.nodes[node]}"]
        return self._srun(environment, 1, where, "srun", str(port), str(node))

    def _srun(
        self, environment: dict[str, str], nodes: int, options: list[str], *agent: str
    ) -> subprocess.Popen[bytes]:
        # Every option that a site's or a person's SLURM_* variables could change is said again; without -c a step of
        # 22.05 has one CPU per task.
        cpus = environment.get("SLURM_CPUS_PER_TASK")
        words = ["srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "--distribution=block",
                 *([f"--cpus-per-task={cpus}"] if cpus else []), "--export=ALL", "--input=none", "--unbuffered",
                 "--mpi=none", *options, f"--chdir={self._spec.cwd}"]  # fmt: skip
        return subprocess.Popen(
            [*words, *agent_command(*agent)],
            env=environment,
            stdin=subprocess.DEVNULL,
            # srun ends its step at once on the terminal's Ctrl-C; that is ours to hear.
            start_new_session=True,
        )

    def stop_now(self, number: int | None) -> Stop | None:
        stop = self._inquire()
        if stop.cause in ("signalled", "unknown") and number is None:
            return None
        self.stop, self.signal = stop, number
        return stop

    def _inquire(self) -> Stop:
        at = time.time()
        try:
            now = self._ask().record
        except ClusterError:
            now = None
        stop = why(self.before, now, at=at, grace_s=self._grace_s, kill_wait_s=self._kill_wait_s)
        if now is not None and stop.cause in ("signalled", "preempted") and not stop.requeued:
            self.before = now  # the time limit may have been moved
        due = self.stop_at(None)
        if stop.cause in ("signalled", "unknown") and due is not None and at >= due:
            stop = Stop("time limit", self.before.end)
        return stop

    def stop_at(self, save_s: float | None) -> float | None:
        if self.before.limit_s is None or self.before.end is None:
            return None
        self._save_s = save_s or self._save_s
        return float(self.before.end - self.lead)

    @property
    def lead(self) -> float:
        """Seconds before the time limit at which the ranks are told."""
        if self.slurm.stop_lead_s is not None:
            return self.slurm.stop_lead_s
        return lead(self.before.limit_s or 0.0, self._save_s)

    @property
    def orphan_grace_s(self) -> float:
        # Slurm ends the steps when the batch script was killed; then there is still the requeue to do.
        return max(1.0, self._kill_wait_s - 3.0)

    @property
    def heir(self) -> list[str]:
        return python_command(__name__, "inherit", str(self._folder)) if self.batch else []

    # ------------------------------------------------------------------------------------------ afterwards

    def settle(self) -> Stop | None:
        """What Slurm says of the stop now that the ranks have left: it may have been cancelled meanwhile, and a
        controller that was away when the signal came may know by now what it was for.
        """
        if self.stop is not None and self.stop.requeued:
            return self.stop  # from here on the record lists only the nodes that are not yet done with this life
        unknown = self.stop is not None and self.stop.cause == "unknown"
        with contextlib.suppress(ClusterError):
            self._patiently(self._ask, 20.0, _AWAY_S if unknown else 20.0)
            self.stop_now(None)
        return self.stop

    def requeue(self, exclude: list[str]) -> None:
        """Put the job back into the queue. Slurm ends what is left of it, so little may come after this.

        A controller that was away may have done so itself, because it lost sight of this node: then the job's next
        life must not be ended in place of this one.
        """
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

        def requeue() -> None:
            if (self._ask().record.restarts or 0) <= self.restart:
                self._tool("scontrol", "requeue", self._name, timeout_s=20.0)

        self._patiently(requeue)
        self.avoid(exclude)

    def avoid(self, hosts: Sequence[str]) -> None:
        """Have the next life of the job, which is in the queue again, start on other hosts."""
        if not hosts:
            return
        names = ",".join(filter(None, [str(self.slurm.options.get("exclude", "")), *hosts]))
        # Refused while the job runs; it takes a moment after the requeue until it does not.
        within_s = max(1.0, self._kill_wait_s - 1.0)
        with contextlib.suppress(ClusterError):
            self._patiently(
                lambda: self._tool("scontrol", "update", f"JobId={self._name}", f"ExcNodeList={names}"),
                within_s,
                within_s,
            )

    def failed_nodes(self) -> dict[str, str]:
        """The nodes that Slurm stopped the job for, with what it says of each."""
        found = {}
        for node in () if self.stop is None else self.stop.nodes:
            with contextlib.suppress(ClusterError):
                said = self._tool("scontrol", "show", "node", node, timeout_s=_HURRY_S)
                if (state := re.search(r"\bState=(\S*(?:DOWN|FAIL|NOT_RESPONDING)\S*|\S+\*\S*)", said)) is not None:
                    reason = re.search(r"^\s*Reason=(.*?)(?: \[|$)", said, re.MULTILINE)
                    found[node] = state[1].lower() + (f": {reason[1]}" if reason is not None else "")
        return found


def command(folder: Path) -> list[str]:
    """What the batch script becomes, for a run's folder or the folder of an array of runs."""
    return python_command("launcher.backends.slurm_job", str(folder))


def bootstrap() -> None:
    """Entry of the batch script's interpreter, and of the agent that takes a killed supervisor's place."""
    words = sys.argv[1:]
    try:
        code = _inherit(Path(words[1])) if words[0] == "inherit" else _body(Path(words[0]))
    except LaunchError as error:
        _say(f"error: {error}")
        code = error.exit_code
    sys.stdout.flush()
    sys.exit(code)


def _say(line: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(f"launch: {line}\n")
        sys.stderr.flush()


def _body(folder: Path) -> int:
    with _own_run(folder, os.environ) as run_folder:
        return run(run_folder, _say)


def _own_run(folder: Path, environ: Mapping[str, str]) -> RunFolder:
    """The run of this job, or of this element of an array of runs. The last life may still be leaving."""
    if not (folder / "array.json").is_file():
        return RunFolder.open(folder, None, wait_s=120)
    from launcher.arrays import Array

    return Array.read(folder).open(int(environ["SLURM_ARRAY_TASK_ID"]), wait_s=120)


def run(folder: RunFolder, say: Callable[[str], None]) -> int:
    """Bring the run to its end in this job, or to where it goes on in a later one; returns the exit code."""
    state = folder.state()
    if state["status"] == "finished":
        say(f"run {folder.run_id} is finished already (folder {folder.path}); nothing to do")
        return 0
    become_subreaper()
    folder.bear(say)
    ledger = Ledger(**state.get("ledger", {}))
    job = Job(folder.spec, folder.path, ledger.save_s)
    record = job.before
    folder.event("job", job_id=record.job_id, raw_id=job.job_id, restart=job.restart, nodes=list(record.nodes),
                 partition=record.partition, submitted=record.submit, started=record.start, ends=record.end,
                 attempt=int(state["attempt"]) + 1)  # fmt: skip
    folder.set_state(job_id=record.job_id, raw_id=job.job_id, restart=job.restart)
    spec = folder.spec
    if spec.elastic:
        nodes = min(spec.nodes, len(record.nodes))
        spares = min(spec.spares, len(record.nodes) - nodes)
        spec = folder.spec = replace(spec, nodes=nodes, spares=spares)  # of what was asked for, in this job
    say(f"job {record.job_id} on {','.join(record.nodes)}, run {folder.run_id}, attempt {int(state['attempt']) + 1}: "
        f"{spec.world_size} rank(s) on {spec.nodes} node(s), folder {folder.path}")  # fmt: skip
    listener = socket.create_server(("", 0), family=socket.AF_INET, backlog=2048)
    with listener:
        supervisor = Supervisor(folder, local=(), say=say, listener=listener, token=secrets.token_hex(16),
                                where=f"{socket.gethostname()} port {listener.getsockname()[1]}", scheduler=job,
                                restarts=ledger.failures, failure=ledger.failure)  # fmt: skip
        lost = {}
        try:
            early = _look_first(folder, job, say) if spec.preflight else None
            outcome = early or supervisor.work()
            lost = supervisor.lost
        except LaunchError as error:
            outcome = Outcome("failed", error.exit_code, str(error))
            _record(folder, outcome, supervisor.gang.attempt)
            if not isinstance(error, (ClusterError, MeetingError)):
                folder.set_state(goes_on=False)
                end_told(folder, outcome, say, job_id=record.job_id, why=str(error))
                raise
            lost = {record.nodes[i]: str(error) for i in supervisor.gang.missing if i < len(record.nodes)}
    verdict = decide(
        outcome,
        None if outcome.status == "finished" else job.settle(),
        ledger,
        job.slurm,
        failures=supervisor.gang.restarts,
        progress=supervisor.progress,
        lost=lost,
        by_user_signal=job.signal in (signal.SIGUSR1, signal.SIGUSR2),
    )
    verdict = replace(verdict, ledger=replace(verdict.ledger, failure=supervisor.gang.failure))
    return _conclude(folder, job, outcome, verdict, say, silent=sorted(supervisor.unreachable))


class _AskedToLeave(BaseException):
    """A stop signal, where nothing else is ready for one; no handler of errors is meant by it."""


def _look_first(folder: RunFolder, job: Job, say: Callable[[str], None]) -> Outcome | None:
    """The doctor's look at the nodes; how the run ends where it is not to begin on them."""
    from launcher.doctor.preflight import preflight

    def leave(number: int, _: object) -> None:
        job.stop_now(number)
        raise _AskedToLeave(signal_name(number))

    # Slurm may want the nodes back meanwhile, and then the job is to be requeued as if its ranks had left.
    old = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)}
    try:
        bad = preflight(folder.spec, folder.path, say)
        if bad is None:
            outcome = None
        elif job.stop_now(None) is not None:  # the steps are told first, and then no node answers
            outcome = Outcome("stopped", 75, "stopped while the nodes were looked at")
        else:
            outcome = Outcome("failed", ClusterError.exit_code, f"{bad}; nothing was started")
    except _AskedToLeave as stop:
        outcome = Outcome("stopped", 75, f"{stop} while the nodes were looked at")
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
    if outcome is not None:
        _record(folder, outcome, int(folder.state()["attempt"]) + 1)
    return outcome


def _record(folder: RunFolder, outcome: Outcome, attempt: int) -> None:
    """What the supervisor records of an end, where it could not."""
    folder.event("end", status=outcome.status, code=outcome.code, cause=outcome.cause, attempt=attempt, exits={},
                 progress=None)  # fmt: skip
    folder.set_state(status=outcome.status, exit_code=outcome.code, cause=outcome.cause)


def _requeue_told(folder: RunFolder, facts: dict[str, Any]) -> None:
    """Start the person's command; the requeue does not wait for it, since Slurm may be about to kill this process. What
    Slurm sends to all that is left of the job does not end the command (an ignored signal stays ignored in it).
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    folder.notices.tell("requeue", **facts)


def _conclude(
    folder: RunFolder,
    job: Job,
    outcome: Outcome,
    verdict: Verdict,
    say: Callable[[str], None],
    *,
    silent: Sequence[str] = (),
    by: str = "supervisor",
) -> int:
    ledger = verdict.ledger
    excluded = {**(ledger.excluded or {}), **dict.fromkeys(silent, outcome.cause), **job.failed_nodes()}
    again = verdict.again and (verdict.by_slurm or (job.batch and job.requeues))
    values = {"ledger": replace(ledger, excluded=excluded).to_json(), "goes_on": again}
    cause = None if job.stop is None or outcome.status == "finished" else job.stop.cause
    folder.event("job-end", job_id=job.before.job_id, restart=job.restart, again=again, why=verdict.why, cause=cause)
    if folder.gaps is not None:
        say(folder.gaps)
    more = {"job_id": job.before.job_id, "why": verdict.why}
    facts = told(outcome, int(folder.state()["attempt"])) | more
    if outcome.status == "finished":
        folder.set_state(**values)
        say(f"run {folder.run_id} finished")
        end_told(folder, outcome, say, **more)
        return 0
    if outcome.status == "failed":
        say(f"run {folder.run_id} failed with exit code {outcome.code}")
        say(report(outcome, folder))
    if not again:
        folder.set_state(**values)
        resume = f"; go on with: launch resume {folder.path}" if outcome.status == "stopped" else ""
        say(f"run {folder.run_id} {outcome.status} ({verdict.why}){resume}")
        end_told(folder, outcome, say, **more)
        return outcome.code
    folder.set_state(status="stopped", cause=verdict.why, **values)
    if verdict.by_slurm:
        say(f"{verdict.why}: Slurm has put the job back into the queue")
        folder.event("requeued", job_id=job.before.job_id, restart=job.restart, by="Slurm")
        _requeue_told(folder, facts)
        folder.close()
        job.avoid(sorted(excluded))
    elif _mark(folder.path, job, verdict.why, by=by):
        _requeue_told(folder, facts)
        if job.slurm.requeue == "resubmit":
            _resubmit(folder, job, verdict.why, sorted(excluded), say)
        else:
            say(f"{verdict.why}: the job goes back into the queue")
            folder.event("requeued", job_id=job.before.job_id, restart=job.restart, by=by)
            folder.close()  # Slurm may start the job again while a controller that is away is waited for
            try:
                job.requeue(sorted(excluded))
            except ClusterError:
                if folder.state().get("restart") == job.restart:
                    folder.set_state(goes_on=False)
                    end_told(folder, outcome, say, **more)
                raise
    for trouble in folder.notices.wait(_AFTER_REQUEUE_S, record=False):
        say(trouble)
    return outcome.code


def _resubmit(folder: RunFolder, job: Job, why: str, exclude: Sequence[str], say: Callable[[str], None]) -> None:
    """Go on as a new job, which is not held for cred_expire as a requeued one is. submitit is imported here."""
    from launcher.backends.slurm import submit

    options = dict(job.slurm.options)
    if exclude:
        options["exclude"] = ",".join(filter(None, [str(options.get("exclude", "")), *exclude]))
    spec = replace(folder.spec, slurm=replace(job.slurm, options=options))
    job_id = submit(folder.path, spec)
    folder.event("resubmitted", job_id=job_id, after=job.before.job_id, restart=job.restart)
    if (why_not := index.register(folder.path, folder.created, job_id)) is not None:
        say(why_not)
    say(f"{why}: goes on as job {job_id}")


def _mark(folder: Path, job: Job, cause: str, *, by: str) -> bool:
    """Whether this process is the one to requeue this life of the job: the first to make its marker is."""
    # A slurmctld that lost its state gives a number out again; the time of submission keeps the two jobs apart.
    path = folder / f"requeue-{job.job_id}-{job.restart}-{job.before.submit or 0:.0f}.json"
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return False
    with contextlib.suppress(OSError), open(descriptor, "w") as file:  # on a full disk it is a marker without words
        json.dump({"cause": cause, "by": by, "time": time.time()}, file)
    return True


def _inherit(path: Path) -> int:
    """Node 0's agent, after the supervisor was killed: do what that would have done."""
    with RunFolder.open(path, None, wait_s=10) as folder:
        folder.bear(_say)
        state = folder.state()
        job = Job(folder.spec, path)
        stop = job.stop_now(None)
        outcome = Outcome("failed", 1, "the supervisor was killed")
        verdict = decide(outcome, stop, Ledger(**state.get("ledger", {})), job.slurm, failures=0, progress=None,
                         lost={socket.gethostname(): "the supervisor was killed"})  # fmt: skip
        _record(folder, outcome, state["attempt"])
        return _conclude(folder, job, outcome, verdict, _say, by="agent")
