"""What can be decided before the first batch: a `Fit` or an `Evaluation`, bound to what it needs."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from trainer.callbacks.finders import Finder
from trainer.errors import ConfigError
from trainer.forms import bound_step, check_manual, require_dataloader_idx
from trainer.guard import Guard, Guarding, refuse_guard
from trainer.hparams import storable
from trainer.loading import to_device
from trainer.loop import Evaluation, Fit, Stopping, clip, evaluate
from trainer.optimizers import WrappedOptimizer, needs_closure, parameters_of, read_optimizers
from trainer.progress import PREDICT, TEST, TRAIN, VALIDATE
from trainer.rank_state import place_in_epoch, restore_random, restore_rank
from trainer.ranks import rank_zero_info, rank_zero_warn
from trainer.seed import chosen_seed, isolate_rng
from trainer.state import (
    RunningStage,
    TrainerFn,
    TrainState,
    restore_model,
    restore_training,
)
from trainer.stop import StopAgreement
from trainer.throughput import Meter
from trainer.virtual import VirtualRanks, refuse

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from trainer.hooks import Hooks
    from trainer.module import Module
    from trainer.sources import Loaders
    from trainer.trainer import Trainer

# The loaders' kind, the word in the hooks' names, and the phase on the progress page.
_EVALUATIONS = {
    TrainerFn.VALIDATING: ("val", "validation", VALIDATE),
    TrainerFn.TESTING: ("test", "test", TEST),
    TrainerFn.PREDICTING: ("predict", "predict", PREDICT),
}


def prepare_fit(
    trainer: Trainer, module: Module, ckpt_path: str | Path | None, weights_only: bool | None
) -> Fit | None:
    """Load what is to be resumed, make the optimizers, bind the loop. None if this run is finished already."""
    trainer.train_state = TrainState(accumulate=trainer.accumulate_grad_batches, seed=_shared_seed(trainer))
    trainer.parallel.wrap(module)
    found = trainer.saves.find(ckpt_path, weights_only, fitting=True)
    if found is not None:
        trainer.train_state.seed = (found.state.get("progress") or {}).get("seed", trainer.train_state.seed)
        restore_model(trainer, found.state)
        if found.finished and trainer.run_dir is not None:
            trainer.train_state.epoch = int(found.state["epoch"])
            trainer.train_state.global_step = int(found.state["global_step"])
            # What the script does next finds what there was when this training came to its end.
            restore_random(found, trainer.world)
            if trainer.metrics is not None and (logged := found.rank_state.get("metrics")) is not None:
                trainer.metrics.load_state_dict(logged | {"entries": []})
            trainer.saves.is_trained()
            rank_zero_info(f"fit: this run finished at step {trainer.global_step}; nothing is left to do.")
            return None
    else:
        _find(trainer, module)
    hooks = trainer.bind_hooks()
    trainer.optimizers, trainer.lr_scheduler_configs = read_optimizers(module)
    if not module.automatic_optimization:
        check_manual(trainer)
    _wrap_optimizers(trainer, module, hooks)
    if hooks.on_fit_start is not None:
        hooks.on_fit_start()
    if trainer.config.enable_autolog_hparams:
        trainer.reports.hyperparameters(module)
    if found is not None:
        restore_training(trainer, found.state)
        trainer.reports.resume(found.state)
        if trainer.max_epochs is not None and 0 <= trainer.max_epochs < trainer.current_epoch:
            raise ConfigError(
                f"The checkpoint has finished {trainer.current_epoch} epochs, but max_epochs={trainer.max_epochs}."
            )
        rank_zero_info(f"fit goes on from {found.name}: epoch {trainer.current_epoch}, step {trainer.global_step}.")
    if trainer.page is not None:
        trainer.page.began(trainer.global_step)
    _warn_of_what_is_not_saved(trainer)
    trainer.fit_run = run = _make_fit(trainer, module, hooks)
    if found is not None and (guarded := found.state.get("guard")) is not None:
        if run.guard is not None:
            run.guard.load_state_dict(guarded)
        elif guarded["skipped"]:
            rank_zero_warn(
                f"{found.name} leaves {len(guarded['skipped'])} steps of the data out, and this Trainer has no guard: "
                "those that are still to come are trained. Pass Trainer(guard=True) to leave them out."
            )
    trainer.data.load_training(run)
    if found is not None:
        run.resumed = place_in_epoch(run, found, anew=trainer.config.resume == "epoch")
    trainer.data.load_validation(run)
    if trainer.world.any(run.signals.requested):
        raise Stopping  # a signal during the set-up: nothing was trained, so there is nothing to save
    module.zero_grad()
    return run


def _warn_of_what_is_not_saved(trainer: Trainer) -> None:
    for owner in (trainer.lightning_module, trainer.datamodule):
        if owner is not None and (names := storable(owner.hparams)[1]):
            kind = type(owner).__name__
            rank_zero_warn(
                f"Checkpoints hold data, not objects, so they will lack the hyperparameters {', '.join(names)} of "
                f"{kind}. Give them again to {kind}.load_from_checkpoint(path, "
                f"{', '.join(f'{name}=...' for name in names)}), or leave them out: "
                f"save_hyperparameters(ignore={names})."
            )


def begin(run: Fit) -> None:
    """The last things before the first batch: the sanity check, or the state that belongs to this rank."""
    if run.resumed is None:
        _sanity_check(run)
    else:
        restore_rank(run, run.resumed)
        run.resumed = None
    run.parallel.draw_alike()
    run.trainer.state.stage = RunningStage.TRAINING
    if run.page is not None:
        run.page.phase(TRAIN)


def _sanity_check(run: Fit) -> None:
    """A few batches of validation before training, so that a bug in it shows now and not after an epoch."""
    if run.validation is None or not run.trainer.num_sanity_val_steps:
        return
    run.trainer.state.stage = RunningStage.SANITY_CHECKING
    with isolate_rng():
        if run.hooks.on_sanity_check_start is not None:
            run.hooks.on_sanity_check_start()
        evaluate(run.validation)
        if run.hooks.on_sanity_check_end is not None:
            run.hooks.on_sanity_check_end()
    run.metrics.enter("train")
    run.metrics.forget()


def prepare_evaluation(
    trainer: Trainer,
    fn: TrainerFn,
    module: Module,
    ckpt_path: str | Path | None,
    weights_only: bool | None,
    *,
    model_given: bool,
) -> Evaluation:
    """Load the weights that are asked for, and bind the loop."""
    kind, name, phase = _EVALUATIONS[fn]
    if trainer.train_state.seed is None:
        trainer.train_state.seed = _shared_seed(trainer)
    trainer.parallel.wrap(module, training=False)
    if not model_given and ckpt_path is None and getattr(trainer.checkpoint_callback, "best_model_path", None):
        ckpt_path = "best"
    found = trainer.saves.find(ckpt_path, weights_only, fitting=False)
    if found is not None:
        restore_model(trainer, found.state)
        rank_zero_info(f"{fn} uses the weights of {found.name}.")
    _find(trainer, module)
    trainer.bind_hooks()
    loaders = trainer.data.load(kind)
    if trainer.config.enable_autolog_hparams:
        trainer.reports.hyperparameters(module)
    if trainer.page is not None:
        trainer.page.phase(phase)
    return make_evaluation(trainer, name, loaders, inference_mode=trainer.config.inference_mode)


def _find(trainer: Trainer, module: Module) -> None:
    """Let callbacks that look for a learning rate or batch size do so, before optimizers and loaders are made."""
    for callback in trainer.callbacks:
        if isinstance(callback, Finder):
            callback.find(trainer, module)


def make_evaluation(trainer: Trainer, name: str, loaders: Loaders, *, inference_mode: bool) -> Evaluation:
    """Bind a validation (also that of a fit), test or predict."""
    module, metrics, signals, hooks = trainer.lightning_module, trainer.metrics, trainer.signals, trainer.hooks
    assert module is not None
    assert metrics is not None
    assert signals is not None
    assert hooks is not None
    fit_run = trainer.fit_run
    together = loaders.together()
    step_name = f"{name}_step"
    if together is None and len(loaders.feeds) > 1:
        require_dataloader_idx(module, step_name)
    return Evaluation(
        trainer=trainer,
        module=module,
        hooks=hooks,
        metrics=metrics,
        world=trainer.world,
        precision=trainer.precision_object,
        signals=signals,
        agreement=(
            StopAgreement(trainer.world, signals, trainer.train_state) if fit_run is None else fit_run.agreement
        ),
        page=trainer.page,
        name=name,
        step=bound_step(trainer, module, step_name, trainer.parallel.step_of(step_name)),
        move=_mover(trainer, hooks),
        feeds=loaders.feeds,
        limits=loaders.limits if together is None else [loaders.batches],
        together=together,
        inference_mode=inference_mode,
        virtual=None if fit_run is None else fit_run.virtual,
    )


def _make_fit(trainer: Trainer, module: Module, hooks: Hooks) -> Fit:
    assert trainer.metrics is not None
    assert trainer.signals is not None
    optimizer = trainer.optimizers[0] if trainer.optimizers and module.automatic_optimization else None
    run = Fit(
        trainer=trainer,
        state=trainer.train_state,
        module=module,
        hooks=hooks,
        metrics=trainer.metrics,
        world=trainer.world,
        parallel=trainer.parallel,
        precision=trainer.precision_object,
        signals=trainer.signals,
        agreement=StopAgreement(trainer.world, trainer.signals, trainer.train_state, trainer.saves.settle),
        page=trainer.page,
        meter=Meter(
            module,
            trainer.device,
            trainer.world_size,
            str(trainer.precision),
            tensor_parallel=trainer.parallel.tensor_parallel,
        ),
        step=bound_step(trainer, module, "training_step", trainer.parallel.step),
        optimizer=optimizer,
        wrapped=trainer.wrapped_optimizers[0] if optimizer is not None else None,
        by_closure=optimizer is not None and (needs_closure(optimizer) or hooks.optimizer_step is not None),
        schedulers=trainer.lr_scheduler_configs,
        gradient_clip_val=trainer.gradient_clip_val,
        gradient_clip_algorithm=trainer.gradient_clip_algorithm or "norm",
        validate_seconds=trainer.config.val_check_seconds,
    )
    if trainer.config.virtual_ranks is not None:
        refuse(run)
        run.virtual = VirtualRanks(module, trainer.world, trainer.config.virtual_ranks, seed=trainer.train_state.seed)
    clips = trainer.gradient_clip_val is not None or hooks.configure_gradient_clipping is not None
    # Whether clipping computes no norm that the guard could look at.
    lacks_norm = not clips or run.gradient_clip_algorithm != "norm" or hooks.configure_gradient_clipping is not None
    if isinstance(trainer.config.guard, Guard):
        refuse_guard(run)
        run.guard = Guarding(run, trainer.config.guard)
        if lacks_norm:
            shares = " and one all-reduce of one number" if trainer.parallel.sharded else ""
            rank_zero_info(f"guard: gradients are not clipped by norm; their norm{shares} is computed for it per step.")
    guard = run.guard
    if clips or guard is not None or hooks.on_before_optimizer_step is not None:

        def before_step(stepped: Any) -> None:
            if hooks.on_before_optimizer_step is not None:
                hooks.on_before_optimizer_step(stepped)
            norm = run.parallel.norm(parameters_of(stepped)) if guard is not None and lacks_norm else None
            clipped = clip(run, stepped) if clips else None
            if guard is not None:
                guard.see(clipped if norm is None else norm)

        run.before_step = before_step
        if module.automatic_optimization:
            for wrapped in trainer.wrapped_optimizers:
                wrapped._before_step = before_step
    return run


def _wrap_optimizers(trainer: Trainer, module: Module, hooks: Hooks) -> None:
    """What `self.optimizers()` gives; in manual optimization their steps count."""

    def count() -> None:
        trainer.train_state.global_step += 1

    def nothing() -> None:
        """The loop counts itself."""

    trainer.wrapped_optimizers = [
        WrappedOptimizer(
            optimizer,
            module=module,
            precision=trainer.precision_object,
            parallel=trainer.parallel,
            before_step=hooks.on_before_optimizer_step,
            stepped=nothing if module.automatic_optimization else count,
        )
        for optimizer in trainer.optimizers
    ]


def training_mover(run: Fit) -> Callable[[Any, int], Any] | None:
    """How a training batch gets to the device, or None if it is there as it comes."""
    move = _mover(run.trainer, run.hooks)
    if move is None or run.virtual is None:
        return move
    return lambda batches, number: [move(batch, number) for batch in batches]


def _mover(trainer: Trainer, hooks: Hooks) -> Callable[[Any, int], Any] | None:
    """How a batch gets to the device, or None if it is there as it comes."""
    device, convert = trainer.device, trainer.precision_object.convert_batch
    before, transfer, after = (
        hooks.on_before_batch_transfer, hooks.transfer_batch_to_device, hooks.on_after_batch_transfer,
    )  # fmt: skip
    plain = before is None and transfer is None and after is None
    converts = not trainer.precision_object.keeps_batches
    if plain and not converts and device.type == "cpu":
        return None

    def move(batch: Any, number: int) -> Any:
        if converts:
            batch = convert(batch)
        if before is not None:
            batch = before(batch, number)
        batch = to_device(batch, device) if transfer is None else transfer(batch, device, number)
        return batch if after is None else after(batch, number)

    return move


def _shared_seed(trainer: Trainer) -> int:
    """The seed of the sample order: that of seed_everything, or one drawn now; the same on all ranks."""
    seed = chosen_seed()
    if seed is None:
        seed = int.from_bytes(os.urandom(4), "little")
    return int(trainer.world.broadcast(seed))
