"""Optimizers, schedulers, accumulation, clipping, closures, and manual optimization."""

from __future__ import annotations

import pytest
import torch

import trainer as T
from trainer.errors import ConfigError, ModuleError

SGD = torch.optim.SGD


def schedule(optimizer):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 0.5**n)


FORMS = {
    "optimizer": lambda o, s: o,
    "list": lambda o, s: [o],
    "tuple": lambda o, s: (o,),
    "two lists": lambda o, s: ([o], [s]),
    "lists and dict": lambda o, s: ([o], [{"scheduler": s, "interval": "epoch"}]),
    "dict": lambda o, s: {"optimizer": o},
    "dict and scheduler": lambda o, s: {"optimizer": o, "lr_scheduler": s},
    "dict and config": lambda o, s: {"optimizer": o, "lr_scheduler": {"scheduler": s, "name": "x"}},
    "tuple of dicts": lambda o, s: ({"optimizer": o, "lr_scheduler": s},),
    "list of dicts": lambda o, s: [{"optimizer": o, "lr_scheduler": {"scheduler": s}}],
}


@pytest.mark.parametrize("form", list(FORMS))
def test_every_form_of_configure_optimizers(boring, data, quiet, form):
    class Model(boring):
        def configure_optimizers(self):
            self.optimizer = SGD(self.parameters(), lr=0.1)
            return FORMS[form](self.optimizer, schedule(self.optimizer))

    model = Model()
    trainer = quiet(max_epochs=2)
    trainer.fit(model, data())
    expected = 0.1 if form in ("optimizer", "list", "tuple", "dict") else 0.025
    assert model.optimizer.param_groups[0]["lr"] == pytest.approx(expected)
    assert trainer.optimizers == [model.optimizer]
    assert model.optimizers(use_pl_optimizer=False) is model.optimizer
    assert isinstance(model.optimizers(), SGD)


def test_no_optimizer(boring, data, quiet):
    class Model(boring):
        def configure_optimizers(self):
            return None

    model = Model()
    before = model.layer.weight.clone()
    trainer = quiet(max_epochs=1)
    with pytest.warns(UserWarning, match="without an optimizer"):
        trainer.fit(model, data())
    assert torch.equal(before, model.layer.weight)
    assert trainer.global_step == 8


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        (lambda m: 3, "Allowed: an Optimizer"),
        (lambda m: [SGD(m.parameters(), 0.1), SGD(m.parameters(), 0.1)], "automatic_optimization = False"),
        (lambda m: {"optimizer": SGD(m.parameters(), 0.1), "scheduler": 1}, "unknown keys \\['scheduler'\\]"),
        (lambda m: {"lr_scheduler": 1}, "without an optimizer"),
        (lambda m: ([SGD(m.parameters(), 0.1)], [schedule(SGD(m.parameters(), 0.1))]), "did not return"),
        (
            lambda m: {"optimizer": (o := SGD(m.parameters(), 0.1)),
                       "lr_scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau(o)},
            "needs the name of the value",
        ),
        (
            lambda m: {"optimizer": (o := SGD(m.parameters(), 0.1)),
                       "lr_scheduler": {"scheduler": schedule(o), "interval": "batch"}},
            "interval='batch'",
        ),
    ],
)  # fmt: skip
def test_wrong_forms_are_named(boring, data, quiet, returned, words):
    class Model(boring):
        def configure_optimizers(self):
            return returned(self)

    with pytest.raises(ModuleError, match=words):
        quiet(max_epochs=1).fit(Model(), data())


def test_when_schedulers_step(boring, data, quiet):
    class Model(boring):
        def __init__(self, **config):
            super().__init__()
            self.config, self.steps = config, []

        def configure_optimizers(self):
            optimizer = SGD(self.parameters(), lr=0.1)
            return [optimizer], [{"scheduler": schedule(optimizer), **self.config}]

        def lr_scheduler_step(self, scheduler, metric):
            self.steps.append(self.global_step)
            super().lr_scheduler_step(scheduler, metric)

    for config, arguments, steps in (
        ({"interval": "step"}, {}, [1, 2, 3, 4, 5, 6, 7, 8]),
        ({"interval": "step", "frequency": 3}, {}, [3, 6]),
        ({"interval": "step"}, {"accumulate_grad_batches": 4}, [1, 2]),
        ({"interval": "epoch"}, {"max_epochs": 3}, [8, 16, 24]),
        ({"interval": "epoch", "frequency": 2}, {"max_epochs": 3}, [16]),
    ):
        model = Model(**config)
        quiet(**({"max_epochs": 1} | arguments)).fit(model, data())
        assert model.steps == steps, config


def test_plateau_scheduler_follows_its_monitor(boring, data, quiet):
    class Model(boring):
        def __init__(self, **config):
            super().__init__()
            self.config, self.seen = config, []

        def validation_step(self, batch, batch_idx):
            self.log("val", 1.0 + self.current_epoch)

        def configure_optimizers(self):
            optimizer = SGD(self.parameters(), lr=0.1)
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, **self.config}}

        def lr_scheduler_step(self, scheduler, metric):
            self.seen.append(float(metric))
            super().lr_scheduler_step(scheduler, metric)

    model = Model(monitor="val")
    trainer = quiet(max_epochs=3)
    trainer.fit(model, data(), data(4))
    assert model.seen == [1.0, 2.0, 3.0]
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.025)
    model = Model(monitor="loss", interval="step")
    quiet(max_epochs=1, limit_train_batches=2).fit(model, data(), data(4))
    assert len(model.seen) == 2
    with pytest.raises(ModuleError, match="'nothing', which was not logged"):
        quiet(max_epochs=1).fit(Model(monitor="nothing"), data(), data(4))
    with pytest.warns(UserWarning, match="was not logged"):
        quiet(max_epochs=1).fit(Model(monitor="nothing", strict=False), data(), data(4))


def test_accumulation_equals_the_large_batch(boring, data, quiet):
    small, large = boring(), boring()
    large.load_state_dict(small.state_dict())
    quiet(max_epochs=2, accumulate_grad_batches=4).fit(small, data(32, 4))
    quiet(max_epochs=2).fit(large, data(32, 16))
    assert torch.allclose(small.layer.weight, large.layer.weight, atol=1e-6)


def test_clipping(boring, data, quiet):
    norms = []

    class Look(T.Callback):
        def on_before_zero_grad(self, trainer, pl_module, optimizer):
            if pl_module.layer.weight.grad is not None:
                norms.append(torch.nn.utils.get_total_norm([p.grad for p in pl_module.parameters()]).item())

    quiet(max_epochs=1, gradient_clip_val=0.1, callbacks=[Look()]).fit(boring(), data())
    assert max(norms) <= 0.1 + 1e-5

    class Own(boring):
        def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
            assert gradient_clip_algorithm == "value"
            self.clip_gradients(optimizer, gradient_clip_val / 2, gradient_clip_algorithm)

        def on_before_zero_grad(self, optimizer):
            if self.layer.weight.grad is not None:
                assert self.layer.weight.grad.abs().max() <= 0.05

    quiet(max_epochs=1, gradient_clip_val=0.1, gradient_clip_algorithm="value").fit(Own(), data())


def test_an_optimizer_that_wants_a_closure(boring, data, quiet):
    calls = []

    class Model(boring):
        def training_step(self, batch, batch_idx):
            calls.append(batch_idx)
            return super().training_step(batch, batch_idx)

        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters(), lr=0.5, max_iter=3)

    model = Model()
    trainer = quiet(max_epochs=1, limit_train_batches=2)
    trainer.fit(model, data())
    assert trainer.global_step == 2
    assert len(calls) > 4
    assert trainer.callback_metrics["loss"] < 0.5


def test_overridden_optimizer_step(boring, data, quiet):
    class Model(boring):
        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
            for group in optimizer.param_groups:
                group["lr"] = 0.1 * (batch_idx + 1)
            optimizer.step(closure=optimizer_closure)

        def on_before_optimizer_step(self, optimizer):
            self.stepped = getattr(self, "stepped", 0) + 1

    model = Model()
    before = model.layer.weight.clone()
    trainer = quiet(max_epochs=1, limit_train_batches=3)
    trainer.fit(model, data())
    assert not torch.equal(before, model.layer.weight)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.3)
    assert trainer.global_step == model.stepped == 3


class Two(T.Module):
    """Two networks with an optimizer each, stepped by hand."""

    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Linear(4, 1), torch.nn.Linear(4, 1)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        self.toggle_optimizer(first)
        assert not self.b.weight.requires_grad
        before = None if self.b.weight.grad is None else self.b.weight.grad.clone()
        loss = (self.a(batch[0]) - self.b(batch[0])).square().mean()
        first.zero_grad()
        self.manual_backward(loss)
        first.step()
        self.untoggle_optimizer(first)
        assert before is None or torch.equal(self.b.weight.grad, before)
        with second.toggle_model():
            loss = (self.b(batch[0]) - 1).square().mean()
            second.zero_grad()
            self.manual_backward(loss)
            self.clip_gradients(second, 0.5)
            second.step()
        assert self.a.weight.requires_grad
        if self.trainer.is_last_batch:
            for scheduler in self.lr_schedulers():
                scheduler.step()
        self.log("loss", loss)

    def configure_optimizers(self):
        optimizers = [SGD(self.a.parameters(), lr=0.1), SGD(self.b.parameters(), lr=0.1)]
        return optimizers, [schedule(o) for o in optimizers]


def test_manual_optimization_with_two_optimizers(data, quiet):
    model = Two()
    trainer = quiet(max_epochs=2)
    trainer.fit(model, data())
    assert trainer.global_step == 32
    assert [o.param_groups[0]["lr"] for o in trainer.optimizers] == pytest.approx([0.025, 0.025])
    assert "loss" in trainer.callback_metrics
    with pytest.raises(ConfigError, match="clip_gradients"):
        quiet(gradient_clip_val=1.0).fit(Two(), data())
    with pytest.raises(ConfigError, match="accumulate_grad_batches=2"):
        quiet(accumulate_grad_batches=2).fit(Two(), data())


def test_manual_backward_needs_manual_optimization(boring, data, quiet):
    class Model(boring):
        def training_step(self, batch, batch_idx):
            self.manual_backward(self.loss(batch))

    with pytest.raises(ModuleError, match="automatic_optimization = False"):
        quiet(max_epochs=1).fit(Model(), data())


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed", "bf16-true", "64-true"])
def test_precisions_train(boring, data, quiet, precision):
    class Model(boring):
        def training_step(self, batch, batch_idx):
            out = self(batch[0])
            self.kind = out.dtype
            return torch.nn.functional.mse_loss(out, batch[1].to(out.dtype))

    torch.manual_seed(0)
    model = Model(lr=0.05)
    trainer = quiet(max_epochs=4, precision=precision, gradient_clip_val=10.0)
    trainer.fit(model, data())
    kinds = {
        "bf16-mixed": torch.bfloat16,
        "16-mixed": torch.float16,
        "bf16-true": torch.bfloat16,
        "64-true": torch.float64,
    }
    assert model.kind == kinds[precision]
    assert (model.layer.weight.float() - 1).abs().max() < 0.35
    assert (trainer.precision_object.scaler is not None) == (precision == "16-mixed")


def test_accumulation_may_be_changed_by_a_callback(boring, data, quiet):
    class Schedule(T.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            trainer.accumulate_grad_batches = {0: 4, 1: 1}[trainer.current_epoch]

    trainer = quiet(max_epochs=2, callbacks=[Schedule()])
    trainer.fit(boring(), data())
    assert trainer.global_step == 2 + 8


def test_estimated_stepping_batches(boring, data, quiet):
    class Model(boring):
        def configure_optimizers(self):
            self.total = self.trainer.estimated_stepping_batches
            optimizer = SGD(self.parameters(), lr=0.1)
            one = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=self.total)
            return [optimizer], [{"scheduler": one, "interval": "step"}]

    model = Model()
    trainer = quiet(max_epochs=2, accumulate_grad_batches=3)
    trainer.fit(model, data())
    assert model.total == trainer.global_step == 6
