"""The process group, the device, and the collectives that the rest uses."""

from __future__ import annotations

import contextlib
import math
import pickle
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from trainer.errors import ConfigError, DistributedError
from trainer.ranks import Ranks, read_ranks

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from types import TracebackType

__all__ = ["World", "choose_device", "connect"]

_OPS = {
    "sum": dist.ReduceOp.SUM,
    "mean": dist.ReduceOp.SUM,
    "max": dist.ReduceOp.MAX,
    "min": dist.ReduceOp.MIN,
}


@contextlib.contextmanager
def _let_go(*tensors: torch.Tensor) -> Iterator[None]:
    """Around a collective: on return no thread of gloo's holds the tensors any more.

    Such a thread needs the interpreter lock to let go of a tensor that Python knows, and does so some time after the
    collective is over. If the interpreter is being taken down by then, Python ends the thread inside a destructor and
    the process aborts with its work done (seen in 3 of 25 runs on a busy machine, torch 2.15, Python 3.11).
    """
    held = [(tensor, tensor._use_count()) for tensor in tensors if tensor.is_cpu]
    yield
    while any(tensor._use_count() > count for tensor, count in held):
        time.sleep(0)  # passes the interpreter lock on


def _bytes_in(tensor: torch.Tensor) -> bytes:
    return tensor.cpu().numpy().tobytes()


class World:
    """A rank's place, its device, and the group of all ranks (none where there is one rank only).

    Every rank must call each collective, in the same order. `close` destroys the group only if `connect` made it.
    """

    def __init__(self, ranks: Ranks, device: torch.device, *, owns_group: bool) -> None:
        self.ranks = ranks
        self.device = device
        self.size = ranks.world_size
        self.rank = ranks.rank
        self.is_global_zero = ranks.rank == 0
        self.is_local_zero = ranks.local_rank == 0
        self._owns_group = owns_group

    def barrier(self, what: str, timeout_s: float | None = None) -> None:
        """Wait until all ranks are here.

        With `timeout_s` (math.inf: a year) the wait is on the store, so it may outlast the group's own timeout.

        Raises:
            DistributedError: not all came in time, or one was lost; names `what`, and who is missing if that is known.
        """
        if self.size == 1:
            return
        # A connection of its own: a wait on the shared one would lock the collectives of other threads out.
        store = dist.distributed_c10d._get_default_store().clone()
        # Counted in the store: every World on this group goes on where the one before it was.
        number = store.add(f"trainer/barrier/of {self.rank}", 1)
        store.set(f"trainer/barrier/{self.rank}", f"{number} {what}")
        try:
            if timeout_s is None:
                self.all_reduce(torch.zeros(1, device=self.device)).item()
            else:
                self._wait_at_store(store, f"trainer/barrier/{number}", timeout_s)
        except RuntimeError as error:
            waited = "" if timeout_s is None else f" {timeout_s:g} s"
            raise DistributedError(
                f"rank {self.rank} waited{waited} for the others at {what!r} in vain; {self._elsewhere(store, number)} "
                "Look at their logs."
            ) from error

    def _wait_at_store(self, store: Any, key: str, timeout_s: float) -> None:
        if store.add(f"{key}/count", 1) == self.size:
            store.set(f"{key}/open", "1")
        store.wait([f"{key}/open"], timedelta(seconds=365 * 86400.0 if math.isinf(timeout_s) else timeout_s))

    def _elsewhere(self, store: Any, number: int) -> str:
        """Who has not come to this barrier, and where each was seen last."""
        late = []
        try:
            for rank in range(self.size):
                key = f"trainer/barrier/{rank}"
                seen = store.get(key).decode() if store.check([key]) else "0 nowhere yet"
                count, _, place = seen.partition(" ")
                if int(count) < number:
                    late.append(f"rank {rank} (last seen at {place!r})")
        except RuntimeError:
            return "the store is gone, and with it the rank or launcher that held it."
        if not late:
            return "all came, but one was lost in the exchange."
        return "not there: " + ", ".join(late[:8]) + (f" and {len(late) - 8} more." if len(late) > 8 else ".")

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """`obj` of rank `src`, on every rank. It is pickled: for small things between the ranks of one job."""
        if self.size == 1:
            return obj
        data = pickle.dumps(obj) if self.rank == src else b""
        length = torch.tensor([len(data)], device=self.device)
        with _let_go(length):
            dist.broadcast(length, src=src)
        content = self._bytes_of(data, int(length.item()))
        with _let_go(content):
            dist.broadcast(content, src=src)
        return obj if self.rank == src else pickle.loads(_bytes_in(content))

    def gather(self, obj: Any) -> list[Any]:
        """Every rank's `obj`, by rank, on every rank."""
        if self.size == 1:
            return [obj]
        data = pickle.dumps(obj)
        length = torch.tensor([len(data)], device=self.device)
        lengths = torch.empty(self.size, dtype=length.dtype, device=self.device)
        with _let_go(length, lengths):
            dist.all_gather_into_tensor(lengths, length)
        longest = int(lengths.max().item())
        content = self._bytes_of(data, longest)
        contents = torch.empty(self.size * longest, dtype=torch.uint8, device=self.device)
        with _let_go(content, contents):
            dist.all_gather_into_tensor(contents, content)
        parts = zip(contents.view(self.size, longest), lengths.tolist(), strict=True)
        return [pickle.loads(_bytes_in(part[:count])) for part, count in parts]

    def _bytes_of(self, data: bytes, size: int) -> torch.Tensor:
        """`data` as a tensor of `size` bytes, filled up with zeros, on this rank's device."""
        return torch.frombuffer(bytearray(data.ljust(size, b"\0")), dtype=torch.uint8).to(self.device)

    def all_reduce(self, tensor: torch.Tensor, op: str = "sum") -> torch.Tensor:
        """Reduce `tensor` in place over all ranks ("sum", "mean", "max", "min"); returns it."""
        if op not in _OPS:
            raise ConfigError(f"all_reduce op {op!r}: one of {', '.join(_OPS)} is possible.")
        if self.size > 1:
            with _let_go(tensor):
                dist.all_reduce(tensor, op=_OPS[op])
            if op == "mean":
                tensor /= self.size
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on any rank."""
        if self.size == 1:
            return flag
        found = torch.tensor([int(flag)], dtype=torch.int32, device=self.device)
        return bool(self.all_reduce(found, "max").item())

    def close(self) -> None:
        """Destroy the group if it is ours. Twice is once."""
        if self._owns_group:
            self._owns_group = False
            if dist.is_initialized():
                dist.destroy_process_group()

    def __enter__(self) -> World:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def connect(
    *,
    accelerator: str = "auto",
    devices: int | str | list[int] = "auto",
    num_nodes: int = 1,
    timeout_s: float = 1800.0,
    environ: Mapping[str, str] | None = None,
) -> World:
    """Join the other ranks that the environment tells of; a process that is alone makes no group.

    accelerator: "auto", "cpu", "gpu", "cuda" or "mps". devices: "auto", -1, a count or a list of indices per node,
    which must agree with what the launcher started. A group that exists already is used as it is.

    Raises:
        ConfigError: the arguments and the environment contradict each other, or there is no such device.
        DistributedError: the ranks did not meet within `timeout_s`.
    """
    ranks = read_ranks(environ)
    _check_request(ranks, devices, num_nodes)
    device = choose_device(accelerator, devices, ranks)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if dist.is_initialized():
        if (dist.get_rank(), dist.get_world_size()) != (ranks.rank, ranks.world_size):
            raise DistributedError(
                f"This process is rank {dist.get_rank()} of {dist.get_world_size()} in the process group that the "
                f"script made, but rank {ranks.rank} of {ranks.world_size} by its environment. Set RANK and WORLD_SIZE "
                "before the Trainer is made, or start the script with launch, torchrun or srun and leave the group "
                "to the Trainer."
            )
        return World(ranks, device, owns_group=False)
    if ranks.world_size == 1:
        return World(ranks, device, owns_group=False)
    if ranks.master_addr is None or ranks.master_port is None:
        raise DistributedError(
            f"{ranks.world_size} ranks should meet, but MASTER_ADDR or MASTER_PORT is not set. Start the script with "
            "launch, torchrun or srun."
        )
    backend = {"cuda": "nccl", "cpu": "gloo"}.get(device.type)
    if backend is None:
        raise ConfigError(f"accelerator={device.type!r} runs on one process only; the environment tells of several.")
    try:
        if ranks.started_by == "slurm":
            address = f"[{ranks.master_addr}]" if ":" in ranks.master_addr else ranks.master_addr
            dist.init_process_group(
                backend,
                init_method=f"tcp://{address}:{ranks.master_port}",
                rank=ranks.rank,
                world_size=ranks.world_size,
                timeout=timedelta(seconds=timeout_s),
                device_id=device if device.type == "cuda" else None,
            )
        else:
            dist.init_process_group(
                backend,
                timeout=timedelta(seconds=timeout_s),
                device_id=device if device.type == "cuda" else None,
            )
    except (RuntimeError, ValueError) as error:
        raise DistributedError(
            f"rank {ranks.rank} of {ranks.world_size} did not meet the others at {ranks.master_addr} port "
            f"{ranks.master_port}: {error}"
        ) from error
    return World(ranks, device, owns_group=True)


def _check_request(ranks: Ranks, devices: int | str | list[int], num_nodes: int) -> None:
    count = len(devices) if isinstance(devices, list) else devices if isinstance(devices, int) else None
    if isinstance(devices, str) and devices not in ("auto", "-1"):
        if not devices.isdigit():
            raise ConfigError(f"devices={devices!r}: give a count, a list of indices, -1 or 'auto'.")
        count = int(devices)
    if count is not None and count != -1 and count < 1:
        raise ConfigError(f"devices={devices!r} asks for no device; give at least 1, -1 or 'auto'.")
    if count not in (None, -1) and count != ranks.local_world_size:
        if ranks.started_by == "python":
            raise ConfigError(
                f"devices={devices!r} needs {count} processes, and this script was started as one. "
                f"Start it with: launch --procs {count} {Path(sys.argv[0]).name}  (or --gpus {count})"
            )
        raise ConfigError(
            f"devices={devices!r} contradicts the launcher, which started {ranks.local_world_size} ranks on this node. "
            "Leave devices='auto'."
        )
    if num_nodes not in (1, ranks.num_nodes):
        raise ConfigError(
            f"num_nodes={num_nodes} contradicts the launcher, which started ranks on {ranks.num_nodes} node(s). "
            "Leave num_nodes=1 to take the launcher's number."
        )


def choose_device(accelerator: str, devices: int | str | list[int], ranks: Ranks) -> torch.device:
    """The device of this rank."""
    name = {"gpu": "cuda"}.get(accelerator, accelerator)
    if accelerator in ("tpu", "ipu", "hpu"):
        raise ConfigError(f"accelerator={accelerator!r} is not supported; cpu, gpu (cuda) and mps are.")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if _mps_alone(ranks) else "cpu"
    elif accelerator == "gpu" and not torch.cuda.is_available() and _mps_alone(ranks):
        name = "mps"
    if name == "cpu":
        return torch.device("cpu")
    if name == "mps":
        if not torch.backends.mps.is_available():
            raise ConfigError("accelerator='mps': this machine has no such device.")
        return torch.device("mps")
    if name != "cuda":
        raise ConfigError(f"accelerator={accelerator!r}: one of auto, cpu, gpu, cuda, mps is possible.")
    found = torch.cuda.device_count()
    if not torch.cuda.is_available() or found == 0:
        raise ConfigError(f"accelerator={accelerator!r}, but torch finds no CUDA device here; use accelerator='cpu'.")
    index = devices[ranks.local_rank] if isinstance(devices, list) else ranks.local_rank
    if found == 1 and not isinstance(devices, list):
        index = 0  # the launcher shows each rank its own GPU only
    if not 0 <= index < found:
        raise ConfigError(f"rank {ranks.rank} should use GPU {index}, but torch finds {found} on this node.")
    return torch.device("cuda", index)


def _mps_alone(ranks: Ranks) -> bool:
    return ranks.world_size == 1 and torch.backends.mps.is_available()
