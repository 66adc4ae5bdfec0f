"""Seeds, and the random state of a process: python, numpy, torch, and its device."""

from __future__ import annotations

import os
import random
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from trainer.errors import ConfigError
from trainer.ranks import rank_zero_info

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["chosen_seed", "isolate_rng", "rng_state", "seed_everything", "set_rng_state"]

# Lightning's names, so that its scripts and their subprocesses see the same.
SEED_VARIABLE = "PL_GLOBAL_SEED"
WORKERS_VARIABLE = "PL_SEED_WORKERS"


def seed_everything(seed: int | None = None, workers: bool = False, verbose: bool = True) -> int:
    """Seed python, numpy and torch on this rank; returns the seed.

    seed: 0 to 2**32 - 1; None takes PL_GLOBAL_SEED, else 0. workers is accepted as Lightning has it: the random
    state of loader workers is always keyed by (seed, epoch, sample) here.

    Raises:
        ConfigError: the seed is no such number.
    """
    if seed is None:
        text = os.environ.get(SEED_VARIABLE, "0")
        try:
            seed = int(text)
        except ValueError as error:
            raise ConfigError(f"{SEED_VARIABLE}={text!r} is not a whole number.") from error
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or not 0 <= seed <= 0xFFFFFFFF:
        raise ConfigError(f"seed={seed!r} is not a whole number from 0 to {0xFFFFFFFF}.")
    seed = int(seed)
    if verbose:
        rank_zero_info(f"Seed set to {seed}")
    os.environ[SEED_VARIABLE] = str(seed)
    os.environ[WORKERS_VARIABLE] = str(int(workers))
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    return seed


def chosen_seed() -> int | None:
    """The seed of the newest `seed_everything` in this process or its parent, if any."""
    text = os.environ.get(SEED_VARIABLE)
    return int(text) if text is not None and text.isdigit() else None


def rng_state() -> dict[str, Any]:
    """The state of all generators of this process, as tensors, arrays and plain values."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": {"version": version, "internal": list(internal), "gauss": gauss},
        "numpy": {
            "name": str(name),
            "keys": torch.from_numpy(np.asarray(keys, dtype=np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached": float(cached),
        },
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state["cuda"] = torch.cuda.get_rng_state()
    if torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Put back what `rng_state` returned."""
    python, numpy_state = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["internal"]), python["gauss"]))
    keys = np.asarray(numpy_state["keys"], dtype=np.uint32)
    np.random.set_state(
        (numpy_state["name"], keys, numpy_state["position"], numpy_state["has_gauss"], numpy_state["cached"])
    )
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
    if "mps" in state and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"].cpu())


@contextmanager
def isolate_rng() -> Iterator[None]:
    """What is drawn inside does not change what is drawn after."""
    state = rng_state()
    try:
        yield
    finally:
        set_rng_state(state)
