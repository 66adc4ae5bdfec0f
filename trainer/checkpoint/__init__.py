"""Checkpoints that are whole or absent, and verified when read: `Store` for gangs, `save_file` for one file."""

from __future__ import annotations

from trainer.checkpoint.background import Saved
from trainer.checkpoint.file import load_checkpoint, load_file, save_file
from trainer.checkpoint.manifest import Manifest
from trainer.checkpoint.retention import Retention
from trainer.checkpoint.store import Loaded, Store
from trainer.checkpoint.weights import load_tensors, load_weights

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
