"""Models that are made on the meta device: weights come into being layer by layer, where and when there is room.

A layer's initial weights are a function of the seed and of the layer's name. So they are the same on any number of
ranks and with every strategy, whichever layers a rank fills in, and in whatever order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from trainer.errors import ModuleError
from trainer.seed import isolate_rng

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["NoInit", "is_meta", "materialize"]


class NoInit(TorchFunctionMode):
    """Layers made inside get memory, and no values: the functions of torch.nn.init do nothing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if kwargs and "tensor" in kwargs else args[0]
        return func(*args, **(kwargs or {}))


def is_meta(module: nn.Module) -> bool:
    """Whether any parameter or buffer has a shape only."""
    return any(t.is_meta for t in (*module.parameters(), *module.buffers()))


def materialize(root: nn.Module, device: torch.device, *, seed: int, part: nn.Module | None = None) -> None:
    """Give the layers of `part` (default: all of `root`) that are on the meta device their memory and first weights.

    A layer fills itself by `reset_parameters`, as torch's own do. After that the nearest module above it that has a
    method `_init_weights(layer)`, as many transformers do, may change it.

    Raises:
        ModuleError: a layer has parameters or buffers of its own and no way to fill them.
    """
    names = {id(m): name for name, m in root.named_modules()}
    initialise = _initialisers(root)
    # A weight that two layers share keeps what the first of them gave it.
    filled: dict[nn.Parameter, nn.Parameter] = {}
    with isolate_rng(), torch.no_grad():
        for layer in (part or root).modules():
            before = dict(layer.named_parameters(recurse=False))
            if not any(t.is_meta for t in (*before.values(), *layer.buffers(recurse=False))):
                continue
            layer.to_empty(device=device, recurse=False)
            _fill(layer, names[id(layer)], initialise[id(layer)], seed)
            for name, old in before.items():
                if old in filled:
                    setattr(layer, name, filled[old])
                else:
                    filled[old] = getattr(layer, name)


def _fill(layer: nn.Module, name: str, further: Callable[[nn.Module], Any] | None, seed: int) -> None:
    floating = [t for t in (*layer.parameters(recurse=False), *layer.buffers(recurse=False)) if t.is_floating_point()]
    for tensor in floating:
        tensor.fill_(torch.nan)  # what nobody fills must not pass for a weight
    key = int(np.random.SeedSequence([seed, *name.encode()]).generate_state(1, np.uint64)[0])
    torch.manual_seed(key >> 1)
    reset: Any = getattr(layer, "reset_parameters", None)
    if callable(reset):
        reset()
    if further is not None:
        further(layer)
    if (not callable(reset) and further is None) or any(t.isnan().any() for t in floating):
        raise ModuleError(
            f"{name or 'The module'} ({type(layer).__name__}) is on the meta device, and nothing fills all of its own "
            "parameters and buffers: give it a reset_parameters(), or a module above it an _init_weights(layer)."
        )


def _initialisers(root: nn.Module) -> dict[int, Callable[[nn.Module], Any] | None]:
    """For each layer the `_init_weights` of the nearest module above it, or its own."""
    found: dict[int, Callable[[nn.Module], Any] | None] = {}

    def walk(layer: nn.Module, above: Callable[[nn.Module], Any] | None) -> None:
        own = getattr(layer, "_init_weights", None)
        above = own if callable(own) else above
        found[id(layer)] = above
        for child in layer.children():
            walk(child, above)

    walk(root, None)
    return found
