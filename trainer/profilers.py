"""Profilers: where the time of a run goes. `Trainer(profiler="simple" | "advanced" | "pytorch")`, or an object."""

from __future__ import annotations

import inspect
import sys
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.errors import ConfigError, TrainerError
from trainer.loggers.table import text_table

if TYPE_CHECKING:
    import cProfile
    import os
    from collections.abc import Callable, Iterator

__all__ = ["AdvancedProfiler", "PassThroughProfiler", "Profiler", "PyTorchProfiler", "SimpleProfiler", "make_profiler"]


class Profiler(ABC):
    """Base: `start` and `stop` surround an action by name; `summary` says what was found.

    Args:
        dirpath: folder for the report. Default: the log's folder, if a filename is given.
        filename: file of the report, without extension; None prints it.
    """

    def __init__(self, dirpath: str | os.PathLike[str] | None = None, filename: str | None = None) -> None:
        self.dirpath = dirpath
        self.filename = filename
        self._stage: str | None = None
        self._rank: int | None = None
        self._log_dir: str | None = None

    @abstractmethod
    def start(self, action_name: str) -> None:
        """The action begins."""

    @abstractmethod
    def stop(self, action_name: str) -> None:
        """The action ends."""

    def summary(self) -> str:
        """What was found so far, as text."""
        return ""

    @contextmanager
    def profile(self, action_name: str) -> Iterator[str]:
        """Surround an action: `with profiler.profile("load"): ...`."""
        self.start(action_name)
        try:
            yield action_name
        finally:
            self.stop(action_name)

    def setup(self, stage: str, local_rank: int | None = None, log_dir: str | None = None) -> None:
        """Called at the beginning of fit, validate, test or predict. local_rank: None if there is one process."""
        self._stage, self._rank, self._log_dir = stage, local_rank, log_dir

    def teardown(self, stage: str | None) -> None:
        """Called when the profiler is not needed any more."""

    def describe(self) -> None:
        """Give the report: to a file of each rank if there is a filename, else on rank 0's screen."""
        text = self.summary()
        if not text:
            return
        if self.filename is None:
            if not self._rank:
                print(text, flush=True)  # noqa: T201 - without a filename the screen is the report
            return
        path = self.path(".txt")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def path(self, extension: str) -> Path:
        """A file of the report: `stage-filename[-rank]extension`."""
        parts = [self._stage, self.filename, None if self._rank is None else str(self._rank)]
        folder = Path(self.dirpath or self._log_dir or ".")
        return folder / ("-".join(part for part in parts if part) + extension)


class PassThroughProfiler(Profiler):
    """Measures nothing: `with self.trainer.profiler.profile("load"): ...` works without a profiler too."""

    def start(self, action_name: str) -> None:
        pass

    def stop(self, action_name: str) -> None:
        pass


class SimpleProfiler(Profiler):
    """Wall-clock time per action, as a table. An action inside another counts in both.

    Args:
        dirpath, filename: see Profiler.
        extended: show calls, mean and share of the total, not only mean and total.

    Raises:
        TrainerError: an action is started twice, or stopped without a start.
    """

    def __init__(
        self, dirpath: str | os.PathLike[str] | None = None, filename: str | None = None, extended: bool = True
    ) -> None:
        super().__init__(dirpath, filename)
        self.extended = extended
        self.current_actions: dict[str, float] = {}
        self.recorded_durations: dict[str, list[float]] = defaultdict(list)
        self.start_time = time.monotonic()

    def start(self, action_name: str) -> None:
        if action_name in self.current_actions:
            raise TrainerError(f"The profiler was told to start {action_name!r}, which runs already.")
        self.current_actions[action_name] = time.monotonic()

    def stop(self, action_name: str) -> None:
        end = time.monotonic()
        begun = self.current_actions.pop(action_name, None)
        if begun is None:
            raise TrainerError(f"The profiler was told to stop {action_name!r}, which was not started.")
        self.recorded_durations[action_name].append(end - begun)

    def summary(self) -> str:
        if not self.recorded_durations:
            return ""
        total = time.monotonic() - self.start_time
        measured = sorted(self.recorded_durations.items(), key=lambda item: -sum(item[1]))
        if not self.extended:
            rows = [[name, f"{sum(d) / len(d):.5g}", f"{sum(d):.5g}"] for name, d in measured]
            return text_table({"Action": "<", "Mean duration (s)": ">", "Total time (s)": ">"}, rows)
        headers = {
            "Action": "<",
            "Mean duration (s)": ">",
            "Num calls": ">",
            "Total time (s)": ">",
            "Percentage %": ">",
        }
        rows = [["Total", "-", str(sum(len(d) for _, d in measured)), f"{total:.5g}", "100"]]
        rows += [
            [name, f"{sum(d) / len(d):.5g}", str(len(d)), f"{sum(d):.5g}", f"{100 * sum(d) / total:.5g}"]
            for name, d in measured
        ]
        return text_table(headers, rows)


class AdvancedProfiler(Profiler):
    """cProfile per action: which functions take the time.

    Args:
        dirpath, filename: see Profiler.
        line_count_restriction: how much of each action's table to show: a number of lines or a fraction.
        dump_stats: also write each action's raw statistics (`.prof`) for other viewers.

    Raises:
        TrainerError: an action is stopped without a start.
    """

    def __init__(
        self,
        dirpath: str | os.PathLike[str] | None = None,
        filename: str | None = None,
        line_count_restriction: float = 1.0,
        dump_stats: bool = False,
    ) -> None:
        super().__init__(dirpath, filename)
        self.line_count_restriction = line_count_restriction
        self.dump_stats = dump_stats
        self.profiled_actions: dict[str, cProfile.Profile] = {}
        # Python has one profile hook: an action inside another suspends the outer one's profile.
        self._running: list[str] = []

    def start(self, action_name: str) -> None:
        import cProfile

        if self._running:
            self.profiled_actions[self._running[-1]].disable()
        profile = self.profiled_actions.setdefault(action_name, cProfile.Profile())
        self._running.append(action_name)
        profile.enable()

    def stop(self, action_name: str) -> None:
        if not self._running or self._running[-1] != action_name:
            raise TrainerError(f"The profiler was told to stop {action_name!r}, which is not the action that runs.")
        self.profiled_actions[self._running.pop()].disable()
        if self._running:
            self.profiled_actions[self._running[-1]].enable()

    def summary(self) -> str:
        import io
        import pstats

        parts = []
        for name, profile in self.profiled_actions.items():
            text = io.StringIO()
            statistics = pstats.Stats(profile, stream=text).strip_dirs().sort_stats("cumulative")
            statistics.print_stats(self.line_count_restriction)
            parts.append(f"Profile stats for: {name}\n{text.getvalue()}")
            if self.dump_stats:
                safe = "".join(c if c.isalnum() or c in "._-" else "_" for c in name)
                path = self.path(f"-{safe}.prof")
                path.parent.mkdir(parents=True, exist_ok=True)
                statistics.dump_stats(path)
        return "\n".join(parts)


class PyTorchProfiler(Profiler):
    """torch.profiler over a few training steps: operators, and a trace for TensorBoard or Perfetto.

    Args:
        dirpath, filename: see Profiler. The trace stands beside the report, else in the log's folder.
        schedule: which steps to record, as `torch.profiler.schedule(...)`; default: skip one, warm up for one, record
            three.
        sort_by_key, row_limit: order and length of the operator table.
        export_to_chrome: write the trace (`*.pt.trace.json`, which TensorBoard and Perfetto open).
        group_by_input_shapes, table_kwargs: for the table; see `torch.autograd.profiler.profile`.
        profiler_kwargs: for `torch.profiler.profile`, such as `record_shapes=True`, `with_stack=True`.

    Raises:
        ConfigError: an argument that `torch.profiler.profile` does not have, or two that exclude each other.
    """

    STEP_ACTIONS = ("training_step", "validation_step", "test_step", "predict_step")

    def __init__(
        self,
        dirpath: str | os.PathLike[str] | None = None,
        filename: str | None = None,
        schedule: Callable[[int], Any] | None = None,
        sort_by_key: str | None = None,
        row_limit: int = 20,
        export_to_chrome: bool = True,
        group_by_input_shapes: bool = False,
        table_kwargs: dict[str, Any] | None = None,
        **profiler_kwargs: Any,
    ) -> None:
        import torch

        super().__init__(dirpath, filename)
        allowed = inspect.signature(torch.profiler.profile).parameters
        if unknown := sorted(set(profiler_kwargs) - set(allowed)):
            raise ConfigError(f"PyTorchProfiler: unknown arguments {unknown}. torch has {', '.join(allowed)}.")
        if "on_trace_ready" in profiler_kwargs and export_to_chrome:
            raise ConfigError("PyTorchProfiler: give on_trace_ready or export_to_chrome=True, not both.")
        self._schedule = schedule
        self._sort_by = sort_by_key
        self._rows = row_limit
        self._export = export_to_chrome
        self._by_shapes = group_by_input_shapes
        self._table_kwargs = table_kwargs or {}
        self._kwargs = profiler_kwargs | ({"record_shapes": True} if group_by_input_shapes else {})
        self._profile: Any = None
        self._ranges: dict[str, Any] = {}
        self._table = ""
        self.trace_paths: list[Path] = []

    def start(self, action_name: str) -> None:
        import torch

        if self._profile is None and action_name in self.STEP_ACTIONS:
            schedule = self._schedule or torch.profiler.schedule(wait=1, warmup=1, active=3, repeat=1)
            ready = self._kwargs.get("on_trace_ready", self._trace_ready)
            self._profile = torch.profiler.profile(**(self._kwargs | {"schedule": schedule, "on_trace_ready": ready}))
            self._profile.start()
        if self._profile is not None and action_name not in self._ranges:
            self._ranges[action_name] = torch.profiler.record_function(f"[trainer]{action_name}")
            self._ranges[action_name].__enter__()

    def stop(self, action_name: str) -> None:
        opened = self._ranges.pop(action_name, None)
        if opened is not None:
            opened.__exit__(*sys.exc_info())
        if self._profile is not None and action_name in self.STEP_ACTIONS:
            self._profile.step()

    def _trace_ready(self, profile: Any) -> None:
        key = self._sort_by or ("cuda_time_total" if _has_cuda() else "cpu_time_total")
        averages = profile.key_averages(group_by_input_shape=self._by_shapes)
        self._table = averages.table(**({"sort_by": key, "row_limit": self._rows} | self._table_kwargs))
        if self._export:
            path = self.path(f".{time.time_ns()}.pt.trace.json")
            path.parent.mkdir(parents=True, exist_ok=True)
            profile.export_chrome_trace(str(path))
            self.trace_paths.append(path)

    def summary(self) -> str:
        self._end()
        return self._table

    def teardown(self, stage: str | None) -> None:
        self._end()

    def _end(self) -> None:
        if self._profile is not None:
            for opened in self._ranges.values():
                opened.__exit__(None, None, None)
            self._ranges.clear()
            self._profile.stop()
            self._profile = None


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def make_profiler(profiler: Profiler | str | None) -> Profiler:
    """The profiler by name, the given object, or one that measures nothing.

    Raises:
        ConfigError: there is no profiler of that name.
    """
    if profiler is None:
        return PassThroughProfiler()
    if not isinstance(profiler, str):
        return profiler
    known: dict[str, type[Profiler]] = {
        "simple": SimpleProfiler,
        "advanced": AdvancedProfiler,
        "pytorch": PyTorchProfiler,
    }
    if profiler.lower() not in known:
        raise ConfigError(f"profiler={profiler!r}. Allowed: {', '.join(known)}, or a Profiler object.")
    return known[profiler.lower()]()
