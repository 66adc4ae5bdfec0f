"""The number formats of a run: autocast and its scaler, or true half."""

from __future__ import annotations

from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trainer.errors import ConfigError
from trainer.loading import map_tensors

if TYPE_CHECKING:
    from collections.abc import Iterator

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
        self.plain = name == "32-true"
        self.keeps_batches = self.dtype is None
        self.autocast_dtype = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}.get(name)
        # One object for all steps: making it costs as much as entering it.
        self._autocast = None if self.autocast_dtype is None else torch.autocast(device.type, self.autocast_dtype)
        self.scaler: torch.amp.GradScaler | None = None
        if name == "16-mixed":
            self.scaler = torch.amp.GradScaler(device.type)

    def context(self) -> AbstractContextManager[Any]:
        """What the forward pass runs in."""
        if self._autocast is not None:
            return self._autocast
        return self.weights()

    def weights(self) -> AbstractContextManager[Any]:
        """What weights are made in."""
        return nullcontext() if self.dtype is None else _default_dtype(self.dtype)

    def convert_module(self, module: nn.Module) -> nn.Module:
        """The module in this precision, in place."""
        return module if self.dtype is None else module.to(self.dtype)

    def convert_batch(self, batch: Any) -> Any:
        """The batch with its floating-point tensors in this precision."""
        if self.dtype is None:
            return batch
        return map_tensors(batch, self._convert)

    def _convert(self, value: Tensor) -> Tensor:
        return value.to(self.dtype) if value.is_floating_point() else value

    def state_dict(self) -> dict[str, Any]:
        """The scaler's state; empty without one."""
        return {} if self.scaler is None else self.scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put the scaler's state back."""
        if self.scaler is not None and state:
            self.scaler.load_state_dict(state)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Tensors that a step makes without a dtype fit the weights."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


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
