"""Which hooks are called, in which order; and that nothing else of ours runs in a step."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import trainer as T

PACKAGE = str(Path(T.__file__).parent)


def test_the_order_of_a_fit(boring, data, quiet):
    calls = []

    def note(name):
        def hook(self, *args, **kwargs):
            calls.append(name)

        return hook

    names = [
        "prepare_data", "setup", "on_fit_start", "on_validation_start", "on_validation_epoch_start",
        "on_validation_batch_start", "on_validation_batch_end", "on_validation_epoch_end", "on_validation_end",
        "on_train_start", "on_train_epoch_start", "on_train_batch_start", "on_before_zero_grad", "on_before_backward",
        "on_after_backward", "on_before_optimizer_step", "on_train_batch_end", "on_train_epoch_end", "on_train_end",
        "on_fit_end", "teardown",
    ]  # fmt: skip
    model_class = type("Model", (boring,), {name: note(name) for name in names})
    quiet(max_epochs=1, limit_train_batches=1, limit_val_batches=1, num_sanity_val_steps=0).fit(
        model_class(), data(), data()
    )
    assert calls == [
        "prepare_data", "setup", "on_fit_start", "on_train_start", "on_train_epoch_start", "on_train_batch_start",
        "on_before_zero_grad", "on_before_backward", "on_after_backward", "on_before_optimizer_step",
        "on_train_batch_end", "on_validation_start", "on_validation_epoch_start", "on_validation_batch_start",
        "on_validation_batch_end", "on_validation_epoch_end", "on_validation_end", "on_train_epoch_end",
        "on_train_end", "on_fit_end", "teardown",
    ]  # fmt: skip


def test_callbacks_come_before_the_module_and_monitors_after_it(boring, data, quiet):
    calls = []

    class First(T.Callback):
        def on_train_start(self, trainer, pl_module):
            calls.append("callback start")

        def on_train_epoch_end(self, trainer, pl_module):
            calls.append("callback end")

    class Watches(T.callbacks.EarlyStopping):
        def on_train_epoch_end(self, trainer, pl_module):
            calls.append(f"monitor sees {float(trainer.callback_metrics['late'])}")

    class Model(boring):
        def on_train_start(self):
            calls.append("module start")

        def on_train_epoch_end(self):
            self.log("late", 3.0)
            calls.append("module end")

    quiet(max_epochs=1, callbacks=[Watches("late"), First()]).fit(Model(), data())
    assert calls == ["callback start", "module start", "callback end", "module end", "monitor sees 3.0"]


def test_batch_transfer_hooks_of_the_datamodule_win(boring, data, quiet):
    calls = []

    class Data(T.DataModule):
        def train_dataloader(self):
            return data(4)

        def on_before_batch_transfer(self, batch, dataloader_idx):
            calls.append("before")
            return batch

        def on_after_batch_transfer(self, batch, dataloader_idx):
            calls.append("after")
            return [b * 0 for b in batch]

    class Model(boring):
        def training_step(self, batch, batch_idx):
            assert not batch[0].any()
            return self.loss(batch)

        def transfer_batch_to_device(self, batch, device, dataloader_idx):
            calls.append("transfer")
            return batch

    quiet(max_epochs=1).fit(Model(), Data())
    assert calls == ["before", "transfer", "after"]


def test_a_callback_set_on_the_object_and_configure_callbacks(boring, data, quiet):
    seen = []
    callback = T.Callback()
    callback.on_train_start = lambda trainer, module: seen.append("object")

    class Stop(T.callbacks.EarlyStopping):
        pass

    class Model(boring):
        def configure_callbacks(self):
            return [Stop("loss", patience=7)]

    trainer = quiet(max_epochs=1, callbacks=[callback, Stop("loss", patience=3)])
    trainer.fit(Model(), data())
    assert seen == ["object"]
    assert [c.patience for c in trainer.early_stopping_callbacks] == [7]


def test_exceptions_reach_callbacks_and_the_datamodule(boring, data, quiet):
    heard = []

    class Look(T.Callback):
        def on_exception(self, trainer, pl_module, exception):
            heard.append(("callback", str(exception), trainer.interrupted))

    class Data(T.DataModule):
        def train_dataloader(self):
            return data()

        def on_exception(self, exception):
            heard.append(("data", str(exception)))

    class Model(boring):
        def training_step(self, batch, batch_idx):
            raise KeyError("broken")

    trainer = quiet(max_epochs=1, callbacks=[Look()])
    with pytest.raises(KeyError, match="broken"):
        trainer.fit(Model(), datamodule=Data())
    assert heard == [("callback", "'broken'", True), ("data", "'broken'")]
    assert not trainer.training


class Plain(T.Module):
    """Nothing overridden but what is needed."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch[0]).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Logging(Plain):
    """The same with one value logged."""

    def training_step(self, batch, batch_idx):
        loss = self.layer(batch[0]).sum()
        self.log("loss", loss)
        return loss


def counted_calls(model, trainer, steps=20):
    """Names of our own functions called per step, and the deepest pile of our frames under the optimizer's step."""
    calls, depth = [], []

    def profile(frame, event, argument):
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            calls.append(frame.f_code.co_name)

    class Batches:
        def __len__(self):
            return 10 + steps + 10

        def __iter__(self):
            for number in range(len(self)):
                if number == 10:
                    sys.setprofile(profile)
                if number == 10 + steps:
                    sys.setprofile(None)
                yield torch.ones(2, 4), None

    class Look(torch.optim.SGD):
        def step(self, closure=None):
            frame, mine = sys._getframe(1), 0
            while frame is not None:
                mine += frame.f_code.co_filename.startswith(PACKAGE)
                frame = frame.f_back
            depth.append(mine)
            return super().step(closure)

    model.configure_optimizers = lambda: Look(model.parameters(), lr=0.1)
    try:
        trainer.fit(model, Batches())
    finally:
        sys.setprofile(None)
    return {name: calls.count(name) / steps for name in sorted(set(calls))}, max(depth)


def test_calls_of_ours_in_a_step_are_frozen(quiet):
    calls, depth = counted_calls(Plain(), quiet(max_epochs=1))
    assert calls == {"batches": 1.0}  # the feed's generator
    # fit, the loop's fit, train_epoch, train.
    assert depth <= 5


def test_one_log_adds_two_calls(quiet):
    calls, _ = counted_calls(Logging(), quiet(max_epochs=1))
    assert calls == {"batches": 1.0, "log": 2.0}
