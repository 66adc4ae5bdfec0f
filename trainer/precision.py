"""The number formats of a run: autocast and its scaler, or true half."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from trainer.errors import ConfigError

__all__ = ["Precision", "make_precision"]

_ALIASES = {
    "32": "32-true", "32-true": "32-true", "64": "64-true", "64-true": "64-true",
    "16": "16-mixed", "16-mixed": "16-mixed", "bf16": "bf16-mixed", "bf16-mixed": "bf16-mixed",
    "16-true": "16-true", "bf16-true": "bf16-true",
}  # fmt: skip
_TRUE = {"64-true": torch.float64, "16-true": torch.float16, "bf16-true": torch.bfloat16}


class Precision:
    """How one run computes.

    plain: no context is needed around the forward pass. scaler: only with 16-mixed. keeps_batches: batches are used
    as they are (floating-point tensors are converted otherwise).
    """

    def __init__(self, name: str, device: torch.device) -> None:
        self.name = name
        self.device = device
        self.dtype = _TRUE.get(name)
        self.plain = not name.endswith("-mixed")
        self.keeps_batches = self.dtype is None
        self.autocast_dtype = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}.get(name)
        self.scaler: torch.amp.GradScaler | None = None
        if name == "16-mixed":
            self.scaler = torch.amp.GradScaler(device.type)

    def context(self) -> AbstractContextManager[Any]:
        """What the forward pass runs in."""
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast_dtype)

    def convert_module(self, module: nn.Module) -> nn.Module:
        """The module in this precision, in place."""
        return module if self.dtype is None else module.to(self.dtype)

    def convert_batch(self, batch: Any) -> Any:
        """The batch with its floating-point tensors in this precision."""
        if self.dtype is None:
            return batch
        return tree_map(self._convert, batch)

    def _convert(self, value: Any) -> Any:
        return value.to(self.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    def state_dict(self) -> dict[str, Any]:
        """The scaler's state; empty without one."""
        return {} if self.scaler is None else self.scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put the scaler's state back."""
        if self.scaler is not None and state:
            self.scaler.load_state_dict(state)


def make_precision(name: str | int, device: torch.device) -> Precision:
    """The precision that Lightning's spelling names.

    Raises:
        ConfigError: there is no such precision, or this device has none of it.
    """
    known = _ALIASES.get(str(name))
    if known is None:
        raise ConfigError(f"precision={name!r}: one of {', '.join(dict.fromkeys(_ALIASES.values()))} is possible.")
    if known == "64-true" and device.type == "mps":
        raise ConfigError("precision='64-true': mps has no double precision.")
    return Precision(known, device)
