"""A copy of a shard in memory that can be shared with another process, reused by the next save."""

from __future__ import annotations

import errno
import math
import mmap
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trainer.checkpoint.plan import Part
    from trainer.checkpoint.shards import Layout

# Of the memory that is free, so much at most is taken for a copy: the training step wants some as well.
_SHARE = 0.9
# <linux/mman.h>, since Linux 5.14; Python has no name for it.
_MADV_POPULATE_WRITE = 23


class Snapshot:
    """Anonymous shared memory (a memfd: no name in /dev/shm, gone with the last process that has it).

    On CUDA it is registered as pinned memory, so that the device writes straight into it.
    """

    def __init__(self) -> None:
        self._descriptor = -1
        self._map: mmap.mmap | None = None
        self._flat = torch.empty(0, dtype=torch.uint8)
        self._size = 0
        self._pinned = False

    @property
    def descriptor(self) -> int:
        """The memory's file descriptor."""
        return self._descriptor

    @property
    def capacity(self) -> int:
        """Bytes that are taken."""
        return len(self._flat)

    def view(self) -> memoryview:
        """The bytes of the shard that was copied last."""
        assert self._map is not None
        return memoryview(self._map)[: self._size]

    def growth(self, size: int) -> int:
        """How much more memory a shard of `size` bytes would take."""
        return 0 if self._fits(size) else size - len(self._flat)

    def reserve(self, size: int, *, pinned: bool) -> torch.Tensor:
        """Memory for `size` bytes, flat uint8, to be filled. Nobody may be reading what was there before.

        Raises:
            OSError: there is no memory.
        """
        if not self._fits(size):
            self.close()
            self._allocate(size, pinned=pinned)
        # Whoever reads the file sees just what is in it.
        os.ftruncate(self._descriptor, size)
        self._size = size
        return self._flat[:size]

    def fill(self, layout: Layout, parts: Sequence[Part]) -> None:
        """Copy a shard; on return the tensors may change. Raises OSError: there is no memory."""
        flat = self.reserve(layout.bytes, pinned=any(part.data.is_cuda for part in parts))
        for begin, header in layout.headers.items():
            flat[begin : begin + len(header)] = torch.frombuffer(bytearray(header), dtype=torch.uint8)
        data = {(part.key, part.offset): part.data for part in parts}
        devices = set()
        for piece in layout.pieces:
            source = data[piece.key, piece.offset]
            if piece.begin < piece.end:
                target = flat[piece.begin : piece.end].view(source.dtype).view(source.shape)
                target.copy_(source, non_blocking=self._pinned)
                devices.add(source.device)
        for device in devices:
            if device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()

    def close(self) -> None:
        """Give the memory back. A writer that still has it mapped keeps its own view."""
        if self._map is None:
            return
        if self._pinned:
            torch.cuda.cudart().cudaHostUnregister(self._flat.data_ptr())  # type: ignore[no-untyped-call]
        self._flat = torch.empty(0, dtype=torch.uint8)
        self._map.close()
        self._map = None
        os.close(self._descriptor)
        self._descriptor = -1
        self._size = 0

    def _fits(self, size: int) -> bool:
        # Not much larger either: memory for a save is at most 1.1 x the state.
        return self._map is not None and size <= len(self._flat) <= max(1.1 * size, mmap.PAGESIZE)

    def _allocate(self, size: int, *, pinned: bool) -> None:
        capacity = -(-max(size, 1) // mmap.PAGESIZE) * mmap.PAGESIZE
        self._descriptor = os.memfd_create("checkpoint", os.MFD_CLOEXEC)
        try:
            os.ftruncate(self._descriptor, capacity)
            self._map = mmap.mmap(self._descriptor, capacity)
            _populate(self._map, self._descriptor, capacity)
        except OSError:
            if self._map is not None:
                self._map.close()
                self._map = None
            os.close(self._descriptor)
            raise
        self._flat = torch.frombuffer(self._map, dtype=torch.uint8)
        self._pinned = False
        if pinned:
            registered = torch.cuda.cudart().cudaHostRegister(self._flat.data_ptr(), capacity, 0)  # type: ignore[no-untyped-call]
            self._pinned = int(registered) == 0


def _populate(memory: mmap.mmap, descriptor: int, size: int) -> None:
    """Take all pages now, large ones if there are: one that cannot be had later, at its first write, is SIGBUS."""
    try:
        memory.madvise(mmap.MADV_HUGEPAGE)
        memory.madvise(_MADV_POPULATE_WRITE)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        # Linux before 5.14, or a kernel without huge pages.
        os.posix_fallocate(descriptor, 0, size)


def has_memory(size: int) -> bool:
    """Whether so many bytes can be taken without bringing the machine, or the control group, near its limit."""
    return size <= _SHARE * available_memory()


def available_memory() -> float:
    """Bytes that this process may still take: what the machine has, and what its control groups (v2, v1) allow."""
    available = math.inf
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    for group in _groups():
        available = min(available, group.available())
    return available


@dataclass(frozen=True)
class _Group:
    """A memory control group: its folder, and what the files in it are called."""

    folder: Path
    limit: str
    used: str
    reclaimable: str

    def available(self) -> float:
        """Bytes below its limit, counting cached files as free; inf if it has none, or is not there."""
        try:
            limit = (self.folder / self.limit).read_text().strip()
            used = int((self.folder / self.used).read_text())
            statistics = dict(line.split() for line in (self.folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            return math.inf
        if limit == "max":
            return math.inf
        return max(0, int(limit) - used + int(statistics.get(self.reclaimable, 0)))


def _groups() -> list[_Group]:
    """Every memory control group around this process."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    groups = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, names = Path("/sys/fs/cgroup"), ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root = Path("/sys/fs/cgroup/memory")
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        folder = root / path.lstrip("/")
        # In a container the path may be the host's, while the container's own group is mounted as the root.
        around = [f for f in (folder, *folder.parents) if f == root or root in f.parents]
        groups += [_Group(f, *names) for f in around]
    return groups
