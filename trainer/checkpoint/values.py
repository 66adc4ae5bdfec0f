"""A state as JSON plus tensors: what may stand in a checkpoint, and how it is written without pickle.

`encode` turns a nested state into a skeleton of JSON values and a flat table of tensors; `decode` puts it together
again. Reading runs no code from the file: every kind of value has a tag of its own here, and an unknown tag is an
error.

A dict whose keys are all strings, none beginning with "$", is a JSON object. All else that JSON has no word for is
an object with one key: {"$tuple": [...]}, {"$tensor": "state_dict.weight"}, and so on.
"""

from __future__ import annotations

import base64
import math
import sys
from collections import Counter, OrderedDict
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch

from trainer.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

Json: TypeAlias = "bool | int | float | str | list[Any] | dict[str, Any] | None"

_ALLOWED = (
    "tensors, numpy arrays and numbers, None, bool, int, float, complex, str, bytes, and lists, tuples, sets and dicts "
    "of these"
)


def encode(state: Mapping[Any, Any], prefix: str = "") -> tuple[Json, dict[str, torch.Tensor]]:
    """The skeleton of a state, and its tensors by key (DTensors stay what they are; nothing is copied).

    A tensor's key is its path, joined by dots: `state_dict.layer.weight`; `prefix` comes first. Two paths that spell
    the same are told apart by a suffix `#2`, in the order of the state.

    Raises:
        CheckpointError: a value of another kind, or a tensor that cannot be written; names its path.
    """
    tensors: dict[str, torch.Tensor] = {}

    def add(path: tuple[str, ...], tensor: torch.Tensor) -> str:
        key = name = prefix + ".".join(path)
        count = 1
        while key in tensors:
            count += 1
            key = f"{name}#{count}"
        tensors[key] = tensor
        return key

    return _encode(state, (), add), tensors


def decode(skeleton: Json, tensors: Callable[[str], torch.Tensor]) -> Any:
    """The value that `encode` was given; `tensors` returns the tensor of a key.

    Raises:
        CheckpointError: the skeleton holds a tag that this version does not know.
    """
    if isinstance(skeleton, list):
        return [decode(item, tensors) for item in skeleton]
    if not isinstance(skeleton, dict):
        return skeleton
    tag = next(iter(skeleton), "")
    if not tag.startswith("$"):
        return {key: decode(value, tensors) for key, value in skeleton.items()}
    content = skeleton[tag]
    if tag == "$tensor":
        return tensors(content)
    if tag == "$complex_tensor":
        return torch.view_as_complex(tensors(content))
    if tag == "$array":
        return tensors(content).numpy()
    if tag in _CONTAINERS:
        return _CONTAINERS[tag](decode(item, tensors) for item in content)
    if tag in _MAPPINGS:
        return _MAPPINGS[tag]((decode(k, tensors), decode(v, tensors)) for k, v in content)
    if tag in _SCALARS:
        return _SCALARS[tag](content)
    raise CheckpointError(f"The checkpoint holds a value of the unknown kind {tag!r}; a newer version wrote it.")


def is_dtensor(value: Any) -> bool:
    """Whether a value is a DTensor, without importing what defines it."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def _encode(value: Any, path: tuple[str, ...], add: Callable[[tuple[str, ...], torch.Tensor], str]) -> Json:
    kind = type(value)
    if value is None or kind in (bool, int, str) or (kind is float and math.isfinite(value)):
        return value  # type: ignore[no-any-return]
    if kind is float:
        return {"$float": str(value)}
    if isinstance(value, torch.Tensor):
        return _encode_tensor(value, path, add)
    if kind is dict:
        if all(type(key) is str and not key.startswith("$") for key in value):
            return {key: _encode(item, (*path, key), add) for key, item in value.items()}
        return {"$dict": _encode_items(value, path, add)}
    if kind is list:
        return [_encode(item, (*path, str(i)), add) for i, item in enumerate(value)]
    if kind in (tuple, set, frozenset):
        items = value if kind is tuple else sorted(value, key=repr)
        return {f"${kind.__name__}": [_encode(item, (*path, str(i)), add) for i, item in enumerate(items)]}
    if kind is OrderedDict:
        return {"$ordered": _encode_items(value, path, add)}
    if kind is Counter:
        return {"$counter": _encode_items(value, path, add)}
    if isinstance(value, np.ndarray):
        return {"$array": add(path, _array_tensor(value, path))}
    if isinstance(value, np.generic):
        if value.dtype.kind not in "biufc":
            raise _refused(value, path)
        return {"$numpy": [value.dtype.str, base64.b64encode(value.tobytes()).decode()]}
    if kind is bytes:
        return {"$bytes": base64.b64encode(value).decode()}
    if kind is complex:
        return {"$complex": [_encode(value.real, path, add), _encode(value.imag, path, add)]}
    if kind is torch.Size:
        return {"$size": list(value)}
    if kind in (torch.dtype, torch.device):
        return {f"${kind.__name__}": str(value).removeprefix("torch.")}
    raise _refused(value, path)


def _encode_items(
    value: Mapping[Any, Any], path: tuple[str, ...], add: Callable[[tuple[str, ...], torch.Tensor], str]
) -> list[Json]:
    return [[_encode(k, (*path, "key"), add), _encode(v, (*path, str(k)), add)] for k, v in value.items()]


def _encode_tensor(
    value: torch.Tensor, path: tuple[str, ...], add: Callable[[tuple[str, ...], torch.Tensor], str]
) -> Json:
    where = ".".join(path)
    if is_dtensor(value):
        if value.is_complex():
            raise CheckpointError(f"{where}: sharded complex tensors cannot be written; save torch.view_as_real.")
        return {"$tensor": add(path, value.detach())}
    if type(value) not in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer):
        raise CheckpointError(
            f"{where} is a {type(value).__qualname__}, a kind of tensor whose content this format does not know. Save "
            "plain tensors from which it can be made again."
        )
    if value.layout is not torch.strided or value.is_quantized or value.is_meta:
        raise CheckpointError(
            f"{where} is a {'meta' if value.is_meta else value.layout} tensor of {value.dtype}; only dense tensors "
            "with data can be written. Save its parts (for sparse: indices() and values())."
        )
    tensor = value.detach()
    if tensor.is_complex():
        return {"$complex_tensor": add(path, torch.view_as_real(tensor.resolve_conj()))}
    return {"$tensor": add(path, tensor.resolve_neg())}


def _array_tensor(value: np.ndarray[Any, Any], path: tuple[str, ...]) -> torch.Tensor:
    # A copy: it is small, may be read-only (torch would warn), or in another byte order.
    try:
        return torch.from_numpy(value.astype(value.dtype.newbyteorder("="), order="C", copy=True))
    except TypeError as error:
        raise _refused(value, path) from error


def _refused(value: Any, path: tuple[str, ...]) -> CheckpointError:
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    return CheckpointError(
        f"The state holds at {'.'.join(path) or 'its top'} a {kind} ({repr(value)[:80]}), which a checkpoint cannot "
        f"hold: reading it back would run code. Allowed are {_ALLOWED}. Turn it into these in state_dict() or "
        "on_save_checkpoint(), and back when loading."
    )


def _numpy_scalar(content: list[str]) -> Any:
    return np.frombuffer(base64.b64decode(content[1]), dtype=np.dtype(content[0]))[0]


def _complex(content: list[Any]) -> complex:
    real, imaginary = (decode(part, _no_tensor) for part in content)
    return complex(real, imaginary)


def _no_tensor(key: str) -> torch.Tensor:
    raise CheckpointError(f"The checkpoint holds a tensor ({key}) where none can be.")


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(f"The checkpoint names the dtype {name!r}, unknown to torch {torch.__version__}.")
    return dtype


_CONTAINERS: dict[str, Callable[[Any], Any]] = {"$tuple": tuple, "$set": set, "$frozenset": frozenset}
_MAPPINGS: dict[str, Callable[[Any], Any]] = {
    "$dict": dict,
    "$ordered": OrderedDict,
    "$counter": lambda items: Counter(dict(items)),
}
_SCALARS: dict[str, Callable[[Any], Any]] = {
    "$float": float,
    "$bytes": base64.b64decode,
    "$numpy": _numpy_scalar,
    "$complex": _complex,
    "$size": torch.Size,
    "$dtype": _dtype,
    "$device": torch.device,
}
