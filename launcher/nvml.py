"""What NVIDIA GPUs do, by the driver's own library: no torch, no process per question.

The driver may take seconds to answer (a GPU that is ill, no persistence mode), so a thread asks it, and whoever wants
to know gets the last answer.
"""

from __future__ import annotations

import ctypes
import threading
from typing import Any

__all__ = ["GpuWatch", "of_rank"]

_UUID_LENGTH = 96


class _Utilization(ctypes.Structure):
    _fields_ = (("gpu", ctypes.c_uint), ("memory", ctypes.c_uint))


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


class GpuWatch:
    """The GPUs of this machine, as they were at the last question but one; nothing where there are none."""

    def __init__(self) -> None:
        self._wanted = threading.Event()
        self._found: list[dict[str, Any]] = []
        self._thread: threading.Thread | None = None

    def look(self) -> list[dict[str, Any]]:
        """Of each GPU: index, uuid, use (per cent of the last moments), used and total (bytes)."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="launch-nvml", daemon=True)
            self._thread.start()
        self._wanted.set()
        return self._found

    def _work(self) -> None:
        try:
            library = ctypes.CDLL("libnvidia-ml.so.1")
        except OSError:
            return
        if library.nvmlInit_v2() != 0:
            return
        while True:
            self._wanted.wait()
            self._wanted.clear()
            self._found = _ask(library)


def _ask(library: ctypes.CDLL) -> list[dict[str, Any]]:
    count = ctypes.c_uint()
    if library.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0:
        return []
    found = []
    for index in range(count.value):
        device, uuid = ctypes.c_void_p(), ctypes.create_string_buffer(_UUID_LENGTH)
        use, memory = _Utilization(), _Memory()
        if library.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(device)) != 0:
            continue
        library.nvmlDeviceGetUUID(device, uuid, _UUID_LENGTH)
        if library.nvmlDeviceGetMemoryInfo(device, ctypes.byref(memory)) != 0:
            continue
        known = library.nvmlDeviceGetUtilizationRates(device, ctypes.byref(use)) == 0
        found.append({"index": index, "uuid": uuid.value.decode(errors="replace"), "use": use.gpu if known else None,
                      "used": memory.used, "total": memory.total})  # fmt: skip
    return found


def of_rank(gpus: list[dict[str, Any]], visible: str | None, local_rank: int) -> dict[str, Any] | None:
    """The GPU of a rank that takes the one of its local rank, of those that it sees; None if that cannot be told.

    visible: its CUDA_VISIBLE_DEVICES: numbers, or identifiers (the beginnings of them suffice).
    """
    seen = None if visible is None else [v.strip() for v in visible.split(",") if v.strip()]
    if seen is None:
        return gpus[local_rank] if local_rank < len(gpus) else None
    if not seen:
        return None
    mine = seen[local_rank] if local_rank < len(seen) else seen[0] if len(seen) == 1 else ""
    if not mine:
        return None
    return next((g for g in gpus if str(g["index"]) == mine or g["uuid"].startswith(mine)), None)
