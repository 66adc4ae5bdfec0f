"""The guard against gradients that are not finite or many times what they were: back to a snapshot, and around them.

What it looks at is the norm of all gradients, the same number on every rank, so that all decide alike without asking
each other. Training goes back to the newest snapshot in memory and repeats its steps, exactly, up to the guilty step,
whose batches it leaves out: weights, random numbers and metrics come out as if those had not been in the data.

On a GPU the norm of a step is read when the next one has been queued, so that the GPU never waits; what followed the
guilty step is undone with it. Before anything is validated or saved nothing is left to be looked at.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections import deque
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from trainer.errors import ConfigError, DivergedError
from trainer.optimizers import needs_closure
from trainer.rank_state import rank_state, restore_rank
from trainer.ranks import rank_zero_info, rank_zero_warn
from trainer.resume import Found
from trainer.state import TrainState

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trainer.loop import Fit

__all__ = ["SKIPPED", "Guard", "Guarding", "GuiltyStep"]

# Stands for a batch that is left out.
SKIPPED: Any = object()
_NOTHING = object()
# Steps before a norm can be called many times what norms are.
_JUDGED_FROM = 20
_IDS_SHOWN = 16


@dataclass(frozen=True, kw_only=True)
class Guard:
    """What `Trainer(guard=...)` looks for, and what it does about it.

    A step is guilty if the norm of its gradients (before clipping) is not finite, or more than `spike` times the median
    of the last `window` steps' norms, from the 20th step on. With precision="16-mixed" norms that are not finite are
    the scaler's business.

    Args:
        spike: None for norms that are not finite only.
        window: number of norms.
        snapshot_every: optimizer steps between snapshots; there is also one at the start of every epoch, after every
            validation and after every save. Each takes the memory of weights and optimizer state of a rank, on the
            host, and the time of copying them there.
        max_tries: how often training goes back to one snapshot before it gives up with a DivergedError.
    """

    spike: float | None = 10.0
    window: int = 100
    snapshot_every: int = 100
    max_tries: int = 3

    def __post_init__(self) -> None:
        if self.spike is not None and not self.spike > 1:
            raise ConfigError(f"Guard(spike={self.spike!r}): more than 1, or None.")
        for name, least in (("window", _JUDGED_FROM), ("snapshot_every", 1), ("max_tries", 1)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ConfigError(f"Guard({name}={value!r}): an int from {least} on.")


@dataclass
class Window:
    """The batches of one optimizer step: where they are in the data, and this rank's sample ids if they are known."""

    step: int
    epoch: int
    batch: int
    start: Any
    end: Any = None
    ids: list[Any] = field(default_factory=list)

    @property
    def samples(self) -> int | None:
        """How many samples of all ranks it has, if positions count samples."""
        return self.end - (self.start or 0) if isinstance(self.end, int) else None

    def holds(self, epoch: int, before: Any, after: Any) -> bool:
        """Whether a batch between two positions is, or on another number of ranks overlaps, one of these."""
        return epoch == self.epoch and any(
            start < last and end > first
            for (start, end), (first, last) in zip(_spans(before, after), _spans(self.start, self.end), strict=True)
        )


def _spans(before: Any, after: Any) -> list[tuple[Any, Any]]:
    """What lies between two positions: samples (or batches) of a loader, or [cycle, sample] of each of several."""
    if isinstance(after, int):
        return [(before or 0, after)]
    return [(list(start), list(end)) for start, end in zip(before or [(0, 0)] * len(after), after, strict=True)]


class GuiltyStep(BaseException):
    """Ends the step at hand; `Guarding.roll_back` takes it. Never leaves the loop."""

    def __init__(self, window: Window, norm: float, median: float | None) -> None:
        super().__init__()
        self.window, self.norm, self.median = window, norm, median


class _Kept:
    """A copy on the host of a tensor, or of this rank's part of a sharded one."""

    def __init__(self, tensor: Tensor) -> None:
        self._like: Any = tensor if hasattr(tensor, "to_local") else None
        local = _local(tensor)
        self._device = local.device
        self.copy = torch.empty(local.shape, dtype=local.dtype, pin_memory=local.is_cuda)
        # Later kernels of the stream come after it, and nobody reads it before `restored` waits.
        self.copy.copy_(local.detach(), non_blocking=True)

    def restored(self) -> Tensor:
        """A tensor like the one that was kept."""
        local = self.copy.to(self._device, copy=True)
        if self._like is None:
            return local
        from torch.distributed.tensor import DTensor

        like = self._like
        return DTensor.from_local(
            local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
        )


def _kept(values: Any) -> Any:
    return tree_map(lambda v: _Kept(v) if isinstance(v, Tensor) else v, values)


def _restored(values: Any) -> Any:
    return tree_map(lambda v: v.restored() if isinstance(v, _Kept) else v, values)


def _local(tensor: Any) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # type: ignore[no-any-return]


def _put_back(values: dict[Any, Any], kept: dict[Any, Any]) -> None:
    """Each value as it was; tensors in place, as others may hold them (a scheduler its learning rate)."""
    for name, value in kept.items():
        now = values.get(name)
        if isinstance(value, _Kept) and isinstance(now, Tensor) and _local(now).shape == value.copy.shape:
            _local(now).copy_(value.copy)
        else:
            values[name] = _restored(value)


class Snapshot:
    """All that a training goes on from, between two batches, in this process's memory.

    No hook of checkpoints takes part: those are made for a run that begins. Parameters, buffers and the optimizers'
    state go back in place, nothing is gathered, renamed or made anew; callbacks have `Callback.snapshot_state`.
    """

    def __init__(self, run: Fit) -> None:
        trainer, module = run.trainer, run.module
        self.step = run.state.global_step
        self.norms: list[float] = []
        self._progress = asdict(run.state)
        _reshard(module)
        self._parameters = [(p, _Kept(p)) for p in module.parameters()]
        self._buffers = [(m._buffers, _kept(dict(m._buffers))) for m in module.modules() if m._buffers]
        self._extra = [
            (m, _kept(m.get_extra_state()))
            for m in module.modules() if type(m).get_extra_state is not nn.Module.get_extra_state
        ]  # fmt: skip
        self._optimizers = [
            (
                [(p, _kept(dict(values))) for p, values in optimizer.state.items()],
                [{k: _kept(v) for k, v in group.items() if k != "params"} for group in optimizer.param_groups],
            )
            for optimizer in trainer.optimizers
        ]
        self._schedulers = [_kept(c.scheduler.state_dict()) for c in trainer.lr_scheduler_configs]
        self._precision = _kept(trainer.precision_object.state_dict())
        self._data = None if trainer.datamodule is None else _kept(trainer.datamodule.state_dict())
        self._callbacks = [(callback, _kept(callback.snapshot_state())) for callback in trainer.callbacks]
        self._own = _kept(rank_state(run))

    @property
    def size(self) -> int:
        """Bytes on the host."""
        found: list[_Kept] = []
        tree_map(lambda v: found.append(v) if isinstance(v, _Kept) else None, list(vars(self).values()))
        return sum(kept.copy.nbytes for kept in found)

    @torch.no_grad()
    def restore(self, run: Fit) -> None:
        """Bring all of it back."""
        trainer = run.trainer
        if run.world.device.type == "cuda":
            torch.cuda.synchronize()
        _reshard(run.module)
        for parameter, kept in self._parameters:
            _local(parameter).copy_(kept.copy)
        for buffers, saved in self._buffers:
            _put_back(buffers, saved)
        for module, extra in self._extra:
            module.set_extra_state(_restored(extra))
        for optimizer, (states, groups) in zip(trainer.optimizers, self._optimizers, strict=True):
            optimizer.zero_grad()
            known = dict(states)
            for parameter in [p for p in optimizer.state if p not in known]:
                del optimizer.state[parameter]
            for parameter, saved in states:
                state = optimizer.state[parameter]
                for name in [n for n in state if n not in saved]:
                    del state[name]
                _put_back(state, saved)
            for group, values in zip(optimizer.param_groups, groups, strict=True):
                _put_back(group, values)
        for config, saved in zip(trainer.lr_scheduler_configs, self._schedulers, strict=True):
            config.scheduler.load_state_dict(_restored(saved))
        trainer.precision_object.load_state_dict(_restored(self._precision))
        if trainer.datamodule is not None and self._data:
            trainer.datamodule.load_state_dict(_restored(self._data))
        for callback, saved in self._callbacks:
            if saved:
                callback.load_snapshot_state(_restored(saved))
        for name in (f.name for f in fields(TrainState)):
            setattr(run.state, name, self._progress[name])
        run.metrics.enter("train")
        run.metrics.begin_anew()
        restore_rank(run, Found("the snapshot", {}, _restored(self._own), False, world_size=run.world.size))


def _reshard(module: nn.Module) -> None:
    """Let go of weights that FSDP2 has gathered: after a validation the outermost are still there."""
    from torch.distributed.fsdp import FSDPModule

    for unit in module.modules():
        if isinstance(unit, FSDPModule):
            unit.reshard()


class Guarding:
    """A Guard at work in one fit."""

    def __init__(self, run: Fit, guard: Guard) -> None:
        self.guard = guard
        self.due = True
        self.rollbacks = 0
        self.skipped: list[Window] = []
        self._run = run
        self._norms: deque[float] = deque(maxlen=guard.window)
        self._snapshot: Snapshot | None = None
        self._tries = 0
        self._window: Window | None = None
        # On a GPU: the event after which the newest norm is in its buffer on the host, and whose it is.
        self._pending: tuple[torch.cuda.Event, Tensor, Window] | None = None

    # ---------------------------------------------------------------------------------------- between two batches

    def watch(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The batches, and SKIPPED in place of those that are left out; snapshots are taken in between."""
        state, feed = self._run.state, self._run.feed
        skips = False
        while True:
            begins = (state.batch - state.windows_from) % state.accumulate == 0
            due = self.due or state.global_step - self._taken_at >= self.guard.snapshot_every
            if self._snapshot is None or (begins and due):  # a resumed run may begin within a step
                self._take()
            before = state.position
            batch = next(batches, _NOTHING)
            if batch is _NOTHING:
                return
            # A step is left out as a whole: on another number of ranks one may have other batches than the guilty one.
            skips = skips and not begins
            if skips or any(window.holds(state.epoch, before, feed.position) for window in self.skipped):
                skips = True
                yield SKIPPED
                continue
            if begins or self._window is None:
                self._window = Window(state.global_step + 1, state.epoch, state.batch, before)
            self._window.end = feed.position
            self._window.ids.append(getattr(feed, "indices", None))
            yield batch

    @property
    def _taken_at(self) -> int:
        return -1 if self._snapshot is None else self._snapshot.step

    def _take(self) -> None:
        self.settle()
        first = self._snapshot is None
        self._snapshot = None  # its memory is let go before that of the next is taken
        self._snapshot = Snapshot(self._run)
        self._snapshot.norms = list(self._norms)
        self._tries, self.due = 0, False
        if first:
            rank_zero_info(
                f"guard: a snapshot of {self._snapshot.size / 2**20:.1f} MiB per rank is kept in the host's memory, "
                f"and taken every {self.guard.snapshot_every} steps."
            )

    # ------------------------------------------------------------------------------------------------- in a step

    def see(self, norm: Tensor | None) -> None:
        """Look at the norm of a step's gradients, before the optimizer steps.

        Raises:
            GuiltyStep: it, or on a GPU that of the step before, is what the guard looks for.
        """
        assert self._window is not None
        assert norm is not None
        if not norm.is_cuda:
            self._judge(float(norm), self._window)
            return
        self.settle()
        buffer = torch.empty((), dtype=norm.dtype, pin_memory=True)
        buffer.copy_(norm.detach(), non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        self._pending = event, buffer, self._window

    def settle(self) -> None:
        """Look at a norm that is still on its way. Every rank must call it.

        Raises:
            GuiltyStep: as `see` does.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            event, buffer, window = pending
            event.synchronize()
            self._judge(float(buffer), window)

    def leave(self) -> None:
        """The run ends by an exception: nothing is undone any more, and other ranks may not be there to agree."""
        self._pending = None

    def _judge(self, norm: float, window: Window) -> None:
        if not math.isfinite(norm):
            if self._run.precision.scaler is None:
                raise GuiltyStep(window, norm, self._median())
            return
        if self.guard.spike is not None and len(self._norms) >= _JUDGED_FROM:
            median = self._median()
            if median is not None and norm > self.guard.spike * median > 0:
                raise GuiltyStep(window, norm, median)
        self._norms.append(norm)

    def _median(self) -> float | None:
        return statistics.median(self._norms) if self._norms else None

    # ---------------------------------------------------------------------------------------------- a guilty step

    def roll_back(self, guilty: GuiltyStep) -> None:
        """Go back to the snapshot, and leave the step's batches out from now on. Every rank must call it.

        Raises:
            DivergedError: that was tried often enough.
        """
        run, snapshot, window = self._run, self._snapshot, guilty.window
        assert snapshot is not None
        self._pending = self._window = None
        ids = run.world.gather(window.ids)
        self._tries += 1
        what = (
            f"the gradients of step {window.step} have the norm {guilty.norm:g}"
            + ("" if guilty.median is None else f" (the median before: {guilty.median:g})")
            + f", in epoch {window.epoch}, batches {_range(window)}, samples {_told(ids)}"
        )
        if self._tries > self.guard.max_tries:
            raise DivergedError(
                f"After {self.guard.max_tries} rollbacks to step {snapshot.step} {what}. Left out since then: "
                f"{'; '.join(f'epoch {w.epoch}, batches {_range(w)}' for w in self.skipped[-self.guard.max_tries :])}. "
                "So it is hardly the data: look at the learning rate, the precision and the loss, go on from an older "
                "checkpoint, or give Guard(spike=..., max_tries=...) other values."
            )
        reports = run.trainer.reports
        reports.told_until = max(reports.told_until, run.state.logger_step)
        snapshot.restore(run)
        self._norms = deque(snapshot.norms, maxlen=self.guard.window)
        self.rollbacks += 1
        self.skipped.append(window)
        rank_zero_warn(
            f"guard: {what}. Back to step {snapshot.step} and on without them "
            f"(try {self._tries} of {self.guard.max_tries})."
        )
        self._record(guilty, ids, snapshot.step)
        counts = {"guard/rollbacks": float(self.rollbacks), "guard/skipped_steps": float(len(self.skipped))}
        reports.log(counts, reports.told_until)

    def _record(self, guilty: GuiltyStep, ids: list[Any], back_to: int) -> None:
        run_dir = self._run.trainer.run_dir
        if run_dir is None or not self._run.world.is_global_zero:
            return
        window = guilty.window
        event = {
            "time": time.time(), "event": "rollback", "step": window.step, "epoch": window.epoch,
            "batches": [window.batch, window.batch + len(window.ids)], "samples": ids, "norm": str(guilty.norm),
            "median": guilty.median, "back_to_step": back_to, "try": self._tries,
        }  # fmt: skip
        with open(Path(run_dir) / "guard.jsonl", "a") as file:
            file.write(json.dumps(event) + "\n")

    def told(self) -> str | None:
        """One line for the end of a fit, if there is something to tell."""
        if not self.skipped:
            return None
        counts = [w.samples for w in self.skipped]
        samples = f" ({sum(c or 0 for c in counts)} samples)" if None not in counts else ""
        where = "; ".join(f"epoch {w.epoch}, batches {_range(w)}" for w in self.skipped[:8])
        rest = f" and {len(self.skipped) - 8} more" if len(self.skipped) > 8 else ""
        return f"guard: {self.rollbacks} rollbacks; left out: {where}{rest}{samples}."

    # ---------------------------------------------------------------------------------------------- the checkpoint

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run goes on with: norms, and what is left out. Sample ids are not kept."""
        return {
            "norms": list(self._norms), "rollbacks": self.rollbacks,
            "skipped": [asdict(w) | {"ids": [None] * len(w.ids)} for w in self.skipped],
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what `state_dict` returned."""
        self._norms = deque(state["norms"], maxlen=self.guard.window)
        self.rollbacks = int(state["rollbacks"])
        self.skipped = [Window(**values) for values in state["skipped"]]


def refuse_guard(run: Fit) -> None:
    """Raises ConfigError where steps cannot be taken back."""
    if not run.module.automatic_optimization:
        raise ConfigError("Trainer(guard=...) needs automatic optimization: in manual optimization a step is yours.")
    if run.optimizer is not None and needs_closure(run.optimizer):
        raise ConfigError(
            f"Trainer(guard=...) and {type(run.optimizer).__name__} do not work together: it steps several times on "
            "one batch."
        )
    alone = set(getattr(run.module, "_ddp_params_and_buffers_to_ignore", ()))
    if run.world.size > 1 and alone & {name for name, _ in run.module.named_parameters()}:
        raise ConfigError("Trainer(guard=...): ranks whose parameters DDP ignores have different norms.")


def _range(window: Window) -> str:
    last = window.batch + len(window.ids) - 1
    return str(window.batch) if last == window.batch else f"{window.batch}-{last}"


def _told(ids: list[Any]) -> str:
    """The sample ids of all ranks, as far as they fit into a line."""
    told = []
    for rank, batches in enumerate(ids[:4]):
        if any(batch is None for batch in batches):
            return "unknown"
        own = [i for batch in batches for i in batch]
        rest = f" and {len(own) - _IDS_SHOWN} more" if len(own) > _IDS_SHOWN else ""
        told.append(f"{', '.join(map(str, own[:_IDS_SHOWN]))}{rest}" + (f" (rank {rank})" if len(ids) > 1 else ""))
    return "; ".join(told) + (f"; and those of {len(ids) - 4} more ranks" if len(ids) > 4 else "")
