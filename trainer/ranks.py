"""Who this process is among the ranks. The only reader of rank variables."""

from __future__ import annotations

import functools
import os
import re
import sys
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from trainer.errors import RanksError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["Ranks", "first_host", "rank_zero_info", "rank_zero_only", "rank_zero_warn", "read_ranks"]

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Ranks:
    """One process's place, as its launcher told it through the environment.

    started_by: "launch", "torchrun", "slurm", "environment" (RANK and WORLD_SIZE set by hand) or "python" (alone).
    attempt counts the starts of a run from 0, restart_count those of torch elastic's.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    node_rank: int = 0
    num_nodes: int = 1
    started_by: str = "python"
    master_addr: str | None = None
    master_port: int | None = None
    run_id: str | None = None
    run_dir: str | None = None
    attempt: int = 0
    restart_count: int = 0
    grace_s: float | None = None
    progress_page: str | None = None

    def __post_init__(self) -> None:
        for name, value, size_name, size in (
            ("RANK", self.rank, "WORLD_SIZE", self.world_size),
            ("LOCAL_RANK", self.local_rank, "LOCAL_WORLD_SIZE", self.local_world_size),
            ("GROUP_RANK", self.node_rank, "number of nodes", self.num_nodes),
        ):
            if not 0 <= value < size:
                raise RanksError(
                    f"{name}={value} is outside 0 to {size - 1} ({size_name}={size}). Start the job with launch, "
                    "torchrun or srun, or set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and "
                    "MASTER_PORT to fit each other."
                )
        if self.local_world_size > self.world_size:
            raise RanksError(f"LOCAL_WORLD_SIZE={self.local_world_size} is more than WORLD_SIZE={self.world_size}.")


def read_ranks(environ: Mapping[str, str] | None = None) -> Ranks:
    """Read the variables of launch, torchrun, srun or a hand-made environment; alone if there are none.

    Raises:
        RanksError: a variable is no number, or they contradict each other.
    """
    env = os.environ if environ is None else environ
    common = {
        "run_id": env.get("LAUNCH_RUN_ID"),
        "run_dir": env.get("LAUNCH_RUN_DIR"),
        "attempt": _number(env, "LAUNCH_ATTEMPT", 0),
        "restart_count": _number(env, "TORCHELASTIC_RESTART_COUNT", 0),
        "grace_s": _seconds(env, "LAUNCH_GRACE_S"),
        "progress_page": env.get("LAUNCH_PROGRESS"),
    }
    if "RANK" in env or "WORLD_SIZE" in env:
        return _from_torch(env, common)
    if "SLURM_PROCID" in env and _in_step(env) and _slurm_tasks(env) > 1:
        return _from_slurm(env, common)
    return Ranks(**common)  # type: ignore[arg-type]


def _from_torch(env: Mapping[str, str], common: dict[str, Any]) -> Ranks:
    for name, other in (("RANK", "WORLD_SIZE"), ("WORLD_SIZE", "RANK")):
        if name not in env:
            raise RanksError(
                f"{other}={env[other]} is set but {name} is not: a launcher sets both. Unset it, or set both."
            )
    rank, size = _number(env, "RANK", 0), _number(env, "WORLD_SIZE", 1)
    local_size = _number(env, "LOCAL_WORLD_SIZE", size)
    started_by = "launch" if "LAUNCH_RUN_ID" in env else "torchrun" if "TORCHELASTIC_RUN_ID" in env else "environment"
    # Nodes need not have equal numbers of ranks; launch and torchrun tell how many there are.
    nodes = _number(env, "GROUP_WORLD_SIZE", max(1, -(-size // max(1, local_size))))
    return Ranks(
        rank=rank,
        world_size=size,
        local_rank=_number(env, "LOCAL_RANK", rank % max(1, local_size)),
        local_world_size=local_size,
        node_rank=_number(env, "GROUP_RANK", _number(env, "NODE_RANK", rank // max(1, local_size))),
        num_nodes=nodes,
        started_by=started_by,
        master_addr=env.get("MASTER_ADDR"),
        master_port=_number(env, "MASTER_PORT", 0) or None,
        **common,
    )


# Slurm's own steps (batch script, interactive shell, external) have the highest ids: slurm.h, SLURM_MAX_NORMAL_STEP_ID.
_LAST_STEP = 0xFFFFFFF0


def _in_step(env: Mapping[str, str]) -> bool:
    """Whether srun started this process as one of its tasks: a batch script or an interactive shell is not one."""
    step = env.get("SLURM_STEP_ID", env.get("SLURM_STEPID", ""))
    return step.isdigit() and int(step) < _LAST_STEP


def _slurm_tasks(env: Mapping[str, str]) -> int:
    """Tasks of the step; SLURM_NTASKS may be what the job asked for."""
    return _number(env, "SLURM_STEP_NUM_TASKS", _number(env, "SLURM_NTASKS", 1))


def _from_slurm(env: Mapping[str, str], common: dict[str, Any]) -> Ranks:
    size = _slurm_tasks(env)
    nodes = _number(env, "SLURM_STEP_NUM_NODES", _number(env, "SLURM_NNODES", 1))
    node = _number(env, "SLURM_NODEID", 0)
    per_node = _tasks_per_node(env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE", str(size)))
    hosts = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", "127.0.0.1")
    job = re.sub(r"\D", "", env.get("SLURM_JOB_ID", "0")) or "0"
    return Ranks(
        rank=_number(env, "SLURM_PROCID", 0),
        world_size=size,
        local_rank=_number(env, "SLURM_LOCALID", 0),
        local_world_size=per_node[node] if node < len(per_node) else per_node[-1],
        node_rank=node,
        num_nodes=nodes,
        started_by="slurm",
        master_addr=env.get("MASTER_ADDR") or first_host(hosts),
        # The same on every task, another for another job or step on the same nodes, and below the ports that Linux
        # gives to whoever connects (from 32768 on).
        master_port=_number(env, "MASTER_PORT", 0)
        or 12000 + (int(job) * 31 + _number(env, "SLURM_STEP_ID", 0)) % 20000,
        **common,
    )


def _tasks_per_node(text: str) -> list[int]:
    """Slurm's `4(x2),3` -> [4, 4, 3]."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            raise RanksError(f"SLURM_TASKS_PER_NODE={text!r} is not of Slurm's form, like 4(x2),3.")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def first_host(nodelist: str) -> str:
    """The first host of Slurm's compressed list: `gpu[03-05,9],login` -> `gpu03`."""
    first = ""
    depth = 0
    for character in nodelist.strip():
        if character == "," and depth == 0:
            break
        depth += {"[": 1, "]": -1}.get(character, 0)
        first += character
    while (match := re.search(r"\[([^\]]*)\]", first)) is not None:
        inner = re.split(r"[,-]", match[1])[0]
        first = first[: match.start()] + inner + first[match.end() :]
    if not first:
        raise RanksError(f"The node list {nodelist!r} names no host.")
    return first


def _seconds(env: Mapping[str, str], name: str) -> float | None:
    text = env.get(name, "")
    if text == "":
        return None
    try:
        return float(text)
    except ValueError as error:
        raise RanksError(f"{name}={text!r} is not a number of seconds.") from error


def _number(env: Mapping[str, str], name: str, default: int) -> int:
    text = env.get(name, "")
    if text == "":
        return default
    try:
        return int(text)
    except ValueError as error:
        raise RanksError(f"{name}={text!r} is not a whole number.") from error


def _global_rank() -> int:
    try:
        return read_ranks().rank
    except RanksError:
        return 0  # whoever needs the ranks will say what is wrong with them


class _RankZeroOnly:
    """`@rank_zero_only`: other ranks do not call the function and get None. `.rank` as Lightning has it."""

    @property
    def rank(self) -> int:
        """The global rank of this process."""
        return _global_rank()

    def __call__(self, fn: Callable[P, R], default: Any = None) -> Callable[P, R | Any]:
        @functools.wraps(fn)
        def wrapped(*args: P.args, **kwargs: P.kwargs) -> R | Any:
            return fn(*args, **kwargs) if _global_rank() == 0 else default

        return wrapped


rank_zero_only = _RankZeroOnly()


def rank_zero_info(text: str) -> None:
    """Tell the person something, once: a line on stderr of rank 0."""
    if _global_rank() == 0:
        print(text, file=sys.stderr, flush=True)  # noqa: T201


def rank_zero_warn(text: str, category: type[Warning] = UserWarning, stacklevel: int = 3) -> None:
    """`warnings.warn` on rank 0 only."""
    if _global_rank() == 0:
        warnings.warn(text, category, stacklevel=stacklevel)
