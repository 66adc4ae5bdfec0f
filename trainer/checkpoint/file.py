"""A checkpoint as one torch file: written whole or not at all, read without running code from it."""

from __future__ import annotations

import io
import pickle
from typing import TYPE_CHECKING, Any

import torch

from trainer.checkpoint import catalog
from trainer.checkpoint.folder import Folder
from trainer.checkpoint.values import encode, is_dtensor
from trainer.errors import CheckpointDamagedError, CheckpointError, CheckpointNotFoundError

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping


def save_file(state: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write one torch file to a path or fsspec URL; `torch.load(path, weights_only=True)` opens it.

    A file that is there is replaced when the new one is durable.

    Raises:
        CheckpointError: the state holds a value that is not plain (see `Store.save`), or a sharded tensor.
    """
    _, tensors = encode(state)
    sharded = next((key for key, tensor in tensors.items() if is_dtensor(tensor)), None)
    if sharded is not None:
        raise CheckpointError(f"{sharded} is sharded over ranks; a single file holds whole tensors. Save to a Store.")
    target = Folder.at(path)
    content = io.BytesIO()
    torch.save(dict(state), content)
    target.parent.make()
    target.parent.write_whole(target.name, content.getvalue())


def load_file(path: str | os.PathLike[str], *, map_location: Any = "cpu", weights_only: bool = True) -> dict[str, Any]:
    """Read a torch file that we or Lightning wrote. weights_only=False runs code from the file: only for your own.

    Raises:
        CheckpointNotFoundError: it is not there.
        CheckpointDamagedError: it is not a whole torch file.
        CheckpointError: it holds more than tensors and plain values.
    """
    place = Folder.at(path)
    try:
        content = place.parent.read(place.name)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise CheckpointNotFoundError(f"There is no file {place}.") from error
    try:
        state = torch.load(io.BytesIO(content), map_location=map_location, weights_only=weights_only)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{place} holds more than tensors and plain values, so reading it would run code from it: {error}\n"
            "If you trust whoever made it, pass weights_only=False."
        ) from error
    except (RuntimeError, EOFError, ValueError) as error:
        raise CheckpointDamagedError(f"{place} is not a whole torch file: {error}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{place} holds a {type(state).__qualname__}, not the dict of a checkpoint.")
    return state


def load_checkpoint(
    path: str | os.PathLike[str], *, map_location: Any = None, weights_only: bool = True
) -> dict[str, Any]:
    """The shared state of a checkpoint in either form, a folder of shards or a torch file, with whole tensors."""
    from trainer.checkpoint.store import Store

    place = Folder.at(path)
    if place.fs.isdir(place.path):
        checkpoint = catalog.open_checkpoint(path)
        state = Store(checkpoint.folder.parent.parent.path).load(checkpoint.path).state
    else:
        state = load_file(path, map_location=map_location or "cpu", weights_only=weights_only)
    if not isinstance(state, dict):
        raise CheckpointError(f"{place} holds no dict of a checkpoint.")
    return state
