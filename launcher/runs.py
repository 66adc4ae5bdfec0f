"""The run folder and its records: what a launch leaves for people, for `trainer`, and for the next launch of the run.

run.json                the spec, who made it, when
state.json              running | finished | failed | stopped, the last attempt, exit code (replaced atomically)
events.jsonl            one line per thing that happened, appended
failure.json            the first failure of the last failed attempt
stop-<attempt>.json     cause and deadline of a stop request, written before the ranks are told
logs/attempt-<n>/rank-<r>.log   everything that rank printed
stacks/attempt-<n>-<time>/      where all ranks were, after a hang or when somebody asked
run.lock                held while a launch works on the run
"""

from __future__ import annotations

import fcntl
import getpass
import json
import os
import secrets
import socket
import time
from typing import TYPE_CHECKING, Any

from launcher.errors import RunError, UsageError
from launcher.spec import RUN_NAME, LaunchSpec

if TYPE_CHECKING:
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

    @property
    def run_id(self) -> str:
        return self.path.name

    @classmethod
    def open(cls, path: Path, spec: LaunchSpec | None, *, wait_s: float = 0.0) -> RunFolder:
        """Create the run, or take an existing one up again; one that another launch holds is awaited for `wait_s`.

        With `spec=None` the run must exist and its own spec is used (`launch resume`). Raises `RunError` if another
        launch holds it, if the folder holds something else, or if it is a run of another program.
        """
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
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"pid {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        created = record["created"] if record else time.time()
        folder = cls(path, spec, lock, created)
        if record is None or record["spec"] != spec.to_json():
            folder._write_record()
        return folder

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
        return read_json(self.path / "state.json") or {"status": "new", "attempt": -1}

    def set_state(self, **values: Any) -> None:
        write_json(self.path / "state.json", self.state() | values | {"updated": time.time()})

    def event(self, what: str, **values: Any) -> None:
        line = json.dumps({"time": time.time(), "event": what} | values, separators=(",", ":"))
        with open(self.path / "events.jsonl", "a") as file:
            file.write(line + "\n")

    def write_stop(self, attempt: int, cause: str, deadline: float | None) -> None:
        """Tell the ranks why and until when, before any of them gets SIGTERM."""
        write_json(
            self.path / f"stop-{attempt}.json",
            {"cause": cause, "deadline": deadline, "requested": time.time(), "attempt": attempt},
        )

    def write_stacks(self, name: str, data: dict[str, Any]) -> None:
        """Where all ranks were at one time; the nodes have put the whole of it beside."""
        folder = self.path / "stacks" / name
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_json(folder / "groups.json", data)

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
