"""Tensors by name out of any checkpoint: for a warm start, for a part of a model, for export."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch

from trainer.checkpoint import catalog
from trainer.checkpoint.contents import read_contents
from trainer.checkpoint.file import load_file
from trainer.checkpoint.folder import Folder
from trainer.checkpoint.reader import Reading
from trainer.checkpoint.values import is_dtensor
from trainer.errors import CheckpointDamagedError, CheckpointError, CheckpointNotFoundError

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Mapping, Sequence


def load_tensors(
    path: str | os.PathLike[str], *, only: str = "*", rename: Mapping[str, str] | None = None
) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint by their keys, whole, on the CPU.

    path: a checkpoint of a Store (only the bytes asked for are read, and verified), a torch file, or a safetensors
    file, from anywhere; a path or fsspec URL. only: a shell pattern on keys as they are in the checkpoint, such as
    "state_dict.encoder.*" (a torch file's nested dicts are joined by dots). rename: regular expressions on keys, and
    what their match becomes, applied in order: {r"^state_dict\\.": ""} leaves a module's own names.

    Raises:
        CheckpointNotFoundError, CheckpointDamagedError, CheckpointError: nothing there; not whole; no key matches, or
            two become one.
    """
    return _renamed(_read(path, (only,)), rename or {}, str(path))


def load_weights(
    module: torch.nn.Module,
    path: str | os.PathLike[str],
    *,
    only: str = "*",
    rename: Mapping[str, str] | None = None,
    strict: bool | None = None,
) -> list[str]:
    """Put tensors of any checkpoint into a module's parameters and buffers; returns their names.

    path, only, rename: see `load_tensors`; of a checkpoint that has a `state_dict` only that is looked at, and names
    are those inside it. Sharded parameters take their own part. strict: whether every weight of the module must be
    among them; default: if `only` selects everything.

    Raises:
        CheckpointError: a tensor has no place in the module, or another shape there; or, if strict, a weight is left.
        And what `load_tensors` raises.
    """
    found = _read(path, (f"state_dict.{only}", only))
    tensors = _renamed({k.removeprefix("state_dict."): t for k, t in found.items()}, rename or {}, str(path))
    targets = module.state_dict()
    problems = [f"{key} has no place in the module" for key in tensors if key not in targets]
    problems += [
        f"{key} has shape {tuple(t.shape)} in the file, {tuple(targets[key].shape)} in the module"
        for key, t in tensors.items()
        if key in targets and t.shape != targets[key].shape
    ]
    if only == "*" if strict is None else strict:
        problems += [f"{key} of the module is not in the file" for key in targets if key not in tensors]
    if problems:
        more = f" (and {len(problems) - 8} more)" if len(problems) > 8 else ""
        raise CheckpointError(
            f"{path} does not fit {type(module).__name__}: {'; '.join(problems[:8])}{more}. Choose with only=, give "
            "other names with rename=, or pass strict=False to leave weights of the module as they are."
        )
    with torch.no_grad():
        for key, tensor in tensors.items():
            _put(targets[key], tensor)
    return list(tensors)


def _put(target: torch.Tensor, value: torch.Tensor) -> None:
    if is_dtensor(target):
        from torch.distributed.tensor import DTensor, distribute_tensor

        assert isinstance(target, DTensor)
        # src_data_rank=None: every rank has read the whole tensor, so nothing is sent.
        value = distribute_tensor(value.to(target.device), target.device_mesh, target.placements, src_data_rank=None)
    target.copy_(value)


def read_tensors(checkpoint: catalog.Checkpoint, patterns: Sequence[str]) -> dict[str, torch.Tensor]:
    """The tensors of a store's checkpoint whose keys match the first of the patterns that any key matches."""
    contents = read_contents(checkpoint)
    reading = Reading(contents)
    tensors = {key: reading.tensor(key) for key in _matching(contents.pieces, patterns)}
    reading.run()
    return tensors


def _read(path: str | os.PathLike[str], patterns: Sequence[str]) -> dict[str, torch.Tensor]:
    """The tensors whose keys match the first of the patterns that any key matches."""
    place = Folder.at(path)
    if place.name.endswith(".safetensors"):
        tensors = _from_safetensors(place)
    elif place.fs.isdir(place.path):
        tensors = read_tensors(catalog.open_checkpoint(path), patterns)
    else:
        tensors = {}
        _flatten(load_file(path), (), tensors)
    tensors = {key: tensors[key] for key in _matching(tensors, patterns)}
    if not tensors:
        raise CheckpointError(f"{place} holds no tensor whose key matches {' or '.join(map(repr, patterns))}.")
    return tensors


def _matching(keys: Iterable[str], patterns: Sequence[str]) -> list[str]:
    keys = list(keys)
    return next((found for p in patterns if (found := [k for k in keys if fnmatchcase(k, p)])), [])


def _from_safetensors(place: Folder) -> dict[str, torch.Tensor]:
    import safetensors.torch

    try:
        content = place.parent.read(place.name)
    except FileNotFoundError as error:
        raise CheckpointNotFoundError(f"There is no file {place}.") from error
    try:
        return safetensors.torch.load(content)
    except safetensors.SafetensorError as error:
        raise CheckpointDamagedError(f"{place} is not a whole safetensors file: {error}") from error


def _flatten(value: Any, path: tuple[str, ...], found: dict[str, torch.Tensor]) -> None:
    if isinstance(value, torch.Tensor):
        found[".".join(path)] = value
    elif isinstance(value, dict):
        for key, item in value.items():
            _flatten(item, (*path, str(key)), found)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            _flatten(item, (*path, str(index)), found)


def _renamed(tensors: dict[str, torch.Tensor], rename: Mapping[str, str], where: str) -> dict[str, torch.Tensor]:
    result: dict[str, torch.Tensor] = {}
    for key, tensor in tensors.items():
        new = key
        for pattern, replacement in rename.items():
            new = re.sub(pattern, replacement, new)
        if new in result:
            raise CheckpointError(f"Renaming the keys of {where} makes two tensors {new!r}.")
        result[new] = tensor
    return result
