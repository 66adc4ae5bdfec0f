"""The step, the epoch and the evaluation: plain code that reads top to bottom.

What can be known before the first batch (which hooks somebody overrides, whether batches move, how the optimizer is
stepped) is decided by the Trainer and stands in a `Fit` or an `Evaluation`; a step only looks at it.

A checkpoint may be written by a hook in the middle of the work that follows a batch. `state.resume_at` then says
which hook that was, and a resumed run goes on behind it:

    ""                 between two batches: the next thing is a batch
    "batch_end"        on_train_batch_end has run; the step report, validation and what follows are to come
    "validation"       the validation after this batch was broken off by a stop; it is done again
    "validation_end"   the validation is over; plateau schedulers and what follows are to come
    "epoch_end"        on_train_epoch_end has run; plateau schedulers and the next epoch are to come
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from trainer.errors import ModuleError
from trainer.forms import bound_step
from trainer.guard import SKIPPED, GuiltyStep
from trainer.optimizers import parameters_of
from trainer.progress import TRAIN, VALIDATE
from trainer.rank_state import Before
from trainer.ranks import rank_zero_info, rank_zero_warn
from trainer.state import RunningStage, TrainerFn
from trainer.stop import LAST
from trainer.virtual import VALIDATION

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from trainer.combined import CombinedFeed
    from trainer.distributed import World
    from trainer.guard import Guarding
    from trainer.hooks import Hooks
    from trainer.loading import Feed
    from trainer.metrics import Metrics
    from trainer.module import Module
    from trainer.optimizers import SchedulerConfig, WrappedOptimizer
    from trainer.parallel import Parallel
    from trainer.precision import Precision
    from trainer.progress import ProgressPage
    from trainer.resume import Found
    from trainer.signals import StopSignals
    from trainer.state import TrainState
    from trainer.stop import StopAgreement
    from trainer.throughput import Meter
    from trainer.trainer import Trainer
    from trainer.virtual import VirtualRanks


class Stopping(BaseException):
    """Ends the loops at the place where all ranks have agreed to stop; never leaves the Trainer."""


@dataclass(slots=True)
class Fit:
    """One call of `fit`, with everything decided that can be decided before the first batch."""

    trainer: Trainer
    state: TrainState
    module: Module
    hooks: Hooks
    metrics: Metrics
    world: World
    parallel: Parallel
    precision: Precision
    signals: StopSignals
    agreement: StopAgreement
    page: ProgressPage | None
    meter: Meter
    step: Callable[[Any, int], Any]
    optimizer: Any
    wrapped: WrappedOptimizer | None
    # The optimizer is stepped through a closure: it wants one, or the module overrides optimizer_step.
    by_closure: bool
    schedulers: list[SchedulerConfig]
    gradient_clip_val: float | None
    gradient_clip_algorithm: str
    # Clipping and on_before_optimizer_step; None if there is neither.
    before_step: Callable[[Any], None] | None = None
    feed: Any = None  # a Feed or CombinedFeed; the loaders are asked for last
    # How a batch of this feed gets to the device; None if it is there as it comes.
    move: Callable[[Any, int], Any] | None = None
    batches_per_epoch: float = 0
    validation: Evaluation | None = None
    # Set per epoch: validate after every so many batches (0: not in this epoch), counted over epochs or not.
    validate_every: float = 0
    validate_seconds: float | None = None
    last_validation: float = 0.0
    # What a broken-off validation starts from again.
    before_validation: Before | None = None
    # What a resumed run still has to take back before its first batch.
    resumed: Found | None = None
    virtual: VirtualRanks | None = None
    guard: Guarding | None = None
    warned: set[str] = field(default_factory=set)


@dataclass(slots=True)
class Evaluation:
    """A validation or test: its loaders and how its steps are called."""

    trainer: Trainer
    module: Module
    hooks: Hooks
    metrics: Metrics
    world: World
    precision: Precision
    signals: StopSignals
    agreement: StopAgreement
    page: ProgressPage | None
    # "validation" or "test"
    name: str
    step: Callable[..., Any]
    move: Callable[[Any, int], Any] | None
    feeds: list[Feed]
    limits: list[float]
    # With a mode other than "sequential" the loaders are gone through together, as one.
    together: CombinedFeed | None = None
    inference_mode: bool = True
    virtual: VirtualRanks | None = None


# ------------------------------------------------------------------------------------------------- training


def fit(run: Fit) -> None:
    """Train until a limit is reached."""
    state, hooks = run.state, run.hooks
    if hooks.on_train_start is not None:
        hooks.on_train_start()
    run.last_validation = time.monotonic() - state.elapsed
    run.meter.begin(state.batches, run.feed)
    while (reason := _end(run)) is None:
        train_epoch(run)
    if hooks.on_train_end is not None:
        hooks.on_train_end()
    rank_zero_info(f"fit ends: {reason}.")  # after the progress bars, which would draw over it
    if run.trainer.compiling is not None:
        rank_zero_info(run.trainer.compiling.told())
    if run.guard is not None and (told := run.guard.told()) is not None:
        rank_zero_info(told)
    if (speed := run.meter.told()) is not None:
        rank_zero_info(speed)


def _end(run: Fit) -> str | None:
    """Which limit of the whole fit is reached, if one is."""
    trainer, state = run.trainer, run.state
    if state.resume_at:
        return None
    if run.batches_per_epoch == 0:
        return "there are no training batches"
    if 0 <= trainer.max_steps <= state.global_step:
        return f"max_steps={trainer.max_steps} reached"
    if trainer.max_epochs is not None and 0 <= trainer.max_epochs <= state.epoch:
        return f"max_epochs={trainer.max_epochs} reached"
    return "should_stop is set" if state.should_stop and may_stop(run) else None


def may_stop(run: Fit) -> bool:
    """Whether `should_stop` may be followed: min_epochs and min_steps are met."""
    trainer, state = run.trainer, run.state
    if state.global_step < (trainer.min_steps or 0):
        return False
    return state.epoch >= (trainer.min_epochs or 0)


def train_epoch(run: Fit) -> None:
    """One epoch, from wherever `state` says, to its end or to a limit."""
    trainer, state, hooks, metrics, agreement = run.trainer, run.state, run.hooks, run.metrics, run.agreement
    trainer.data.prepare_epoch(run)
    if state.resume_at == "epoch_end":
        end_epoch(run)
        return
    if state.batch == 0 and not state.resume_at:
        state.position = None
        metrics.hook = "on_train_epoch_start"
        if hooks.on_train_epoch_start is not None:
            hooks.on_train_epoch_start()
        state.accumulate, state.windows_from = trainer.accumulate_grad_batches, 0
    trainer.accumulate_grad_batches = state.accumulate
    limit = run.batches_per_epoch
    metrics.hook = "training_step"
    if (state.resume_at and after_batch(run, state.batch >= limit)) or state.batch >= limit:
        end_epoch(run)
        return

    if hooks.on_train_epoch_start is not None and run.parallel.rewrap():
        run.step = bound_step(trainer, run.module, "training_step", run.parallel.step)
    metrics.feed = run.feed
    if run.guard is None:
        train_batches(run, limit)
    else:
        run.guard.due = True
        while True:
            try:
                train_batches(run, limit)
                break
            except GuiltyStep as guilty:
                run.guard.roll_back(guilty)
    end_epoch(run)
    if agreement.stop_here((state.batches << 32) + LAST):
        raise Stopping


def train_batches(run: Fit, limit: float) -> None:
    """The epoch's batches from wherever `state` says, and what follows each of them."""
    trainer, state, agreement = run.trainer, run.state, run.agreement
    batches = run.feed.batches(state.epoch, state.position)
    if trainer.compiling is not None:
        batches = trainer.compiling.timed(batches)
    train = bind_plain_batches(run, batches, limit) or bind_batches(run, batches, limit)
    while (trained := train(next_event(run, limit))) is not None:
        stepped, is_last = trained
        if after_batch(run, is_last) or is_last:
            break
        if stepped and agreement.stop_here((state.batches << 32) + LAST):
            if run.guard is not None:
                run.guard.settle()
            raise Stopping
    if run.guard is not None:
        run.guard.settle()


def next_event(run: Fit, limit: float) -> float:
    """The number of this epoch's batches after which something may be due that most batches do not have."""
    trainer, state = run.trainer, run.state
    if not run.meter.knows_batches or run.validate_seconds is not None:
        return 0
    if any(c.reduce_on_plateau and c.interval == "step" for c in run.schedulers):
        return 0
    accumulate = state.accumulate if run.module.automatic_optimization else 1
    events = [limit]
    if trainer.log_every_n_steps:
        reports = trainer.log_every_n_steps
        events.append(state.batch + max(0, reports - state.logger_step % reports - 1) * accumulate + 1)
    if 0 < run.validate_every < math.inf:
        done = state.batches if trainer.check_val_every_n_epoch is None else state.batch
        events.append(state.batch + run.validate_every - done % run.validate_every)
    if trainer.max_steps >= 0:
        # In manual optimization one batch may take several steps.
        left = trainer.max_steps - state.global_step if run.module.automatic_optimization else 1
        events.append(state.batch + max(1, (left - 1) * accumulate + 1))
    return min(events)


def bind_batches(run: Fit, batches: Iterator[Any], limit: float) -> Callable[[float], tuple[bool, bool] | None]:
    """Trains batches until something more than the next batch may be due.

    The function takes the number of batches of this epoch after which something will be (see `next_event`), and
    returns whether the newest one ended with an optimizer step, and whether it is the epoch's last. None: there are no
    more, or on_train_batch_start asked to skip the rest of the epoch.
    """
    state, agreement, signals, page = run.state, run.agreement, run.signals, run.page
    look_ahead = _LookAhead(batches, run.feed) if limit == math.inf else None
    coming = batches if look_ahead is None else iter(look_ahead)
    train_batch = bind_train_batch(run)
    if run.guard is not None:
        coming, train_batch = run.guard.watch(coming), _or_skip(run, train_batch)

    def train(due: float) -> tuple[bool, bool] | None:
        if page is not None:
            page.since_ns = time.monotonic_ns()
        for batch in coming:
            is_last = state.batch + 1 == limit if look_ahead is None else look_ahead.is_last
            stepped = train_batch(batch, state.batch, is_last)
            if stepped is None:
                break
            if page is not None:
                now = time.monotonic_ns()
                page.pack_step(page.buffer, 8, state.global_step, TRAIN, state.epoch, now, page.own_ns)
            if (
                state.batch >= due
                or state.should_stop or signals.requested or state.batches >= agreement.limit_batches
            ):  # fmt: skip
                return stepped, is_last
            state.logger_step += stepped
            state.resume_at = ""
        return None

    return train


def _or_skip(run: Fit, train_batch: Callable[[Any, int, bool], bool | None]) -> Callable[[Any, int, bool], bool | None]:
    """`train_batch` for a guarded run, whose batches may be left out: then they only count."""
    state = run.state

    def train_or_skip(batch: Any, index: int, is_last: bool) -> bool | None:
        if batch is not SKIPPED:
            return train_batch(batch, index, is_last)
        state.batch += 1
        state.batches += 1
        state.position = run.feed.position
        reports = run.trainer.reports
        reports.told_until = max(reports.told_until, state.logger_step + 1)  # of this one there is nothing to tell
        if is_last:
            step_schedulers(run, "epoch", plateau=False)
        return is_last or (index + 1 - state.windows_from) % state.accumulate == 0

    return train_or_skip


def bind_plain_batches(
    run: Fit, batches: Iterator[Any], limit: float
) -> Callable[[float], tuple[bool, bool] | None] | None:
    """What `bind_batches` gives, for a run in which every batch is one step and nobody acts inside of it; else None.

    Most runs are like that. Of what a step of a small model costs above a hand-written loop, half is the calls from
    the loop to the step and on to its parts, and the questions to which the answer is no; here there are none.
    """
    hooks, optimizer, state = run.hooks, run.optimizer, run.state
    inside = (
        hooks.on_before_zero_grad, hooks.optimizer_zero_grad, hooks.on_before_backward, hooks.backward,
        hooks.on_after_backward, run.precision.scaler, run.virtual, run.guard,
    )  # fmt: skip
    if (
        optimizer is None or run.by_closure or state.accumulate != 1 or not run.precision.plain or limit == math.inf
        or any(actor is not None for actor in inside)
    ):  # fmt: skip
        return None
    metrics, feed, move, step, schedulers = run.metrics, run.feed, run.move, run.step, run.schedulers
    agreement, signals, page, before_step = run.agreement, run.signals, run.page, run.before_step
    on_batch_start, on_batch_end = hooks.on_train_batch_start, hooks.on_train_batch_end
    zero_grad, optimizer_step, share_buffers = optimizer.zero_grad, optimizer.step, run.parallel.share_buffers
    clock = time.monotonic_ns

    def train(due: float) -> tuple[bool, bool] | None:
        index = state.batch
        own, since = 0 if page is None else page.own_ns, clock()
        for batch in batches:
            if move is not None:
                batch = move(batch, 0)
            metrics.batch = batch
            if on_batch_start is not None and on_batch_start(batch, index) == -1:
                break
            output = step(batch, index)
            loss = output if type(output) is Tensor else _loss_of(run, output)
            zero_grad()
            if page is not None:
                own += clock() - since
            if loss is not None:
                if feed.weight != 1.0:
                    loss = loss * feed.weight
                loss.backward()
            if page is not None:
                since = clock()
            if before_step is not None:
                before_step(optimizer)
            optimizer_step()
            state.global_step += 1
            if share_buffers is not None:
                share_buffers()
            state.batch = index = index + 1
            state.batches += 1
            state.position = feed.position
            if schedulers:
                step_schedulers(run, "step", plateau=False)
                if index == limit:
                    step_schedulers(run, "epoch", plateau=False)
            if on_batch_end is not None:
                state.resume_at = "batch_end"
                on_batch_end(_outputs(output), batch, index - 1)
            if page is not None:
                if isinstance(output, Tensor) and output.is_cpu:
                    page.pack_loss(page.buffer, 56, output.item())
                page.pack_step(page.buffer, 8, state.global_step, TRAIN, state.epoch, since, own)
            if (
                index >= due
                or state.should_stop or signals.requested or state.batches >= agreement.limit_batches
            ):  # fmt: skip
                if page is not None:
                    page.own_ns = own
                return True, index == limit
            state.logger_step += 1
            state.resume_at = ""
            if loss is not output:
                # What else a dict holds need not live through the next forward. A plain loss may, as in a hand-written
                # loop: to free its graph before the next one is made costs 1.5 us.
                output = loss = None
        if page is not None:
            page.own_ns = own
        return None

    return train


class _LookAhead:
    """Batches of a loader without a length: the last one is known only once the next one is not there."""

    def __init__(self, batches: Iterator[Any], feed: Any) -> None:
        self.batches, self.feed, self.is_last = batches, feed, False

    def __iter__(self) -> Iterator[Any]:
        feed = self.feed
        nothing = object()
        batch = next(self.batches, nothing)
        while batch is not nothing:
            mine = feed.position, feed.weight
            following = next(self.batches, nothing)
            theirs = feed.position, feed.weight
            self.is_last = following is nothing
            feed.position, feed.weight = mine
            yield batch
            feed.position, feed.weight = theirs
            batch = following


def bind_train_batch(run: Fit) -> Callable[[Any, int, bool], bool | None]:
    """One batch: gradients, and at the end of an accumulation window the optimizer's step.

    The function returns whether the optimizer stepped; None if on_train_batch_start asked to skip the rest of the
    epoch. What it needs stands in its own variables: reading it from objects at every step costs more than the rest.
    """
    state, metrics, feed, move, step, schedulers = run.state, run.metrics, run.feed, run.move, run.step, run.schedulers
    optimizer, scaler, before_step, by_closure = run.optimizer, run.precision.scaler, run.before_step, run.by_closure
    on_batch_start, on_batch_end = run.hooks.on_train_batch_start, run.hooks.on_train_batch_end
    automatic, no_sync = run.module.automatic_optimization, run.parallel.no_sync
    page, share_buffers = run.page, run.parallel.share_buffers
    micro_batch = bind_micro_batch(run)
    if run.virtual is not None:
        micro_batch = run.virtual.bind(run, micro_batch)

    def train_batch(batch: Any, index: int, is_last: bool) -> bool | None:
        if move is not None:
            batch = move(batch, 0)
        metrics.batch = batch
        if on_batch_start is not None and on_batch_start(batch, index) == -1:
            return None

        stepping = is_last or (index + 1 - state.windows_from) % state.accumulate == 0
        if not automatic:
            output = step(batch, index)
            stepping = True
        elif not stepping:
            with no_sync():
                output = micro_batch(batch, index)
        elif by_closure:
            output = _step_by_closure(run, micro_batch, batch, index)
            state.global_step += 1
        else:
            output = micro_batch(batch, index)
            if optimizer is None:
                pass
            elif scaler is None:
                if before_step is not None:
                    before_step(optimizer)
                optimizer.step()
            else:
                scaler.unscale_(optimizer)
                if before_step is not None:
                    before_step(optimizer)
                scaler.step(optimizer)
                scaler.update()
            state.global_step += 1

        if share_buffers is not None and stepping:
            share_buffers()
        state.batch += 1
        state.batches += 1
        state.position = feed.position
        if schedulers:
            if stepping:
                step_schedulers(run, "step", plateau=False)
            if is_last:
                step_schedulers(run, "epoch", plateau=False)
        if page is not None and isinstance(output, Tensor) and output.is_cpu:
            page.pack_loss(page.buffer, 56, output.item())
        if on_batch_end is not None:
            state.resume_at = "batch_end"
            on_batch_end(_outputs(output), batch, index)
        return stepping

    return train_batch


def bind_micro_batch(run: Fit) -> Callable[[Any, int], Any]:
    """Forward, clear the gradients if a window begins, backward. The function returns what training_step returned."""
    state, feed, optimizer, step = run.state, run.feed, run.optimizer, run.step
    plain, autocast, scaler = run.precision.plain, run.precision.context, run.precision.scaler
    hooks = run.hooks
    on_before_zero_grad, zero_grad = hooks.on_before_zero_grad, hooks.optimizer_zero_grad
    on_before_backward, backward, on_after_backward = hooks.on_before_backward, hooks.backward, hooks.on_after_backward
    page = run.page

    def micro_batch(batch: Any, index: int) -> Any:
        if plain:
            output = step(batch, index)
        else:
            with autocast():
                output = step(batch, index)
        loss = output if type(output) is Tensor else _loss_of(run, output)
        accumulate = state.accumulate
        if optimizer is not None and (index - state.windows_from) % accumulate == 0:
            if on_before_zero_grad is not None:
                on_before_zero_grad(optimizer)
            if zero_grad is None:
                optimizer.zero_grad()
            else:
                zero_grad(state.epoch, index, optimizer)
        if loss is None:
            return output
        if accumulate != 1:
            loss = loss / accumulate
        if feed.weight != 1.0:
            loss = loss * feed.weight
        if on_before_backward is not None:
            on_before_backward(loss)
        if scaler is not None:
            loss = scaler.scale(loss)
        if page is not None:
            page.own_ns += time.monotonic_ns() - page.since_ns
        if backward is None:
            loss.backward()
        else:
            backward(loss)
        if page is not None:
            page.since_ns = time.monotonic_ns()
        if on_after_backward is not None:
            on_after_backward()
        return output

    return micro_batch


def _loss_of(run: Fit, output: Any) -> Tensor | None:
    """The loss in what training_step returned, or None to skip the batch."""
    if isinstance(output, Mapping):
        loss = output.get("loss")
        if loss is None:
            raise ModuleError(
                f"training_step returned a dict with the keys {sorted(map(str, output))}; it needs the key 'loss'. "
                "(To log values use self.log; a dict under 'log' has no meaning.)"
            )
        for removed in ("log", "progress_bar"):
            if isinstance(output.get(removed), Mapping):
                raise ModuleError(
                    f"training_step returned a dict under {removed!r}, which nobody reads any more: call "
                    "self.log_dict({...}) instead, with prog_bar=True for the progress bar."
                )
        if not isinstance(loss, Tensor):
            raise ModuleError(f"training_step returned a 'loss' of type {type(loss).__name__}; it must be a tensor.")
        return loss
    if isinstance(output, Tensor):
        return output
    if output is None:
        if run.world.size > 1:
            raise ModuleError(
                "training_step returned None on a run with several ranks: the other ranks would wait for this one's "
                "gradients. Return a loss of zero weight instead, e.g. 0.0 * loss."
            )
        if "none" not in run.warned:
            run.warned.add("none")
            rank_zero_warn("training_step returned None: such batches are skipped.")
        return None
    raise ModuleError(
        f"training_step returned {type(output).__name__}; allowed are a tensor, a dict with 'loss', and None."
    )


def _outputs(output: Any) -> Any:
    """What on_train_batch_end gets: a dict with the detached loss."""
    if isinstance(output, Tensor):
        return {"loss": output.detach()}
    if isinstance(output, Mapping):
        return {k: v.detach() if k == "loss" and isinstance(v, Tensor) else v for k, v in output.items()}
    return {} if output is None else output


def _step_by_closure(run: Fit, micro_batch: Callable[[Any, int], Any], batch: Any, index: int) -> Any:
    """An optimizer that evaluates the loss itself (LBFGS), or a module that overrides optimizer_step."""
    output: Any = None

    def closure() -> Tensor | None:
        nonlocal output
        with torch.enable_grad():
            output = micro_batch(batch, index)
        return _loss_of(run, output)

    assert run.wrapped is not None
    if run.hooks.optimizer_step is not None:
        run.hooks.optimizer_step(run.state.epoch, index, run.wrapped, closure)
    else:
        run.wrapped.step(closure)
    return output


def clip(run: Fit, optimizer: Any) -> Tensor | None:
    """Clip the gradients as the Trainer was told, or as the module wants; the norm before it, if that was asked for."""
    if run.hooks.configure_gradient_clipping is not None:
        run.hooks.configure_gradient_clipping(optimizer, run.gradient_clip_val, run.gradient_clip_algorithm)
    elif run.gradient_clip_val is not None:
        return run.parallel.clip(parameters_of(optimizer), run.gradient_clip_val, run.gradient_clip_algorithm)
    return None


def step_schedulers(run: Fit, interval: str, *, plateau: bool) -> None:
    """Step the schedulers of one interval that are due. Plateau schedulers come later, when values are logged."""
    if not run.module.automatic_optimization:
        return
    state = run.state
    count = state.batch if interval == "step" else state.epoch + 1
    for config in run.schedulers:
        if config.interval != interval or config.reduce_on_plateau != plateau or count % config.frequency:
            continue
        value = None
        if plateau:
            value = run.metrics.callback_metrics.get(config.monitor or "")
            if value is None:
                known = sorted(run.metrics.callback_metrics)
                text = f"A scheduler monitors {config.monitor!r}, which was not logged. Logged so far: {known}."
                if config.strict:
                    raise ModuleError(text + " Log it, or give the scheduler 'strict': False.")
                rank_zero_warn(text)
                continue
        if run.hooks.lr_scheduler_step is not None:
            run.hooks.lr_scheduler_step(config.scheduler, value)
        elif value is None:
            config.scheduler.step()
        else:
            config.scheduler.step(value)


def _validation_is_due(run: Fit, is_last: bool) -> bool:
    if run.validate_every == math.inf:
        return is_last
    count = run.state.batches if run.trainer.check_val_every_n_epoch is None else run.state.batch
    return count % run.validate_every == 0


def after_batch(run: Fit, is_last: bool) -> bool:
    """What follows a batch where more than the next batch is due. Returns whether the epoch ends here."""
    trainer, state, hooks = run.trainer, run.state, run.hooks
    run.meter.look(state.batches, run.feed, run.metrics.batch, is_last=is_last)
    stepped = (
        is_last or (state.batch - state.windows_from) % state.accumulate == 0 or not run.module.automatic_optimization
    )
    if state.resume_at in ("", "batch_end"):
        log_every = trainer.log_every_n_steps
        if stepped and log_every and ((state.logger_step + 1) % log_every == 0 or state.should_stop):
            trainer.reports.step()
        stopping = state.should_stop and may_stop(run)
        due = bool(run.validate_every) and (_validation_is_due(run, is_last) or stopping)
        if run.validate_seconds is not None:
            due = bool(run.validate_every) and (
                stopping or run.world.any(time.monotonic() - run.last_validation >= run.validate_seconds)
            )
        if due:
            state.resume_at = "validation"
    if state.resume_at == "validation" and run.validation is not None:
        if run.guard is not None:
            run.guard.settle()
            run.guard.due = True
        if stepped and run.agreement.stop_here(state.batches << 32):
            raise Stopping
        if stepped:
            if hooks.on_validation_model_zero_grad is not None:
                hooks.on_validation_model_zero_grad()
            else:
                run.module.zero_grad()
        run.before_validation = Before(run, [], copied=True)
        trainer.state.stage = RunningStage.VALIDATING
        run.meter.pause()
        evaluate(run.validation)
        run.meter.resume()
        trainer.state.stage = RunningStage.TRAINING
        run.before_validation = None
        if run.virtual is not None:
            run.virtual.enter(VALIDATION, state.batches, run.virtual.count)
        run.last_validation = time.monotonic()
        run.metrics.enter("train")
        run.metrics.hook, run.metrics.feed = "training_step", run.feed
        state.resume_at = "validation_end"
    if stepped:
        if run.schedulers:
            step_schedulers(run, "step", plateau=True)
        state.logger_step += 1
    state.resume_at = ""
    if 0 <= trainer.max_steps <= state.global_step:
        return True
    return state.should_stop and may_stop(run)


def end_epoch(run: Fit) -> None:
    """Hooks, schedulers and the report at the end of an epoch."""
    trainer, state, hooks, metrics = run.trainer, run.state, run.hooks, run.metrics
    metrics.batch = metrics.feed = None
    if state.resume_at != "epoch_end":
        metrics.epoch_report()
        metrics.hook = "on_train_epoch_end"
        if hooks.on_train_epoch_end is not None:
            hooks.on_train_epoch_end()
            metrics.epoch_report(("on_train_epoch_end",))
        # Before the callbacks that may save, so that the row is written once however often the run is resumed.
        trainer.reports.epoch()
        state.resume_at = "epoch_end"
        if hooks.on_train_epoch_end_monitoring is not None:
            hooks.on_train_epoch_end_monitoring()
    if run.schedulers and state.batch >= run.batches_per_epoch:
        step_schedulers(run, "epoch", plateau=True)
    metrics.reset()
    state.epoch += 1
    state.batch = 0
    state.position = None
    state.resume_at = ""
    trainer.saves.after_epoch()


# ----------------------------------------------------------------------------------------------- evaluation


def evaluate(run: Evaluation) -> list[dict[str, float]]:
    """One pass over the evaluation loaders. Returns what was logged, one dict per loader.

    Modules are in eval mode inside and get their own modes back; gradients are off.
    """
    if not sum(run.limits):
        return []
    trainer, hooks, metrics, name = run.trainer, run.hooks, run.metrics, run.name
    modes = {m: m.training for m in run.module.modules()}
    to_eval = getattr(hooks, f"on_{name}_model_eval")
    to_train = getattr(hooks, f"on_{name}_model_train")
    with torch.inference_mode() if run.inference_mode else torch.no_grad():
        metrics.enter(name)
        if to_eval is not None:
            to_eval()
        else:
            run.module.eval()
        _call(metrics, hooks, f"on_{name}_start")
        _call(metrics, hooks, f"on_{name}_epoch_start")
        for number in range(1 if run.together is not None else len(run.feeds)):
            _evaluate_loader(run, number)
        metrics.dataloader_idx = metrics.batch = metrics.feed = None
        results = metrics.epoch_report(keep=not trainer.sanity_checking)
        epoch_end = f"on_{name}_epoch_end"
        if getattr(hooks, epoch_end) is not None:
            _call(metrics, hooks, epoch_end)
            results += metrics.epoch_report((epoch_end,), keep=not trainer.sanity_checking)
        if not trainer.sanity_checking:
            trainer.reports.evaluation({e.names(on_step=False)[1]: v for e, v in results if e.logger})
            if trainer.state.fn is TrainerFn.FITTING:
                trainer.train_state.resume_at = "validation_end"
        _call(metrics, hooks, f"on_{name}_end")
        metrics.reset()
    if to_train is not None:
        to_train()
    else:
        for child, mode in modes.items():
            child.training = mode
    everywhere = {e.names(on_step=False)[1]: v.item() for e, v in results if e.dataloader_idx is None}
    per_loader: list[dict[str, float]] = [{} for _ in run.feeds] if run.together is None else [{}]
    for entry, value in results:
        if entry.dataloader_idx is not None:
            per_loader[entry.dataloader_idx][entry.names(on_step=False)[1]] = value.item()
    return [own | everywhere for own in per_loader]


def _call(metrics: Metrics, hooks: Hooks, name: str) -> None:
    hook = getattr(hooks, name)
    if hook is not None:
        metrics.hook = name
        hook()


def _evaluate_loader(run: Evaluation, number: int) -> None:
    """The batches of one loader (or of several that are gone through together)."""
    trainer, hooks, metrics, agreement = run.trainer, run.hooks, run.metrics, run.agreement
    several = run.together is None and len(run.feeds) > 1
    feed: Any = run.feeds[number] if run.together is None else run.together
    limit = run.limits[number]
    if trainer.sanity_checking:
        limit = min(limit, trainer.num_sanity_val_steps)
    before = getattr(hooks, f"on_{run.name}_batch_start")
    after = getattr(hooks, f"on_{run.name}_batch_end")
    rest = (number,) if several else ()
    metrics.dataloader_idx = number if several else None
    metrics.feed = feed
    step_name = f"{run.name}_step"
    base = trainer.train_state.batches << 32
    agreement.place, agreement.evaluating = base, True

    def evaluate_batch(batch: Any, index: int) -> None:
        if run.move is not None:
            batch = run.move(batch, number)
        metrics.batch = batch
        metrics.hook = step_name
        if before is not None:
            before(batch, index, *rest)
        if run.precision.plain:
            output = run.step(batch, index, *rest)
        else:
            with run.precision.context():
                output = run.step(batch, index, *rest)
        if after is not None:
            after(output, batch, index, *rest)

    for index, batch in enumerate(feed.batches(trainer.train_state.epoch, None) if limit else ()):
        if run.virtual is None:
            evaluate_batch(batch, index)
        else:
            for own in run.virtual.each(batch, trainer.train_state.batches, number, index):
                evaluate_batch(own, index)
        if not trainer.sanity_checking:
            trainer.reports.evaluation_step(index)
        if run.page is not None:
            run.page.step(trainer.train_state.global_step, VALIDATE, trainer.train_state.epoch)
        if agreement.stop_here(base + index + 1):
            raise Stopping
        if index + 1 >= limit:
            break
    if agreement.stop_here(base + LAST):
        raise Stopping
    agreement.evaluating = False


def predict(run: Evaluation, *, keep: bool) -> list[Any]:
    """Predictions of every loader, on the CPU: a list per loader, or one list if there is one loader."""
    trainer, hooks = run.trainer, run.hooks
    modes = {m: m.training for m in run.module.modules()}
    predictions: list[list[Any]] = [[] for _ in run.feeds]
    with torch.inference_mode() if run.inference_mode else torch.no_grad():
        if hooks.on_predict_model_eval is not None:
            hooks.on_predict_model_eval()
        else:
            run.module.eval()
        _call(run.metrics, hooks, "on_predict_start")
        _call(run.metrics, hooks, "on_predict_epoch_start")
        for number, feed in enumerate(run.feeds):
            rest = (number,) if len(run.feeds) > 1 else ()
            limit = run.limits[number]
            for index, batch in enumerate(feed.batches(0, None) if limit else ()):
                # A rank that has run out of samples steps along with a copy of one; it predicted nothing.
                trainer.predict_indices = getattr(feed, "indices", None) if feed.weight else []
                if run.move is not None:
                    batch = run.move(batch, number)
                if hooks.on_predict_batch_start is not None:
                    hooks.on_predict_batch_start(batch, index, *rest)
                run.metrics.hook = "predict_step"
                if run.precision.plain:
                    output = run.step(batch, index, *rest)
                else:
                    with run.precision.context():
                        output = run.step(batch, index, *rest)
                if hooks.on_predict_batch_end is not None:
                    hooks.on_predict_batch_end(output, batch, index, *rest)
                if keep and feed.weight:
                    predictions[number].append(_to_cpu(output))
                if run.agreement.stop_here(index + 1):
                    raise Stopping
                if index + 1 >= limit:
                    break
        run.metrics.hook = "on_predict_epoch_end"
        trainer.predictions = predictions
        _call(run.metrics, hooks, "on_predict_epoch_end")
        _call(run.metrics, hooks, "on_predict_end")
    for child, mode in modes.items():
        child.training = mode
    return predictions[0] if len(predictions) == 1 else predictions


def _to_cpu(output: Any) -> Any:
    return tree_map(lambda v: v.cpu() if isinstance(v, Tensor) else v, output)
