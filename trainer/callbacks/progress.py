"""How far a run is, on a terminal as a live bar, in a log file as a line per epoch and one every half minute.

A batch costs one look at the clock; what is shown is formatted only when it is due. Only global rank 0 shows anything.
"""

from __future__ import annotations

import math
import sys
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trainer.callbacks.callback import Callback
from trainer.errors import ConfigError

if TYPE_CHECKING:
    from trainer.module import Module
    from trainer.trainer import Trainer

# Rendering a rich bar takes 2 to 4 ms (measured, 2.1 GHz core): at five per second that is one percent of the time.
_LIVE_S = 0.2
_LINE_S = 30.0


@dataclass
class Task:
    """One pass that is shown: of `total` batches (inf if unknown) `done` are done; it began at `first`."""

    stage: str
    label: str
    total: float
    done: int = 0
    first: int = 0
    metrics: dict[str, Any] = field(default_factory=dict)
    # Samples or tokens per second, and the MFU, where they are known.
    speed: str = ""
    begun: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        """Time since it began."""
        return time.monotonic() - self.begun

    @property
    def rate(self) -> float:
        """Batches per second so far."""
        return (self.done - self.first) / self.seconds if self.seconds > 0 else 0.0


class Screen(ABC):
    """Where tasks are shown. `every`: seconds between two looks at a running task."""

    every: float

    @abstractmethod
    def begin(self, task: Task) -> None:
        """Show a new task."""

    @abstractmethod
    def draw(self, task: Task) -> None:
        """Show how far the task is."""

    @abstractmethod
    def end(self, task: Task) -> None:
        """The task is over."""

    @abstractmethod
    def say(self, text: str) -> None:
        """Print a line of text that does not tear the display."""

    def close(self) -> None:
        """Leave the display in order; the screen is not used again."""


class Lines(Screen):
    """Plain lines with the time of day, for log files and pipes."""

    every = _LINE_S

    def begin(self, task: Task) -> None:
        pass

    def draw(self, task: Task) -> None:
        self.say(self._line(task))

    def end(self, task: Task) -> None:
        if task.stage in ("train", "test", "predict"):
            self.say(self._line(task))

    def say(self, text: str) -> None:
        print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}", flush=True)  # noqa: T201 - this is its purpose

    @staticmethod
    def _line(task: Task) -> str:
        total = f"/{int(task.total)}" if math.isfinite(task.total) else ""
        parts = [task.label, f"batch {task.done}{total}", f"{task.rate:.4g} it/s"]
        parts += [task.speed] if task.speed else []
        parts += [f"{name} {format_value(value)}" for name, value in task.metrics.items() if name != "v_num"]
        return "  ".join(parts)


class ProgressBar(Callback):
    """Base of progress bars; shows plain lines. Subclasses give another `make_screen`.

    Args:
        refresh_rate: look at every n-th batch only; 0 shows nothing. How often something is drawn is a matter of
            time, not of batches.
    """

    # What it shows at the end of an epoch includes what the module logs there.
    monitors_epoch_end = True

    def __init__(self, refresh_rate: int = 1) -> None:
        if refresh_rate < 0:
            raise ConfigError(f"{type(self).__name__}(refresh_rate={refresh_rate}). Allowed: 0 (nothing) or more.")
        self._refresh_rate = refresh_rate
        self._enabled = True
        self._trainer: Trainer | None = None
        self._screen: Screen | None = None
        self._tasks: list[Task] = []
        # When the next look is due; batches compare the clock with it and do nothing else.
        self._due = math.inf

    # ------------------------------------------------------------------------------ what others may call

    @property
    def refresh_rate(self) -> int:
        """Every how many batches it may draw."""
        return self._refresh_rate

    @property
    def is_enabled(self) -> bool:
        """Whether it shows anything."""
        return self._enabled and self._refresh_rate > 0

    @property
    def is_disabled(self) -> bool:
        """Whether it shows nothing."""
        return not self.is_enabled

    def disable(self) -> None:
        """Show nothing from now on."""
        self._enabled = False
        self._due = math.inf

    def enable(self) -> None:
        """Show progress again, from the next pass on."""
        self._enabled = True

    @property
    def trainer(self) -> Trainer:
        """The trainer whose progress is shown.

        Raises:
            ConfigError: it was not given to a trainer yet.
        """
        if self._trainer is None:
            raise ConfigError(f"{type(self).__name__} is not attached to a running Trainer yet.")
        return self._trainer

    @property
    def total_train_batches(self) -> float:
        """Training batches per epoch; inf if unknown."""
        return self.trainer.num_training_batches

    def print(self, *args: Any, **_options: Any) -> None:
        """Print without tearing the bar."""
        text = " ".join(map(str, args))
        if self._screen is not None:
            self._screen.say(text)

    def get_metrics(self, trainer: Trainer, pl_module: Module) -> dict[str, int | str | float | dict[str, float]]:
        """What is shown beside the bar: the log's version, and everything logged with `prog_bar=True`."""
        shown: dict[str, int | str | float | dict[str, float]] = {}
        version = trainer.loggers[0].version if trainer.loggers else None
        if version is not None:
            shown["v_num"] = version[-4:] if isinstance(version, str) else version
        return shown | dict(trainer.progress_bar_metrics)

    def make_screen(self) -> Screen:
        """Where to show it; asked once per fit, validate, test or predict, on rank 0."""
        return Lines()

    # ------------------------------------------------------------------------------------------- tasks

    def setup(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        self._trainer = trainer
        self._close()
        if self.is_enabled and trainer.is_global_zero:
            self._screen = self.make_screen()

    def teardown(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: Module, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        if self._screen is not None:
            self._screen.close()
        self._screen = None
        self._tasks = []
        self._due = math.inf

    def _begin(self, stage: str, label: str, total: float, done: int = 0) -> None:
        if self._screen is None:
            return
        task = Task(stage, label, total, done, done)
        self._tasks.append(task)
        self._screen.begin(task)
        self._due = time.monotonic() + (0.0 if self._screen.every < 1 else self._screen.every)

    def _look(self, trainer: Trainer, pl_module: Module, done: int) -> None:
        """Show the running task, `done` batches into it."""
        if done % self._refresh_rate or self._screen is None or not self._tasks:
            return
        task = self._tasks[-1]
        task.done = done
        self._tell(task, trainer, pl_module)
        self._screen.draw(task)
        self._due = time.monotonic() + self._screen.every

    def _end(self, trainer: Trainer, pl_module: Module, done: int | None = None) -> None:
        if self._screen is None or not self._tasks:
            return
        task = self._tasks.pop()
        task.done = int(task.total) if done is None and math.isfinite(task.total) else done or task.done
        self._tell(task, trainer, pl_module)
        self._screen.end(task)
        self._due = time.monotonic() + self._screen.every if self._tasks else math.inf

    def _tell(self, task: Task, trainer: Trainer, pl_module: Module) -> None:
        task.metrics = self.get_metrics(trainer, pl_module)
        if task.stage == "train" and trainer.fit_run is not None:
            task.speed = trainer.fit_run.meter.rate(task.rate)

    # ------------------------------------------------------------------------------------------- hooks

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Module) -> None:
        last = trainer.max_epochs
        of = f"/{last}" if last is not None and last > 0 else ""
        self._done = 0
        self._begin("train", f"epoch {trainer.current_epoch + 1}{of}", trainer.num_training_batches)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Module, outputs: Any, batch: Any, batch_idx: int) -> None:
        if time.monotonic() >= self._due:
            self._look(trainer, pl_module, batch_idx + 1)
        self._done = batch_idx + 1

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Module) -> None:
        self._end(trainer, pl_module, self._done)

    def on_sanity_check_start(self, trainer: Trainer, pl_module: Module) -> None:
        total = trainer.data.batches_of_pass("val", trainer.num_sanity_val_steps)
        self._begin("sanity", "sanity check", total)

    def on_train_end(self, trainer: Trainer, pl_module: Module) -> None:
        self._close()

    def on_sanity_check_end(self, trainer: Trainer, pl_module: Module) -> None:
        self._end(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: Module) -> None:
        if not trainer.sanity_checking:
            self._evaluated = 0
            stage = "validate" if trainer.state.fn == "fit" else "test"
            self._begin(stage, "validation", trainer.data.batches_of_pass("val"))

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: Module, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._step(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: Module) -> None:
        if not trainer.sanity_checking:
            self._end(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: Module) -> None:
        self._evaluated = 0
        self._begin("test", "test", trainer.data.batches_of_pass("test"))

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: Module, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._step(trainer, pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: Module) -> None:
        self._end(trainer, pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: Module) -> None:
        self._evaluated = 0
        self._begin("predict", "predict", sum(trainer.num_predict_batches))

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: Module, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._step(trainer, pl_module)

    def on_predict_end(self, trainer: Trainer, pl_module: Module) -> None:
        self._end(trainer, pl_module)

    def _step(self, trainer: Trainer, pl_module: Module) -> None:
        """One batch of an evaluation, over all its loaders."""
        self._evaluated += 1
        if time.monotonic() >= self._due:
            self._look(trainer, pl_module, self._evaluated)

    _evaluated = 0
    _done = 0


# ------------------------------------------------------------------------------------------------------- rich


@dataclass(frozen=True)
class RichProgressBarTheme:
    """Styles of the rich bar, in rich's notation, and how its metrics are written."""

    description: str = ""
    progress_bar: str = "#6206E0"
    progress_bar_finished: str = "#6206E0"
    progress_bar_pulse: str = "#6206E0"
    batch_progress: str = ""
    time: str = "dim"
    processing_speed: str = "dim underline"
    metrics: str = "italic"
    metrics_text_delimiter: str = " "
    metrics_format: str = ".3f"


class RichProgressBar(ProgressBar):
    """A live bar on a terminal or in a notebook, drawn with rich; plain lines elsewhere.

    Args:
        refresh_rate: draw at every n-th batch at most; 0 shows nothing.
        leave: keep the bar of every epoch, not only of the last.
        theme: colours and number format.
        console_kwargs: for `rich.console.Console`; `{"force_terminal": True}` shows the bar in any output.
    """

    def __init__(
        self,
        refresh_rate: int = 1,
        leave: bool = False,
        theme: RichProgressBarTheme | None = None,
        console_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(refresh_rate)
        self._leave = leave
        self.theme = theme or RichProgressBarTheme()
        self._console_kwargs = console_kwargs or {}

    def make_screen(self) -> Screen:
        if not self._console_kwargs and not on_terminal():
            return Lines()
        from rich.console import Console

        console = Console(**self._console_kwargs)
        if not (console.is_terminal or console.is_jupyter):
            return Lines()
        return RichScreen(console, self.theme, self._leave)


class RichScreen(Screen):
    """A `rich.progress.Progress` that is refreshed by us: no thread competes with the training for the interpreter."""

    every = _LIVE_S

    def __init__(self, console: Any, theme: RichProgressBarTheme, leave: bool) -> None:
        from rich.progress import BarColumn, Progress, TextColumn
        from rich.table import Column

        self._theme = theme
        self._leave = leave
        self._live: dict[int, Any] = {}
        self._last: Any = None
        self._progress = Progress(
            TextColumn(f"[{theme.description or 'none'}]{{task.description}}"),
            # On a narrow screen the bar is short, and the metrics take several lines; all else stays whole.
            BarColumn(
                bar_width=min(40, max(8, console.width // 2 - 30)), style="dim", complete_style=theme.progress_bar,
                finished_style=theme.progress_bar_finished, pulse_style=theme.progress_bar_pulse,
            ),
            TextColumn(f"[{theme.batch_progress or 'none'}]{{task.fields[count]}}"),
            TextColumn(f"[{theme.time or 'none'}]{{task.fields[times]}}"),
            TextColumn(f"[{theme.processing_speed or 'none'}]{{task.fields[rate]}}"),
            TextColumn(f"[{theme.metrics or 'none'}]{{task.fields[metrics]}}", table_column=Column(no_wrap=False)),
            console=console,
            auto_refresh=False,
            # In a notebook a kernel flushes stdout before it displays; taken over, that displays, and so on without end
            # (ipykernel 7.4, rich 15).
            redirect_stdout=not console.is_jupyter,
            redirect_stderr=not console.is_jupyter,
        )  # fmt: skip
        self._progress.start()

    def begin(self, task: Task) -> None:
        if task.stage == "train" and self._last is not None and not self._leave:
            self._progress.remove_task(self._last)
            self._last = None
        total = task.total if math.isfinite(task.total) else None
        self._live[id(task)] = self._progress.add_task(task.label, total=total, **self._fields(task))
        self._progress.refresh()

    def draw(self, task: Task) -> None:
        self._progress.update(self._live[id(task)], completed=task.done, **self._fields(task))
        self._progress.refresh()

    def end(self, task: Task) -> None:
        self.draw(task)
        number = self._live.pop(id(task))
        if task.stage == "train":
            self._last = number
        elif task.stage in ("sanity", "validate"):
            self._progress.remove_task(number)
            self._progress.refresh()

    def say(self, text: str) -> None:
        self._progress.console.print(text)

    def close(self) -> None:
        self._progress.stop()

    def _fields(self, task: Task) -> dict[str, Any]:
        left = (task.total - task.done) / task.rate if task.rate and math.isfinite(task.total) else math.nan
        metrics = [f"{name}: {format_value(value, self._theme.metrics_format)}" for name, value in task.metrics.items()]
        metrics += [task.speed] if task.speed else []
        return {
            "count": f"{task.done}/{int(task.total) if math.isfinite(task.total) else '?'}",
            "times": f"{_clock(task.seconds)} • {_clock(left)}",
            "rate": f"{task.rate:.2f}it/s",
            "metrics": self._theme.metrics_text_delimiter.join(metrics),
        }


# ------------------------------------------------------------------------------------------------------- tqdm


class TQDMProgressBar(ProgressBar):
    """A tqdm bar on a terminal (needs the tqdm package); plain lines elsewhere.

    Override `init_*_tqdm` to make the bars differently.

    Args:
        refresh_rate: draw at every n-th batch at most; 0 shows nothing.
        process_position: lines to leave free above, for several bars in one terminal.
        leave: keep the bar of every epoch, not only of the last.
    """

    def __init__(self, refresh_rate: int = 1, process_position: int = 0, leave: bool = False) -> None:
        super().__init__(refresh_rate)
        self.process_position = process_position
        self._leave = leave

    def make_screen(self) -> Screen:
        if not on_terminal():
            return Lines()
        try:
            import tqdm  # type: ignore[import-untyped]  # noqa: F401 - only whether it is there
        except ImportError as error:
            raise ConfigError(
                "TQDMProgressBar needs the tqdm package: pip install tqdm, or use RichProgressBar."
            ) from error
        return TqdmScreen(self)

    def _bar(self, label: str, position: int, leave: bool) -> Any:
        from tqdm.auto import tqdm  # type: ignore[import-untyped]

        return tqdm(
            desc=label, position=2 * self.process_position + position, leave=leave, dynamic_ncols=True, file=sys.stdout,
            smoothing=0,
        )  # fmt: skip

    def init_sanity_tqdm(self) -> Any:
        """The bar of the sanity check."""
        return self._bar("sanity check", 0, False)

    def init_train_tqdm(self) -> Any:
        """The bar of training epochs."""
        return self._bar("train", 0, True)

    def init_validation_tqdm(self) -> Any:
        """The bar of validations."""
        return self._bar("validation", 1, False)

    def init_test_tqdm(self) -> Any:
        """The bar of tests."""
        return self._bar("test", 0, True)

    def init_predict_tqdm(self) -> Any:
        """The bar of predictions."""
        return self._bar("predict", 0, True)


class TqdmScreen(Screen):
    """Bars made by a `TQDMProgressBar`, drawn when we say so."""

    every = _LIVE_S

    def __init__(self, callback: TQDMProgressBar) -> None:
        self._make = {
            "sanity": callback.init_sanity_tqdm, "train": callback.init_train_tqdm,
            "validate": callback.init_validation_tqdm, "test": callback.init_test_tqdm,
            "predict": callback.init_predict_tqdm,
        }  # fmt: skip
        self._leave = callback._leave
        self._bars: dict[str, Any] = {}

    def begin(self, task: Task) -> None:
        if self._leave and task.stage == "train" and "train" in self._bars:
            self._bars.pop("train").close()
        bar = self._bars.get(task.stage)
        if bar is None:
            bar = self._bars[task.stage] = self._make[task.stage]()
        bar.reset(total=task.total if math.isfinite(task.total) else None)
        bar.set_description(task.label)

    def draw(self, task: Task) -> None:
        bar = self._bars[task.stage]
        bar.n = task.done
        shown = ", ".join(f"{name}={format_value(value)}" for name, value in task.metrics.items())
        bar.set_postfix_str(", ".join(filter(None, [task.speed, shown])), refresh=False)
        bar.refresh()

    def end(self, task: Task) -> None:
        self.draw(task)
        if task.stage in ("sanity", "validate"):
            self._bars.pop(task.stage).close()

    def say(self, text: str) -> None:
        from tqdm.auto import tqdm

        tqdm.write(text)

    def close(self) -> None:
        for bar in self._bars.values():
            bar.close()


# -------------------------------------------------------------------------------------------------------------


def on_terminal() -> bool:
    """Whether a live display makes sense: standard output is a terminal, or this is a notebook's kernel."""
    return sys.stdout.isatty() or "ipykernel" in sys.modules


def format_value(value: Any, spec: str = ".4g") -> str:
    """A metric in few characters."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return str(value) if isinstance(value, int) else format(value, spec)


def _clock(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "-:--:--"
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
