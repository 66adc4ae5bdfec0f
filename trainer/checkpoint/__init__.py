"""Checkpoints that are whole or absent, and verified when read: `Store` for gangs, `save_file` for one file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainer.late import late

if TYPE_CHECKING:
    from trainer.checkpoint.background import Saved
    from trainer.checkpoint.file import load_checkpoint, load_file, save_file
    from trainer.checkpoint.manifest import Manifest
    from trainer.checkpoint.retention import Retention
    from trainer.checkpoint.store import Loaded, Store
    from trainer.checkpoint.weights import load_tensors, load_weights

# Imported when they are first used: `python -m trainer.checkpoint ls` needs no torch.
_HOME = {
    "Loaded": "store",
    "Manifest": "manifest",
    "Retention": "retention",
    "Saved": "background",
    "Store": "store",
    "load_checkpoint": "file",
    "load_file": "file",
    "load_tensors": "weights",
    "load_weights": "weights",
    "save_file": "file",
}

__all__ = [
    "Loaded",
    "Manifest",
    "Retention",
    "Saved",
    "Store",
    "load_checkpoint",
    "load_file",
    "load_tensors",
    "load_weights",
    "save_file",
]

__getattr__, __dir__ = late(__name__, _HOME)
