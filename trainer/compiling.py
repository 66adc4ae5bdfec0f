"""torch.compile around what a strategy can compile as one piece; what it compiles is counted, and told at the end.

One process and DDP compile the steps of the module as a whole, with the loss. With FSDP2 a whole step would break at
every gathering of weights, so each sharded unit is compiled for itself, as in manual optimization each child of the
module is. Names in the state_dict stay as they are.
"""

from __future__ import annotations

import inspect
import sys
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from trainer.errors import ConfigError
from trainer.module import Module
from trainer.ranks import rank_zero_warn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

__all__ = ["KEYS", "Compiling", "check_compile"]

# torch.compile's own, and `blocks`.
KEYS = ("backend", "mode", "options", "dynamic", "fullgraph", "blocks")
_STEPS = ("training_step", "validation_step", "test_step", "predict_step")
# Modes that replay recorded CUDA graphs, which must be told where a step begins.
_GRAPHS = ("reduce-overhead", "max-autotune")
# So often one function may be compiled anew before a warning.
_RECOMPILES = 4
# torch gives up after 8 shapes and runs the rest uncompiled: a resumed run, which met others first, would not compute
# what went on would have.
_NO_LIMIT = 1 << 30


def check_compile(given: Any) -> dict[str, Any] | None:
    """The options in `Trainer(compile=...)`; None if nothing is compiled.

    Raises:
        ConfigError: there is no such key, backend or mode, or two contradict each other.
    """
    if given in (None, False):
        return None
    options = {} if given is True else given
    if not isinstance(options, dict) or set(options) - set(KEYS):
        raise ConfigError(
            f"compile={given!r} is not allowed. Allowed: True, False, or a dict with keys of {', '.join(KEYS)}."
        )
    blocks = options.get("blocks")
    kinds = blocks if isinstance(blocks, tuple) else (blocks,)
    if blocks is not None and not all(isinstance(kind, type) and issubclass(kind, nn.Module) for kind in kinds):
        raise ConfigError(f"compile={{'blocks': {blocks!r}}} is not allowed. Allowed: a class of layers, or a tuple.")
    backend, mode = options.get("backend"), options.get("mode")
    if isinstance(backend, str) and backend not in (known := torch.compiler.list_backends(exclude_tags=())):
        raise ConfigError(f"compile={{'backend': {backend!r}}}: torch has {', '.join(known)}, or give a function.")
    if mode is not None and backend in (None, "inductor"):
        from torch._inductor import list_mode_options

        if mode not in (known := list(list_mode_options())):
            raise ConfigError(f"compile={{'mode': {mode!r}}}: one of {', '.join(known)} is possible.")
    if mode is not None and options.get("options") is not None:
        raise ConfigError("compile={'mode': ..., 'options': ...}: give one of them; a mode is a set of options.")
    # Shapes are compiled one by one unless told otherwise: torch's own way, to compile the second shape for all of
    # them, lets sums depend on which shapes came first, and a resumed run would not compute what went on would have.
    return {"dynamic": False} | options


class Compiling:
    """Compiles for one run of the Trainer, and counts. Use as a context manager around the run.

    compiled: functions (and parts of them, where a graph broke). recompiled: how often one was compiled anew, because
    what it was compiled for did not hold. seconds: spent compiling. first_step_s: the first training step of the
    newest fit, with what was compiled in it.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.compiled = self.recompiled = 0
        self.seconds = 0.0
        self.first_step_s: float | None = None
        self._options = {k: v for k, v in options.items() if k != "blocks"}
        self._blocks = options.get("blocks")
        self._marks = False
        self._changed: list[nn.Module] = []
        self._undo: list[Callable[[], object]] = []
        self._anew: Counter[str] = Counter()
        self._began = 0.0

    # ------------------------------------------------------------------------------------------ what is compiled

    def step(self, module: nn.Module, name: str) -> Callable[..., Any]:
        """What to call in place of a step of the module."""
        step = getattr(module, name)
        if self._blocks is not None or not getattr(module, "automatic_optimization", True):
            self.units(module, [])
            return step  # type: ignore[no-any-return]
        compiled: Callable[..., Any] = torch.compile(step, **self._options)
        if not self._marks:
            return compiled

        def marked(*args: Any) -> Any:
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
            return compiled(*args)

        return marked

    def units(self, module: nn.Module, units: Iterable[nn.Module]) -> None:
        """Compile each unit for itself: those of `blocks` if that was given, else these, else the children."""
        if self._blocks is not None:
            units = [m for m in module.modules() if isinstance(m, self._blocks)]
            if not units:
                raise ConfigError(
                    f"compile={{'blocks': {self._blocks!r}}}: {type(module).__name__} has no such layer. It has: "
                    f"{', '.join(sorted({type(m).__name__ for m in module.modules() if m is not module}))}."
                )
        chosen = list(units) or [c for c in module.children() if next(c.parameters(), None) is not None]
        for unit in chosen:
            if unit._compiled_call_impl is None:
                unit.compile(**self._options)
                self._changed.append(unit)

    # ----------------------------------------------------------------------------------------------- around a run

    def __enter__(self) -> Compiling:
        from torch._dynamo.callback import callback_handler

        callback_handler.register_start_callback(self._start)
        callback_handler.register_end_callback(self._end)
        self._undo += [
            lambda: callback_handler.remove_start_callback(self._start),
            lambda: callback_handler.remove_end_callback(self._end),
        ]
        return self

    def __exit__(self, *exc: object) -> None:
        while self._undo:
            self._undo.pop()()
        for unit in self._changed:
            unit._compiled_call_impl = None
        self._changed.clear()

    def begin(self, module: nn.Module, device: torch.device) -> None:
        """Before anything is compiled: what counts and logs stays outside of graphs, and a batch's number a number."""
        self._marks = device.type == "cuda" and self._options.get("mode") in _GRAPHS
        for owner, names in ((Module, ("log", "log_dict", "print", "all_gather")), *_metrics(module)):
            for name in names:
                self._keep_out(owner, name)
        if self._options.get("dynamic") is not False:
            return
        # With shapes compiled one by one a batch_idx would be, too, wherever a step looks at it.
        numbers = {
            name
            for step in _STEPS
            for name, parameter in list(inspect.signature(getattr(module, step)).parameters.items())[1:]
            if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        }
        config: Any = torch.compiler.config
        sources = ",".join(filter(None, [config.dynamic_sources, *(f"L['{n}']" for n in sorted(numbers))]))
        self._set(config, "dynamic_sources", sources)
        for limit in ("recompile_limit", "accumulated_recompile_limit"):
            self._set(torch._dynamo.config, limit, _NO_LIMIT)

    def _set(self, config: Any, name: str, value: Any) -> None:
        before = getattr(config, name)
        setattr(config, name, value)
        self._undo.append(lambda: setattr(config, name, before))

    def _keep_out(self, owner: type, name: str) -> None:
        function = owner.__dict__[name]
        setattr(owner, name, torch.compiler.disable(function))  # type: ignore[no-untyped-call]
        self._undo.append(lambda: setattr(owner, name, function))

    # ------------------------------------------------------------------------------------------------- what it took

    def _start(self, args: Any) -> None:
        self._began = time.monotonic()
        if args.callback_trigger.name != "DYNAMO":
            return  # a backward, compiled when it is first needed
        frame, _, again = str(args.compile_id).rpartition("/")
        if again == "0":
            self.compiled += 1
        else:
            self.recompiled += 1
            self._anew[frame] += 1

    def _end(self, args: Any) -> None:
        self.seconds += time.monotonic() - self._began
        frame, _, again = str(args.compile_id).rpartition("/")
        if args.callback_trigger.name == "DYNAMO" and again != "0" and self._anew[frame] == _RECOMPILES:
            what, why = _reason(frame)
            limit = torch._dynamo.config.recompile_limit
            then = "goes on with every change" if limit >= _NO_LIMIT else f"gives up after {limit}"
            rank_zero_warn(
                f"torch.compile has compiled {what} {_RECOMPILES + 1} times, and {then}; the newest reason: {why}. If "
                "shapes change, pad them, or "
                "Trainer(compile={'dynamic': True}); what changes with every step belongs into a function under "
                "@torch.compiler.disable."
            )

    def timed(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The batches; the time between the first two is that of the first step."""
        if self.first_step_s is None:
            for batch in batches:
                began = time.monotonic()
                yield batch
                self.first_step_s = time.monotonic() - began
                break
        yield from batches

    def told(self) -> str:
        """One line for the end of a fit."""
        first = "" if self.first_step_s is None else f"; the first step took {self.first_step_s:.1f} s"
        return f"compile: {self.compiled} functions, {self.recompiled} times anew, in {self.seconds:.1f} s{first}."


def _metrics(module: nn.Module) -> Iterator[tuple[type, tuple[str, ...]]]:
    """The classes of torchmetrics' objects in a module: they count in Python, and would be compiled at every call."""
    torchmetrics = sys.modules.get("torchmetrics")
    if torchmetrics is None:
        return
    found = [m for m in module.modules() if isinstance(m, (torchmetrics.Metric, torchmetrics.MetricCollection))]
    yield from dict.fromkeys(
        (next(c for c in type(m).__mro__ if name in vars(c)), (name,)) for m in found for name in ("forward", "update")
    )


def _reason(frame: str) -> tuple[str, str]:
    """Which function is compiled anew and why: the newest that torch has a record of."""
    from torch._dynamo.utils import get_compilation_metrics

    for record in reversed(get_compilation_metrics()):
        if record.recompile_reason and str(record.compile_id).rpartition("/")[0] == frame:
            where = f"{record.co_name} ({record.co_filename}:{record.co_firstlineno})"
            return where, record.recompile_reason.splitlines()[0]
    return f"function {frame}", "torch does not tell (TORCH_LOGS=recompiles does)"
