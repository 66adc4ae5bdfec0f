"""`trainer.strategy`: the few calls on it that published callbacks and modules make."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from trainer.trainer import Trainer


class Strategy:
    """Ranks, device and simple exchanges, by the names that code written for Lightning uses."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    @property
    def root_device(self) -> torch.device:
        """The device of this rank."""
        return self._trainer.device

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self._trainer.world_size

    @property
    def global_rank(self) -> int:
        """Rank among all processes."""
        return self._trainer.global_rank

    @property
    def local_rank(self) -> int:
        """Rank among the processes of this node."""
        return self._trainer.local_rank

    @property
    def node_rank(self) -> int:
        """Number of this node."""
        return self._trainer.node_rank

    @property
    def is_global_zero(self) -> bool:
        """Whether this is rank 0."""
        return self._trainer.is_global_zero

    @property
    def lightning_module(self) -> Any:
        """The module that is trained."""
        return self._trainer.lightning_module

    @property
    def model(self) -> Any:
        """The module that is trained."""
        return self._trainer.model

    def barrier(self, name: str | None = None) -> None:
        """Wait for all ranks."""
        self._trainer.world.barrier(name or "strategy.barrier()")

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """The object of rank `src`."""
        return self._trainer.world.broadcast(obj, src)

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:  # noqa: ARG002 - Lightning's
        """The mean (or sum, min, max) of a tensor over the ranks."""
        if not isinstance(tensor, torch.Tensor) or self._trainer.world_size == 1:
            return tensor
        op = str(reduce_op or "mean").lower().rpartition(".")[2]
        return self._trainer.world.all_reduce(tensor.clone(), {"avg": "mean"}.get(op, op))

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:  # noqa: A002 - Lightning's name
        """Whether all ranks (or with all=False: any rank) decided yes."""
        world = self._trainer.world
        return not world.any(not decision) if all else world.any(bool(decision))

    def all_gather(self, tensor: Any, group: Any = None, sync_grads: bool = False) -> Any:
        """The tensors of all ranks, stacked."""
        return self._trainer.all_gather(tensor, group=group, sync_grads=sync_grads)
