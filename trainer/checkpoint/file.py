"""A checkpoint as one torch file: written whole or not at all, read without running code from it."""

from __future__ import annotations

import errno
import io
import mmap
import os
import pickle
import tempfile
import time
from typing import TYPE_CHECKING, Any

import torch
import torch.utils.serialization

from trainer.checkpoint import catalog
from trainer.checkpoint.background import Alone, Background, Saved
from trainer.checkpoint.folder import Folder
from trainer.checkpoint.job import FileJob
from trainer.checkpoint.saved import After
from trainer.checkpoint.seal import COMMENT_LENGTH, verify_file
from trainer.checkpoint.values import encode, is_dtensor
from trainer.checkpoint.writing import blocks_of
from trainer.errors import CheckpointDamagedError, CheckpointError, CheckpointNotFoundError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from trainer.checkpoint.snapshot import Snapshot


def save_file(
    state: Mapping[str, Any],
    path: str | os.PathLike[str],
    *,
    step: int = 0,
    background: Background | None = None,
    after: After | None = None,
    wait: bool = True,
) -> Saved:
    """Write one torch file to a path or fsspec URL; `torch.load(path, weights_only=True)` opens it.

    A file that is there is replaced when the new one is durable. At its end stands a checksum of all of it, which
    `load_file` verifies. background: with wait=False the file is written beside the training, see `Background`, whose
    `wait` tells when it is durable. after: what follows then.

    Raises:
        CheckpointError: the state holds a value that is not plain (see `Store.save`), or a sharded tensor.
        CheckpointWriteError: the file system failed in this save, or in that which `background` was at.
    """
    if background is None:
        background = Background(Alone())
        try:
            return save_file(state, path, step=step, background=background, after=after)
        finally:
            background.close()
    began = time.monotonic()
    background.wait()
    _, tensors = encode(state)
    sharded = next((key for key, tensor in tensors.items() if is_dtensor(tensor)), None)
    if sharded is not None:
        raise CheckpointError(f"{sharded} is sharded over ranks; a single file holds whole tensors. Save to a Store.")
    target = Folder.at(path)
    content = _TorchFile(dict(state), on_cuda=any(tensor.is_cuda for tensor in tensors.values()))
    task = FileJob(target.parent, target.name, content.bytes, after or After())
    saved = Saved(str(target), target.name, step, 0.0)
    saved = background.begin(task, content, saved, began, target.parent)
    return background.finish(saved, began) if wait else saved


class _TorchFile:
    """A state as the file that torch.save makes of it, without the seal."""

    def __init__(self, state: dict[str, Any], *, on_cuda: bool) -> None:
        self._state = state
        self._on_cuda = on_cuda
        probe = _Sink(None)
        with torch.serialization.skip_data():
            self._save(probe)
        self.bytes = probe.position

    def fill(self, snapshot: Snapshot) -> None:
        """Copy the file into memory: one pass over the state, 0.10 s per GiB, as long as a plain copy takes."""
        target = snapshot.reserve(self.bytes, pinned=False)
        self._save_into(memoryview(target.numpy()))  # type: ignore[arg-type]

    def blocks(self) -> Iterator[memoryview]:
        """The file, by way of the disk: torch.save can only push its bytes."""
        with tempfile.TemporaryFile() as file:
            file.truncate(self.bytes)
            # Not closed by hand: whoever writes may hold the last block a moment longer.
            content = memoryview(mmap.mmap(file.fileno(), self.bytes))
            self._save_into(content)
            yield from blocks_of(content)

    def _save_into(self, target: memoryview) -> None:
        self._save(_Sink(target))
        # Says that a comment follows the archive: the seal.
        target[-len(COMMENT_LENGTH) :] = COMMENT_LENGTH

    def _save(self, sink: _Sink) -> None:
        settings = torch.utils.serialization.config.save
        before = torch.serialization.get_crc32_options(), settings.use_pinned_memory_for_d2h
        # Nothing reads zip's own checksums (torch.load does not), and they take 0.25 s per GiB of the training's time.
        torch.serialization.set_crc32_options(False)
        settings.use_pinned_memory_for_d2h = self._on_cuda
        try:
            torch.save(self._state, sink)  # type: ignore[arg-type]
        finally:
            torch.serialization.set_crc32_options(before[0])
            settings.use_pinned_memory_for_d2h = before[1]


class _Sink:
    """A file for torch.save: memory, or (None) only the count of what would be written."""

    def __init__(self, target: memoryview | None) -> None:
        self._target = target
        self.position = 0

    def write(self, content: memoryview | bytes) -> int:
        """Take the bytes in."""
        end = self.position + len(content)
        if self._target is not None:
            self._target[self.position : end] = content
        self.position = end
        return len(content)

    def seek(self, offset: int, whence: int) -> int:
        """Pass over data that torch was told to skip."""
        assert whence == os.SEEK_CUR
        self.position += offset
        return self.position

    def flush(self) -> None:
        """Nothing is held back."""


def load_file(path: str | os.PathLike[str], *, map_location: Any = "cpu", weights_only: bool = True) -> dict[str, Any]:
    """Read a torch file that we or Lightning wrote. weights_only=False runs code from the file: only for your own.

    Raises:
        CheckpointNotFoundError: it is not there.
        CheckpointDamagedError: it is not a whole torch file, or not what we wrote.
        CheckpointError: it holds more than tensors and plain values.
    """
    place = Folder.at(path)
    try:
        _, fetched = verify_file(place)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise CheckpointNotFoundError(f"There is no file {place}.") from error
    source: Any = place.path if fetched is None else io.BytesIO(fetched)
    try:
        state = torch.load(source, map_location=map_location, weights_only=weights_only)
    except pickle.UnpicklingError as error:
        if not _pickled(place):
            raise CheckpointDamagedError(f"{place} is not a torch file.") from error
        raise CheckpointError(
            f"{place} holds more than tensors and plain values, so reading it would run code from it: {error}\n"
            "If you trust whoever made it, pass weights_only=False."
        ) from error
    except (RuntimeError, EOFError, ValueError, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        # EINVAL: the archive's directory points before its beginning.
        raise CheckpointDamagedError(f"{place} is not a whole torch file: {error}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{place} holds a {type(state).__qualname__}, not the dict of a checkpoint.")
    return state


def _pickled(place: Folder) -> bool:
    """Whether a file begins as torch's files do, today's (zip) or those of torch 1.5 and before (a bare pickle)."""
    with place.fs.open(place.path, "rb") as file:
        begins: bytes = file.read(2)
    return begins == b"PK" or begins[:1] == pickle.PROTO


def load_checkpoint(
    path: str | os.PathLike[str], *, map_location: Any = None, weights_only: bool = True
) -> dict[str, Any]:
    """The shared state of a checkpoint in either form, a folder of shards or a torch file, with whole tensors."""
    from trainer.checkpoint.store import Store

    place = Folder.at(path)
    if place.fs.isdir(place.path):
        checkpoint = catalog.open_checkpoint(path)
        state = Store(str(checkpoint.folder.parent.parent)).load(checkpoint.path).state
    else:
        state = load_file(path, map_location=map_location or "cpu", weights_only=weights_only)
    if not isinstance(state, dict):
        raise CheckpointError(f"{place} holds no dict of a checkpoint.")
    return state
