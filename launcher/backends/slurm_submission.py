"""Submission and jobs through submitit, with a batch script and a knowledge of states of our own.

submitit's executor starts its function by srun, signals it by a time fixed at submission, and knows states by sacct
alone. Here the batch script becomes the launcher's own supervisor, and states come from whatever source answers.
Importing this module imports submitit (0.06 s): to be imported where a job is submitted or waited for, and only there.
"""

from __future__ import annotations

import os
import re
import shutil
import time
import uuid
from typing import TYPE_CHECKING, Any

from submitit.core import core
from submitit.slurm import slurm

from launcher.backends import slurm_notation as notation
from launcher.backends.slurm_records import SACCT, SQUEUE, JobRecord, merge, query_environment, read_sacct, read_squeue
from launcher.backends.slurm_script import batch_script, submission_environment
from launcher.backends.slurm_tools import AwayError, ask, call
from launcher.errors import ClusterError, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from submitit.core.utils import DelayedSubmission

    from launcher.backends.slurm_script import Value

__all__ = ["BatchExecutor", "BatchJob", "States"]

# submitit replaces the first four wherever they stand; a backslash makes Slurm replace nothing at all.
_MARKS = ("%j", "%t", "%A", "%a", "\\")


class States(slurm.SlurmInfoWatcher):
    """The states of many jobs by one squeue and, for those that the controller forgot, one sacct."""

    def __init__(self, delay_s: int = 30) -> None:
        super().__init__(delay_s)
        self._records: dict[str, JobRecord] = {}

    def update(self) -> None:
        """Ask now. A source that does not answer is left out; while none does, the last states stand."""
        asked = sorted(self._registered - self._finished)
        if not asked:
            return
        self._num_calls += 1
        environ = query_environment(os.environ)
        accounting = _answer(lambda: read_sacct(ask(*SACCT, "-j", _main_ids(asked), environ=environ)))
        # After accounting: a job that was submitted in between would look lost otherwise.
        controller = _answer(lambda: read_squeue(ask(*SQUEUE, "--user", str(os.getuid()), environ=environ)))
        if accounting is not None or controller is not None:
            for job_id in asked:
                submitted = JobRecord(job_id=job_id, raw_id=job_id, state="PENDING", source="submission")
                record = merge(job_id, controller=controller, accounting=accounting, own=submitted)
                self._records[job_id] = record
                self._info_dict[job_id] = _as_info(record)
        self._last_status_check = time.time()
        self._finished |= {job_id for job_id in asked if self.is_done(job_id, mode="cache")}

    def get_state(self, job_id: str, mode: str = "standard") -> str:
        return self.get_info(job_id, mode=mode).get("State", "UNKNOWN")

    def is_done(self, job_id: str, mode: str = "standard") -> bool:
        """Whether the job will not run any more. A requeued one will; a lost one will not."""
        self.get_info(job_id, mode=mode)
        record = self._records.get(job_id)
        return record is not None and (record.over or record.state == "LOST")

    def record(self, job_id: str, mode: str = "standard") -> JobRecord | None:
        """All that is known of a job; None as long as no source has answered."""
        self.get_info(job_id, mode=mode)
        return self._records.get(job_id)


def _answer(read: Any) -> Any:
    try:
        return read()
    except ClusterError:
        return None


def _main_ids(job_ids: Sequence[str]) -> str:
    # One id for a whole array: asking for each element is slow and outgrows the command line.
    return ",".join(dict.fromkeys(job_id.split("_")[0] for job_id in job_ids))


def _as_info(record: JobRecord) -> dict[str, str]:
    """The record under the names that submitit's users know from sacct."""
    info = {"JobID": record.job_id, "State": record.state, "NodeList": ",".join(record.nodes)}
    if record.exit_code is not None:
        info["ExitCode"] = f"{record.exit_code}:{record.signal or 0}"
    return info


class BatchJob(slurm.SlurmJob[core.R]):
    """submitit's job, whose state is known with and without accounting."""

    watcher = States()


class BatchExecutor(slurm.SlurmExecutor):
    """Submits batch scripts that become `command`.

    folder: shared by all nodes; submitit's files go there (`%j_submission.sh`, `%j_submitted.pkl`, `%j_0_log.out`,
    `%j_<rank>_result.pkl`), and it names the job unless `options` does. options: sbatch's, by their long names.
    environment: exported in the script. setup: shell lines before the command. environ: of the person who submits;
    what describes an outer job is taken out. throttle: how many elements of `map_array` run at once.

    `submit` and `map_array` also leave the pickled call as `%j_submitted.pkl` for the command to find by
    SLURM_ARRAY_JOB_ID and SLURM_ARRAY_TASK_ID or SLURM_JOB_ID. It is there a moment after sbatch returns, so the
    command waits for it. `submit_batch` leaves none.
    """

    job_class = BatchJob

    def __init__(
        self,
        folder: Path,
        command: Sequence[str],
        *,
        options: Mapping[str, Value],
        environment: Mapping[str, str] | None = None,
        setup: Sequence[str] = (),
        environ: Mapping[str, str] | None = None,
        throttle: int | None = None,
    ) -> None:
        for program in ("sbatch", "srun"):
            if shutil.which(program) is None:
                raise UsageError(f"there is no {program} on PATH; submit from a login node, or run with --nodes 1 here")
        if any(mark in str(folder) for mark in _MARKS):
            raise UsageError(
                f"{folder} has one of {' '.join(_MARKS)} in its path, which Slurm or submitit would replace"
            )
        super().__init__(folder)
        self._command = tuple(command)
        self._options = dict(options)
        self._job_environment = dict(environment or {})
        self._setup = tuple(setup)
        self._environ = dict(os.environ if environ is None else environ)
        self._throttled = throttle

    # ------------------------------------------------------------------------------------------ what is sent

    def script(self, array: str | None = None) -> str:
        """The exact text that is sent to sbatch; `array` like `0-9%4`."""
        # One file for the job's own words; `%` in a folder's name would be a pattern to Slurm.
        folder = str(self.folder).replace("%", "%%")
        output = f"{folder}/{'%j' if array is None else '%A_%a'}_0_log.out"
        options: dict[str, Value] = {"job-name": self.folder.name, "output": output, "open-mode": "append"}
        if "no-requeue" not in self._options:
            options["requeue"] = True
        options |= self._options
        if array is not None:
            options["array"] = array
        return batch_script(options, self._command, environment=self._job_environment, setup=self._setup)

    def submission_environment(self) -> dict[str, str]:
        """What sbatch is started with, and by its default the job too."""
        return submission_environment(self._environ, self._options)

    def test(self, array: str | None = None) -> str:
        """Have Slurm check the script without submitting it: its words on when and where the job would start."""
        try:
            done = call(["sbatch", "--test-only"], self.submission_environment(), os.fsencode(self.script(array)))
        except AwayError:
            raise
        except ClusterError as error:
            raise ClusterError(
                f"{error}\nNothing was submitted. sinfo -o '%P %l %D %c %m %G' lists the partitions: time limit, "
                "nodes, and CPUs, memory and GPUs of each node"
            ) from error
        return done.stderr.decode(errors="replace").replace("sbatch: ", "").strip()

    # ------------------------------------------------------------------------------------------ submitting

    def submit_batch(self, array: str | None = None) -> list[BatchJob[Any]]:
        """Submit `command` as one job, or one per index of `array`; the jobs in the order of the indices."""
        if array is None:
            return [self._send(None)]
        indices, _ = notation.array_indices(array)
        first = self._send(array)
        return [BatchJob(self.folder, f"{first.job_id}_{index}") for index in indices]

    def _internal_process_submissions(self, delayed_submissions: list[DelayedSubmission]) -> list[core.Job[Any]]:
        self.folder.mkdir(parents=True, exist_ok=True)
        pickles = [self.folder / f"{uuid.uuid4().hex}.pkl" for _ in delayed_submissions]
        throttle = "" if self._throttled is None else f"%{self._throttled}"
        array = None if len(pickles) == 1 else f"0-{len(pickles) - 1}{throttle}"
        try:
            for delayed, path in zip(delayed_submissions, pickles, strict=True):
                delayed.dump(path)
            jobs = self.submit_batch(array)
        except BaseException:
            for path in pickles:
                path.unlink(missing_ok=True)
            raise
        for job, path in zip(jobs, pickles, strict=True):
            job.paths.move_temporary_file(path, "submitted_pickle")
        return list(jobs)

    def _send(self, array: str | None) -> BatchJob[Any]:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f".submission-{uuid.uuid4().hex}.sh"
        path.write_bytes(os.fsencode(self.script(array)))
        try:
            said = ask("sbatch", "--parsable", str(path), environ=self.submission_environment())
            job_id = self._get_job_id_from_submission_command(said)
        except BaseException:
            path.unlink()
            raise
        job: BatchJob[Any] = BatchJob(self.folder, job_id)
        job.paths.move_temporary_file(path, "submission_file")
        return job

    @staticmethod
    def _get_job_id_from_submission_command(string: str | bytes) -> str:
        text = string if isinstance(string, str) else string.decode(errors="replace")
        # `12`, or `12;cluster`; a site's plugin may print before it.
        match = re.fullmatch(r"(\d+)(;\S+)?", (text.strip().splitlines() or [""])[-1])
        if match is None:
            raise ClusterError(f"sbatch answered {text!r}, which has no job id; look for the job with squeue --me")
        return match[1]
