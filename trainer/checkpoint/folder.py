"""A folder on any fsspec file system, and the few ways in which this package touches one.

Torch-free: the writer's process imports it.
"""

from __future__ import annotations

import errno
import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.spec import AbstractBufferedFile

from trainer.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from datetime import datetime

    from trainer.checkpoint.manifest import Stretch

# Bytes after which the disk is told to start.
_START_WRITING = 16 << 20


@dataclass(frozen=True)
class Folder:
    """A place on a file system: `path` is spelled as that file system wants it, without the protocol."""

    fs: Any
    path: str

    @classmethod
    def at(cls, url: str | os.PathLike[str]) -> Folder:
        """The folder at a path or fsspec URL; it need not exist.

        Raises:
            CheckpointError: fsspec does not know the protocol, or the package that serves it is not installed.
        """
        try:
            fs, path = fsspec.core.url_to_fs(os.fspath(url))
        except (ValueError, ImportError) as error:
            raise CheckpointError(
                f"{os.fspath(url)} is neither a path nor a URL that fsspec can open: {error}"
            ) from error
        return cls(fs, path.rstrip("/") or "/")

    @classmethod
    def from_json(cls, text: str) -> Folder:
        """The folder that `to_json` described, in another process."""
        described = json.loads(text)
        return cls(fsspec.AbstractFileSystem.from_json(described["fs"]), described["path"])

    def to_json(self) -> str:
        """A description from which another process makes the same folder."""
        return json.dumps({"fs": self.fs.to_json(), "path": self.path})

    def __truediv__(self, name: str) -> Folder:
        return Folder(self.fs, f"{self.path.rstrip('/')}/{name}")

    def __str__(self) -> str:
        return self.path if self.local else str(self.fs.unstrip_protocol(self.path))

    @cached_property
    def local(self) -> bool:
        """Whether files can be opened by their path."""
        return isinstance(self.fs, LocalFileSystem)

    @property
    def in_this_process(self) -> bool:
        """Whether no other process can reach it: memory://."""
        return isinstance(self.fs, MemoryFileSystem)

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rpartition("/")[2]

    @property
    def parent(self) -> Folder:
        """The folder around this one."""
        return Folder(self.fs, self.path.rpartition("/")[0] or "/")

    def make(self) -> None:
        """Create the folder and those around it, where the file system has folders."""
        if not self.local:
            self.fs.makedirs(self.path, exist_ok=True)
            return
        path = Path(self.path)
        missing = [folder for folder in (path, *path.parents) if not folder.is_dir()]
        path.mkdir(parents=True, exist_ok=True)
        for made in missing:
            # The entry of a new folder is in the folder around it, and is lost with the power unless that is synced.
            _sync_folder(str(made.parent))

    def sizes(self) -> dict[str, int]:
        """The files of this folder with their sizes, and its folders with -1; empty if there is no such folder."""
        self.fs.invalidate_cache(self.path)
        try:
            entries = self.fs.ls(self.path, detail=True)
        except FileNotFoundError:
            return {}
        except NotADirectoryError:
            return {}
        found = {}
        for entry in entries:
            name = entry["name"].rstrip("/").rpartition("/")[2]
            # Some object stores list the folder itself among its entries, and `ls` of a file lists that file.
            if entry["name"].rstrip("/") != self.path.rstrip("/"):
                found[name] = int(entry["size"] or 0) if entry["type"] == "file" else -1
        return found

    def modified(self, name: str) -> datetime:
        """When a file was written, in local time."""
        written: datetime = self.fs.modified(f"{self.path}/{name}")
        return written.astimezone()

    def read(self, name: str) -> bytes:
        """The content of a small file. Raises FileNotFoundError."""
        if self.local:
            with open(f"{self.path}/{name}", "rb") as file:
                return file.read()
        return bytes(self.fs.cat_file(f"{self.path}/{name}"))

    def write_blocks(self, name: str, blocks: Iterable[memoryview]) -> int:
        """Write a new file and make it durable; returns its size. It must not exist.

        Raises:
            OSError: it failed, or the file is shorter than what was written. What is left is not whole.
        """
        path = f"{self.path}/{name}"
        if not self.local:
            return self._stream(path, blocks)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            written = started = 0
            for block in blocks:
                _write_all(descriptor, block)
                written += len(block)
                if written - started >= _START_WRITING:
                    # Starts the disk on what is in the cache, so that little is left for fsync.
                    os.posix_fadvise(descriptor, started, written - started, os.POSIX_FADV_DONTNEED)
                    started = written
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        _check_size(path, written)
        return written

    def replace_blocks(
        self, name: str, blocks: Iterable[memoryview], check: Callable[[str], object] | None = None
    ) -> None:
        """Write a file that is there whole, or as it was before, and make it and its entry durable.

        check: called with the name of what was written before that takes the place of what was there, where there is
        such a moment (on a local disk), else after it; it may raise.
        """
        if not self.local:
            self._stream(f"{self.path}/{name}", blocks)
            if check is not None:
                check(name)
            return
        part = f".{name}.{os.getpid()}.part"
        self.remove(part)  # of a process that died and had our number
        try:
            size = self.write_blocks(part, blocks)
            if check is not None:
                check(part)
            Path(f"{self.path}/{part}").replace(f"{self.path}/{name}")
            if Path(f"{self.path}/{part}").exists():
                raise OSError(errno.EIO, "The file system did not rename", f"{self.path}/{part}")
        except BaseException:
            self.remove(part)
            raise
        _sync_folder(self.path)
        _check_size(f"{self.path}/{name}", size)

    def write_whole(self, name: str, content: bytes) -> None:
        """Write a small file that is there whole, or as it was before, and make it and its entry durable."""
        if self.local:
            self.replace_blocks(name, [memoryview(content)])
        else:
            self.fs.pipe_file(f"{self.path}/{name}", content)

    @property
    def s3(self) -> bool:
        """Whether it is S3: several files are written side by side."""
        return hasattr(self.fs, "_call_s3")

    def upload(self, stretches: Sequence[Stretch], descriptor: int) -> bool:
        """Write files, elsewhere than on a local disk, from an open file of this process: side by side.

        Returns whether the store has compared all that it got with our checksums.
        """
        if self.s3:
            from trainer.checkpoint.upload import upload

            return upload(self.fs, self.path, stretches, descriptor)
        (whole,) = stretches
        self.fs.put_file(f"/proc/self/fd/{descriptor}", f"{self.path}/{whole.name}")
        return False

    def duplicate(self, name: str, target: Folder) -> None:
        """Give a file of this folder a second name, which is there whole, or as it was before."""
        if not self.local:
            self.fs.copy(f"{self.path}/{name}", target.path)
            return
        temporary = Path(f"{target.parent.path}/.{target.name}.{os.getpid()}.part")
        temporary.unlink(missing_ok=True)
        try:
            temporary.hardlink_to(f"{self.path}/{name}")
        except OSError:  # another file system, or one without hard links
            with open(f"{self.path}/{name}", "rb") as file:
                target.parent.replace_blocks(
                    target.name, (memoryview(b) for b in iter(lambda: file.read(1 << 20), b""))
                )
            return
        temporary.replace(target.path)
        _sync_folder(target.parent.path)

    def _stream(self, path: str, blocks: Iterable[memoryview]) -> int:
        file = self.fs.open(path, "wb")
        written = 0
        try:
            for block in blocks:
                file.write(block)
                written += len(block)
        except BaseException:
            if isinstance(file, AbstractBufferedFile):
                # Closing it, which its finaliser does too, would make an object of the part that was written.
                file.discard()
                file.closed = True
            raise
        file.close()
        return written

    def remove(self, name: str) -> None:
        """Remove one file of this folder; it may be gone already."""
        try:
            self.fs.rm_file(f"{self.path}/{name}")
        except FileNotFoundError:
            return

    def remove_all(self) -> None:
        """Remove this folder with all that is in it; it may be gone already."""
        try:
            self.fs.rm(self.path, recursive=True)
        except FileNotFoundError:
            return
        finally:
            self.fs.invalidate_cache(self.path)


def _write_all(descriptor: int, block: memoryview) -> None:
    while block:
        block = block[os.write(descriptor, block) :]


def _check_size(path: str, written: int) -> None:
    size = Path(path).stat().st_size
    if size != written:
        raise OSError(errno.EIO, f"{written} bytes were written, {size} are there", path)


def _sync_folder(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
