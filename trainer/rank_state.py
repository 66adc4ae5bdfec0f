"""What each rank has for itself: kept in every checkpoint, given back on any number of ranks.

On the same number of ranks everybody gets its own back. On fewer, a rank also stands in for those that are no more
(its number plus once, twice, ... the number of ranks): their half-finished sums are added to its own. On more, a new
rank begins with nothing counted of what rank 0 counts, rank 0's newest values to read, and random numbers of its own.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trainer.errors import CheckpointError, ConfigError
from trainer.loading import _key, _seed_all
from trainer.ranks import rank_zero_info
from trainer.seed import rng_state, set_rng_state

if TYPE_CHECKING:
    from trainer.distributed import World
    from trainer.loop import Fit
    from trainer.resume import Found


def rank_state(run: Fit) -> dict[str, Any]:
    """Random state, the epoch's half-reduced values, the loaders' state, gradients of an unfinished window."""
    broken_off = run.state.resume_at == "validation" and run.before_validation is not None
    # A validation that was broken off is done again, from what was there before it.
    before: Any = run.before_validation if broken_off else Before(run, run.metrics.passing())
    state: dict[str, Any] = {
        "rng": before.rng,
        "metrics": run.metrics.state_dict(),
        "torchmetrics": before.torchmetrics,
        "feed": run.feed.state_dict(),
    }
    if before.buffers:
        state["buffers"] = before.buffers
    if in_flight(run):
        # DDP has not exchanged them yet, so they are not the same on all ranks.
        state["gradients"] = {n: p.grad for n, p in run.module.named_parameters() if p.grad is not None}
    return state


def in_flight(run: Fit) -> int:
    """Batches of the unfinished accumulation window."""
    state = run.state
    if not run.module.automatic_optimization or state.batch >= run.batches_per_epoch:
        return 0
    return (state.batch - state.windows_from) % state.accumulate


class Before:
    """What a validation changes although it belongs to training: random state, torchmetrics objects, and this rank's
    own buffers, where averages stand in for them.

    copied: the buffers are copies. left_out: torchmetrics objects that are not wanted.
    """

    def __init__(self, run: Fit, left_out: list[Any], *, copied: bool = False) -> None:
        self.rng = rng_state()
        self.torchmetrics = metric_states(run.module, left_out)
        self.buffers: dict[str, Tensor] = {}
        own = in_flight(run) or run.parallel.share_buffers is None
        if run.world.size > 1 and not run.parallel.sharded and own:
            self.buffers = {n: b.clone() if copied else b for n, b in run.module.named_buffers()}


def place_in_epoch(run: Fit, found: Found, *, anew: bool) -> Found:
    """Count the epoch's batches for the number of ranks that there is now; returns what `restore_rank` shall take.

    anew: an epoch that was broken off begins again, with the weights as they are.
    """
    state = run.state
    now, then = run.trainer.config.virtual_ranks, found.state.get("virtual", {}).get("count")
    if None not in (now, then) and now != then:
        raise ConfigError(
            f"virtual_ranks={now}, but the checkpoint {found.name} was made with {then}: its batches were cut into "
            f"{then} shares. Go on with virtual_ranks={then}; the number of ranks may be any up to that."
        )
    if state.position is None:
        return found
    window = in_flight(run)
    batch = run.feed.batches_done(state.position)
    if anew and batch < run.batches_per_epoch and state.resume_at != "epoch_end":
        rank_zero_info(f"resume='epoch': epoch {state.epoch} begins anew; {batch} of its batches are trained again.")
        state.batch, state.windows_from, state.position, state.resume_at = 0, 0, None, ""
        return replace(found, rank_state={}, orphans=())
    if batch != state.batch:
        # Another number of ranks takes another number of batches to the same place; the window goes on where it was.
        state.batch, state.windows_from = batch, batch - window
    return found


def restore_rank(run: Fit, found: Found) -> None:
    """Give this rank what it, and those it stands in for, had."""
    world, own = run.world, found.rank_state
    joins = world.rank >= found.world_size
    if found.world_size < world.size:
        counted = world.broadcast(own.get("metrics"))
        if joins and counted:
            own = {"metrics": counted}
    if "metrics" in own:
        run.metrics.load_state_dict(own["metrics"], [o["metrics"] for o in found.orphans], joins=joins)
        load_metric_states(run.module, [o["torchmetrics"] for o in (own, *found.orphans) if "torchmetrics" in o])
    if found.world_size == world.size:
        for name, buffer in own.get("buffers", {}).items():
            run.module.get_buffer(name).copy_(buffer)
    if own.get("feed") and found.world_size == world.size:
        run.feed.load_state_dict(own["feed"])
    # Each is a part of a mean over the ranks that there were; that of virtual ranks is the whole, on every rank.
    share = world.size / found.world_size
    if virtual := found.state.get("virtual"):
        own, share = own | virtual, 1.0
    for state in (own, *found.orphans):
        for name, gradient in state.get("gradients", {}).items():
            parameter = run.module.get_parameter(name)
            part = gradient.to(parameter.device) * share if share != 1 else gradient.to(parameter.device)
            parameter.grad = part if parameter.grad is None else parameter.grad + part
    restore_random(found, world)


def restore_random(found: Found, world: World) -> None:
    """Give this rank the random state that it had, or, if it is new, one of its own."""
    own = found.rank_state | found.state.get("virtual", {})
    if "rng" in own:
        set_rng_state(own["rng"])
    else:
        progress = found.state.get("progress") or {}
        _seed_all(_key(progress.get("seed") or 0, progress.get("batches", 0), world.rank, world.size))


def metric_states(module: torch.nn.Module, left_out: list[Any]) -> dict[str, Any]:
    """The half-finished torchmetrics objects among a module's children: they are not in its state_dict by default."""
    found = {}
    for name, child in module.named_modules():
        if _is_metric(child) and child._update_count and not any(child is metric for metric in left_out):
            # They are added to in place.
            state = {key: _copied(value) for key, value in child.metric_state.items()}
            found[name] = {"state": state, "updates": child._update_count}
    return found


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else list(value)


def load_metric_states(module: torch.nn.Module, ranks: list[dict[str, Any]]) -> None:
    """Put back what `metric_states` returned, on one rank or on several that this one stands in for.

    Raises:
        CheckpointError: the parts of several ranks cannot be made one.
    """
    children: dict[str, Any] = dict(module.named_modules())
    for name in dict.fromkeys(name for states in ranks for name in states):
        metric = children.get(name)
        if metric is None or not _is_metric(metric):
            continue
        parts = [states[name] for states in ranks if name in states]
        for key in parts[0]["state"]:
            metric._modules.pop(key, None)
            setattr(metric, key, _merged(name, metric, key, [part["state"][key] for part in parts]))
        metric._update_count = sum(part["updates"] for part in parts)
        metric._computed = None


def _merged(name: str, metric: Any, key: str, values: list[Any]) -> Any:
    """One state of a metric over several ranks, reduced as torchmetrics itself does when ranks meet."""
    if len(values) == 1:
        return values[0]
    if isinstance(values[0], list):
        return [item for value in values for item in value]
    reduce = metric._reductions[key]
    if reduce is None:
        raise CheckpointError(
            f"The metric {name} ({type(metric).__name__}) is in the middle of an epoch on more ranks than there are "
            f"now, and its {key} of several ranks cannot be made one. Resume with the same number of ranks, or begin "
            "the epoch anew: Trainer(resume='epoch')."
        )
    return reduce(torch.stack(values))


def _is_metric(child: Any) -> bool:
    return hasattr(child, "metric_state") and hasattr(child, "_update_count")
