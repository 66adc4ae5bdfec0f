"""Pure: where a rank stands in the gang, and the environment that tells it so. The one table of variable names."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from launcher.spec import LaunchSpec

__all__ = ["Place", "World", "packed", "places", "rank_environment", "unpacked"]


@dataclass(frozen=True)
class World:
    """One attempt's gang, as the supervisor decided it: ranks per node in node order, and where the store listens."""

    attempt: int
    restarts: int
    slots: tuple[int, ...]
    store_addr: str
    store_port: int

    @property
    def size(self) -> int:
        return sum(self.slots)


@dataclass(frozen=True)
class Place:
    """One rank's coordinates."""

    rank: int
    local_rank: int
    node: int


def places(world: World, node: int) -> list[Place]:
    """The places of one node's ranks: ranks count up node by node."""
    first = sum(world.slots[:node])
    return [Place(first + local, local, node) for local in range(world.slots[node])]


def packed(slots: Sequence[int]) -> list[tuple[int, int]]:
    """Ranks on each node as (ranks, nodes in a row that have so many): each of n nodes is told of all n."""
    return [(ranks, len(list(row))) for ranks, row in itertools.groupby(slots)]


def unpacked(rows: Iterable[tuple[int, int]]) -> tuple[int, ...]:
    """What `packed` was given."""
    return tuple(itertools.chain.from_iterable(itertools.repeat(ranks, nodes) for ranks, nodes in rows))


def rank_environment(
    base: Mapping[str, str],
    spec: LaunchSpec,
    world: World,
    place: Place,
    *,
    run_id: str,
    run_dir: str,
    error_file: str,
    progress: str | None,
) -> dict[str, str]:
    """The whole environment of a rank: `base`, then what every torchrun rank has, then what only ours has."""
    local_size = world.slots[place.node]
    environment = dict(base)
    environment.update(spec.environment)
    environment.update(
        RANK=str(place.rank),
        LOCAL_RANK=str(place.local_rank),
        WORLD_SIZE=str(world.size),
        LOCAL_WORLD_SIZE=str(local_size),
        GROUP_RANK=str(place.node),
        GROUP_WORLD_SIZE=str(len(world.slots)),
        ROLE_NAME=spec.role,
        ROLE_RANK=str(place.rank),
        ROLE_WORLD_SIZE=str(world.size),
        NODE_RANK=str(place.node),
        MASTER_ADDR=world.store_addr,
        MASTER_PORT=str(world.store_port),
        TORCHELASTIC_RESTART_COUNT=str(world.restarts),
        TORCHELASTIC_MAX_RESTARTS=str(spec.max_restarts),
        TORCHELASTIC_RUN_ID=run_id,
        # The agent of node 0 holds the store, so no rank has to win a race for the port.
        TORCHELASTIC_USE_AGENT_STORE="True",
        TORCHELASTIC_ERROR_FILE=error_file,
        LAUNCH_RUN_ID=run_id,
        LAUNCH_RUN_DIR=run_dir,
        LAUNCH_ATTEMPT=str(world.attempt),
        LAUNCH_GRACE_S=f"{spec.grace:g}",
    )
    environment.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")
    if local_size > 1:
        environment.setdefault("OMP_NUM_THREADS", "1")
    if progress is not None:
        environment["LAUNCH_PROGRESS"] = progress
    if spec.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    if spec.virtual_local_rank:
        visible = [d for d in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if d]
        environment["CUDA_VISIBLE_DEVICES"] = visible[place.local_rank] if visible else str(place.local_rank)
        environment["LOCAL_RANK"] = "0"
    return environment
