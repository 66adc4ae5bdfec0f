"""Whatever the storage does at whichever call: the newest loadable checkpoint is bit-correct, and no acknowledged one
is lost.

Faults are injected at every call index in turn: into the system calls that the local path makes (fail, write half, drop
silently, delay, kill), and into an fsspec file system over memory (drop silently, cut off, delay, answer 500 or 503,
lose the connection). Those of S3 are in test_checkpoint_s3.py.
"""

from __future__ import annotations

import errno
import itertools
import os
import signal
import time
from pathlib import Path

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from tests.soak.table import keep
from trainer.checkpoint import Retention, Store, load_file, save_file
from trainer.checkpoint.saved import After, Entry, SavedList
from trainer.errors import CheckpointError

# Every call in turn takes a minute; every fifth, with another first one for each kind, is for every day.
STRIDES = pytest.mark.parametrize("stride", [5, pytest.param(1, marks=[pytest.mark.soak, pytest.mark.timeout(1500)])])
CALLS = ("open", "write", "fsync", "mkdir", "rename", "replace", "unlink", "remove", "rmdir")


def state(step: int) -> dict:
    return {"w": torch.arange(300_000) * step, "small": {"b": torch.full((3,), float(step))}, "step": step}


def check(loaded: dict) -> int:
    """Which step a loaded state is of; it must be all of that step."""
    step = loaded["step"]
    assert torch.equal(loaded["w"], state(step)["w"])
    assert torch.equal(loaded["small"]["b"], state(step)["small"]["b"])
    return step


class Faults:
    """Counts calls, and misbehaves at one of them."""

    def __init__(self, at: int, what: str) -> None:
        self.at, self.what, self.count = at, what, -1

    def now(self) -> bool:
        self.count += 1
        return self.count == self.at


# ------------------------------------------------------------------------------------- system calls, local files


def patched_calls(monkeypatch, faults: Faults) -> None:
    for name in CALLS:
        original = getattr(os, name)

        def call(*args, _original=original, _name=name, **kwargs):
            if not faults.now():
                return _original(*args, **kwargs)
            if faults.what == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if faults.what == "delay":
                time.sleep(0.005)
                return _original(*args, **kwargs)
            if faults.what == "drop":
                if _name == "open":
                    return _original("/dev/null" if args[1] & os.O_CREAT else args[0], *args[1:], **kwargs)
                return len(args[1]) if _name == "write" else None
            if faults.what == "half" and _name == "write":
                _original(args[0], args[1][: len(args[1]) // 2])
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(os, name, call)


def counted(case: str, stride: int, began: float, tried: int) -> None:
    """Keep a large count in the table."""
    if stride == 1:
        keep("faults of the store", case, time.monotonic() - began, tried=tried)


@STRIDES
@pytest.mark.parametrize(("first", "what"), [(0, "fail"), (1, "half"), (2, "drop"), (3, "delay")])
def test_a_system_call_that_goes_wrong(first, what, stride, tmp_path, monkeypatch):
    began = time.monotonic()
    for at in itertools.count(first % stride, stride):
        url = str(tmp_path / str(at))
        Store(url).save(state(1), step=1)
        faults, acknowledged = Faults(at, what), False
        with monkeypatch.context() as patch:
            patched_calls(patch, faults)
            try:
                Store(url, retention=Retention(last=1)).save(state(2), step=2)
                acknowledged = True
            except CheckpointError:
                pass
        after = Store(url, retention=Retention(last=1))
        assert check(after.load_newest().state) in ((2,) if acknowledged else (1, 2)), at
        after.save(state(3), step=3)
        assert check(after.load_newest().state) == 3
        assert [m.step for m in after.list()] == [3]
        if faults.count < at:
            break
    assert at > 15
    counted(f"file: {what} at every system call of a save", stride, began, at)


@STRIDES
def test_sigkill_at_a_system_call(stride, tmp_path, monkeypatch):
    began = time.monotonic()
    for at in itertools.count(2 % stride, stride):
        url = str(tmp_path / str(at))
        Store(url).save(state(1), step=1)
        store = Store(url, retention=Retention(last=1))
        acknowledged = killed_while(lambda store=store: store.save(state(2), step=2), at, monkeypatch)
        after = Store(url, retention=Retention(last=1))
        assert check(after.load_newest().state) in ((2,) if acknowledged else (1, 2)), at
        after.save(state(3), step=3)
        assert check(after.load_newest().state) == 3
        assert [m.step for m in after.list()] == [3]
        if acknowledged:
            break
    assert at > 15
    counted("file: SIGKILL at every system call of a save", stride, began, at)


def killed_while(act, at: int, monkeypatch) -> bool:
    """Whether something came to its end in a process that is killed at its `at`th call."""
    pid = os.fork()
    if pid == 0:
        try:
            with monkeypatch.context() as patch:
                patched_calls(patch, Faults(at, "kill"))
                act()
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return not os.WIFSIGNALED(status)


def saved_list(folder: Path) -> SavedList:
    return SavedList(folder / "saved.json")


def save_listed(folder: Path, step: int) -> None:
    """What a Trainer on one process does: a file in the place of the one before it, and the list."""
    older = [e.path for e in saved_list(folder).read()]
    path = str(folder / f"step-{step}.ckpt")
    save_file(state(step), path, after=After(saved=saved_list(folder), entry=Entry(path, step), replaced=tuple(older)))


def newest_listed(folder: Path) -> int:
    """Which step the newest listed file is of; every listed file that is there is whole."""
    there = [e for e in saved_list(folder).read() if Path(e.path).exists()]
    return max(check(load_file(e.path)) for e in there)


@STRIDES
@pytest.mark.parametrize(("first", "what"), [(0, "fail"), (1, "half"), (2, "kill"), (3, "drop"), (4, "delay")])
def test_a_listed_file_whatever_a_system_call_does(first, what, stride, tmp_path, monkeypatch):
    began = time.monotonic()
    for at in itertools.count(first % stride, stride):
        folder = tmp_path / str(at)
        save_listed(folder, 1)
        if what == "kill":
            acknowledged = killed_while(lambda folder=folder: save_listed(folder, 2), at, monkeypatch)
            reached = not acknowledged
        else:
            faults, acknowledged = Faults(at, what), False
            with monkeypatch.context() as patch:
                patched_calls(patch, faults)
                try:
                    save_listed(folder, 2)
                    acknowledged = True
                except CheckpointError:
                    pass
            reached = faults.count >= at
        assert newest_listed(folder) in ((2,) if acknowledged else (1, 2)), at
        save_listed(folder, 3)
        assert newest_listed(folder) == 3
        if not reached:
            break
    assert at > 15
    counted(f"one file and its list: {what} at every system call of a save", stride, began, at)


# ------------------------------------------------------------------------------------------ an object store


class FaultyFileSystem(MemoryFileSystem):
    """Memory that misbehaves at one call, as an object store does. An object appears when it is whole."""

    protocol = "faulty"
    cachable = False
    faults = Faults(-1, "")
    store: dict = {}  # noqa: RUF012 - shared by all instances, as MemoryFileSystem's is
    pseudo_dirs = [""]  # noqa: RUF012

    def _fault(self, write: bool) -> str | None:
        if not self.faults.now():
            return None
        if self.faults.what == "connection":
            raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")
        if self.faults.what in ("500", "503"):
            raise OSError({"500": "500 Internal Server Error", "503": "503 Slow Down"}[self.faults.what])
        if self.faults.what == "delay":
            time.sleep(0.005)
        return self.faults.what if write else None

    def pipe_file(self, path, value, mode="overwrite", **kwargs):
        fault = self._fault(write=True)
        if fault == "drop":
            return
        super().pipe_file(path, value[: len(value) // 2] if fault == "cut" else value, mode=mode, **kwargs)

    def _open(self, path, mode="rb", **kwargs):
        fault = self._fault(write="w" in mode)
        file = super()._open(path, mode, **kwargs)
        if fault in ("drop", "cut"):
            write = file.write
            file.write = lambda block: write(block[: len(block) // 2]) if fault == "cut" else len(block)
        return file

    def cat_file(self, path, start=None, end=None, **kwargs):
        self._fault(write=False)
        return super().cat_file(path, start=start, end=end, **kwargs)

    def ls(self, path, detail=True, **kwargs):
        self._fault(write=False)
        return super().ls(path, detail=detail, **kwargs)

    def rm_file(self, path):
        if self._fault(write=True) != "drop":
            super().rm_file(path)

    def makedirs(self, path, exist_ok=False):
        self._fault(write=False)
        super().makedirs(path, exist_ok=exist_ok)


@pytest.fixture
def faulty():
    fsspec.register_implementation("faulty", FaultyFileSystem, clobber=True)
    FaultyFileSystem.faults = Faults(-1, "")
    yield FaultyFileSystem
    FaultyFileSystem.faults = Faults(-1, "")
    FaultyFileSystem.store.clear()


@pytest.mark.filterwarnings("ignore:The manifest of")
@STRIDES
@pytest.mark.parametrize(
    ("first", "what"), [(0, "500"), (1, "503"), (2, "connection"), (3, "drop"), (4, "cut"), (0, "delay")]
)
def test_a_call_of_an_object_store_that_goes_wrong(first, what, stride, faulty):
    began = time.monotonic()
    for at in itertools.count(first % stride, stride):
        url = f"faulty://{what}{at}"
        faulty.faults = Faults(-1, "")
        Store(url).save(state(1), step=1)
        faulty.faults, acknowledged = Faults(at, what), False
        try:
            Store(url).save(state(2), step=2)
            acknowledged = True
        except CheckpointError:
            pass
        reached = faulty.faults.count >= at
        faulty.faults = Faults(-1, "")
        newest = check(Store(url).load_newest().state)
        assert newest == 2 if acknowledged else newest in (1, 2), at
        Store(url).save(state(3), step=3)
        assert check(Store(url).load_newest().state) == 3
        if not reached:
            break
    assert at > 8
    counted(f"memory: {what} at every call of a save", stride, began, at)


def test_a_read_that_fails_is_an_error_and_not_a_damaged_checkpoint(faulty):
    url = "faulty://reading"
    Store(url).save(state(1), step=1)
    Store(url).save(state(2), step=2)
    for at in itertools.count():
        faulty.faults = Faults(at, "503")
        step, error = None, ""
        try:
            step = check(Store(url).load_newest().state)
        except CheckpointError as failure:
            error = str(failure)
        assert step == 2 or "503" in error
        if faulty.faults.count < at:
            break
    assert at > 5
    faulty.faults = Faults(-1, "")
    assert check(Store(url).load_newest().state) == 2
