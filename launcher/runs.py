"""The run folder and its records: what a launch leaves for people, for `trainer`, and for the next launch of the run.

run.json                the spec, who made it, when
state.json              running | finished | failed | stopped, the last attempt, exit code (replaced atomically)
events.jsonl            one line per thing that happened, appended
failure.json            the first failure of the last failed attempt
stop-<attempt>.json     cause and deadline of a stop request, written before the ranks are told
logs/attempt-<n>/rank-<r>.log   everything that rank printed
surroundings-<attempt>.json     interpreter, packages, machine and code of each launch; its edits: surroundings-*.diff
samples.jsonl           what the ranks took over time: steps, memory, saves; bounded
notify.log              what the command of --notify printed
stacks/attempt-<n>-<time>/      where all ranks were, after a hang or when somebody asked
run.lock                held while a launch works on the run
"""

from __future__ import annotations

import contextlib
import fcntl
import getpass
import json
import os
import secrets
import socket
import time
from typing import TYPE_CHECKING, Any

from launcher.errors import RunError, UsageError
from launcher.notices import Notices
from launcher.spec import RUN_NAME, LaunchSpec

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from types import TracebackType

    from launcher.spec import Program

__all__ = ["RunFolder", "default_root", "new_name", "resolve"]

_VERSION = 1


def default_root(cwd: Path) -> Path:
    """Where runs without a folder of their own go."""
    return cwd / "runs"


def new_name(program: Program) -> str:
    """A name that sorts by time and does not collide: stem, local time, four random hex digits."""
    return f"{program.stem[:80]}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def resolve(name: str, cwd: Path) -> Path:
    """The folder that `--run NAME|DIR` means: anything with a slash is a folder, else a name below `runs/`."""
    if "/" in name or name in (".", ".."):
        return (cwd / name).resolve()
    if not RUN_NAME.fullmatch(name):
        raise UsageError(
            f"--run {name!r}: a name has letters, digits, '.', '_', '-' and at most 128 of them; "
            "a folder is written with a slash"
        )
    return default_root(cwd) / name


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Replace `path` by `data`: whole or not at all, also for a reader on another host."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w") as file:
            json.dump(data, file, indent=1)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _append(path: Path, data: bytes) -> None:
    """All of it, or nothing where there is no room for all."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        size = os.fstat(descriptor).st_size
        try:
            while data:
                data = data[os.write(descriptor, data) :]
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, size)
            raise
    finally:
        os.close(descriptor)


def read_json(path: Path) -> dict[str, Any] | None:
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise RunError(f"{path} holds no record")
    return data


def _lock(descriptor: int, wait_s: float) -> None:
    deadline = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise
        time.sleep(0.2)


class RunFolder:
    """An open run folder, locked against a second launch until it is closed."""

    def __init__(self, path: Path, spec: LaunchSpec, lock: int, created: float) -> None:
        self.path = path
        self.spec = spec
        self.created = created
        self._lock = lock
        self.notices = Notices(self)
        self._say: Callable[[str], None] | None = None
        self._said = False
        self._lost: dict[str, str] = {}  # files that could not be written, and why
        self._state: dict[str, Any] = {}  # not yet written
        self._events: list[str] = []  # not yet written

    @property
    def run_id(self) -> str:
        return self.path.name

    @classmethod
    def open(cls, path: Path, spec: LaunchSpec | None, *, wait_s: float = 0.0) -> RunFolder:
        """Create the run, or take an existing one up again; one that another launch holds is awaited for `wait_s`.

        With `spec=None` the run must exist and its own spec is used (`launch resume`). Raises `RunError` if another
        launch holds it, if the folder holds something else, or if it is a run of another program.
        """
        if path.exists() and not path.is_dir():
            raise RunError(f"{path} is a file, no run folder; choose another --run name or folder")
        record = read_json(path / "run.json")
        if record is None:
            if spec is None:
                raise RunError(f"there is no run in {path}: nothing to resume")
            if path.exists() and any(p.name != "run.lock" for p in path.iterdir()):
                raise RunError(f"{path} exists and is not a run folder; choose another --run name or an empty folder")
        else:
            if record.get("version") != _VERSION:
                raise RunError(f"{path} was written by another version of launch (format {record.get('version')!r})")
            known = LaunchSpec.from_json(record["spec"])
            if spec is None:
                spec = known
            elif (spec.program.kind, spec.program.target, spec.cwd) != (
                known.program.kind, known.program.target, known.cwd,
            ):  # fmt: skip
                raise RunError(
                    f"{path} is a run of {known.program.target} in {known.cwd}, not of {spec.program.target} "
                    f"in {spec.cwd}; choose another --run name"
                )
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = os.open(path / "run.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise RunError(f"the run folder {path} cannot be written: {error.strerror}; give one with --run") from error
        try:
            _lock(lock, wait_s)
        except OSError as error:
            holder = os.pread(lock, 200, 0).decode(errors="replace").strip() or "another launch"
            os.close(lock)
            raise RunError(f"run {path.name} is being worked on by {holder}; wait for it, or cancel it") from error
        created = record["created"] if record else time.time()
        folder = cls(path, spec, lock, created)
        try:
            os.ftruncate(lock, 0)
            os.pwrite(lock, f"pid {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
            if record is None or record["spec"] != spec.to_json():
                folder._write_record()
        except OSError as error:
            folder.close()
            raise RunError(
                f"the run folder {path} cannot be written: {error.strerror}; make room, or give another with --run"
            ) from error
        return folder

    def bear(self, say: Callable[[str], None]) -> None:
        """From here on the run is worth more than its record: where that cannot be written, a person is told so once,
        what was to be written is kept, and it is written with whatever comes next, if there is room again.
        """
        self._say = say

    @property
    def gaps(self) -> str | None:
        """What the record lacks, as a sentence; None if it is complete."""
        if not self._lost:
            return None
        (why, *_) = self._lost.values()
        return f"the record of this run is incomplete: {', '.join(self._lost)} could not be written ({why})"

    def keep(self, name: str, write: Callable[[], None]) -> None:
        """Write one of the run's files. A failure is raised before the run begins, and borne with then."""
        try:
            write()
        except (OSError, RunError) as error:
            if self._say is None:
                raise
            self._lost[name] = (error.strerror if isinstance(error, OSError) else None) or str(error)
            if not self._said:
                self._said = True
                self._say(
                    f"{self.path / name} cannot be written: {self._lost[name]}. The run goes on, and its record will "
                    "have gaps if no room is made"
                )
        else:
            self._lost.pop(name, None)

    def change_spec(self, spec: LaunchSpec) -> None:
        """Record another spec for this run, from here on."""
        self.spec = spec
        self._write_record()

    def _write_record(self) -> None:
        try:
            user = getpass.getuser()
        except (KeyError, OSError):
            user = str(os.getuid())
        write_json(
            self.path / "run.json",
            {
                "version": _VERSION,
                "run_id": self.run_id,
                "created": self.created,
                "host": socket.gethostname(),
                "user": user,
                "spec": self.spec.to_json(),
            },
        )

    def state(self) -> dict[str, Any]:
        return (read_json(self.path / "state.json") or {"status": "new", "attempt": -1}) | self._state

    def set_state(self, **values: Any) -> None:
        self._state |= values | {"updated": time.time()}

        def write() -> None:
            write_json(self.path / "state.json", self.state())
            self._state = {}

        self.keep("state.json", write)

    def event(self, what: str, **values: Any) -> None:
        self._events.append(json.dumps({"time": time.time(), "event": what} | values, separators=(",", ":")) + "\n")

        def write() -> None:
            _append(self.path / "events.jsonl", "".join(self._events).encode())
            self._events = []

        self.keep("events.jsonl", write)

    def write(self, name: str, data: dict[str, Any]) -> None:
        """One of the files that are written as a whole, and its folder."""
        path = self.path / name

        def write() -> None:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_json(path, data)

        self.keep(name, write)

    def write_stop(self, attempt: int, cause: str, deadline: float | None) -> None:
        """Tell the ranks why and until when, before any of them gets SIGTERM."""
        self.write(
            f"stop-{attempt}.json",
            {"cause": cause, "deadline": deadline, "requested": time.time(), "attempt": attempt},
        )

    def logs(self, attempt: int) -> Path:
        folder = self.path / "logs" / f"attempt-{attempt}"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return folder

    def close(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
