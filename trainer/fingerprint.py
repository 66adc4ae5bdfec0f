"""What can be seen of a running training, as one hash per piece of state with a name that a person can read."""

from __future__ import annotations

import collections
import functools
import hashlib
import random
import sys
import sysconfig
import types
from enum import Enum
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from trainer.trainer import Trainer

# Longer containers are one piece; deeper objects are not looked into.
_LONG, _DEEP = 200, 12
_PLAIN = (type(None), bool, int, float, complex, str, bytes, Enum, torch.dtype, torch.device, torch.Size, np.generic)
_OPAQUE = (types.ModuleType, type, types.BuiltinFunctionType, types.GeneratorType, types.FrameType)
# Parts of torch's and our objects that say nothing about what is computed next.
_SKIPPED = {
    "_iterator", "trainer", "_trainer", "_metrics", "_backward_hooks", "_backward_pre_hooks", "_forward_hooks",
    "_forward_pre_hooks", "_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
    "_is_full_backward_hook",
    "_forward_pre_hooks_with_kwargs", "_non_persistent_buffers_set", "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks", "_optimizer_state_dict_pre_hooks", "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks", "_optimizer_load_state_dict_post_hooks", "_zero_grad_profile_name",
    "_warned_capturable_if_run_uncaptured", "_initial_step", "_hparams_initial", "_rng_state",
}  # fmt: skip


class _Walk:
    """Goes through objects once each, wherever they are reached first."""

    def __init__(self) -> None:
        self.found: dict[str, str] = {}
        self._seen: dict[int, Any] = {}

    def take(self, name: str, value: Any, depth: int = 0) -> None:
        """Add a piece of state, or the pieces that it consists of."""
        if isinstance(value, _PLAIN) or (leaf := _leaf(value)) is not None:
            self.found[name] = _hash(repr(value).encode() if isinstance(value, _PLAIN) else leaf)
            return
        if isinstance(value, _OPAQUE) or id(value) in self._seen or depth > _DEEP:
            return
        self._seen[id(value)] = value  # kept, so that no other object gets its id
        parts = list(_parts(value))
        if len(parts) > _LONG and all(isinstance(part, _PLAIN) for _, part in parts):
            self.found[name] = _hash(repr(parts).encode())
            return
        for key, part in parts:
            self.take(f"{name}{key}", part, depth + 1)


def _leaf(value: Any) -> bytes | None:
    """The content of what is one piece but not plain."""
    if isinstance(value, Tensor):
        local = value.to_local() if hasattr(value, "to_local") else value
        if local.is_meta or local.layout is not torch.strided:
            return repr(local).encode()
        return f"{local.dtype}{tuple(local.shape)}".encode() + (
            local.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if local.numel() else b""
        )
    if isinstance(value, np.ndarray):
        return repr(value.tolist()).encode() if value.dtype.hasobject else value.tobytes() + str(value.shape).encode()
    if isinstance(value, torch.Generator):
        return value.get_state().numpy().tobytes()
    if isinstance(value, random.Random):
        return repr(value.getstate()).encode()
    if isinstance(value, np.random.Generator):
        return repr(value.bit_generator.state).encode()
    if isinstance(value, np.random.RandomState):
        return repr(value.get_state(legacy=True)).encode()
    return None


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    """What a container or an object consists of, with how each part is spelled behind its owner's name."""
    if isinstance(value, (dict, collections.abc.Mapping)):
        yield from (
            (f"[{key if isinstance(key, _PLAIN) else n!r}]", part) for n, (key, part) in enumerate(value.items())
        )
    elif isinstance(value, (list, tuple, collections.deque)):
        yield from ((f"[{n}]", part) for n, part in enumerate(value))
    elif isinstance(value, (set, frozenset)):
        yield from ((f"{{{n}}}", part) for n, part in enumerate(sorted(value, key=repr)))
    elif isinstance(value, functools.partial):
        yield from ((".func", value.func), (".args", value.args), (".keywords", value.keywords))
    elif isinstance(value, types.MethodType):
        yield ".__self__", value.__self__
    elif isinstance(value, types.FunctionType):
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            if cell != types.CellType():  # an empty one has no contents
                yield f" (its variable {name})", cell.cell_contents
    else:
        if isinstance(value, nn.Module):  # parameters and buffers that are saved are taken by their names
            yield from ((f".{name}", value._buffers[name]) for name in sorted(value._non_persistent_buffers_set))
            yield from ((f".{name}", part) for name, part in value._modules.items())
        attributes = dict(getattr(value, "__dict__", {}))
        for kind in type(value).__mro__:
            for name in getattr(kind, "__slots__", ()):
                if isinstance(name, str) and hasattr(value, name) and name != "__weakref__":
                    attributes[name] = getattr(value, name)
        tables = {"_parameters", "_buffers", "_modules"} if isinstance(value, nn.Module) else set()
        yield from ((f".{n}", part) for n, part in attributes.items() if n not in _SKIPPED | tables)


def _hash(content: bytes | None) -> str:
    return hashlib.blake2b(content or b"", digest_size=8).hexdigest()


def fingerprint(trainer: Trainer, batch: Any = None) -> dict[str, str]:
    """Name -> hash of all state that can be seen: random numbers, batch, model, optimizers, ..., the script's globals.

    What several of these reach stands under the first of them.
    """
    walk, module = _Walk(), trainer.lightning_module
    assert module is not None
    walk.take("random numbers of python", repr(random.getstate()))
    walk.take("random numbers of numpy", repr(np.random.get_state(legacy=True)))
    walk.take("random numbers of torch", torch.get_rng_state())
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        walk.take("random numbers of the GPU", torch.cuda.get_rng_state())
    walk.take("batch", batch)
    for name, tensor in module.state_dict().items():
        walk.take(f"weight {name}", tensor)
    walk.take("model", module)
    for number, optimizer in enumerate(trainer.optimizers):
        name = f"optimizer {number} ({type(optimizer).__name__})"
        for group, values in enumerate(optimizer.param_groups):
            walk.take(f"{name} group {group}", {k: v for k, v in values.items() if k != "params"})
        walk.take(f"{name} state", optimizer.state_dict()["state"])
    for number, config in enumerate(trainer.lr_scheduler_configs):
        walk.take(f"scheduler {number} ({type(config.scheduler).__name__})", config.scheduler)
    walk.take("loss scaler", trainer.precision_object.state_dict())
    for callback in trainer.callbacks:
        if type(callback).__module__.startswith("trainer."):  # whose other attributes follow from these
            walk.take(f"callback {type(callback).__name__}", callback.state_dict())
        else:
            walk.take(f"callback {type(callback).__name__}", vars(callback))
    if trainer.datamodule is not None:
        walk.take(f"DataModule {type(trainer.datamodule).__name__}", trainer.datamodule)
    for kind, title in (("train", "training"), ("val", "validation")):
        walk.take(f"{title} loader", trainer.data.raw(kind))
    walk.take("logged values", dict(trainer.callback_metrics))
    for name, variables in _script_variables():
        walk.take(f"module {name}", variables)
    return walk.found


def is_result(name: str) -> bool:
    """Whether a piece of state is what training is for, or shows that it has gone another way."""
    return name.startswith(("batch", "weight ", "optimizer", "logged values"))


def _script_variables() -> Iterable[tuple[str, dict[str, Any]]]:
    """The global variables of the user's own modules."""
    paths = sysconfig.get_paths()
    installed = tuple(paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib"))
    for name, module in sorted(sys.modules.items()):
        path = getattr(module, "__file__", None) or ""
        if not path or path.startswith(installed) or name.partition(".")[0] == "trainer":
            continue
        yield name, {k: v for k, v in vars(module).items() if not k.startswith("__")}
