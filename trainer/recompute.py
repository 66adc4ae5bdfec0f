"""Activation checkpointing: layers whose forward is run again in backward, instead of keeping what it made."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from trainer.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["recompute"]


def recompute(module: nn.Module, which: type[nn.Module] | tuple[type[nn.Module], ...] | Callable[[Any], bool]) -> int:
    """Let the layers of these classes, or those that a function chooses, recompute in backward; returns how many.

    To be called once the layers exist, such as at the end of `Module.configure_model`, with every strategy. Names in
    the state_dict stay as they are, and dropout drops the same elements again. Of layers within chosen layers only
    the outer ones recompute.

    Raises:
        ConfigError: there is no such layer.
    """
    found: list[nn.Module] = []

    def walk(parent: nn.Module) -> None:
        for layer in parent.children():
            if isinstance(layer, which) if isinstance(which, (type, tuple)) else which(layer):
                found.append(layer)
            else:
                walk(layer)

    walk(module)
    if not found:
        known = sorted({type(m).__name__ for m in module.modules() if m is not module})
        raise ConfigError(f"recompute found none of {which!r} in {type(module).__name__}. It has: {', '.join(known)}.")
    for layer in dict.fromkeys(found):
        kind = type(layer)
        if not issubclass(kind, _Recomputed):
            # By its class and not by a function in the instance: a copy of the module must call its own layers.
            layer.__class__ = _class_for(kind)
    return len(dict.fromkeys(found))


class _Recomputed(nn.Module):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return super().forward(*args, **kwargs)
        from torch.utils.checkpoint import checkpoint

        return checkpoint(super().forward, *args, use_reentrant=False, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made on the fly: a pickle names the layer's own, from which it is made again.
        return _restore, (type(self).__bases__[1], dict(vars(self)))


_classes: dict[type[nn.Module], type[nn.Module]] = {}


def _class_for(kind: type[nn.Module]) -> type[nn.Module]:
    if kind not in _classes:
        _classes[kind] = type(kind.__name__, (_Recomputed, kind), {"__module__": kind.__module__})
    return _classes[kind]


def _restore(kind: type[nn.Module], state: dict[str, Any]) -> nn.Module:
    layer = kind.__new__(kind)
    layer.__dict__.update(state)
    layer.__class__ = _class_for(kind)
    return layer
