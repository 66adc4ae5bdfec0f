"""What can be seen of a running training, as one hash per piece of state with a name that a person can read."""

from __future__ import annotations

import collections
import functools
import hashlib
import inspect
import itertools
import os
import random
import sys
import sysconfig
import types
from enum import Enum
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from trainer.combined import CombinedLoader

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from trainer.trainer import Trainer

# Of longer containers the first and the last items are taken; deeper objects are not looked into.
_LONG, _DEEP = 200, 12
# Bytes of a tensor that is hashed once per version instead of once per batch.
_LARGE = 1 << 20
_PLAIN = (
    type(None), bool, int, float, complex, str, bytes, Enum, PurePath, np.generic,
    torch.dtype, torch.device, torch.Size,
)  # fmt: skip
_OPAQUE = (types.ModuleType, types.BuiltinFunctionType, types.FrameType, types.CodeType, property)
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
    "_forward_cache", "_computed",
}  # fmt: skip
# Hashes of large tensors outside of weights and optimizers, by the version that torch counts for each.
_known: dict[int, tuple[Any, int, str]] = {}


class _Walk:
    """Goes through objects once each, wherever they are reached first.

    Arrays and generators are taken wherever they are: which names share one says nothing, and a resume may change it.
    """

    def __init__(self) -> None:
        self.found: dict[str, str] = {}
        self._seen: dict[int, Any] = {}
        self.folder = os.environ.get("LAUNCH_RUN_DIR") or "\0"  # another one in every run

    def take(self, name: str, value: Any, depth: int = 0) -> None:
        """Add a piece of state, or the pieces that it consists of."""
        if isinstance(value, _PLAIN):
            self.found[name] = _hash(repr(value).replace(self.folder, "").encode())
            return
        if isinstance(value, _OPAQUE) or id(value) in self._seen or depth > _DEEP or _is_ours(value):
            return
        if isinstance(value, Tensor) and value.numel() * value.element_size() > _LARGE and not is_result(name):
            self.found[name] = _hash_by_version(value)
        elif (leaf := _leaf(value)) is not None:
            self.found[name] = _hash(leaf)
        else:
            self.leave_out(value)
            self._take_parts(name, value, depth)

    def leave_out(self, value: Any) -> None:
        """Take an object nowhere any more."""
        self._seen[id(value)] = value  # kept, so that no other object gets its id

    def _take_parts(self, name: str, value: Any, depth: int) -> None:
        if isinstance(value, (list, tuple, collections.deque)) and len(value) > _LONG:
            if all(isinstance(part, _PLAIN) for part in value):
                self.found[name] = _hash(repr(value).encode())
                return
            self.take(f"len({name})", len(value))
            ends = [*range(_LONG // 2), *range(len(value) - _LONG // 2, len(value))]
            parts: Iterable[tuple[str, Any]] = [(f"[{n}]", value[n]) for n in ends]
        else:
            parts = list(_parts(value))
            if len(parts) > _LONG and all(isinstance(part, _PLAIN) for _, part in parts):
                self.found[name] = _hash(repr(parts).encode())
                return
        for key, part in parts:
            self.take(f"{name}{key}", part, depth + 1)

    def attributes(self, name: str, value: Any) -> None:
        """Add an object by its attributes, whoever made its class."""
        self.leave_out(value)
        for key, part in _attributes(value):
            self.take(f"{name}{key}", part, 1)


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
    if isinstance(value, itertools.count):
        return repr(value).encode()
    if isinstance(value, functools._lru_cache_wrapper):
        return repr(value.cache_info()).encode()
    return None


def _parts(value: Any) -> Iterable[tuple[str, Any]]:
    """What a container or an object consists of, with how each part is spelled behind its owner's name."""
    if isinstance(value, (dict, collections.abc.Mapping)):
        return ((f"[{key if isinstance(key, _PLAIN) else n!r}]", part) for n, (key, part) in enumerate(value.items()))
    if isinstance(value, (list, tuple, collections.deque)):
        return ((f"[{n}]", part) for n, part in enumerate(value))
    if isinstance(value, (set, frozenset)):
        return ((f"{{{n}}}", part) for n, part in enumerate(sorted(value, key=repr)))
    if isinstance(value, functools.partial):
        return (".func", value.func), (".args", value.args), (".keywords", value.keywords)
    if isinstance(value, types.MethodType):
        return ((".__self__", value.__self__), (".__func__", value.__func__))
    if isinstance(value, types.FunctionType):
        return _of_function(value)
    if isinstance(value, types.GeneratorType):
        frame = value.gi_frame
        return ((".gi_frame", None if frame is None else frame.f_lasti), ("", inspect.getgeneratorlocals(value)))
    if isinstance(value, type):
        own = _is_users(value.__module__)
        return ((f".{n}", part) for n, part in (vars(value).items() if own else ()) if not n.startswith("__"))
    if isinstance(value, (staticmethod, classmethod)):
        return ((".__func__", value.__func__),)
    if type(value).__module__ == "builtins" and hasattr(value, "__next__"):
        return ((" (an iterator)", value.__reduce__()),)
    return _attributes(value)


def _of_function(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """What a function of the user's holds between its calls: variables around it, defaults, attributes."""
    if not _is_users(function.__module__):
        return
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        if cell != types.CellType():  # an empty one has no contents
            yield f" (its variable {name})", cell.cell_contents
    if function.__defaults__ or function.__kwdefaults__:
        yield " (its defaults)", (function.__defaults__, function.__kwdefaults__)
    yield from ((f".{name}", part) for name, part in vars(function).items() if name != "__wrapped__")


def _attributes(value: Any) -> Iterator[tuple[str, Any]]:
    attributes = dict(getattr(value, "__dict__", {}))
    if isinstance(value, nn.Module):
        for table in ("_parameters", "_buffers", "_modules"):
            attributes |= attributes.pop(table, {})
    for kind in type(value).__mro__:
        for name in getattr(kind, "__slots__", ()):
            if isinstance(name, str) and name != "__weakref__" and hasattr(value, name):
                attributes[name] = getattr(value, name)
    return ((f".{name}", part) for name, part in attributes.items() if name not in _SKIPPED)


def _is_ours(value: Any) -> bool:
    """Whether it is an object of this package, which brings its own state back, or a Trainer of whatever class."""
    if any(kind.__module__ == "trainer.trainer" for kind in type(value).__mro__):
        return True
    return type(value).__module__.startswith("trainer.") and not isinstance(value, (dict, nn.Module, CombinedLoader))


@functools.cache
def _is_users(module: str | None) -> bool:
    """Whether a module is neither Python's, nor installed, nor a part of this package."""
    path = getattr(sys.modules.get(module or ""), "__file__", None) or ""
    paths = sysconfig.get_paths()
    installed = tuple(paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib"))
    return bool(path) and not path.startswith(installed) and (module or "").partition(".")[0] != "trainer"


def _hash_by_version(tensor: Tensor) -> str:
    version = -1 if tensor.is_inference() else tensor._version
    kept = _known.get(id(tensor))
    if kept is None or kept[0] is not tensor or kept[1] != version or version < 0:
        kept = _known[id(tensor)] = tensor, version, _hash(_leaf(tensor) or b"")
    return kept[2]


def _hash(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def fingerprint(trainer: Trainer, batch: Any = None) -> dict[str, str]:
    """Name -> hash of all state that can be seen: random numbers, batch, model, optimizers, ..., the script's globals.

    What several of these reach stands under the first of them. The path of the run folder is left out of texts.
    """
    walk, module = _Walk(), trainer.lightning_module
    assert module is not None
    walk.take("random numbers of python", repr(random.getstate()))
    walk.take("random numbers of numpy", repr(np.random.get_state(legacy=True)))
    walk.take("random numbers of torch", torch.get_rng_state())
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        walk.take("random numbers of the GPU", torch.cuda.get_rng_state())
    walk.take("batch", batch)
    for name, tensor in module.state_dict(keep_vars=True).items():
        walk.take(f"weight {name}", tensor)
        walk.leave_out(tensor)
    for number, optimizer in enumerate(trainer.optimizers):
        name = f"optimizer {number} ({type(optimizer).__name__})"
        for group, values in enumerate(optimizer.param_groups):
            walk.take(f"{name} group {group}", {k: v for k, v in values.items() if k != "params"})
        walk.take(f"{name} state", optimizer.state_dict()["state"])
        walk.leave_out(optimizer)
    walk.take("model", module)
    for number, config in enumerate(trainer.lr_scheduler_configs):
        walk.take(f"scheduler {number} ({type(config.scheduler).__name__})", config.scheduler)
    walk.take("loss scaler", trainer.precision_object.state_dict())
    for callback in trainer.callbacks:
        if _is_ours(callback):  # its other attributes follow from these
            # Files that the next save is to remove: going on removes them at once.
            state = {name: value for name, value in callback.state_dict().items() if name != "replaced"}
            walk.take(f"callback {type(callback).__name__}", state)
        else:
            walk.attributes(f"callback {type(callback).__name__}", callback)
    if trainer.datamodule is not None:
        walk.attributes(f"DataModule {type(trainer.datamodule).__name__}", trainer.datamodule)
    for kind, title in (("train", "training"), ("val", "validation")):
        walk.take(f"{title} loader", trainer.data.raw(kind))
    walk.take("logged values", [dict(trainer.callback_metrics), dict(trainer.logged_metrics)])
    for name, loaded in sorted(sys.modules.items()):
        if _is_users(name):
            for variable, value in list(vars(loaded).items()):
                if not variable.startswith("__"):
                    walk.take(f"{'global' if name == '__main__' else name} {variable}", value, 1)
    # Keys of dicts are parts of names.
    return {name.replace(walk.folder, ""): found for name, found in walk.found.items()}


def is_result(name: str) -> bool:
    """Whether a piece of state is what training is for, or shows that it has gone another way."""
    return name.startswith(("batch", "weight ", "optimizer", "logged values"))
