"""`self.log`: values are kept where they are, and reduced when they are reported.

A logged value costs a dictionary look-up and an addition. Nothing is sent, formatted or copied between devices until
a report: the step report every `log_every_n_steps`, the end of a training epoch, the end of an evaluation. A report
is one exchange between the ranks however many values there are, and its first numbers say which names a rank logged,
so that ranks which logged different names get an error instead of mixed numbers.
"""

from __future__ import annotations

import hashlib
import math
import numbers
from dataclasses import fields, is_dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trainer.errors import LoggingError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from trainer.distributed import World

# Hook -> (report each step by default, report the epoch by default). A hook that is not here cannot log.
_PER_STEP, _PER_EPOCH = (True, False), (False, True)
_TRAINING_STEP_HOOKS = (
    "training_step", "on_train_batch_start", "on_train_batch_end", "on_before_zero_grad", "optimizer_zero_grad",
    "on_before_backward", "backward", "on_after_backward", "on_before_optimizer_step", "optimizer_step",
    "configure_gradient_clipping",
)  # fmt: skip
_EVALUATION_STEP_HOOKS = (
    "validation_step", "on_validation_batch_start", "on_validation_batch_end",
    "test_step", "on_test_batch_start", "on_test_batch_end",
)  # fmt: skip
_EPOCH_HOOKS = (
    "on_train_start", "on_train_epoch_start", "on_train_epoch_end",
    "on_validation_start", "on_validation_epoch_start", "on_validation_epoch_end",
    "on_test_start", "on_test_epoch_start", "on_test_epoch_end",
)  # fmt: skip
LEVELS: dict[str, tuple[bool, bool]] = (
    dict.fromkeys(_TRAINING_STEP_HOOKS, _PER_STEP)
    | dict.fromkeys(_EVALUATION_STEP_HOOKS, _PER_EPOCH)
    | dict.fromkeys(_EPOCH_HOOKS, _PER_EPOCH)
)

_REDUCTIONS = {
    "mean": "mean", "avg": "mean", "sum": "sum", "min": "min", "max": "max",
    torch.mean: "mean", torch.sum: "sum", torch.min: "min", torch.max: "max", sum: "sum", min: "min", max: "max",
}  # fmt: skip

# Values of tensors on an accelerator that wait to be added up there in one kernel.
_PENDING = 128
# Length of the first exchange; it grows once ranks have agreed that they log more.
_CAPACITY = 64


class Entry:
    """One logged name of one hook: how it is reported, and what has been seen of it in this epoch."""

    __slots__ = (
        "add_suffix", "dataloader_idx", "dtype", "exact", "fresh", "hook", "label", "last", "logger", "metric", "name",
        "on_epoch", "on_step", "options", "pending", "pending_sizes", "prog_bar", "rank_zero_only", "reduce", "seen",
        "sync_epoch", "sync_step", "total", "weight",
    )  # fmt: skip

    def __init__(
        self,
        hook: str,
        name: str,
        dataloader_idx: int | None,
        label: str,
        options: tuple[Any, ...],
        *,
        double: bool = False,
        exact: bool = False,
    ) -> None:
        self.hook = hook
        self.name = name
        self.dataloader_idx = dataloader_idx
        self.label = label
        self.options = options
        self.prog_bar, self.logger, self.on_step, self.on_epoch, self.reduce, sync, self.add_suffix, zero_only = options
        self.rank_zero_only = zero_only
        self.sync_epoch = not zero_only and sync is not False
        self.sync_step = not zero_only and bool(sync)
        self.dtype = torch.float64 if double else torch.float32
        # Sums are fractions, so that they do not depend on the order in which values come.
        self.exact = exact
        # The torchmetrics object, which reduces by itself.
        self.metric: Any = None
        self.reset()

    def reset(self) -> None:
        """Forget what has been seen."""
        # Whether anything was logged since the last reset, and since callbacks last looked.
        self.seen = self.fresh = False
        self.last: Any = None
        self.total: float | Fraction = {"min": math.inf, "max": -math.inf}.get(self.reduce, 0.0)
        self.weight: float = 0.0
        self.pending: list[Tensor] = []
        self.pending_sizes: list[float] = []

    def names(self, on_step: bool) -> tuple[str, str]:
        """The plain name and the name under which it is reported, with the loader's suffix if there are several."""
        suffix = f"/dataloader_idx_{self.dataloader_idx}" if self.add_suffix and self.dataloader_idx is not None else ""
        forked = f"{self.name}_{'step' if on_step else 'epoch'}" if self.on_step and self.on_epoch else self.name
        return self.name + suffix, forked + suffix

    def add(self, number: float, size: float) -> None:
        """Take one value into the epoch's reduction; a size of 0 is a padding rank's copy and does not count."""
        if self.reduce == "mean":
            self._sum_up(number, size)
            self.weight += size
        elif size:
            self.weight = 1.0
            if self.reduce == "sum":
                self._sum_up(number, 1.0)
            else:
                self.total = min(self.total, number) if self.reduce == "min" else max(self.total, number)

    def _sum_up(self, number: float, size: float) -> None:
        if self.exact and math.isfinite(number) and (self.total == 0 or isinstance(self.total, Fraction)):
            self.total += Fraction(number) * Fraction(size)
        else:  # once there is an infinity or a nan the order makes no difference either
            self.total = float(self.total) + number * size

    def drain(self) -> None:
        """Bring the values that wait on an accelerator into the running reduction: one wait for the device."""
        if not self.pending:
            return
        values = torch.stack([v.reshape(()) for v in self.pending]).double().tolist()
        for number, size in zip(values, self.pending_sizes, strict=True):
            self.add(number, size)
        self.pending, self.pending_sizes = [], []


class Metrics:
    """Everything that was logged in one call of fit, validate or test.

    The loop says where it is (`hook`, `batch`, `dataloader_idx`, `enter`), `log` records, and the three reports
    reduce. `callback_metrics`, `logged_metrics` and `progress_bar_metrics` are made when somebody reads them.

    exact: epoch values have the same bits in whatever order, and on whatever ranks, their parts were logged.
    """

    def __init__(self, world: World, module: torch.nn.Module, *, exact: bool = False) -> None:
        self.world = world
        self._module = module
        self._exact = exact
        # Whether a value that is logged now is reported per step. Of a step that is run in several parts the first is.
        self.keeps_steps = True
        self.hook: str | None = None
        self.dataloader_idx: int | None = None
        self.batch: Any = None
        # The feed that gave the batch, whose weight is 0 on a rank that runs a copy for lack of a sample of its own.
        self.feed: Any = None
        self._measured: Any = None
        self._size = 1.0
        self.training = True
        self._entries: dict[tuple[Any, ...], Entry] = {}
        self._sections: dict[str, dict[tuple[Any, ...], Entry]] = {"train": self._entries}
        self._section = "train"
        self._unread = False
        self._callback: dict[str, Tensor] = {}
        self._logged: dict[str, Tensor] = {}
        self._progress: dict[str, float] = {}
        self._epoch: dict[str, float] = {}
        # Whether an evaluation logs anything per step, which is rare.
        self.logs_evaluation_steps = False
        self._capacity = _CAPACITY
        self._steps_are_synced: bool | None = None

    # -------------------------------------------------------------------------------------- recording

    def log(
        self,
        name: str,
        value: Any,
        prog_bar: bool,
        logger: bool | None,
        on_step: bool | None,
        on_epoch: bool | None,
        reduce_fx: Any,
        sync_dist: bool | None,
        sync_dist_group: Any,
        add_dataloader_idx: bool,
        batch_size: float | None,
        rank_zero_only: bool,
    ) -> None:
        """Record one value; see `Module.log` for the arguments."""
        key = (
            name, self.hook, self.dataloader_idx, prog_bar, logger, on_step, on_epoch, reduce_fx, sync_dist,
            add_dataloader_idx, rank_zero_only,
        )  # fmt: skip
        entry = self._entries.get(key)
        if entry is None:
            entry = self._declare(key, value, sync_dist_group)
        entry.seen = entry.fresh = self._unread = True
        if entry.metric is not None:
            entry.metric = value
            if self.keeps_steps:
                entry.last = value._forward_cache
            return
        if isinstance(value, Tensor):
            if value.numel() != 1:
                raise LoggingError(
                    f"self.log({name!r}, ...) was given a tensor of shape {tuple(value.shape)}; one number is needed. "
                    "Reduce it first, e.g. value.mean()."
                )
            if not value.is_cpu or type(value) is not Tensor:
                self._log_on_device(entry, value, batch_size)
                return
            value = value.item()
        if entry.on_step and self.keeps_steps:
            entry.last = value
        if entry.on_epoch:
            size = self._sample_count(entry, batch_size)
            if entry.reduce == "mean" and not entry.exact:
                entry.total += value * size
                entry.weight += size
            else:
                entry.add(value, size)

    def _log_on_device(self, entry: Entry, value: Tensor, batch_size: float | None) -> None:
        """Record a value that lives on an accelerator, without waiting for it."""
        value = value.detach()
        if hasattr(value, "full_tensor"):  # a DTensor: its parts are on several ranks
            value = value.full_tensor()
        # The copy keeps the number even if the caller goes on adding to its tensor in place.
        value = value.reshape(()).to(torch.float32 if value.dtype != torch.float64 else torch.float64, copy=True)
        if entry.on_step and self.keeps_steps:
            entry.last = value
        if entry.on_epoch:
            size = self._sample_count(entry, batch_size)
            entry.pending.append(value)
            entry.pending_sizes.append(size)
            if len(entry.pending) >= _PENDING:
                entry.drain()

    def _sample_count(self, entry: Entry, batch_size: float | None) -> float:
        """How much a value counts: the samples of its batch for a mean, else once; a padding copy not at all."""
        # A last, smaller batch has another weight in the loss, but its size says how much it counts here.
        weight = 1.0 if self.feed is None or self.feed.weight else 0.0
        if batch_size is not None:
            return batch_size * weight
        if entry.reduce != "mean" or self.batch is None or not weight:
            return weight
        if self._measured is not self.batch:
            self._measured, self._size = self.batch, float(batch_size_of(self.batch))
        return self._size * weight

    def _declare(self, key: tuple[Any, ...], value: Any, sync_dist_group: Any) -> Entry:
        """Check a name that is logged for the first time, or with other arguments than before."""
        name, hook, dataloader_idx, prog_bar, logger, on_step, on_epoch, reduce_fx, sync, add_idx, zero_only = key
        if hook not in LEVELS:
            where = f"inside {hook}()" if hook else "outside of the hooks that the Trainer calls"
            raise LoggingError(
                f"self.log({name!r}, ...) is not possible {where}. Write to the logger itself: "
                "self.logger.log_metrics({...}) or self.logger.experiment."
            )
        if not isinstance(name, str):
            raise LoggingError(f"self.log() was given the name {name!r}; it must be a str.")
        if add_idx and "/dataloader_idx_" in name:
            raise LoggingError(
                f"self.log({name!r}, ...): the loader's number is appended for you; leave it out, or pass "
                "add_dataloader_idx=False."
            )
        if sync_dist_group is not None:
            raise LoggingError(f"self.log({name!r}, ..., sync_dist_group=...) is not supported; leave it out.")
        try:
            reduce = _REDUCTIONS[reduce_fx.lower() if isinstance(reduce_fx, str) else reduce_fx]
        except (KeyError, TypeError):
            raise LoggingError(
                f"self.log({name!r}, ..., reduce_fx={reduce_fx!r}). Allowed: mean, sum, min, max. For another "
                "reduction log a torchmetrics object."
            ) from None
        by_step, by_epoch = LEVELS[hook]
        by_step = by_step if on_step is None else on_step
        by_epoch = by_epoch if on_epoch is None else on_epoch
        if hook in _EPOCH_HOOKS and (by_step or not by_epoch):
            raise LoggingError(f"self.log({name!r}, on_step=..., on_epoch=...): {hook}() can log on_epoch only.")
        if not by_step and not by_epoch:
            raise LoggingError(f"self.log({name!r}, on_step=False, on_epoch=False) would never be reported.")
        if self._exact and by_step and sync:
            raise LoggingError(
                f"self.log({name!r}, sync_dist=True) per step is not possible with virtual_ranks: a step's value is "
                "that of virtual rank 0. Leave sync_dist out, or log on_epoch only."
            )
        label = f"{hook}:{name}" if dataloader_idx is None or not add_idx else f"{hook}:{name}:{dataloader_idx}"
        options = (prog_bar, logger is None or bool(logger), by_step, by_epoch, reduce, sync, add_idx, zero_only)
        for known in self._entries.values():
            if known.label == label:
                if known.options != options:
                    raise LoggingError(
                        f"self.log({name!r}, ...) was called twice in {hook}() with different arguments. Use one set "
                        "of arguments, or two names."
                    )
                self._entries[key] = known
                return known
        is_metric = hasattr(value, "_forward_cache") and hasattr(value, "compute")
        if not is_metric and not isinstance(value, (Tensor, numbers.Number)):
            raise LoggingError(
                f"self.log({name!r}, ...) was given a {type(value).__name__}. Allowed: a number, a tensor of one "
                "element, a torchmetrics object. For a dict use self.log_dict()."
            )
        double = (value.dtype if isinstance(value, Tensor) else torch.get_default_dtype()) == torch.float64
        # With add_dataloader_idx=False one entry serves all loaders; the user's name says which one it is.
        entry = Entry(hook, name, dataloader_idx if add_idx else None, label, options, double=double, exact=self._exact)
        entry.metric = value if is_metric else None
        self._entries[key] = entry
        if by_step and not self.training:
            self.logs_evaluation_steps = True
        return entry

    # ----------------------------------------------------------------------------- where the loop is

    def enter(self, section: str) -> None:
        """Go on in the training values ("train") or in those of an evaluation, whose old values are forgotten."""
        self._read_steps()
        self._section = section
        self.training = section == "train"
        self._entries = self._sections.setdefault(section, {})
        if not self.training:
            self.reset()
        self.batch = self._measured = self.feed = self.dataloader_idx = None

    def reset(self) -> None:
        """Forget the values of the current section: a new epoch begins."""
        for entry in self._distinct():
            if entry.metric is not None and entry.seen and entry.on_epoch:
                entry.metric.reset()
            entry.reset()
        self._unread = False

    def begin_anew(self) -> None:
        """Forget the values of the current section, and how they were logged: `load_state_dict` follows."""
        self.reset()
        self._entries.clear()

    def passing(self) -> list[Any]:
        """The torchmetrics objects of the evaluation at hand, which begin anew when it is over."""
        return [] if self.training else [e.metric for e in self._distinct() if e.metric is not None and e.on_epoch]

    def forget(self) -> None:
        """Forget everything that callbacks and bars could read, e.g. after the sanity check."""
        self._callback, self._logged, self._progress = {}, {}, {}
        self._unread = False

    def _distinct(self) -> list[Entry]:
        return list({id(e): e for e in self._entries.values()}.values())

    # ------------------------------------------------------------------------------------- the reports

    def step_report(self) -> dict[str, float]:
        """The last value of everything logged per step, for the loggers.

        Values with sync_dist=True are averaged over the ranks in one exchange. Whether there are such values must
        be the same on all ranks: the first report asks. One that turns up later, where there were none, is left out
        until the epoch's end, where ranks compare names again; so a rank never waits alone.
        """
        entries = [e for e in self._distinct() if e.on_step and e.seen and e.last is not None]
        values = _to_floats([e.last for e in entries])
        if self.world.size > 1:
            synced = [i for i, e in enumerate(entries) if e.sync_step and e.metric is None]
            if self._steps_are_synced is not False:
                means = self._means_over_ranks([entries[i] for i in synced], [values[i] for i in synced])
                for i, mean in zip(synced, means, strict=True):
                    values[i] = entries[i].last = mean
                self._steps_are_synced = bool(synced)
            elif synced:
                entries, values = zip_drop(entries, values, synced)
        return {e.names(on_step=True)[1]: v for e, v in zip(entries, values, strict=True) if e.logger}

    def _means_over_ranks(self, entries: list[Entry], values: list[float]) -> list[float]:
        order = sorted(range(len(entries)), key=lambda i: entries[i].label)
        weight = 1.0 if self.feed is None or self.feed.weight else 0.0
        flat = [x for i in order for x in (values[i] * weight, weight)]
        ranks = self._exchange([entries[i].label for i in order], flat)
        means = [0.0] * len(entries)
        for place, i in enumerate(order):
            weight = sum(r[2 * place + 1] for r in ranks)
            means[i] = sum(r[2 * place] for r in ranks) / weight if weight else values[i]
        return means

    def evaluation_step_report(self) -> dict[str, float]:
        """What an evaluation step logged with on_step=True (rank 0's own values)."""
        entries = [
            e for e in self._distinct()
            if e.on_step and e.seen and e.last is not None and e.logger and e.dataloader_idx == self.dataloader_idx
        ]  # fmt: skip
        values = _to_floats([e.last for e in entries])
        return {e.names(on_step=True)[1]: v for e, v in zip(entries, values, strict=True)}

    def epoch_report(self, hooks: Iterable[str] | None = None, *, keep: bool = True) -> list[tuple[Entry, Tensor]]:
        """Reduce what was logged per epoch (by the given hooks only, if given), in one exchange.

        The results are put where callbacks read them, unless `keep` is false, and returned.
        """
        chosen = None if hooks is None else set(hooks)
        self._read_steps()
        entries = [
            e for e in self._distinct() if e.on_epoch and e.seen and (chosen is None or e.hook in chosen)
        ]  # fmt: skip
        entries.sort(key=lambda e: e.label)
        plain = [e for e in entries if e.metric is None]
        for entry in plain:
            entry.drain()
        results: dict[int, Tensor] = {}
        synced = [e for e in plain if e.sync_epoch]
        if self.world.size > 1:
            exchange: Any = self._exchange_exactly if self._exact else self._exchange
            ranks = exchange([e.label for e in synced], [x for e in synced for x in (e.total, e.weight)])
            for place, entry in enumerate(synced):
                parts = [(r[2 * place], r[2 * place + 1]) for r in ranks]
                results[id(entry)] = _finish(entry, *_combine(entry.reduce, parts))
        for entry in plain:
            if id(entry) not in results and (self.world.is_global_zero or not entry.rank_zero_only):
                results[id(entry)] = _finish(entry, entry.total, entry.weight)
        for entry in entries:
            if entry.metric is not None:
                results[id(entry)] = _compute(entry)
        reported = [(e, results[id(e)]) for e in entries if id(e) in results]
        if keep:
            for entry, value in reported:
                self._publish(entry, value, on_step=False)
                if entry.logger and self.training:
                    self._epoch[entry.names(on_step=False)[1]] = value.item()
        return reported

    def epoch_values(self) -> dict[str, float]:
        """What the training epoch's reports gave for the loggers, once."""
        values, self._epoch = self._epoch, {}
        return values

    def _exchange(self, labels: list[str], values: list[float]) -> list[list[float]]:
        """Every rank's values, in rank order; an error if the ranks do not hold the same labels.

        The first numbers are a digest of the labels and the count of values; the length is one that all ranks have
        agreed on before, so that a rank with other names still meets the others in the same collective.
        """
        digest = int.from_bytes(hashlib.blake2b("\n".join(labels).encode(), digest_size=6).digest(), "little")
        head = [float(digest & 0xFFFFFF), float(digest >> 24), float(len(values))]
        capacity = self._capacity
        ranks = self._gather(head + values[:capacity] + [0.0] * (capacity - len(values)))
        if any(r[:3] != head for r in ranks) or any(r[:3] != ranks[0][:3] for r in ranks):
            raise LoggingError(_different_names(self.world.gather(labels)))
        found = [r[3 : 3 + min(len(values), capacity)] for r in ranks]
        if len(values) > capacity:
            for mine, rest in zip(found, self._gather(values[capacity:]), strict=True):
                mine.extend(rest)
            self._capacity = len(values)
        return found

    def _exchange_exactly(self, labels: list[str], values: list[float | Fraction]) -> list[list[float | Fraction]]:
        """The same for fractions, which no collective of numbers takes."""
        ranks = self.world.gather((labels, values))
        if any(other != labels for other, _ in ranks):
            raise LoggingError(_different_names([other for other, _ in ranks]))
        return [found for _, found in ranks]

    def _gather(self, values: list[float]) -> list[list[float]]:
        device = self.world.device
        dtype = torch.float32 if device.type == "mps" else torch.float64
        mine = torch.tensor(values, dtype=dtype, device=device)
        everyone = torch.empty(self.world.size * len(values), dtype=dtype, device=device)
        torch.distributed.all_gather_into_tensor(everyone, mine)
        found: list[list[float]] = everyone.view(self.world.size, len(values)).tolist()
        return found

    # ------------------------------------------------------------------------------ what others read

    def _read_steps(self) -> None:
        """Bring the last step values to where callbacks and bars read them."""
        if not self._unread:
            return
        self._unread = False
        fresh = [e for e in self._distinct() if e.on_step and e.fresh and e.last is not None]
        entries = [e for e in fresh if self.training or e.dataloader_idx == self.dataloader_idx]
        for entry, value in zip(entries, _to_floats([e.last for e in entries]), strict=True):
            entry.fresh = False
            self._publish(entry, torch.tensor(value, dtype=entry.dtype), on_step=True)

    def _publish(self, entry: Entry, value: Tensor, *, on_step: bool) -> None:
        name, reported = entry.names(on_step)
        if entry.logger:
            self._logged[reported] = value
        if not entry.rank_zero_only and (self.training or not on_step):
            self._callback[name] = self._callback[reported] = value
        if entry.prog_bar:
            self._progress[reported] = value.item()

    @property
    def callback_metrics(self) -> dict[str, Tensor]:
        """The newest value of every name."""
        self._read_steps()
        return self._callback

    @property
    def logged_metrics(self) -> dict[str, Tensor]:
        """The newest value of every name that loggers get."""
        self._read_steps()
        return self._logged

    @property
    def progress_bar_metrics(self) -> dict[str, float]:
        """The newest value of every name logged with prog_bar=True."""
        self._read_steps()
        return self._progress

    # --------------------------------------------------------------------------------- the checkpoint

    def state_dict(self) -> dict[str, Any]:
        """The half-finished training epoch of this rank, and what callbacks, loggers and bars could read."""
        entries = []
        for entry in {id(e): e for e in self._sections["train"].values()}.values():
            if not entry.seen or (entry.metric is not None and self._path_of(entry.metric) is None):
                continue
            entry.drain()
            entries.append({
                "hook": entry.hook, "name": entry.name, "label": entry.label, "options": list(entry.options),
                "double": entry.dtype == torch.float64, "weight": entry.weight,
                "total": str(entry.total) if isinstance(entry.total, Fraction) else entry.total,
                "last": None if entry.last is None else _to_floats([entry.last])[0],
                "metric": None if entry.metric is None else self._path_of(entry.metric),
            })  # fmt: skip
        return {
            "entries": entries, "callback": dict(self.callback_metrics), "logged": dict(self._logged),
            "progress": dict(self._progress),
        }  # fmt: skip

    def load_state_dict(
        self, state: dict[str, Any], orphans: Iterable[dict[str, Any]] = (), *, joins: bool = False
    ) -> None:
        """Go on from `state_dict`. orphans: what ranks left that are no more; sums over ranks take it in.

        joins: the state is rank 0's, and this rank is new. What all ranks report together it reports with them, and
        has counted nothing of it, even if the epoch has no batch left for it.
        """
        for saved in state["entries"]:
            entry = self._restored(saved)
            if entry is None:
                continue
            if joins:
                if entry.rank_zero_only or (entry.metric is None and not entry.sync_epoch):
                    continue
                last = entry.last
                entry.reset()
                entry.seen, entry.last = True, last
            self._sections["train"]["resumed", entry.label] = entry
        for orphan in orphans:
            for saved in orphan["entries"]:
                self._take_in(saved)
        self._callback = dict(state["callback"])
        self._logged, self._progress = dict(state["logged"]), dict(state["progress"])

    def _restored(self, saved: dict[str, Any]) -> Entry | None:
        """The entry; None if it is of a torchmetrics object that is not there any more."""
        entry = Entry(
            saved["hook"], saved["name"], None, saved["label"], tuple(saved["options"]), double=saved["double"],
            exact=self._exact,
        )  # fmt: skip
        if saved["metric"] is not None:
            entry.metric = dict(self._module.named_modules()).get(saved["metric"])
            if entry.metric is None:
                return None
        entry.seen = True
        entry.last, entry.weight = saved["last"], saved["weight"]
        entry.total = Fraction(saved["total"]) if isinstance(saved["total"], str) else saved["total"]
        return entry

    def _take_in(self, saved: dict[str, Any]) -> None:
        theirs = self._restored(saved)
        if theirs is None or not theirs.sync_epoch:
            return
        section = self._sections["train"]
        mine = section.setdefault(("resumed", theirs.label), theirs)
        if mine is not theirs:
            parts = [(mine.total, mine.weight), (theirs.total, theirs.weight)]
            mine.total, mine.weight = _combine(mine.reduce, parts)

    def _path_of(self, metric: Any) -> str | None:
        return next((name for name, child in self._module.named_modules() if child is metric), None)


def zip_drop(entries: list[Entry], values: list[float], left_out: list[int]) -> tuple[list[Entry], list[float]]:
    """Both lists without the given places."""
    keep = [i for i in range(len(entries)) if i not in set(left_out)]
    return [entries[i] for i in keep], [values[i] for i in keep]


def _to_floats(values: list[Any]) -> list[float]:
    """Numbers and one-element tensors as floats, waiting for an accelerator once for all of them."""
    tensors = [i for i, v in enumerate(values) if isinstance(v, Tensor)]
    out = [0.0 if isinstance(v, Tensor) else float(v) for v in values]
    if tensors:
        device = values[tensors[0]].device
        dtype = torch.float32 if device.type == "mps" else torch.float64
        stacked = torch.stack([values[i].detach().reshape(()).to(device=device, dtype=dtype) for i in tensors])
        for i, number in zip(tensors, stacked.tolist(), strict=True):
            out[i] = number
    return out


def _combine(reduce: str, parts: list[tuple[float | Fraction, float]]) -> tuple[float | Fraction, float]:
    """The ranks' (total, weight) as one; a rank of weight 0 has seen nothing."""
    counted = [(total, weight) for total, weight in parts if weight]
    if not counted:
        return parts[0]
    if reduce in ("mean", "sum"):
        return sum(total for total, _ in counted), sum(weight for _, weight in counted)
    return (min if reduce == "min" else max)(total for total, _ in counted), 1.0


def _finish(entry: Entry, total: float | Fraction, weight: float) -> Tensor:
    number = float(total)
    if entry.reduce == "mean":
        number = number / weight if weight else math.nan
    return torch.tensor(number, dtype=entry.dtype)


def _compute(entry: Entry) -> Tensor:
    value = entry.metric.compute()
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise LoggingError(
            f"self.log({entry.name!r}, ...): compute() of {type(entry.metric).__name__} gives "
            f"{type(value).__name__ if not isinstance(value, Tensor) else tuple(value.shape)}; one number is needed. "
            "Log its parts by name with self.log_dict()."
        )
    return value.detach().reshape(()).cpu()


def _different_names(ranks: list[list[str]]) -> str:
    """Say which rank logged what the others did not."""
    lines = []
    everything = set().union(*ranks)
    for label in sorted(everything):
        having = [r for r, labels in enumerate(ranks) if label in labels]
        lacking = [r for r in range(len(ranks)) if r not in having]
        if lacking:
            hook, _, name = label.partition(":")
            lines.append(f"  {name!r} in {hook}(): logged by rank {_some(having)}, not by rank {_some(lacking)}")
    return (
        "The ranks logged different names, so their values cannot be reduced:\n"
        + "\n".join(lines[:20])
        + "\nLog the same names on every rank, or pass sync_dist=False or rank_zero_only=True for these."
    )


def _some(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")


def batch_size_of(batch: Any) -> int:
    """The number of samples in a batch: the first dimension of the first tensor in it.

    Raises:
        LoggingError: there is no tensor in it.
    """
    for size in _sizes(batch):
        return size
    raise LoggingError(
        f"The batch size cannot be read off a batch of type {type(batch).__name__}; pass self.log(..., batch_size=n)."
    )


def _sizes(batch: Any) -> Iterator[int]:
    if isinstance(batch, Tensor):
        yield batch.shape[0] if batch.ndim else 1
    elif isinstance(batch, str):
        return
    elif isinstance(batch, dict):
        for value in batch.values():
            yield from _sizes(value)
    elif isinstance(batch, (list, tuple)):
        for value in batch:
            yield from _sizes(value)
    elif is_dataclass(batch) and not isinstance(batch, type):
        for field in fields(batch):
            yield from _sizes(getattr(batch, field.name))
    elif hasattr(batch, "values") and callable(batch.values):
        for value in batch.values():
            yield from _sizes(value)
