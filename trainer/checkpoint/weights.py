"""Tensors by name out of any checkpoint: for a warm start, for a part of a model, for export."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch

from trainer.checkpoint import catalog
from trainer.checkpoint.file import load_file
from trainer.checkpoint.folder import Folder
from trainer.checkpoint.reader import Reading, read_contents
from trainer.errors import CheckpointDamagedError, CheckpointError, CheckpointNotFoundError

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping


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
    place = Folder.at(path)
    if place.name.endswith(".safetensors"):
        tensors = _from_safetensors(place, only)
    elif place.fs.isdir(place.path):
        tensors = read_tensors(catalog.open_checkpoint(path), only)
    else:
        found: dict[str, torch.Tensor] = {}
        _flatten(load_file(path), (), found)
        tensors = {key: tensor for key, tensor in found.items() if fnmatchcase(key, only)}
    if not tensors:
        raise CheckpointError(f"{place} holds no tensor whose key matches {only!r}.")
    return _renamed(tensors, rename or {}, str(place))


def read_tensors(checkpoint: catalog.Checkpoint, only: str = "*") -> dict[str, torch.Tensor]:
    """The tensors of a store's checkpoint whose keys match a shell pattern."""
    contents = read_contents(checkpoint)
    reading = Reading(contents)
    tensors = {key: reading.tensor(key) for key in contents.pieces if fnmatchcase(key, only)}
    reading.run()
    return tensors


def _from_safetensors(place: Folder, only: str) -> dict[str, torch.Tensor]:
    import safetensors.torch

    try:
        content = place.parent.read(place.name)
    except FileNotFoundError as error:
        raise CheckpointNotFoundError(f"There is no file {place}.") from error
    try:
        tensors = safetensors.torch.load(content)
    except safetensors.SafetensorError as error:
        raise CheckpointDamagedError(f"{place} is not a whole safetensors file: {error}") from error
    return {key: tensor for key, tensor in tensors.items() if fnmatchcase(key, only)}


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
