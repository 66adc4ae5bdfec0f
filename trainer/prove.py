"""Proof that a script resumes exactly: it runs undisturbed, then hurt at random places, and everything is compared.

usage: python -m trainer.prove [--ranks N] [--kills N] [--stops N] [--seed N] [--folder DIR] [--ignore PATTERN]
       script.py [arguments]

Exit codes: 0 every resumed run is the undisturbed one; 1 one is not, or the script itself is not reproducible; 2 wrong
usage, or the undisturbed script fails.
"""

from __future__ import annotations

import argparse
import fnmatch
import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trainer.errors import ConfigError, TrainerError
from trainer.fingerprint import is_result

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["Difference", "Proof", "Trial", "prove_resume"]

# How often a place is drawn again because the run was over before the signal came.
_DRAWS = 5
_CHILD = "import json, sys; from trainer.recorder import run; run(json.loads(sys.argv[1]), sys.argv[2], sys.argv[3:])"

At = tuple[int, int, int, bool]
Events = dict[At, dict[str, str]]


@dataclass(frozen=True)
class Difference:
    """Where a run goes another way than the undisturbed one.

    rank: on which rank. batch: training batches before it. results: what comes out differently there. states: pieces of
    state that differed there or before: the first ones. Without any the cause is unknown.
    """

    rank: int
    batch: int
    results: tuple[str, ...]
    states: tuple[str, ...]

    def __str__(self) -> str:
        where = f"rank {self.rank}, before batch {self.batch}"
        if self.states:
            return f"{where}: the first state that differs is {_listed(self.states)}. Then: {_listed(self.results)}."
        hint = ""
        if self.results and all(name.startswith("batch") for name in self.results):
            hint = (
                " The samples differ: look at the dataset and its transforms. In loader workers they cannot be seen; "
                "with num_workers=0 they can."
            )
        return (
            f"{where}: unknown cause. {_listed(self.results)} differs, and all other state that can be seen was the "
            f"same.{hint} State that cannot be seen: iterators of itertools, extension modules, files, the time, the "
            "environment, kernels that are not deterministic."
        )


@dataclass(frozen=True)
class Trial:
    """One disturbed run. resumed_at: batches before the first one after the resume. failure: why it did not go on.

    lost: state that is not the undisturbed run's at the end, although all that came out is.
    """

    signal: str
    rank: int
    batch: int
    resumed_at: int | None
    difference: Difference | None
    failure: str = ""
    lost: tuple[str, ...] = ()

    @property
    def exact(self) -> bool:
        """Whether all that came out, and all state that can be seen at the end, is the undisturbed run's."""
        return self.difference is None and not self.failure and not self.lost

    def __str__(self) -> str:
        how = f"{self.signal} to rank {self.rank} at batch {self.batch}, resumed at batch {self.resumed_at}"
        if self.lost:
            return (
                f"{how}: the state that a resume loses is {_listed(self.lost)}. Nothing that came out differs; keep it "
                "in a state_dict, or, if nothing depends on it, pass --ignore with its name."
            )
        return f"{how}: {self.failure or self.difference or 'exact'}"


@dataclass(frozen=True)
class Proof:
    """What `prove_resume` has found. irreproducible: where two undisturbed runs differ; then nothing was tried."""

    trials: tuple[Trial, ...]
    irreproducible: Difference | None = None

    @property
    def exact(self) -> bool:
        """Whether the script is reproducible and every disturbed run came out like the undisturbed one."""
        return self.irreproducible is None and bool(self.trials) and all(trial.exact for trial in self.trials)

    def __str__(self) -> str:
        if self.irreproducible is not None:
            return (
                f"Two undisturbed runs differ, so there is nothing to compare a resume with.\n  {self.irreproducible}"
            )
        lines = [f"  {trial}" for trial in self.trials]
        good = sum(trial.exact for trial in self.trials)
        return "\n".join([f"{good} of {len(self.trials)} disturbed runs came out like the undisturbed one.", *lines])


def prove_resume(
    script: str | os.PathLike[str],
    args: Sequence[str] = (),
    *,
    ranks: int = 1,
    kills: int = 3,
    stops: int = 1,
    seed: int = 0,
    folder: str | os.PathLike[str] | None = None,
    ignore: Sequence[str] = (),
    timeout_s: float = 3600.0,
    tell: Callable[[str], None] | None = None,
) -> Proof:
    """Run a script twice undisturbed, then once per kill (SIGKILL) and clean stop (SIGTERM); resume it; compare.

    The script is run as it is, on `ranks` processes of this machine, each time with a run folder of its own under
    `folder` (default: a temporary one), where its Trainer resumes by itself. A script that writes elsewhere should get
    the place as an argument: {run} in an argument becomes the run folder. Before every training batch all state that
    can be seen is hashed: random numbers, batch, model, optimizers, schedulers, callbacks, DataModule, loaders with
    their datasets, logged values, the global variables of the script's modules. ignore: patterns (of shells) of names
    of state on which nothing depends; what comes out is never ignored. The places are drawn from `seed`. tell: called
    with a line whenever a run is over. timeout_s: of one attempt.

    Raises:
        ConfigError: there is no such script, a number is out of range, or the folder is not empty.
        TrainerError: the undisturbed script fails, trains nothing, or is over before every signal.
    """
    path = Path(script)
    if not path.is_file():
        raise ConfigError(f"prove_resume({str(script)!r}): there is no such script.")
    for name, value, least in (
        ("ranks", ranks, 1),
        ("kills", kills, 0),
        ("stops", stops, 0),
        ("kills + stops", kills + stops, 1),
    ):
        if value < least:
            raise ConfigError(f"prove_resume({name}={value}): at least {least}.")
    with tempfile.TemporaryDirectory(prefix="prove-") as temporary:
        job = _Job(path, list(args), ranks, Path(folder or temporary), Path(temporary), tuple(ignore), timeout_s)
        if folder is not None and any(job.folder.glob("*")):
            raise ConfigError(f"prove_resume(folder={str(folder)!r}): the folder is not empty, and runs would go on.")
        return _prove(job, kills, stops, seed, tell or (lambda _: None))


def _prove(job: _Job, kills: int, stops: int, seed: int, tell: Callable[[str], None]) -> Proof:
    choice = random.Random(seed)
    whole = job.undisturbed("undisturbed", seed)
    tell("undisturbed run: done")
    again = job.undisturbed("again", seed)
    tell("undisturbed run, again: done")
    noise: set[str] = set()
    for rank, (one, other) in enumerate(zip(whole, again, strict=True)):
        noise |= {name for at, state in one.items() for name in _differing(state, other.get(at, {}))}
        if found := _compare(rank, one, other, frozenset(), resumed=False):
            return Proof((), found)
    trials = []
    for number, kind in enumerate(["SIGKILL"] * kills + ["SIGTERM"] * stops):
        trials.append(_trial(job, number, kind, choice, whole, frozenset(noise)))
        tell(str(trials[-1]))
    return Proof(tuple(trials))


def _trial(
    job: _Job, number: int, kind: str, choice: random.Random, whole: list[Events], noise: frozenset[str]
) -> Trial:
    last = len(whole[0]) - 1
    for draw in range(_DRAWS):
        # Half of the places by number, half by time: else a validation after a thousand batches is never hit.
        numbers, weights = range(1, last + 1), [1.0] * last if choice.random() < 0.5 else job.pauses
        rank, (event,) = choice.randrange(job.ranks), choice.choices(numbers, weights)
        folder = job.folder / f"trial-{number}-{draw}"
        codes, _ = job.attempt(folder, 0, job.seed, (rank, [kind, event, choice.random() * job.pauses[event - 1]]))
        if any(codes):
            break
    else:
        raise TrainerError(
            f"The script was over before the signal came, {_DRAWS} times: it trains too short to be hurt."
        )
    at = list(whole[0])[event - 1][2]
    saved = (folder / "checkpoints" / "saved.json").exists()
    # A script that goes on must not depend on how it was seeded; one that begins anew may.
    codes, errors = job.attempt(folder, 1, job.seed + 1000 * saved, None)
    if any(codes):
        return Trial(
            kind, rank, at, None, None, f"the resumed run failed with exit code {max(codes, key=abs)}: {errors}"
        )
    begun = None
    lost: dict[str, None] = {}
    for other in range(job.ranks):
        for attempt in (0, 1):
            events = job.record(folder, attempt, other)
            if attempt and events:
                begun = next(iter(events))[2]
            if found := _compare(other, whole[other], events, noise, resumed=attempt > 0):
                return Trial(kind, rank, at, begun, found)
        # Without an event the resumed run found that nothing was left to do: then the last batch was over before.
        end = list(whole[other])[-1 if events else -2]
        if end not in (events or job.record(folder, 0, other)):
            return Trial(kind, rank, at, begun, Difference(other, at, ("the number of batches",), ()))
        if events:
            lost |= dict.fromkeys(n for n in _differing(whole[other][end], events[end]) if n not in noise)
    return Trial(kind, rank, at, begun, None, lost=tuple(lost))


def _compare(rank: int, whole: Events, events: Events, noise: frozenset[str], *, resumed: bool) -> Difference | None:
    """The first place with another result, and what differed of all other state until then: causes first."""
    states: dict[str, None] = {}
    for number, (at, state) in enumerate(events.items()):
        if at not in whole:
            return Difference(rank, at[2], ("the number of batches",), tuple(states))
        differing = [name for name in _differing(whole[at], state) if name not in noise]
        # What a resume has just put back is state, whatever it is; a batch is made from state.
        first = resumed and number == 0
        for name in differing:
            if not is_result(name) or (first and not name.startswith("batch")):
                states.setdefault(name)
        if results := tuple(name for name in differing if is_result(name)):
            return Difference(rank, at[2], results, tuple(sorted(states, key=is_result)))
    return None


def _differing(one: dict[str, str], other: dict[str, str]) -> list[str]:
    return [name for name in {**one, **other} if one.get(name) != other.get(name)]


class _Job:
    """The script, and how its ranks are started."""

    def __init__(
        self,
        script: Path,
        args: list[str],
        ranks: int,
        folder: Path,
        temporary: Path,
        ignore: tuple[str, ...],
        timeout_s: float,
    ) -> None:
        self.script, self.args, self.ranks, self.folder, self.timeout_s = script, args, ranks, folder, timeout_s
        self.ignore, self.seed = ignore, 0
        # Seconds from one event to the next, in the run before.
        self.pauses: list[float] = []
        # What killed processes leave there, such as the sockets of loader workers, goes at the end.
        self.temporary = temporary / "tmp"
        self.temporary.mkdir()

    def record(self, folder: Path, attempt: int, rank: int) -> Events:
        """What a rank saw of an attempt; a line that a kill has cut off is left out."""
        path = folder / f"record-{attempt}-{rank}.jsonl"
        events: Events = {}
        state: dict[str, str] = {}
        for text in path.read_text().splitlines() if path.exists() else []:
            try:
                line: dict[str, Any] = json.loads(text)
            except ValueError:
                break
            news = {name: found for name, found in line["set"].items() if not self._is_ignored(name)}
            state = {n: v for n, v in state.items() if n not in set(line["gone"])} | news
            number, fit, batches, end = line["at"]
            events[number, fit, batches, end] = state
        return events

    def _is_ignored(self, name: str) -> bool:
        return not is_result(name) and any(fnmatch.fnmatchcase(name, pattern) for pattern in self.ignore)

    def undisturbed(self, name: str, seed: int) -> list[Events]:
        """One run from beginning to end; what was recorded, by rank."""
        self.seed = seed
        folder = self.folder / name
        codes, errors = self.attempt(folder, 0, seed, None)
        if any(codes):
            raise TrainerError(f"The undisturbed script failed with exit code {max(codes, key=abs)}: {errors}")
        found = [self.record(folder, 0, rank) for rank in range(self.ranks)]
        if len(found[0]) < 3:
            raise TrainerError(
                "The script trained fewer than two batches with trainer.Trainer: there is nothing to hurt."
            )
        times = [json.loads(line)["time"] for line in (folder / "record-0-0.jsonl").read_text().splitlines()]
        self.pauses = [b - a for a, b in itertools.pairwise(times)]
        return found

    def attempt(
        self, folder: Path, number: int, seed: int, hurt: tuple[int, list[Any]] | None
    ) -> tuple[list[int], str]:
        """Start all ranks and wait; returns their exit codes and the last words of one that failed."""
        folder.mkdir(parents=True, exist_ok=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        processes = []
        try:
            for rank in range(self.ranks):
                plan = {
                    "record": str(folder / f"record-{number}-{rank}.jsonl"), "seed": seed,
                    "hurt": hurt[1] if hurt is not None and hurt[0] == rank else None,
                }  # fmt: skip
                environment = os.environ | {
                    "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(self.ranks),
                    "LOCAL_WORLD_SIZE": str(self.ranks), "GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port), "LAUNCH_RUN_DIR": str(folder.resolve()), "LAUNCH_ATTEMPT": str(number),
                    "TMPDIR": str(self.temporary),
                }  # fmt: skip
                with open(folder / f"output-{number}-{rank}.txt", "w") as output:
                    args = [arg.replace("{run}", str(folder.resolve())) for arg in self.args]
                    command = [sys.executable, "-c", _CHILD, json.dumps(plan), str(self.script), *args]
                    processes.append(subprocess.Popen(
                        command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
                    ))  # fmt: skip
            self._wait(processes)
        finally:
            for process in processes:
                _kill(process)
        codes = [process.returncode for process in processes]
        failed = [rank for rank, code in enumerate(codes) if code not in (0, -signal.SIGKILL)]
        words = (folder / f"output-{number}-{failed[0]}.txt").read_text() if failed else ""
        return codes, "\n".join(words.splitlines()[-20:])

    def _wait(self, processes: list[subprocess.Popen[bytes]]) -> None:
        """Until all have ended, or one was killed: then the others have nobody to go on with."""
        deadline = time.monotonic() + self.timeout_s
        while any(process.poll() is None for process in processes):
            if any(process.returncode not in (None, 0, 75) for process in processes):
                return
            if time.monotonic() > deadline:
                raise TrainerError(f"{self.script} still ran after {self.timeout_s:.0f} s (timeout_s).")
            time.sleep(0.02)


def _kill(process: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def _listed(names: Sequence[str]) -> str:
    """The first few; items of one container are called by its name."""
    stems = [name[: name.rindex("[")] if name.endswith("]") else name for name in names]
    shown = list(dict.fromkeys(s if stems.count(s) > 1 else n for n, s in zip(names, stems, strict=True)))
    more = len(shown) - 5
    return ", ".join(shown[:5]) + (f" and {more} more" if more > 0 else "")


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="launch drill",
        description="Prove that a script resumes exactly: run it undisturbed, then hurt it at random places, resume "
        "it, compare everything, and name the first state that differs.",
    )
    parser.add_argument("--ranks", "--procs", type=int, default=1, help="processes to run it on (1)")
    parser.add_argument("--kills", type=int, default=3, help="runs that are killed (3)")
    parser.add_argument("--stops", type=int, default=1, help="runs that are told to stop (1)")
    parser.add_argument("--seed", type=int, default=0, help="of the places, and of a script that does not seed itself")
    parser.add_argument("--folder", help="keep the runs here (default: a temporary folder)")
    parser.add_argument("--ignore", action="append", default=[], metavar="PATTERN",
                        help="names of state on which nothing depends (may be given again)")  # fmt: skip
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds that one attempt may take (3600)")
    parser.add_argument("script")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its arguments; {run} becomes the run's folder")
    given = parser.parse_args(argv)
    try:
        proof = prove_resume(
            given.script, given.arguments, ranks=given.ranks, kills=given.kills, stops=given.stops, seed=given.seed,
            folder=given.folder, ignore=given.ignore, timeout_s=given.timeout,
            tell=lambda line: click.echo(line, err=True),
        )  # fmt: skip
    except TrainerError as error:
        click.echo(f"launch drill: {error}", err=True)
        return 2
    click.echo(str(proof))
    return 0 if proof.exact else 1


if __name__ == "__main__":
    sys.exit(main())
