"""A Module outside of training: ONNX and TorchScript files, for programs that have no trainer."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from trainer.errors import ConfigError, ModuleError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trainer.module import Module


def to_onnx(
    module: Module, file_path: Any = None, input_sample: Any = None, *, export_params: bool = True, **kwargs: Any
) -> Any:
    """See `Module.to_onnx`."""
    if kwargs.get("dynamo", True):
        try:
            import onnxscript  # noqa: F401 - only whether it is there
        except ImportError as error:
            raise ConfigError(
                "to_onnx() needs the packages onnx and onnxscript: pip install onnx onnxscript."
            ) from error
    sample = _sample(module, input_sample, "to_onnx(path, input_sample)")
    arguments = sample if isinstance(sample, tuple) else (sample,)
    with _at_rest(module):
        return torch.onnx.export(module, arguments, _path(file_path), export_params=export_params, **kwargs)


def to_torchscript(
    module: Module, file_path: Any = None, method: str = "script", example_inputs: Any = None, **kwargs: Any
) -> Any:
    """See `Module.to_torchscript`."""
    if method not in ("script", "trace"):
        raise ConfigError(f"to_torchscript(method={method!r}). Allowed: 'script', 'trace'.")
    with _at_rest(module):
        if method == "script":
            made: Any = torch.jit.script(module, **kwargs)
        else:
            sample = _sample(module, example_inputs, "to_torchscript(method='trace', example_inputs=...)")
            made = torch.jit.trace(func=module, example_inputs=sample, **kwargs)  # type: ignore[no-untyped-call]
    if file_path is not None:
        import fsspec

        with fsspec.open(str(file_path), "wb") as file:
            torch.jit.save(made, file)
    return made


def _sample(module: Module, given: Any, call: str) -> Any:
    """The given inputs, or the module's example_input_array, on its device."""
    from trainer.loading import to_device

    sample = module.example_input_array if given is None else given
    if sample is None:
        raise ModuleError(
            f"{type(module).__name__}.{call} needs inputs: pass them, or set self.example_input_array in __init__."
        )
    return to_device(sample, module.device)


def _path(path: Any) -> Any:
    return str(path) if isinstance(path, Path) else path


@contextmanager
def _at_rest(module: Module) -> Iterator[None]:
    """In eval mode, without gradients, and without the Trainer, which no file can hold."""
    modes = {m: m.training for m in module.modules()}
    kept = {m: m.__dict__["_trainer"] for m in module.modules() if "_trainer" in m.__dict__}
    try:
        with torch.no_grad():
            for child in kept:
                child.__dict__.update(_trainer=None, _exporting=True)
            module.eval()
            yield
    finally:
        for child, trainer in kept.items():
            child.__dict__.update(_trainer=trainer, _exporting=False)
        for child, mode in modes.items():
            child.training = mode
