"""How the module runs over the ranks: alone, replicated (DDP), or sharded (FSDP2), and when gradients are exchanged."""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from torch.optim import Optimizer

    from trainer.distributed import World
    from trainer.module import Module

__all__ = ["DDP", "FSDP", "Parallel", "Single", "make_parallel"]


class Parallel:
    """What every way of running has. `wrap` is called once, with the module on its device, before optimizers exist."""

    name = ""
    sharded = False

    def __init__(self, world: World) -> None:
        self.world = world
        self.module: nn.Module
        self.step: Callable[..., Any]

    def wrap(self, module: nn.Module) -> None:
        """Take the module; afterwards `step` is what to call in place of `module.training_step`."""
        raise NotImplementedError

    def no_sync(self) -> AbstractContextManager[Any]:
        """Around all but the last micro-batch of a step: gradients stay on their rank."""
        return nullcontext()

    def clip(self, parameters: Iterable[Tensor], value: float, algorithm: str = "norm") -> Tensor | None:
        """Clip gradients in place by total "norm" (returned, before clipping) or by "value"."""
        tensors = [p for p in parameters if p.grad is not None]
        if algorithm == "value":
            torch.nn.utils.clip_grad_value_(tensors, value)
            return None
        return torch.nn.utils.clip_grad_norm_(tensors, value)

    def module_state(self) -> dict[str, Any]:
        """The module's own state_dict (of DTensors where it is sharded)."""
        return self.module.state_dict()

    def load_module_state(self, state: dict[str, Any], strict: bool = True) -> Any:
        """Load what `module_state` returned, on any number of ranks."""
        return self.module.load_state_dict(state, strict=strict)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The optimizer's state_dict."""
        return optimizer.state_dict()

    def load_optimizer_state(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        """Load what `optimizer_state` returned."""
        optimizer.load_state_dict(state)

    def _same_start(self, module: nn.Module) -> None:
        """Rank 0's parameters and buffers on every rank: scripts seed their ranks alike, or not at all."""
        if self.world.size == 1:
            return
        with torch.no_grad():
            for tensor in (*module.parameters(), *module.buffers()):
                if not nn.parameter.is_lazy(tensor):
                    dist.broadcast(tensor.detach(), src=0)


class Single(Parallel):
    """One rank: the module itself, and no frame of ours around its training_step."""

    name = "single"

    def wrap(self, module: nn.Module) -> None:
        self.module = module
        self.step = module.training_step  # type: ignore[assignment]


class _Step(nn.Module):
    """Gives DDP a forward that is the module's training_step, and the parameters in the order in which gradients come.

    That is nearly the reverse of the order in which layers were made. The module itself is not registered: DDP then
    makes its gradient buckets from this list, and `DDP.wrap` fixes them before the first step.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.inner: Module
        object.__setattr__(self, "inner", module)
        ignored = set(getattr(module, "_ddp_params_and_buffers_to_ignore", ()))
        self._ddp_params_and_buffers_to_ignore: list[str] = []
        for name, parameter in reversed(list(module.named_parameters())):
            if name not in ignored:
                self.register_parameter(name.replace(".", "/"), parameter)
        for name, buffer in module.named_buffers():
            if name not in ignored:
                self.register_buffer(name.replace(".", "/"), buffer)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner.training_step(*args, **kwargs)


class DDP(Parallel):
    """Replicas that average their gradients.

    options: DistributedDataParallel's keyword arguments. The gradient buckets are laid out once, before the first
    step: DDP else rebuilds them after the first backward, in the order in which gradients arrived, so that a resumed
    process would sum in another order than one that went on (2 ranks come out equal, 3 and 4 do not; measured on
    torch 2.14 and 2.15).
    """

    name = "ddp"

    def __init__(self, world: World, **options: Any) -> None:
        super().__init__(world)
        self.options = options
        self._ddp: nn.parallel.DistributedDataParallel | None = None

    def wrap(self, module: nn.Module) -> None:
        self.module = module
        if not any(p.requires_grad for p in module.parameters()):
            self._same_start(module)
            self.step = module.training_step  # type: ignore[assignment]
            return
        ids = [self.world.device] if self.world.device.type == "cuda" else None
        ddp = nn.parallel.DistributedDataParallel(_Step(module), device_ids=ids, **self.options)
        if not self.options.get("find_unused_parameters"):
            # What DDP itself calls when a rank without data joins in: the layout follows the list, for good.
            ddp.reducer._push_all_rebuilt_params()
            ddp.reducer._rebuild_buckets()
        self._ddp = ddp
        self.step = ddp

    def no_sync(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._ddp is None else self._ddp.no_sync()


class FSDP(Parallel):
    """FSDP2: parameters, gradients and optimizer state sharded over the ranks by `fully_shard`.

    What is sharded as one unit: whatever `Module.configure_model` has sharded already; else every block of an
    nn.ModuleList or nn.Sequential that has parameters; then the rest, with the module itself.
    """

    name = "fsdp"
    sharded = True

    def __init__(self, world: World, **options: Any) -> None:
        super().__init__(world)
        self.options = options

    def wrap(self, module: nn.Module) -> None:
        from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

        if self.world.size == 1:
            raise ConfigError(
                "strategy='fsdp' shards over several ranks, and there is one. Start with launch --procs N."
            )
        self._same_start(module)
        if not isinstance(module, FSDPModule):
            for block in _blocks(module):
                if not isinstance(block, FSDPModule):
                    fully_shard(block, **self.options)
            fully_shard(module, **self.options)
        self.module = module
        for name in ("training_step", "validation_step", "test_step", "predict_step"):
            if hasattr(module, name):
                register_fsdp_forward_method(module, name)
                # It wraps the bound method, so that inspect.signature would drop the batch along with self.
                module.__dict__[name].__func__.__signature__ = inspect.signature(getattr(type(module), name))
        self.step = module.training_step  # type: ignore[assignment]

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        self.module.set_requires_gradient_sync(False)  # type: ignore[operator]
        try:
            yield
        finally:
            self.module.set_requires_gradient_sync(True)  # type: ignore[operator]

    def clip(self, parameters: Iterable[Tensor], value: float, algorithm: str = "norm") -> Tensor | None:
        norm = super().clip(parameters, value, algorithm)
        # A norm over shards is a DTensor whose parts are still to be summed.
        return norm.full_tensor() if norm is not None and hasattr(norm, "full_tensor") else norm

    def load_module_state(self, state: dict[str, Any], strict: bool = True) -> Any:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

        options = StateDictOptions(full_state_dict=not _has_shards(state), strict=strict)
        return set_model_state_dict(self.module, state, options=options)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

        return dict(get_optimizer_state_dict(self.module, optimizer))

    def load_optimizer_state(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

        options = StateDictOptions(full_state_dict=not _has_shards(state))
        set_optimizer_state_dict(self.module, optimizer, state, options=options)


def _has_shards(state: Any) -> bool:
    from torch.distributed.tensor import DTensor
    from torch.utils._pytree import tree_leaves

    return any(isinstance(leaf, DTensor) for leaf in tree_leaves(state))


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost blocks of ModuleLists and Sequentials that hold parameters, innermost last in the walk."""
    for child in module.children():
        if isinstance(child, (nn.ModuleList, nn.Sequential)):
            for block in child:
                if next(block.parameters(), None) is not None:
                    yield block
        else:
            yield from _blocks(child)


def make_parallel(strategy: str | Parallel, world: World) -> Parallel:
    """The way of running that a strategy's name asks for.

    Raises:
        ConfigError: there is no such strategy, or it does not fit the number of ranks.
    """
    if isinstance(strategy, Parallel):
        return strategy
    if strategy in ("dp", "ddp2"):
        raise ConfigError(f"strategy={strategy!r} is gone; use strategy='ddp' and start with launch --gpus N.")
    if strategy.startswith("deepspeed"):
        raise ConfigError(
            f"strategy={strategy!r} is not supported: ZeRO-2 is strategy='fsdp' with reshard_after_forward=False, "
            "ZeRO-3 is strategy='fsdp'."
        )
    alone = world.size == 1
    if strategy in ("auto", "single", "single_device"):
        if strategy != "auto" and not alone:
            raise ConfigError(
                f"strategy={strategy!r} is for one rank, and there are {world.size}; use 'auto' or 'ddp'."
            )
        return Single(world) if alone else DDP(world)
    options: dict[str, dict[str, Any]] = {
        "ddp": {},
        "ddp_find_unused_parameters_false": {},
        "ddp_find_unused_parameters_true": {"find_unused_parameters": True},
        "ddp_static_graph": {"static_graph": True},
    }
    if strategy in options:
        # A script that says "ddp" must also run as one process, where there is nobody to average with.
        return Single(world) if alone else DDP(world, **options[strategy])
    if strategy == "fsdp":
        return FSDP(world)
    if strategy in ("ddp_spawn", "ddp_fork", "ddp_notebook"):
        raise ConfigError(f"strategy={strategy!r}: processes are started by launch --procs N; use strategy='ddp'.")
    raise ConfigError(f"strategy={strategy!r}: one of auto, single, {', '.join(options)}, fsdp is possible.")
