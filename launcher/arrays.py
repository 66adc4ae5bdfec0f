"""The folder of an array: one program, several elements, each a run of its own below.

array.json   the spec that all share, each element's folder and arguments, the jobs that they were submitted as
state.json   which `launch` works on it here, if it runs without a scheduler
code/        the snapshot of the code that all share
<index>/     the run folder of an element, made when it begins
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from launcher.backends.slurm_notation import array_indices
from launcher.errors import RunError
from launcher.runs import RunFolder, read_json, write_json
from launcher.spec import LaunchSpec

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

__all__ = ["Array", "Element", "Submission"]

_VERSION = 1


@dataclass(frozen=True)
class Element:
    """One element: its run folder, and its arguments after those that all share."""

    index: int
    folder: Path
    args: tuple[str, ...]


@dataclass(frozen=True)
class Submission:
    """One array job of Slurm's: its id, the indices that it was submitted with (`0-9%4`), when."""

    job_id: str
    indices: str
    time: float


@dataclass(frozen=True)
class Array:
    """What array.json says. throttle: how many elements run at once; jobs: what it was submitted as, the last last."""

    path: Path
    spec: LaunchSpec
    elements: Mapping[int, Element]
    throttle: int | None
    created: float
    jobs: tuple[Submission, ...] = ()

    @classmethod
    def create(
        cls, path: Path, spec: LaunchSpec, arguments: Mapping[int, tuple[str, ...]], throttle: int | None
    ) -> Array:
        """Make the folder. Raises `RunError` if there is something already: an array goes on with `launch retry`."""
        if path.exists() and any(path.iterdir()):
            raise RunError(f"{path} is not empty; give another --run, or go on with what is there: launch retry {path}")
        elements = {index: Element(index, path / str(index), args) for index, args in arguments.items()}
        array = cls(path, spec, elements, throttle, time.time())
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"the folder {path} cannot be written: {error.strerror}; give one with --run") from error
        array._write()
        return array

    @classmethod
    def read(cls, path: Path) -> Array:
        """The array in `path`. Raises `RunError` if there is none, or of another version."""
        record = read_json(path / "array.json")
        if record is None:
            raise RunError(f"there is no array in {path}")
        if record.get("version") != _VERSION:
            raise RunError(f"{path} was written by another version of launch (format {record.get('version')!r})")
        elements = {
            int(index): Element(int(index), path / one["folder"], tuple(one["args"]))
            for index, one in record["elements"].items()
        }
        spec = LaunchSpec.from_json(record["spec"])
        jobs = tuple(Submission(**job) for job in record["jobs"])
        return cls(path, spec, elements, record["throttle"], record["created"], jobs)

    def _write(self) -> None:
        record: dict[str, Any] = {
            "version": _VERSION,
            "created": self.created,
            "throttle": self.throttle,
            "jobs": [dataclasses.asdict(job) for job in self.jobs],
            "spec": self.spec.to_json(),
            "elements": {
                str(e.index): {"folder": str(e.folder.relative_to(self.path)), "args": list(e.args)}
                for e in self.elements.values()
            },
        }
        write_json(self.path / "array.json", record)

    @property
    def name(self) -> str:
        return self.path.name

    def element(self, index: int) -> Element:
        """Raises `RunError` if there is no such element."""
        try:
            return self.elements[index]
        except KeyError:
            known = ", ".join(map(str, sorted(self.elements)[:20]))
            raise RunError(f"{self.name} has no element {index}; it has {known}") from None

    def spec_of(self, index: int) -> LaunchSpec:
        """What an element runs: the shared program with its arguments, LAUNCH_ARRAY_INDEX and _COUNT told."""
        element = self.element(index)
        program = dataclasses.replace(self.spec.program, args=(*self.spec.program.args, *element.args))
        place = {"LAUNCH_ARRAY_INDEX": str(index), "LAUNCH_ARRAY_COUNT": str(len(self.elements))}
        return dataclasses.replace(self.spec, program=program, environment=self.spec.environment | place)

    def open(self, index: int, *, wait_s: float = 0.0) -> RunFolder:
        """The element's run folder, locked; made if it is not there yet. wait_s: as of `RunFolder.open`."""
        return RunFolder.open(self.element(index).folder, self.spec_of(index), wait_s=wait_s)

    def job_of(self) -> dict[int, Submission]:
        """Element -> what it was submitted as last."""
        return {index: job for job in self.jobs for index in array_indices(job.indices)[0]}

    def with_spec(self, spec: LaunchSpec) -> Array:
        """Record another spec for all elements. To be called under `hold`."""
        array = dataclasses.replace(self, spec=spec)
        array._write()
        return array

    def submitted(self, job_id: str, indices: str) -> Array:
        """Record that elements were submitted as one job. To be called under `hold`."""
        array = dataclasses.replace(self, jobs=(*self.jobs, Submission(job_id, indices, time.time())))
        array._write()
        return array

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Keep every other launch from working on the array as a whole. Raises `RunError` if one does."""
        lock = os.open(self.path / "run.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise RunError(f"array {self.name} is being worked on by another launch; wait, or cancel it") from error
            yield
        finally:
            os.close(lock)
