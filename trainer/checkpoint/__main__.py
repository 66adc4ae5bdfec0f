"""`python -m trainer.checkpoint`: look at, check, compare, convert and clean up checkpoints, anywhere fsspec reaches.

`launch ckpt` starts it. It needs neither a GPU nor the training code, and runs no code from the files.
"""

# ruff: noqa: T201 - a command prints
from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import warnings
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from trainer.checkpoint import catalog, retention, saved
from trainer.checkpoint.file import has_checksum, load_checkpoint, load_file, save_file
from trainer.checkpoint.folder import Folder
from trainer.checkpoint.manifest import DAMAGED, MANIFEST
from trainer.checkpoint.reader import read_contents, verify
from trainer.checkpoint.retention import Retention
from trainer.checkpoint.shards import bytes_of
from trainer.checkpoint.store import Store
from trainer.checkpoint.values import encode
from trainer.checkpoint.weights import load_tensors, read_tensors
from trainer.errors import CheckpointDamagedError, CheckpointError, TrainerError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from trainer.checkpoint.values import Json

# Exit codes: all is well; what was looked at is damaged or differs; it could not be looked at, or wrong usage.
_OK, _BAD, _ERROR = 0, 1, 2
# What checkpoints that are one file are called.
_ENDINGS = (".ckpt", ".pt", ".pth", ".safetensors")


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        code: int = arguments.run(arguments)
    except (TrainerError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return _ERROR
    return code


def _ls(arguments: argparse.Namespace) -> int:
    store = Folder.at(arguments.store)
    found = catalog.checkpoints_in(store)
    files = {name: size for name, size in store.sizes().items() if size >= 0 and name.endswith(_ENDINGS)}
    if not found and not files:
        _check_there(store)
    for checkpoint in found:
        manifest = checkpoint.manifest
        made = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(manifest.created))
        size = f"{manifest.shard_bytes / 2**20:,.1f} MiB"
        print(f"{manifest.step:>12}  {made}  {manifest.world_size:>5} ranks  {size:>16}  {manifest.name}")
    for name, bytes_ in sorted(files.items()):
        size = f"{bytes_ / 2**20:,.1f} MiB"
        print(f"{'file':>12}  {store.modified(name):%Y-%m-%d %H:%M:%S}  {'':>11}  {size:>16}  {name}")
    for path, known in catalog.damaged_in(store).items():
        print(f"{'damaged':>12}  {'set aside' if known else 'its manifest cannot be read'}: {path}")
    return _OK


def _show(arguments: argparse.Namespace) -> int:
    if _is_file(arguments.checkpoint):
        skeleton, tensors = encode(_one_file(arguments.checkpoint))
        print(f"{arguments.checkpoint}\none file")
        for key, tensor in tensors.items():
            print(f"{key}  {tensor.dtype} {list(tensor.shape)}")
    else:
        checkpoint = catalog.open_checkpoint(arguments.checkpoint)
        manifest, contents = checkpoint.manifest, read_contents(checkpoint)
        print(f"{checkpoint.folder}\nstep {manifest.step}, {manifest.world_size} ranks, {manifest.shard_bytes} bytes")
        print(f"written by {json.dumps(manifest.versions)}; extra {json.dumps(manifest.extra)}")
        for key, pieces in contents.pieces.items():
            ranks = [rank for rank, _ in pieces]
            where = f"rank {ranks[0]}" if len(ranks) == 1 else f"{len(ranks)} ranks"
            print(f"{key}  {pieces[0][1].dtype} {list(pieces[0][1].shape)}  {where}")
        skeleton = contents.state
    for path, value in _plain(skeleton):
        print(f"{path} = {value}")
    return _OK


def _verify(arguments: argparse.Namespace) -> int:
    if _is_file(arguments.checkpoint):
        problems, where = [], arguments.checkpoint
        try:
            _one_file(where)
        except CheckpointDamagedError as error:
            problems.append(str(error))
        if not problems and not has_checksum(where):
            print(f"{where}: can be read, but holds no checksum of ours: a changed byte would not be noticed")
            return _OK
    else:
        checkpoint = _even_if_set_aside(arguments.checkpoint)
        problems, where = verify(checkpoint, print), checkpoint.path
        if not problems:
            read_contents(checkpoint)
    for problem in problems:
        print(problem)
    if not problems:
        print(f"{where}: whole")
    return _BAD if problems else _OK


def _even_if_set_aside(url: str) -> catalog.Checkpoint:
    aside = catalog.set_aside_at(Folder.at(url))
    found = catalog.read_manifest(aside[0], set_aside=True) if aside else None
    if found is None:
        return catalog.open_checkpoint(url)
    print(f"{aside[0]} was set aside; remove {DAMAGED} in it, and it counts again")
    return found


def _diff(arguments: argparse.Namespace) -> int:
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
    return _BAD if lines else _OK


def _taken_apart(path: str, only: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors whose keys match, and the plain values, of a checkpoint in either form."""
    if _is_file(path):
        skeleton, tensors = encode(_one_file(path))
        return {key: tensor for key, tensor in tensors.items() if fnmatchcase(key, only)}, dict(_plain(skeleton))
    checkpoint = catalog.open_checkpoint(path)
    return read_tensors(checkpoint, (only,)), dict(_plain(read_contents(checkpoint).state))


def _export(arguments: argparse.Namespace) -> int:
    target = Folder.at(arguments.target)
    if target.fs.exists(target.path):
        raise CheckpointError(f"{target} is there already; nothing is written over.")
    if arguments.to == "torch":
        state = load_checkpoint(arguments.checkpoint)
        if arguments.only != "*":
            raise CheckpointError("--only chooses tensors; --to torch writes the whole state.")
        save_file(state, arguments.target)
        return _OK
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
    return _OK


def _consolidate(arguments: argparse.Namespace) -> int:
    if _is_file(arguments.checkpoint):
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
    return _OK


def _gc(arguments: argparse.Namespace) -> int:
    store = Folder.at(arguments.store)
    _check_there(store)
    before = time.time() - arguments.older_than * 3600
    dead = catalog.dead_attempts(store, before)
    for folder in dead:
        print(f"never committed: {folder}")
        if not arguments.dry_run:
            catalog.remove_attempt(folder)
    for part in saved.unfinished_parts(store, before):
        print(f"never finished: {part}")
        if not arguments.dry_run:
            part.unlink(missing_ok=True)
    if arguments.damaged:
        for path in (p for p, set_aside in catalog.damaged_in(store).items() if set_aside):
            print(f"damaged: {path}")
            if not arguments.dry_run:
                catalog.remove_attempt(Folder.at(path))
    return _keep_last(store, arguments.last, dry_run=arguments.dry_run) if arguments.last is not None else _OK


def _keep_last(store: Folder, count: int, *, dry_run: bool) -> int:
    policy = Retention(last=count)
    unwanted = policy.removable([c.manifest for c in catalog.checkpoints_in(store)])
    if not dry_run and unwanted and not retention.remove_unwanted(store, policy, lambda c: not verify(c)):
        print(f"Nothing older is removed: of the last {count} not one is whole (see verify).")
        return _BAD
    for manifest in unwanted:
        print(f"older than the last {count}: {store / manifest.name}")
    return _OK


def _check_there(store: Folder) -> None:
    if not store.sizes():
        raise CheckpointError(f"There is nothing at {store}.")


def _one_file(path: str) -> dict[str, Any]:
    """What a checkpoint that is one file holds."""
    return dict(load_tensors(path)) if path.endswith(".safetensors") else load_file(path)


def _is_file(path: str) -> bool:
    place = Folder.at(path)
    return bool(place.fs.isfile(place.path)) and place.name != MANIFEST


def _plain(skeleton: Json, path: str = "") -> Iterator[tuple[str, str]]:
    """The plain values of a state by their paths, as JSON."""
    if isinstance(skeleton, dict) and skeleton.keys() & {"$dict", "$ordered"}:
        (pairs,) = skeleton.values()
        if all(isinstance(key, (str, int)) for key, _ in pairs):
            skeleton = {str(key): value for key, value in pairs}
    if isinstance(skeleton, dict) and not any(key.startswith("$") for key in skeleton):
        for key, value in skeleton.items():
            yield from _plain(value, f"{path}.{key}" if path else key)
    elif isinstance(skeleton, dict) and "$tuple" in skeleton:
        yield from _plain(skeleton["$tuple"], path)
    elif isinstance(skeleton, list):
        for index, value in enumerate(skeleton):
            yield from _plain(value, f"{path}.{index}")
    elif not (isinstance(skeleton, dict) and skeleton.keys() & {"$tensor", "$complex_tensor", "$array"}):
        yield path, json.dumps(skeleton)


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).abs().max())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m trainer.checkpoint", description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Any, text: str, *names: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(run=run)
        for positional in names:
            added.add_argument(positional, help="a path or fsspec URL")
        return added

    command("ls", _ls, "list the checkpoints of a store, newest first", "store")
    command("show", _show, "print what a checkpoint holds", "checkpoint")
    command("verify", _verify, "read every byte of a checkpoint; exit 1 if any is damaged", "checkpoint")
    diff = command("diff", _diff, "compare two checkpoints; exit 1 if they differ", "one", "other")
    export = command("export", _export, "write a checkpoint in another format", "checkpoint", "target")
    export.add_argument("--to", choices=["safetensors", "torch", "dcp"], default="safetensors",
                        help="torch: the whole state in one file; the others: its tensors by key")  # fmt: skip
    for which in (diff, export):
        which.add_argument("--only", default="*", metavar="PATTERN", help="keys, as a shell pattern")
    command("consolidate", _consolidate, "write a checkpoint of many ranks as one shard into a store", "checkpoint",
            "store")  # fmt: skip
    gc = command("gc", _gc, "remove attempts that were never committed", "store")
    gc.add_argument("--older-than", type=float, default=24.0, metavar="HOURS", help="begun so long ago (default 24)")
    gc.add_argument("--last", type=int, metavar="K", help="and all checkpoints but the newest K")
    gc.add_argument("--damaged", action="store_true", help="and what was set aside as damaged")
    gc.add_argument("--dry-run", action="store_true", help="only say what would go")
    return parser


if __name__ == "__main__":
    sys.exit(main())
