"""Steps whose gradients are not finite or spike are undone, and their batches left out as if they were not there."""

from __future__ import annotations

import csv
import json
import math
import time
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import trainer as T
from trainer.callbacks import EMAWeightAveraging, ModelCheckpoint, ModelPruning, OnExceptionCheckpoint, Timer
from trainer.errors import ConfigError, DivergedError
from trainer.loggers import CSVLogger

BATCH = 4


class Model(T.Module):
    """Draws random numbers, keeps running statistics, and steps a scheduler."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1))

    def training_step(self, batch, batch_idx):
        loss = nn.functional.mse_loss(self.net(batch[0]), batch[1])
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.mse_loss(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.97), "interval": "step"}]


def samples(bad=(), value=math.nan, n=160):
    """`n` samples; the targets of the `bad` ones are `value`."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(n, 4, generator=generator), torch.randn(n, 1, generator=generator)
    y[list(bad)] = value
    return x, y


def loader(x, y):
    return DataLoader(TensorDataset(x, y), BATCH)


def without(values, batches, accumulate=1):
    gone = {i for b in batches for i in range(b * BATCH * accumulate, (b + 1) * BATCH * accumulate)}
    keep = [i for i in range(len(values[0])) if i not in gone]
    return tuple(v[keep] for v in values)


def train(quiet, x, y, **arguments):
    torch.manual_seed(1)
    module = Model()
    trainer = quiet(**({"max_epochs": 1, "gradient_clip_val": 1.0} | arguments))
    trainer.fit(module, loader(x, y), loader(*samples(n=8)))
    return module, trainer


def same(a, b):
    assert all(torch.equal(a.state_dict()[name], value) for name, value in b.state_dict().items())


@pytest.mark.parametrize("arguments", [
    {}, {"gradient_clip_val": None}, {"gradient_clip_algorithm": "value"}, {"accumulate_grad_batches": 2},
    {"val_check_interval": 7}, {"guard": T.Guard(snapshot_every=1)}, {"precision": "bf16-mixed"},
])  # fmt: skip
def test_a_batch_that_is_not_finite_might_not_have_been_there(quiet, arguments):
    accumulate = arguments.get("accumulate_grad_batches", 1)
    bad = 15 // accumulate
    values = samples([15 * BATCH + 1])
    with pytest.warns(UserWarning, match=r"samples .*60, 61, 62, 63.*on without them \(try 1 of 3\)"):
        found, trainer = train(quiet, *values, **({"guard": True} | arguments))
    others = {k: v for k, v in arguments.items() if k not in ("guard", "val_check_interval")}
    expected, plain = train(quiet, *without(values, [bad], accumulate), **others)
    same(found, expected)
    assert trainer.global_step == plain.global_step
    assert trainer.callback_metrics["loss_epoch"] == plain.callback_metrics["loss_epoch"]
    assert trainer.train_state.batch == 0
    assert trainer.train_state.batches == plain.train_state.batches + accumulate


@pytest.mark.parametrize("bad", [14 * BATCH, 15 * BATCH])
def test_all_batches_of_several_loaders(quiet, bad):
    """Of a step over several batches all are left out, wherever the guilty one is."""

    class Two(Model):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch[0], batch_idx) + super().training_step(batch[1], batch_idx)

    values, others = samples([bad]), samples(n=160)
    ends = []
    for guard in (True, False):
        first, second = (v if guard else without(v, [7], 2) for v in (values, others))
        torch.manual_seed(1)
        module, trainer = Two(), quiet(max_epochs=1, accumulate_grad_batches=2, guard=guard)
        with pytest.warns(UserWarning, match="batches 14-15.*try 1 of 3") if guard else nullcontext():
            trainer.fit(module, [loader(*first), loader(*second)])
        ends.append((module, trainer))
    assert [t.global_step for _, t in ends] == [19, 19]
    assert ends[0][1].train_state.batches == 40
    same(ends[0][0], ends[1][0])


def test_a_step_of_other_batches_is_left_out_as_a_whole(quiet, tmp_path):
    """A run that goes on with larger batches (as it does on more ranks) has the guilty one in a step with others."""

    class Leave(T.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if trainer.fit_run.guard.rollbacks and trainer.train_state.batch == 22:
                trainer.save_checkpoint(tmp_path / "between.ckpt")
                raise KeyboardInterrupt

    class Seeing(Model):
        def training_step(self, batch, batch_idx):
            seen.append(batch[0])
            return super().training_step(batch, batch_idx)

    seen, (x, y) = [], samples([30 * BATCH])
    with pytest.warns(UserWarning, match="batches 30-31"), pytest.raises(KeyboardInterrupt):
        train(quiet, x, y, guard=True, accumulate_grad_batches=2, callbacks=[Leave()])
    trainer = quiet(max_epochs=1, guard=True, accumulate_grad_batches=2)
    trainer.fit(Seeing(), DataLoader(TensorDataset(x, y), 2 * BATCH), ckpt_path=tmp_path / "between.ckpt")
    assert torch.equal(torch.cat(seen), torch.cat([x[88:120], x[136:]]))
    assert trainer.global_step == 11 + 2 + 2


def test_a_spike_and_several_epochs(quiet, capsys):
    """The same samples come again in every epoch, and are found again."""
    values = samples(range(25 * BATCH, 26 * BATCH), 1e4)
    with pytest.warns(UserWarning, match="the median before"):
        found, trainer = train(quiet, *values, guard=True, max_epochs=2)
    expected, _ = train(quiet, *without(values, [25]), max_epochs=2)
    same(found, expected)
    assert trainer.global_step == 2 * 39
    told = capsys.readouterr().err
    assert "guard: 2 rollbacks; left out: epoch 0, batches 25; epoch 1, batches 25 (8 samples)." in told
    # Without a limit for spikes it is trained.
    _, trainer = train(quiet, *values, guard=T.Guard(spike=None))
    assert trainer.global_step == 40


def test_the_last_batch_and_what_follows_it(quiet):
    values = samples([159])
    with pytest.warns(UserWarning, match="batches 39"):
        found, trainer = train(quiet, *values, guard=True)
    assert trainer.callback_metrics["val_loss"].isfinite()
    same(found, train(quiet, *without(values, [39]))[0])


@pytest.mark.filterwarnings("ignore:A checkpoint waited")
def test_averages_checkpoints_and_logs_go_back_too(quiet, tmp_path):
    values, ends = samples([31 * BATCH]), []
    for name, given in (("whole", without(values, [31])), ("guarded", values)):
        average = EMAWeightAveraging(decay=0.9)
        saves = ModelCheckpoint(tmp_path / name, every_n_train_steps=10, save_top_k=-1)
        with pytest.warns(UserWarning, match="Back to step 30 ") if name == "guarded" else nullcontext():
            module, _ = train(
                quiet, *given, callbacks=[average, saves], logger=CSVLogger(tmp_path / name, name="", version=""),
                log_every_n_steps=1, enable_checkpointing=True, guard=name == "guarded",
            )  # fmt: skip
        with open(tmp_path / name / "metrics.csv") as file:
            losses = [float(row["loss_step"]) for row in csv.DictReader(file) if row.get("loss_step")]
        ends.append((module, average, sorted(f.name for f in (tmp_path / name).glob("*.ckpt")), losses))
    whole, guarded = ends
    same(guarded[0], whole[0])
    assert all(torch.equal(value, guarded[1]._average[k]) for k, value in whole[1]._average.items())
    assert guarded[2] == whole[2]
    assert guarded[3] == whole[3]  # what is repeated is logged once


def test_hooks_of_checkpoints_and_clocks_take_no_part(quiet):
    class Watching(T.Callback):
        seconds, hooks, passed = 0.0, 0, ()

        def state_dict(self):
            return {"passed": list(self.passed)}

        def load_state_dict(self, state_dict):
            self.passed = state_dict["passed"]

        def on_save_checkpoint(self, trainer, module, checkpoint):
            self.hooks += 1

        on_load_checkpoint = on_save_checkpoint

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            self.passed = [*self.passed, batch_idx]
            assert timer.time_elapsed() >= self.seconds
            self.seconds = timer.time_elapsed()
            assert self.seconds <= time.monotonic() - timer.start_time()

    pruned, watching, timer = Model(), Watching(), Timer()
    pruning = ModelPruning("l1_unstructured", parameters_to_prune=[(pruned.net[0], "weight")], amount=0.25)
    trainer = quiet(max_epochs=2, guard=T.Guard(snapshot_every=3), callbacks=[timer, pruning, watching])
    with pytest.warns(UserWarning, match="batches 15, .*on without them"):
        trainer.fit(pruned, loader(*samples([15 * BATCH])))
    assert trainer.global_step == 2 * 39
    assert watching.hooks == 0
    assert watching.passed == [i for i in range(40) if i != 15] * 2
    assert (pruned.net[0].weight == 0).sum() >= 8


def test_an_optimizer_of_another_kind(quiet):
    """Its learning rate is a tensor, which the scheduler fills in place, and its state has a list."""

    class Momentum(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    momenta = self.state[p].setdefault("momenta", [torch.zeros_like(p)])
                    momenta[0] = momenta[0] * 0.9 + p.grad
                    p -= group["lr"] * momenta[0]

    class Other(Model):
        def configure_optimizers(self):
            optimizer = Momentum(self.parameters(), lr=torch.tensor(0.01))
            scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.97)
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    values, ends = samples([15 * BATCH]), []
    for guard, given in ((T.Guard(snapshot_every=10), values), (False, without(values, [15]))):
        torch.manual_seed(1)
        module, trainer = Other(), quiet(max_epochs=1, guard=guard)
        with pytest.warns(UserWarning, match="Back to step 10") if guard else nullcontext():
            trainer.fit(module, loader(*given))
        ends.append((module, trainer.optimizers[0].param_groups[0]["lr"]))
    same(ends[0][0], ends[1][0])
    assert torch.equal(ends[0][1], ends[1][1])


def test_goes_on_within_a_step_that_is_guilty(quiet, tmp_path):
    class Leave(T.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if batch_idx == 30:
                trainer.save_checkpoint(tmp_path / "within.ckpt")
                raise KeyboardInterrupt

    values = samples([31 * BATCH])
    with pytest.raises(KeyboardInterrupt):
        train(quiet, *values, guard=True, accumulate_grad_batches=2, callbacks=[Leave()])
    module, trainer = Model(), quiet(max_epochs=1, gradient_clip_val=1.0, guard=True, accumulate_grad_batches=2)
    with pytest.warns(UserWarning, match="gradients of step 16 have the norm nan.*batches 31,.*Back to step 15"):
        trainer.fit(module, loader(*values), ckpt_path=tmp_path / "within.ckpt")
    assert trainer.global_step == 19
    assert all(value.isfinite().all() for value in module.state_dict().values())


def test_rows_are_logged_once_after_several_rollbacks(quiet, tmp_path):
    values = samples([8 * BATCH, 20 * BATCH, 31 * BATCH])
    with pytest.warns(UserWarning, match="Back to step 0 "):
        train(
            quiet, *values, guard=T.Guard(max_tries=3), log_every_n_steps=1,
            logger=CSVLogger(tmp_path, name="", version=""),
        )  # fmt: skip
    with open(tmp_path / "metrics.csv") as file:
        steps = [row["step"] for row in csv.DictReader(file) if row.get("loss_step")]
    assert len(steps) == len(set(steps)) == 37


def test_a_users_error_stays_the_users(quiet, tmp_path):
    """While the norm of a bad step is still on its way from a GPU, and callbacks save what there is."""

    class Came:
        def synchronize(self):
            pass

    class Fail(T.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            guard = trainer.fit_run.guard
            guard._pending = Came(), torch.tensor(math.nan), guard._window
            raise RuntimeError("the user's")

    callbacks = [Fail(), OnExceptionCheckpoint(tmp_path)]
    with pytest.raises(RuntimeError, match="the user's"):
        train(quiet, *samples(), guard=True, callbacks=callbacks, enable_checkpointing=True)
    assert list(tmp_path.iterdir())


def test_tries_end(quiet):
    values = samples(range(22 * BATCH, 160))
    with (
        pytest.warns(UserWarning, match="try [12] of 2"),
        pytest.raises(
            DivergedError, match=r"After 2 rollbacks to step 0 the gradients of step 23 have the norm nan .*batches 24"
            r", samples 96, 97, 98, 99. Left out since then: epoch 0, batches 22; epoch 0, batches 23\.",
        ),
    ):  # fmt: skip
        train(quiet, *values, guard=T.Guard(max_tries=2))


def test_what_was_left_out_is_state(quiet, tmp_path):
    """Stopped between the rollback and the guilty batch, which a resumed run then leaves out without meeting it."""
    values = samples([31 * BATCH])

    class Leave(T.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if trainer.fit_run.guard.rollbacks and trainer.global_step == 25:
                trainer.save_checkpoint(tmp_path / "between.ckpt")
                raise KeyboardInterrupt

    with pytest.warns(UserWarning, match="Back to step 0 "), pytest.raises(KeyboardInterrupt):
        train(quiet, *values, guard=True, callbacks=[Leave()])
    saved = torch.load(tmp_path / "between.ckpt")["guard"]
    assert [w["batch"] for w in saved["skipped"]] == [31]
    module, trainer = Model(), quiet(max_epochs=1, gradient_clip_val=1.0, guard=True)
    trainer.fit(module, loader(*values), ckpt_path=tmp_path / "between.ckpt")
    same(module, train(quiet, *without(values, [31]))[0])
    assert trainer.fit_run is None
    with pytest.warns(UserWarning, match="leaves 1 steps of the data out, and this Trainer has no guard"):
        quiet(max_steps=26).fit(Model(), loader(*values), ckpt_path=tmp_path / "between.ckpt")


def test_the_run_folder_tells(quiet, tmp_path, monkeypatch):
    monkeypatch.setenv("LAUNCH_RUN_DIR", str(tmp_path))
    with pytest.warns(UserWarning, match="guard: "):
        train(quiet, *samples([60]), guard=True)
    [event] = map(json.loads, (tmp_path / "guard.jsonl").read_text().splitlines())
    assert event.items() >= {"event": "rollback", "step": 16, "batches": [15, 16], "samples": [[[60, 61, 62, 63]]],
                             "norm": "nan", "back_to_step": 0, "try": 1}.items()  # fmt: skip


@pytest.mark.parametrize("arguments", [{"spike": 1}, {"window": 3}, {"snapshot_every": 0}, {"max_tries": 1.5}])
def test_what_a_guard_cannot_be(arguments):
    with pytest.raises(ConfigError, match=f"Guard.{next(iter(arguments))}="):
        T.Guard(**arguments)


def test_what_cannot_be_guarded(quiet, boring, data):
    with pytest.raises(ConfigError, match=r"guard=3 is not allowed. Allowed: True, False, or a trainer.Guard"):
        quiet(guard=3)
    module = boring()
    module.automatic_optimization = False
    with pytest.raises(ConfigError, match="needs automatic optimization"):
        quiet(guard=True).fit(module, data())
    module = boring()
    module.configure_optimizers = lambda: torch.optim.LBFGS(module.parameters())
    with pytest.raises(ConfigError, match="LBFGS do not work together"):
        quiet(guard=True).fit(module, data())


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_on_ranks(gang, strategy):
    """One rank's sample is not finite: all leave the step out, also when they are killed on the way."""
    for rank in gang.ok(2, "guard_ranks.py", strategy, timeout=100):
        assert rank.stdout == "the same\n"
