"""How the module runs over the ranks: alone, replicated (DDP), or sharded (FSDP2), and when gradients are exchanged."""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.errors import CheckpointError, ConfigError
from trainer.materialize import is_meta, materialize
from trainer.module import Module
from trainer.seed import rng_state, set_rng_state

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import MixedPrecisionPolicy
    from torch.optim import Optimizer

    from trainer.compiling import Compiling
    from trainer.distributed import World
    from trainer.precision import Precision

__all__ = ["DDP", "FSDP", "Parallel", "Single", "make_parallel"]

_STEPS = ("training_step", "validation_step", "test_step", "predict_step")
# What DDP calls the sharing of buffers: until torch 2.14, and from 2.15 on, which warns of the other.
_BUFFERS = {"broadcast_buffers", "forward_sync_buffers"}


class DataRank(NamedTuple):
    """A place among the ranks that share each batch among them."""

    rank: int
    size: int


class Parallel:
    """What every way of running has. `wrap` is called with the module on its device, before optimizers exist."""

    name = ""
    sharded = False
    # So many neighbouring ranks compute one model together, on the same batches.
    tensor_parallel = 1

    def __init__(self) -> None:
        self.world: World
        self.precision: Precision | None = None
        self.compiling: Compiling | None = None
        self.module: nn.Module
        self.step: Callable[..., Any]
        # Called after each step: buffers, which every rank changes by its own batches, become rank 0's on all ranks.
        # None: there are none, or they stay each rank's own.
        self.share_buffers: Callable[[], None] | None = None

    @property
    def device_mesh(self) -> DeviceMesh | None:
        """The ranks as a mesh, for a module's `configure_model`; None where there is none."""
        return None

    @property
    def data_rank(self) -> DataRank:
        """Whose share of each batch this rank takes."""
        return DataRank(self.world.rank // self.tensor_parallel, self.world.size // self.tensor_parallel)

    def place(self, module: nn.Module) -> None:
        """Bring the module to the device; what is on the meta device gets its first weights, seeded as torch is."""
        if is_meta(module):
            materialize(module, self.world.device, seed=self.world.broadcast(torch.initial_seed()))
        module.to(self.world.device)

    def wrap(self, module: nn.Module, *, training: bool = True) -> None:
        """Take the module; afterwards `step` is what to call in place of `module.training_step`.

        training=False: nothing will be stepped, so that no room is made for exchanging gradients.
        """
        raise NotImplementedError

    def draw_alike(self) -> None:
        """Ranks that compute one model together draw what the first of them draws, from now on. All must call it."""

    def step_of(self, name: str) -> Callable[..., Any]:
        """What to call in place of a step of the module that exchanges no gradients."""
        if self.compiling is None or self.sharded:
            return getattr(self.module, name)  # type: ignore[no-any-return]
        return self.compiling.step(self.module, name)

    def rewrap(self) -> bool:
        """Take in parameters that began, or ceased, to require gradients since `wrap`. Every rank must call it.

        Returns whether `step` is another one now.
        """
        return False

    def no_sync(self) -> AbstractContextManager[Any]:
        """Around all but the last micro-batch of a step: gradients stay on their rank."""
        return nullcontext()

    def prepare_backward(self, loss: Tensor) -> None:
        """Before each backward of manual optimization, which happens inside of training_step."""

    def clip(self, parameters: Iterable[Tensor], value: float, algorithm: str = "norm") -> Tensor | None:
        """Clip gradients in place by total "norm" (returned, before clipping) or by "value"."""
        tensors = [p for p in parameters if p.grad is not None]
        if algorithm == "value":
            torch.nn.utils.clip_grad_value_(tensors, value)
            return None
        norm = self.norm(tensors)
        for alike in self._alike(tensors):
            torch.nn.utils.clip_grads_with_norm_(alike, value, norm)
        return norm

    def norm(self, parameters: Iterable[Tensor]) -> Tensor:
        """The norm of all gradients, over all ranks: the same on each of them."""
        norms = []
        for alike in self._alike([p for p in parameters if p.grad is not None]):
            norm = torch.nn.utils.get_total_norm([p.grad for p in alike if p.grad is not None])
            # Over shards its parts are still to be summed: once here, and not again by every product with it.
            norms.append(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))

    def _alike(self, tensors: list[Tensor]) -> list[list[Tensor]]:
        """Tensors in groups that torch can work on at once."""
        return [tensors]

    def module_state(self) -> dict[str, Any]:
        """The module's own state_dict (of DTensors where it is sharded)."""
        return self.module.state_dict()

    def load_module_state(self, state: dict[str, Any], strict: bool = True) -> Any:
        """Load what `module_state` returned, on any number of ranks."""
        return self.module.load_state_dict(state, strict=strict)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The optimizer's state_dict; its parameters are named where they are sharded, else numbered."""
        return optimizer.state_dict()

    def load_optimizer_state(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        """Load what `optimizer_state` returned, of this or another way of running."""
        optimizer.load_state_dict(_numbered(state, self.module, optimizer))

    def _broadcast(self, tensors: Callable[[], Iterable[Tensor]], group: dist.ProcessGroup | None = None) -> None:
        group = group or dist.distributed_c10d._get_default_group()
        found = list(tensors())
        for dtype in dict.fromkeys(t.dtype for t in found):  # in one order on all ranks, unlike a set
            same = [t for t in found if t.dtype == dtype]
            dist._broadcast_coalesced(group, same, 250 * 1024 * 1024, 0)  # type: ignore[attr-defined]

    def _same_start(self, module: nn.Module) -> None:
        """Rank 0's parameters and buffers on every rank: scripts seed their ranks alike, or not at all."""
        if self.world.size == 1:
            return
        # What DDP does when it is constructed, with its bucket size.
        from torch.distributed.utils import _sync_module_states

        group = dist.distributed_c10d._get_default_group()
        # Weights that are still to be made will be the same everywhere, and shards are parts of what was.
        tensors = (*module.named_parameters(), *module.named_buffers())
        others = {name for name, t in tensors if t.is_meta or hasattr(t, "full_tensor")}
        _sync_module_states(module, group, 250 * 1024 * 1024, src=0, params_and_buffers_to_ignore=others)


class Single(Parallel):
    """One rank: the module itself, and no frame of ours around its training_step."""

    name = "single"

    def wrap(self, module: nn.Module, *, training: bool = True) -> None:  # noqa: ARG002 - it is the same
        self.module = module
        self.step = self.step_of("training_step")


class _Step(nn.Module):
    """Gives DDP a forward that is the module's training_step, and the parameters in the order that it should use.

    The module itself is no child, so that nobody finds its state twice. DDP looks for parameters module by module,
    with named_modules(): here every parameter has one of its own, in the order of `DDP.wrap`.
    """

    def __init__(self, module: nn.Module, step: Callable[..., Any], names: list[str]) -> None:
        super().__init__()
        self.inner: Module
        object.__setattr__(self, "inner", module)
        self._step = step
        self._names = names
        # Buffers are ours to share, after a step instead of before the next one.
        buffers = [name for name, _ in module.named_buffers()]
        self._ddp_params_and_buffers_to_ignore = [*_ignored(module), *buffers]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._step(*args, **kwargs)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        return self.inner.named_parameters(*args, **kwargs)

    def named_buffers(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Tensor]]:
        return self.inner.named_buffers(*args, **kwargs)

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:  # noqa: ARG002
        for name in self._names:
            prefix, _, own = name.rpartition(".")
            owner = self.inner.get_submodule(prefix)
            if isinstance(owner, (nn.Embedding, nn.EmbeddingBag)) and owner.sparse:
                yield prefix, owner  # DDP must see that its gradient is sparse; `weight` is its only parameter
            else:
                alone = nn.Module()
                alone.register_parameter(own, self.inner.get_parameter(name))
                yield prefix, alone


class DDP(Parallel):
    """Replicas that average their gradients.

    options: DistributedDataParallel's keyword arguments, of whatever torch. Buffers become rank 0's after each step, in
    place of before the next forward, so that validation and checkpoints see what a resumed run has; none do with
    broadcast_buffers=False, and at the start alone with forward_sync_buffers=False. The gradient buckets are laid out
    once, before the first step: DDP else rebuilds them after the first backward, in the order in which gradients
    arrived, so that a resumed process would sum in another order than one that went on (2 ranks come out equal, 3 and 4
    do not; measured on torch 2.14 and 2.15).

    In manual optimization a backward may reach a part of the parameters only (a GAN's generator or discriminator), so
    there find_unused_parameters is on unless it is given.
    """

    name = "ddp"

    def __init__(self, **options: Any) -> None:
        super().__init__()
        known = {*inspect.signature(nn.parallel.DistributedDataParallel.__init__).parameters, *_BUFFERS}
        unknown = sorted(set(options) - known | set(options) & {"self", "module", "device_ids", "output_device"})
        if unknown:
            raise ConfigError(f"DDP({unknown[0]}=...) is not an option of DistributedDataParallel that can be given.")
        if set(options) >= _BUFFERS:
            raise ConfigError("DDP(broadcast_buffers=..., forward_sync_buffers=...): give one of them.")
        self.options = options
        self._ddp: nn.parallel.DistributedDataParallel | None = None
        self._accumulating = False
        self._trained: list[bool] = []

    def wrap(self, module: nn.Module, *, training: bool = True) -> None:
        self.module, self._ddp, self.share_buffers = module, None, None
        self._trained = _trained(module)
        self.step = module.training_step  # type: ignore[assignment]
        if not training or not any(p.requires_grad for p in module.parameters()):
            self._same_start(module)
            return
        manual = not getattr(module, "automatic_optimization", True)
        options = {"find_unused_parameters": True} | self.options if manual else self.options
        # A parameter that is used in several places has its gradient when the first place in the forward has it.
        names = [name for name, _ in module.named_parameters()]
        rebuilds = not options.get("find_unused_parameters") or bool(options.get("static_graph"))
        # DDP turns the buckets that it makes at first around, and takes those that are rebuilt as they come.
        # Compiled inside of DDP's forward, where torch splits the graph so that buckets travel during the backward.
        step = _Step(module, self.step_of("training_step"), names[::-1] if rebuilds else names)
        ids = [self.world.device] if self.world.device.type == "cuda" else None
        others = {name: value for name, value in options.items() if name not in _BUFFERS}
        ddp = nn.parallel.DistributedDataParallel(step, device_ids=ids, **others)
        if next(module.buffers(), None) is not None:
            share = partial(self._broadcast, self._shared_buffers, ddp.process_group)
            if options.get("init_sync", True) and options.get("broadcast_buffers", True):
                share()
            # DDP would make buffers alike before a step. They must be so after it, when validation, averages and
            # checkpoints look at them: a resumed rank has rank 0's.
            if all(options.get(name, True) for name in _BUFFERS):
                self.share_buffers = share
        if rebuilds:
            # What DDP itself calls when a rank without data joins in: the layout follows the list, for good.
            ddp.reducer._push_all_rebuilt_params()
            ddp.reducer._rebuild_buckets()
        self._ddp = ddp
        self.step = self._manual_step if manual else ddp

    def rewrap(self) -> bool:
        # DDP makes room for the gradients that are required when it is made, and leaves others unexchanged.
        if not self.world.any(_trained(self.module) != self._trained):
            return False
        self.wrap(self.module)
        return True

    def _shared_buffers(self) -> list[Tensor]:
        # Asked anew each time: a module may have replaced one.
        ignored = _ignored(self.module)
        return [buffer for name, buffer in self.module.named_buffers() if name not in ignored]

    def _manual_step(self, *args: Any, **kwargs: Any) -> Any:
        assert self._ddp is not None
        # The backwards are inside: each of them is prepared by itself, and none after the forward.
        self._ddp.require_backward_grad_sync = False
        try:
            return self._ddp(*args, **kwargs)
        finally:
            self._ddp.require_backward_grad_sync = True

    def prepare_backward(self, loss: Tensor) -> None:
        if self._ddp is not None and not self._accumulating:
            self._ddp.reducer.prepare_for_backward([loss] if self._ddp.find_unused_parameters else [])

    @contextmanager
    def _manual_no_sync(self) -> Iterator[None]:
        self._accumulating = True
        try:
            yield
        finally:
            self._accumulating = False

    def no_sync(self) -> AbstractContextManager[Any]:
        if self._ddp is None:
            return nullcontext()
        if self._ddp.static_graph and not self._ddp._static_graph_delay_allreduce_enqueued:
            # The graph is learnt in a backward that exchanges gradients: without one torch's reducer asserts (2.15).
            return nullcontext()
        return self._ddp.no_sync() if self.step is self._ddp else self._manual_no_sync()


def _ignored(module: nn.Module) -> list[str]:
    """Names of parameters and buffers that are not to be exchanged: what DDP calls so."""
    return list(getattr(module, "_ddp_params_and_buffers_to_ignore", []))


def _trained(module: nn.Module) -> list[bool]:
    return [p.requires_grad for p in module.parameters()]


class FSDP(Parallel):
    """FSDP2: parameters, gradients and optimizer state sharded over the ranks by `fully_shard`.

    units: what is gathered at once. None: every block of an nn.ModuleList or nn.Sequential that has parameters. A
    class or several: each module of it. A number: each smallest module with at least so many parameters. Whatever
    `Module.configure_model` has sharded already stays as it is, and the rest belongs to the module itself.
    replicas: groups of ranks that hold the same shards (HSDP); ranks of one group are neighbours.
    reshard_after_forward, mp_policy: as fully_shard takes them. Without an mp_policy, mixed precision gathers
    parameters in 16 bits and reduces gradients in 32; autocast still chooses each operation's format, so that losses
    and normalisations are computed as with the other strategies.
    cpu_offload: parameters, gradients and optimizer state live on the CPU, and parameters visit the device in use.
    tensor_parallel: so many neighbouring ranks hold each layer together and take the same batches; weights are sharded
    over the others. `Module.configure_model` cuts the layers, with torch's `parallelize_module(layer,
    self.device_mesh["tensor_parallel"], plan)`. On one rank `self.device_mesh` is None, and nothing is cut.
    """

    name = "fsdp"
    sharded = True

    def __init__(
        self,
        *,
        units: type[nn.Module] | tuple[type[nn.Module], ...] | int | None = None,
        replicas: int | None = 1,
        reshard_after_forward: bool | int | None = None,
        mp_policy: MixedPrecisionPolicy | None = None,
        cpu_offload: bool = False,
        tensor_parallel: int = 1,
    ) -> None:
        super().__init__()
        if type(tensor_parallel) is not int or tensor_parallel < 1:
            raise ConfigError(f"FSDP(tensor_parallel={tensor_parallel!r}): a number of ranks, at least 1.")
        if replicas is not None and replicas < 1:
            raise ConfigError(f"FSDP(replicas={replicas}): at least 1, or None for one per node.")
        self.units, self.replicas = units, replicas
        self.reshard_after_forward, self.mp_policy = reshard_after_forward, mp_policy
        self.cpu_offload, self.tensor_parallel = cpu_offload, tensor_parallel
        self._device_mesh: tuple[World, DeviceMesh] | None = None

    def place(self, module: nn.Module) -> None:
        # Layers on the meta device are made and sharded unit by unit, so that there is never more than one of them.
        module._apply(lambda t: t if t.is_meta else t.to(self.world.device))  # type: ignore[no-untyped-call]

    def wrap(self, module: nn.Module, *, training: bool = True) -> None:
        from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

        if not isinstance(module, FSDPModule):
            self._same_start(module)
            seed = self.world.broadcast(torch.initial_seed()) if is_meta(module) else 0
            options = self._options()
            for unit in (*_units(module, self.units), module):
                if not isinstance(unit, FSDPModule):
                    materialize(module, self.world.device, seed=seed, part=unit)
                    fully_shard(unit, **options)
        if self.compiling is not None:
            self.compiling.units(module, [m for m in module.modules() if isinstance(m, FSDPModule) and m is not module])
        self.module = module
        for name in _STEPS:
            # In the instance's own dict it is there from an earlier run: once more would run FSDP's hooks twice.
            # A step that nobody defined stays so: it would look as if the module had one.
            own = getattr(type(module), name, None)
            if own is not None and own is not getattr(Module, name) and name not in module.__dict__:
                register_fsdp_forward_method(module, name)
                # It wraps the bound method, so that inspect.signature would drop the batch along with self.
                module.__dict__[name].__func__.__signature__ = inspect.signature(getattr(type(module), name))
        self.step = module.training_step  # type: ignore[assignment]
        norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
        statistics = [b for m in norms for b in m.buffers(recurse=False)]
        self.share_buffers = partial(self._broadcast, lambda: statistics) if training and statistics else None

    def _options(self) -> dict[str, Any]:
        from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

        mesh: Any = self.device_mesh
        if self.tensor_parallel > 1:
            mesh = mesh[tuple(name for name in mesh.mesh_dim_names if name != "tensor_parallel")]
        options: dict[str, Any] = {"mesh": mesh}
        if self.reshard_after_forward is not None:
            options["reshard_after_forward"] = self.reshard_after_forward
        if self.mp_policy is not None:
            options["mp_policy"] = self.mp_policy
        elif self.precision is not None and self.precision.autocast_dtype is not None:
            # The inputs' format is autocast's business: targets, too, are among them.
            options["mp_policy"] = MixedPrecisionPolicy(
                self.precision.autocast_dtype, torch.float32, cast_forward_inputs=False
            )
        if self.cpu_offload:
            options["offload_policy"] = CPUOffloadPolicy(pin_memory=self.world.device.type == "cuda")
        return options

    @property
    def device_mesh(self) -> DeviceMesh:
        """The ranks: "replicate" (if there are replicas), "shard", and "tensor_parallel" (if ranks share layers)."""
        from torch.distributed.device_mesh import init_device_mesh

        if self._device_mesh is None or self._device_mesh[0] is not self.world:
            size, replicas = self.world.size, self.replicas or self.world.ranks.num_nodes
            if size % (replicas * self.tensor_parallel):
                what = f"replicas={replicas}"
                if self.tensor_parallel > 1:
                    what += f", tensor_parallel={self.tensor_parallel}"
                raise ConfigError(f"FSDP({what}) does not divide the {size} ranks.")
            shape = {"replicate": replicas, "shard": size // replicas // self.tensor_parallel}
            if replicas == 1:
                del shape["replicate"]
            if self.tensor_parallel > 1:
                shape["tensor_parallel"] = self.tensor_parallel
            # Named by our device: fully_shard's own default is the machine's accelerator, also in a run on the CPU.
            kind = self.world.device.type
            made = init_device_mesh(kind, tuple(shape.values()), mesh_dim_names=tuple(shape))
            self._device_mesh = self.world, made
        return self._device_mesh[1]

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        self.module.set_requires_gradient_sync(False)  # type: ignore[operator]
        try:
            yield
        finally:
            self.module.set_requires_gradient_sync(True)  # type: ignore[operator]

    def draw_alike(self) -> None:
        if self.tensor_parallel > 1:
            state = [rng_state()]
            group = self.device_mesh["tensor_parallel"].get_group()
            dist.broadcast_object_list(state, group=group, group_src=0, device=self.world.device)
            set_rng_state(state[0])

    def _alike(self, tensors: list[Tensor]) -> list[list[Tensor]]:
        if self.tensor_parallel == 1:
            return [tensors]
        # What was cut is laid out over other ranks than what was not.
        groups: dict[Any, list[Tensor]] = {}
        for tensor in tensors:
            groups.setdefault(getattr(tensor, "device_mesh", None), []).append(tensor)
        return list(groups.values())

    def load_module_state(self, state: dict[str, Any], strict: bool = True) -> Any:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

        options = StateDictOptions(full_state_dict=not _has_shards(state), strict=strict)
        return set_model_state_dict(self.module, state, options=options)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

        if not optimizer.state:
            # torch's function would step it, so that its next step were the second (2.15).
            return _named(optimizer.state_dict(), self.module, optimizer)
        return dict(get_optimizer_state_dict(self.module, optimizer))

    def load_optimizer_state(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

        if not state["state"]:
            optimizer.load_state_dict(_numbered(state, self.module, optimizer))
            return
        options = StateDictOptions(full_state_dict=not _has_shards(state))
        set_optimizer_state_dict(self.module, optimizer, _named(state, self.module, optimizer), options=options)


def _has_shards(state: Any) -> bool:
    from torch.distributed.tensor import DTensor
    from torch.utils._pytree import tree_leaves

    return any(isinstance(leaf, DTensor) for leaf in tree_leaves(state))


def _parameter_names(module: nn.Module, optimizer: Optimizer) -> list[str]:
    """The names of an optimizer's parameters, in the order in which its state_dict numbers them."""
    names = {parameter: name for name, parameter in module.named_parameters()}
    return [names[p] for group in optimizer.param_groups for p in group["params"]]


def _numbered(state: dict[str, Any], module: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """An optimizer's state with its parameters by number, whatever way of running it comes from."""
    saved = [p for group in state["param_groups"] for p in group["params"]]
    if not any(isinstance(p, str) for p in saved):
        return state
    names = _parameter_names(module, optimizer)
    if sorted(names) != sorted(saved):
        raise CheckpointError(
            f"The optimizer has the parameters {_first_difference(names, saved)} and the checkpoint has not, or the "
            "other way round: has the model changed?"
        )
    number = {name: i for i, name in enumerate(names)}
    # Groups in the optimizer's own order; the saved ones are found by any of their members.
    return {
        "state": {number[name]: values for name, values in state["state"].items()},
        "param_groups": [
            group | {"params": sorted(number[p] for p in group["params"])}
            for group in sorted(state["param_groups"], key=lambda g: min((number[p] for p in g["params"]), default=0))
        ],
    }


def _named(state: dict[str, Any], module: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """An optimizer's state with its parameters by name, whatever way of running it comes from."""
    saved = [p for group in state["param_groups"] for p in group["params"]]
    if any(isinstance(p, str) for p in saved):
        return state
    names = _parameter_names(module, optimizer)
    if len(names) != len(saved):
        raise CheckpointError(
            f"The optimizer has {len(names)} parameters and the checkpoint's has {len(saved)}: has the model changed?"
        )
    name = dict(zip(saved, names, strict=True))
    return {
        "state": {name[p]: values for p, values in state["state"].items()},
        "param_groups": [group | {"params": [name[p] for p in group["params"]]} for group in state["param_groups"]],
    }


def _first_difference(ours: list[str], theirs: list[str]) -> str:
    return ", ".join(sorted(set(ours) ^ set(theirs))[:4]) or "in other numbers"


def _units(module: nn.Module, wanted: type[nn.Module] | tuple[type[nn.Module], ...] | int | None) -> list[nn.Module]:
    """What is sharded as one unit, inner modules before those that hold them."""
    if wanted is None:
        return list(_blocks(module))
    found: list[nn.Module] = []
    for child in reversed([m for m in module.modules() if m is not module]):
        if isinstance(wanted, int):
            size = sum(p.numel() for p in child.parameters())
            if size >= wanted and not isinstance(child, (nn.ModuleList, nn.ModuleDict)):
                inner = sum(p.numel() for m in found if m in set(child.modules()) for p in m.parameters())
                if size - inner >= wanted:
                    found.append(child)
        elif isinstance(child, wanted) and next(child.parameters(), None) is not None:
            found.append(child)
    if not found and not isinstance(wanted, int):
        raise ConfigError(f"FSDP(units={wanted}): {type(module).__name__} has no such module with parameters.")
    return found


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost blocks of ModuleLists and Sequentials that hold parameters."""
    for child in module.children():
        if isinstance(child, (nn.ModuleList, nn.Sequential)):
            for block in child:
                if next(block.parameters(), None) is not None and not isinstance(block, (nn.ModuleList, nn.ModuleDict)):
                    yield block
        else:
            yield from _blocks(child)


def make_parallel(strategy: str | Parallel, world: World, precision: Precision | None = None) -> Parallel:
    """The way of running that a strategy's name asks for, or the given one.

    On one rank all of them are `Single`: a script that says "ddp" or "fsdp" must also run as one process, where there
    is nobody to average or share with.

    Raises:
        ConfigError: there is no such strategy, or it does not fit the number of ranks.
    """
    parallel = strategy if isinstance(strategy, Parallel) else _by_name(strategy, world)
    if world.size == 1:
        parallel = Single()
    elif isinstance(parallel, Single):
        raise ConfigError(f"strategy={strategy!r} is for one rank, and there are {world.size}; use 'auto' or 'ddp'.")
    parallel.world, parallel.precision = world, precision
    return parallel


def _by_name(strategy: str, world: World) -> Parallel:
    makers: dict[str, Callable[[], Parallel]] = {
        "auto": Single if world.size == 1 else DDP,
        "single": Single,
        "ddp": DDP,
        "ddp_find_unused_parameters_false": lambda: DDP(find_unused_parameters=False),
        "ddp_find_unused_parameters_true": lambda: DDP(find_unused_parameters=True),
        "ddp_static_graph": lambda: DDP(static_graph=True),
        "fsdp": FSDP,
        "hsdp": lambda: FSDP(replicas=None),
    }
    if strategy in ("dp", "ddp2"):
        raise ConfigError(f"strategy={strategy!r} is gone; use strategy='ddp' and start with launch --gpus N.")
    if strategy.startswith("deepspeed"):
        raise ConfigError(
            f"strategy={strategy!r} is not supported: ZeRO-2 is FSDP(reshard_after_forward=False), ZeRO-3 is 'fsdp'."
        )
    if strategy in ("ddp_spawn", "ddp_fork", "ddp_notebook"):
        raise ConfigError(f"strategy={strategy!r}: processes are started by launch --procs N; use strategy='ddp'.")
    made = makers.get({"single_device": "single"}.get(strategy, strategy))
    if made is None:
        raise ConfigError(f"strategy={strategy!r}: one of {', '.join(makers)} is possible, or a DDP or FSDP object.")
    return made()
