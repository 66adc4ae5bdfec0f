"""The commands of `python -m trainer.checkpoint` that need tensors. Each returns whether all is well."""

# ruff: noqa: T201 - a command prints
from __future__ import annotations

import tempfile
import warnings
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from trainer.checkpoint import catalog
from trainer.checkpoint.contents import plain_values, read_contents
from trainer.checkpoint.file import load_checkpoint, load_file, save_file
from trainer.checkpoint.folder import Folder
from trainer.checkpoint.shards import bytes_of
from trainer.checkpoint.store import Store
from trainer.checkpoint.values import encode
from trainer.checkpoint.weights import load_tensors, read_tensors
from trainer.errors import CheckpointDamagedError, CheckpointError

if TYPE_CHECKING:
    import argparse

    import torch


def show_file(arguments: argparse.Namespace) -> bool:
    """Print what a checkpoint that is one file holds."""
    skeleton, tensors = encode(_read_file(arguments.checkpoint))
    print(f"{arguments.checkpoint}\none file")
    for key, tensor in tensors.items():
        print(f"{key}  {tensor.dtype} {list(tensor.shape)}")
    for path, value in plain_values(skeleton):
        print(f"{path} = {value}")
    return True


def verify_foreign_file(arguments: argparse.Namespace) -> bool:
    """Read a checkpoint that is one file and has no seal of ours."""
    try:
        _read_file(arguments.checkpoint)
    except CheckpointDamagedError as error:
        print(error)
        return False
    print(f"{arguments.checkpoint}: can be read, but holds no checksum of ours; a changed byte is not noticed")
    return True


def diff(arguments: argparse.Namespace) -> bool:
    """Compare two checkpoints."""
    sides = [_taken_apart(path, arguments.only) for path in (arguments.one, arguments.other)]
    (one, plain), (other, other_plain) = sides
    lines = [f"only in the {'first' if key in one else 'second'}: {key}" for key in one.keys() ^ other.keys()]
    for key in (k for k in one if k in other):
        a, b = one[key], other[key]
        if a.shape != b.shape or a.dtype != b.dtype:
            lines.append(f"{key}: {a.dtype} {list(a.shape)} and {b.dtype} {list(b.shape)}")
        elif bytes_of(a.contiguous()).ne(bytes_of(b.contiguous())).any():
            count = int((a != b).sum())
            lines.append(f"{key}: {count} of {a.numel()} elements differ, at most by {_distance(a, b):.3g}")
    for path in dict.fromkeys([*plain, *other_plain]):
        values = [p.get(path, "nothing") for p in (plain, other_plain)]
        if values[0] != values[1]:
            lines.append(f"{path}: {values[0]} and {values[1]}")
    print("\n".join(sorted(lines)) if lines else "no difference")
    return not lines


def _taken_apart(path: str, only: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors whose keys match, and the plain values, of a checkpoint in either form."""
    if catalog.is_file(path):
        skeleton, tensors = encode(_read_file(path))
        return {key: tensor for key, tensor in tensors.items() if fnmatchcase(key, only)}, dict(plain_values(skeleton))
    checkpoint = catalog.open_checkpoint(path)
    return read_tensors(checkpoint, (only,)), dict(plain_values(read_contents(checkpoint).state))


def export(arguments: argparse.Namespace) -> bool:
    """Write a checkpoint in another format."""
    target = Folder.at(arguments.target)
    if target.fs.exists(target.path):
        raise CheckpointError(f"{target} is there already; nothing is written over.")
    if arguments.to == "torch":
        state = load_checkpoint(arguments.checkpoint)
        if arguments.only != "*":
            raise CheckpointError("--only chooses tensors; --to torch writes the whole state.")
        save_file(state, arguments.target)
        return True
    tensors = load_tensors(arguments.checkpoint, only=arguments.only)
    if arguments.to == "safetensors":
        import safetensors.torch

        # Copies: tied weights share memory, which that format does not know.
        content = safetensors.torch.save({k: t.contiguous().clone() for k, t in tensors.items()}, {"format": "pt"})
        target.parent.make()
        target.parent.write_whole(target.name, content)
    else:
        from torch.distributed.checkpoint.state_dict_saver import save

        # By way of a local folder: torch renamed its writer for other file systems between 2.11 and 2.15.
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            save(dict(tensors), checkpoint_id=folder, no_dist=True)
            target.fs.put(folder + "/", target.path + "/", recursive=True)
    return True


def consolidate(arguments: argparse.Namespace) -> bool:
    """Write a checkpoint of many ranks as one shard."""
    if catalog.is_file(arguments.checkpoint):
        raise CheckpointError(f"{arguments.checkpoint} is one file already.")
    checkpoint = catalog.open_checkpoint(arguments.checkpoint)
    manifest = checkpoint.manifest
    loaded = Store(str(checkpoint.folder.parent.parent)).load(checkpoint.path)
    target = Store(arguments.store)
    if any(m.name == manifest.name for m in target.list()):
        raise CheckpointError(f"{target.folder} holds {manifest.name} already; nothing is written over.")
    print(target.save(loaded.state, step=manifest.step, name=manifest.name, rank_state=loaded.rank_state,
                      extra=manifest.extra).path)  # fmt: skip
    if manifest.world_size > 1:
        print(f"Of the ranks' own states (random numbers, places in streams) it has rank 0's, not the other "
              f"{manifest.world_size - 1}.")  # fmt: skip
    return True


def _read_file(path: str) -> dict[str, Any]:
    """What a checkpoint that is one file holds."""
    return dict(load_tensors(path)) if path.endswith(".safetensors") else load_file(path)


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).abs().max())
