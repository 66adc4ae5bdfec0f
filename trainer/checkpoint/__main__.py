"""`python -m trainer.checkpoint`: look at, check, compare, convert and clean up checkpoints, anywhere fsspec reaches.

`launch ckpt` starts it. It needs neither a GPU nor the training code, and runs no code from the files.
"""

# ruff: noqa: T201 - a command prints
from __future__ import annotations

import argparse
import json
import sys
import time
from typing import TYPE_CHECKING, Any

from trainer.checkpoint import catalog, retention, saved
from trainer.checkpoint.contents import plain_values, read_contents, verify
from trainer.checkpoint.folder import Folder
from trainer.checkpoint.manifest import DAMAGED
from trainer.checkpoint.retention import Retention
from trainer.checkpoint.seal import verify_file
from trainer.errors import CheckpointDamagedError, CheckpointError, TrainerError

if TYPE_CHECKING:
    from collections.abc import Callable

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
    if catalog.is_file(arguments.checkpoint):
        # What a pickle says is read without running it by torch alone.
        return _with_tensors("show_file")(arguments)
    checkpoint = catalog.open_checkpoint(arguments.checkpoint)
    manifest, contents = checkpoint.manifest, read_contents(checkpoint)
    print(f"{checkpoint.folder}\nstep {manifest.step}, {manifest.world_size} ranks, {manifest.shard_bytes} bytes")
    print(f"written by {json.dumps(manifest.versions)}; extra {json.dumps(manifest.extra)}")
    for key, pieces in contents.pieces.items():
        ranks = sorted({rank for rank, _ in pieces})
        where = f"rank {ranks[0]}" if len(ranks) == 1 else f"{len(ranks)} ranks"
        print(f"{key}  {pieces[0][1].dtype} {list(pieces[0][1].shape)}  {where}")
    for path, value in plain_values(contents.state):
        print(f"{path} = {value}")
    return _OK


def _verify(arguments: argparse.Namespace) -> int:
    if catalog.is_file(arguments.checkpoint):
        return _verify_file(arguments)
    checkpoint = _even_if_set_aside(arguments.checkpoint)
    problems = verify(checkpoint, print)
    if not problems:
        read_contents(checkpoint)
    print("\n".join(problems) if problems else f"{checkpoint.path}: whole")
    return _BAD if problems else _OK


def _verify_file(arguments: argparse.Namespace) -> int:
    place = Folder.at(arguments.checkpoint)
    try:
        sealed = not place.name.endswith(".safetensors") and verify_file(place)[0]
    except CheckpointDamagedError as error:
        print(error)
        return _BAD
    if not sealed:
        return _with_tensors("verify_foreign_file")(arguments)
    print(f"{arguments.checkpoint}: whole")
    return _OK


def _with_tensors(name: str) -> Callable[[argparse.Namespace], int]:
    """A command that needs torch, whose import takes 1.5 s: only when it runs."""

    def run(arguments: argparse.Namespace) -> int:
        from trainer.checkpoint import tensor_commands

        return _OK if getattr(tensor_commands, name)(arguments) else _BAD

    return run


def _even_if_set_aside(url: str) -> catalog.Checkpoint:
    aside = catalog.set_aside_at(Folder.at(url))
    found = catalog.read_manifest(aside[0], set_aside=True) if aside else None
    if found is None:
        return catalog.open_checkpoint(url)
    print(f"{aside[0]} was set aside; remove {DAMAGED} in it, and it counts again")
    return found


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
    diff = command("diff", _with_tensors("diff"), "compare two checkpoints; exit 1 if they differ", "one", "other")
    export = command("export", _with_tensors("export"), "write a checkpoint in another format", "checkpoint", "target")
    export.add_argument("--to", choices=["safetensors", "torch", "dcp"], default="safetensors",
                        help="torch: the whole state in one file; the others: its tensors by key")  # fmt: skip
    for which in (diff, export):
        which.add_argument("--only", default="*", metavar="PATTERN", help="keys, as a shell pattern")
    command("consolidate", _with_tensors("consolidate"), "write a checkpoint of many ranks as one shard into a store",
            "checkpoint", "store")  # fmt: skip
    gc = command("gc", _gc, "remove attempts that were never committed", "store")
    gc.add_argument("--older-than", type=float, default=24.0, metavar="HOURS", help="begun so long ago (default 24)")
    gc.add_argument("--last", type=int, metavar="K", help="and all checkpoints but the newest K")
    gc.add_argument("--damaged", action="store_true", help="and what was set aside as damaged")
    gc.add_argument("--dry-run", action="store_true", help="only say what would go")
    return parser


if __name__ == "__main__":
    sys.exit(main())
