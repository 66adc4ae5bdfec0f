"""Finding the checkpoints of a store, by their manifests alone, and removing them.

Torch-free: the writer's process imports it.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from trainer.checkpoint.folder import Folder
from trainer.checkpoint.manifest import DAMAGED, MANIFEST, Manifest, attempt_time
from trainer.errors import CheckpointDamagedError, CheckpointNotFoundError

if TYPE_CHECKING:
    import os

_THREADS = 8


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint: where its files lie, and its manifest."""

    folder: Folder
    manifest: Manifest

    @property
    def path(self) -> str:
        """Where it lies, by its name (without the attempt)."""
        return str(self.folder.parent)


def attempts_of(folder: Folder) -> list[Checkpoint]:
    """The committed, undamaged attempts at one name, newest first."""
    found = []
    for name in sorted((n for n in folder.sizes() if attempt_time(n) is not None), reverse=True):
        checkpoint = read_manifest(folder / name)
        if checkpoint is not None:
            found.append(checkpoint)
    return found


def read_manifest(folder: Folder, *, set_aside: bool = False) -> Checkpoint | None:
    """The checkpoint in an attempt's folder; None if it is not committed, or was set aside and is not asked for."""
    files = folder.sizes()
    if MANIFEST not in files or (DAMAGED in files and not set_aside):
        return None
    try:
        manifest = Manifest.parse(folder.read(MANIFEST), f"{folder}/{MANIFEST}")
        # By where it lies: a checkpoint may have a second name.
        return Checkpoint(folder, replace(manifest, name=folder.parent.name, attempt=folder.name))
    except (CheckpointDamagedError, FileNotFoundError):
        return None


def checkpoints_in(store: Folder) -> list[Checkpoint]:
    """The committed, undamaged checkpoints of a store, newest first: by step, then by time. One per name."""
    names = [name for name, size in store.sizes().items() if size < 0]
    with ThreadPoolExecutor(_THREADS) as pool:
        found = [attempts[0] for attempts in pool.map(lambda name: attempts_of(store / name), names) if attempts]
    return sorted(found, key=lambda c: (c.manifest.step, c.manifest.created), reverse=True)


def open_checkpoint(url: str | os.PathLike[str]) -> Checkpoint:
    """The checkpoint at `<store>/<name>`, `<store>/<name>/<attempt>`, or the newest of a whole store.

    Raises:
        CheckpointNotFoundError: there is none.
        CheckpointDamagedError: what there is was set aside; says why.
        CheckpointError: a newer version wrote it.
    """
    folder = Folder.at(url)
    if folder.name == MANIFEST:
        folder = folder.parent
    found = read_manifest(folder)
    if found is None:
        candidates = attempts_of(folder) or checkpoints_in(folder)
        if not candidates:
            aside = set_aside_at(folder)
            if aside:
                raise CheckpointDamagedError(f"{aside[0]} was set aside: {aside[0].read(DAMAGED).decode()}")
            raise CheckpointNotFoundError(
                f"There is no whole checkpoint at {folder}: neither a manifest, nor folders with one. A save that was "
                "interrupted leaves files without a manifest, which are not a checkpoint."
            )
        found = candidates[0]
    return found


def is_file(path: str) -> bool:
    """Whether a checkpoint is one file, not a folder of shards."""
    place = Folder.at(path)
    return bool(place.fs.isfile(place.path)) and place.name != MANIFEST


def is_unfinished(folder: Folder) -> bool:
    """Whether all that is there are attempts without a manifest: what is left of a save that died."""
    inside = folder.sizes()
    return bool(inside) and all(attempt_time(n) is not None and MANIFEST not in (folder / n).sizes() for n in inside)


def set_aside_at(folder: Folder) -> list[Folder]:
    """The attempts that were set aside as damaged, of the checkpoint at `<store>/<name>` or `.../<attempt>`."""
    inside = sorted((n for n in folder.sizes() if attempt_time(n) is not None), reverse=True)
    return [f for f in (folder, *(folder / name for name in inside)) if DAMAGED in f.sizes()]


def damaged_in(store: Folder) -> dict[str, bool]:
    """The attempts that were set aside as damaged (True), or whose manifest cannot be read (False), by path."""
    found = {}
    for name, size in store.sizes().items():
        attempts = [a for a in (store / name).sizes() if attempt_time(a) is not None] if size < 0 else []
        for folder in (store / name / attempt for attempt in attempts):
            files = folder.sizes()
            if DAMAGED in files:
                found[str(folder)] = True
            elif MANIFEST in files and read_manifest(folder) is None:
                found[str(folder)] = False
    return found


def is_complete(checkpoint: Checkpoint) -> bool:
    """Whether all files of a checkpoint are there with the sizes that its manifest states."""
    sizes = checkpoint.folder.sizes()
    return all(sizes.get(name) == size for file in checkpoint.manifest.files for name, size in file.sizes.items())


def remove_attempt(folder: Folder) -> None:
    """Remove one attempt, and the folder of its name if nothing else is in it."""
    # First the manifest: whoever looks in the meantime sees no checkpoint rather than half of one.
    folder.remove(MANIFEST)
    folder.remove_all()
    if not folder.parent.sizes():
        folder.parent.remove_all()


def dead_attempts(store: Folder, before: float) -> list[Folder]:
    """Attempts begun before a time (seconds since 1970) that were never committed."""
    found = []
    for name, size in store.sizes().items():
        if size < 0:
            times = {a: attempt_time(a) for a in (store / name).sizes()}
            attempts = [a for a, began in times.items() if began is not None and began < before]
            found += [store / name / a for a in attempts if MANIFEST not in (store / name / a).sizes()]
    return found
