"""`ModelSummary`: the layers of a model, their parameters and, with an example input, shapes and operations."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trainer.callbacks.callback import Callback
from trainer.errors import ConfigError
from trainer.loggers.table import text_table

if TYPE_CHECKING:
    from trainer.module import Module
    from trainer.trainer import Trainer


@dataclass(frozen=True)
class LayerRow:
    """One layer: the shapes are None without an example input, `flops` as well."""

    name: str
    type: str
    parameters: int
    trainable: int
    training: bool
    in_size: Any = None
    out_size: Any = None
    flops: int | None = None


class Summary:
    """The layers of a model down to `max_depth` (-1: all of them, 0: only the totals).

    If the model has an `example_input_array`, one forward pass without gradients, in the mode each layer is in,
    finds shapes and floating point operations.

    Raises:
        ConfigError: `max_depth` is below -1.
    """

    def __init__(self, model: nn.Module, max_depth: int = 1) -> None:
        if max_depth < -1:
            raise ConfigError(f"ModelSummary(max_depth={max_depth}). Allowed: -1 (all layers), 0 (totals), or a depth.")
        self.max_depth = max_depth
        layers = {name: m for name, m in model.named_modules() if name and self._shows(name)}
        shapes, flops = _trace(model, layers)
        self.layers = [
            LayerRow(
                name,
                type(layer).__name__,
                sum(_size(p) for p in layer.parameters()),
                sum(_size(p) for p in layer.parameters() if p.requires_grad),
                layer.training,
                *shapes.get(name, (None, None)),
                None if flops is None else flops.get(name, 0),
            )
            for name, layer in layers.items()
        ]
        parameters = list(model.parameters())
        self.total_parameters = sum(_size(p) for p in parameters)
        self.trainable_parameters = sum(_size(p) for p in parameters if p.requires_grad)
        self.model_size = sum(_size(p) * p.element_size() for p in parameters) / 1e6
        self.total_training_modes = {
            "train": sum(m.training for m in model.modules()) - model.training,
            "eval": sum(not m.training for m in model.modules()) - (not model.training),
        }
        self.total_flops = None if flops is None else flops.get("", 0)
        inside = {id(p) for layer in layers.values() for p in layer.parameters()}
        self._own = sum(_size(p) for p in parameters if id(p) not in inside) if layers else 0

    def _shows(self, name: str) -> bool:
        return self.max_depth == -1 or name.count(".") < self.max_depth

    def columns(self) -> tuple[dict[str, str], list[list[str]]]:
        """Titles with their alignment, and the rows, as text."""
        headers = {"": ">", "Name": "<", "Type": "<", "Params": ">", "Mode": "<"}
        traced = self.total_flops is not None
        if traced:
            headers |= {"FLOPs": ">", "In sizes": ">", "Out sizes": ">"}
        rows = []
        for number, row in enumerate(self.layers):
            cells = [str(number), row.name, row.type, human_count(row.parameters), "train" if row.training else "eval"]
            if traced:
                cells += [human_count(row.flops or 0), _shape_text(row.in_size), _shape_text(row.out_size)]
            rows.append(cells)
        if self._own:
            # Parameters that stand directly on the module are in no row above.
            cells = ["", "(other parameters)", "", human_count(self._own), ""]
            rows.append(cells + [""] * (len(headers) - len(cells)))
        return headers, rows

    def totals(self) -> list[tuple[str, str]]:
        """The lines below the table."""
        frozen = self.total_parameters - self.trainable_parameters
        modes = self.total_training_modes
        lines = [
            ("Trainable params", human_count(self.trainable_parameters)),
            ("Non-trainable params", human_count(frozen)),
            ("Total params", human_count(self.total_parameters)),
            ("Total estimated model params size (MB)", f"{self.model_size:.3f}"),
            ("Modules in train mode", str(modes["train"])),
            ("Modules in eval mode", str(modes["eval"])),
        ]
        if self.total_flops is not None:
            lines.append(("Total FLOPs", human_count(self.total_flops)))
        return lines

    def __str__(self) -> str:
        lines = [f"{value:<9} {what}" for what, value in self.totals()]
        if not self.max_depth:
            return "\n".join(lines)
        text = text_table(*self.columns())
        return "\n".join([text, "-" * len(text.splitlines()[1]), *lines])


class ModelSummary(Callback):
    """Prints the model's layers at the start of `fit`, on rank 0.

    Args:
        max_depth: how deep to go into layers of layers; -1 shows all, 0 only the totals.
    """

    def __init__(self, max_depth: int = 1) -> None:
        if max_depth < -1:
            raise ConfigError(f"{type(self).__name__}(max_depth={max_depth}). Allowed: -1 (all layers) or more.")
        self._max_depth = max_depth

    def on_fit_start(self, trainer: Trainer, pl_module: Module) -> None:
        # Counting is done on every rank, because sharded parameters may need all of them in the forward pass.
        summary = Summary(pl_module, self._max_depth)
        if trainer.is_global_zero:
            self.show(summary)

    def show(self, summary: Summary) -> None:
        """Print it; override to put it elsewhere."""
        print(summary, flush=True)  # noqa: T201 - its purpose


class RichModelSummary(ModelSummary):
    """The same as a rich table.

    Args:
        max_depth: as for ModelSummary.
        summarize_kwargs: for `rich.table.Table`.
    """

    def __init__(self, max_depth: int = 1, **summarize_kwargs: Any) -> None:
        super().__init__(max_depth)
        self._table_kwargs = summarize_kwargs

    def show(self, summary: Summary) -> None:
        from rich.console import Console
        from rich.table import Table

        console = Console()
        headers, rows = summary.columns()
        if summary.max_depth:
            drawn = Table(header_style="bold", **self._table_kwargs)
            for title, align in headers.items():
                drawn.add_column(title, justify="right" if align == ">" else "left")
            for row in rows:
                drawn.add_row(*row)
            console.print(drawn)
        for what, value in summary.totals():
            console.print(f"[bold]{what}[/]: {value}")


def human_count(number: int) -> str:
    """A count with three significant digits and a unit: `1.2 K`, `340 M`, `7 B`.

    >>> human_count(123), human_count(1234), human_count(7_000_000_000)
    ('123', '1.2 K', '7.0 B')
    """
    if number < 1000:
        return str(number)
    power = min(int(math.log10(number)) // 3, 4)
    scaled = number / 1000**power
    return f"{scaled:,.1f} {' KMBT'[power]}" if scaled < 100 else f"{scaled:,.0f} {' KMBT'[power]}"


def _size(parameter: Tensor) -> int:
    if isinstance(parameter, nn.parameter.UninitializedParameter):
        return 0  # a lazy layer that has not seen its first input
    return parameter.numel()


def _trace(model: nn.Module, layers: dict[str, nn.Module]) -> tuple[dict[str, tuple[Any, Any]], dict[str, int] | None]:
    """Shapes and operations per layer from one forward pass; nothing and None without an example input."""
    example = getattr(model, "example_input_array", None)
    if example is None:
        return {}, None
    from torch.utils.flop_counter import FlopCounterMode

    shapes: dict[str, tuple[Any, Any]] = {}
    handles = [
        layer.register_forward_hook(
            lambda _, inputs, output, name=name: shapes.update({name: (_shapes(inputs), _shapes(output))})
        )
        for name, layer in layers.items()
        if not isinstance(layer, torch.jit.ScriptModule)
    ]
    parameter = next(model.parameters(), None)
    example = _to(example, torch.device("cpu") if parameter is None else parameter.device)
    root = type(model).__name__
    try:
        # The counter resets itself when entered, and its names begin with the model's class.
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            if isinstance(example, dict):
                model(**example)
            elif isinstance(example, tuple):
                model(*example)
            else:
                model(example)
    finally:
        for handle in handles:
            handle.remove()
    counts = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    flops = {n.removeprefix(root).removeprefix("."): c for n, c in counts.items() if n.startswith(root)}
    return shapes, {"": counter.get_total_flops()} | {k: v for k, v in flops.items() if k}


def _to(value: Any, device: torch.device) -> Any:
    from torch.utils._pytree import tree_map

    return tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, value)


def _shapes(value: Any) -> Any:
    if isinstance(value, Tensor):
        return list(value.shape)
    if isinstance(value, (list, tuple)):
        found = [_shapes(v) for v in value]
        return found[0] if len(found) == 1 else found
    return "?"


def _shape_text(shape: Any) -> str:
    return "?" if shape is None else str(shape)
