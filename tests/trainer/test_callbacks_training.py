"""Callbacks that act on training: averages of weights, accumulation, monitors, prediction writers."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from trainer import Module, Trainer
from trainer.callbacks import (
    BasePredictionWriter,
    Callback,
    DeviceStatsMonitor,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LambdaCallback,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
    ThroughputMonitor,
    WeightAveraging,
)
from trainer.errors import ConfigError, LoggingError
from trainer.loggers import CSVLogger


class Net(Module):
    def __init__(self, norm=False, scheduler=None):
        super().__init__()
        torch.manual_seed(3)
        self.layer = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4) if norm else nn.Identity(), nn.Linear(4, 1))
        self.scheduler = scheduler
        self.flops_per_batch = 1000

    def training_step(self, batch, batch_idx):
        loss = (self.layer(batch[0]) - batch[0].sum(1, keepdim=True)).square().mean()
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val", self.layer(batch[0]).sum())

    def predict_step(self, batch, batch_idx, dataloader_idx=0):
        return batch[0].sum(1)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9)
        if self.scheduler is None:
            return optimizer
        return [optimizer], [self.scheduler(optimizer)]


def data(n=8, batch_size=2):
    x = torch.arange(2 * n, dtype=torch.float32).reshape(n, 2) / n
    return DataLoader(TensorDataset(x), batch_size=batch_size)


def fit(folder, model, *callbacks, epochs=3, val=False, ckpt_path=None, logger=False, loader=None, **options):
    trainer = Trainer(
        default_root_dir=folder, accelerator="cpu", logger=logger, enable_progress_bar=False, max_epochs=epochs,
        enable_model_summary=False, num_sanity_val_steps=0, limit_val_batches=1 if val else 0,
        callbacks=list(callbacks), **options,
    )  # fmt: skip
    trainer.fit(model, loader or data(), data(2), ckpt_path=ckpt_path)
    return trainer


class Weights(Callback):
    """Keeps the weights after every step and epoch."""

    def __init__(self):
        self.steps, self.epochs = [], []

    @staticmethod
    def of(module):
        return torch.cat([p.detach().flatten().clone() for p in module.parameters()])

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.steps.append(self.of(pl_module))

    def on_train_epoch_end(self, trainer, pl_module):
        self.epochs.append(self.of(pl_module))


def test_ema_is_what_its_formula_says(tmp_path):
    weights, model = Weights(), Net()
    ema = EMAWeightAveraging(decay=0.8, update_every_n_steps=2, update_starting_at_step=4)
    fit(tmp_path, model, weights, ema)
    # Steps 4, 6, 8 and 10 of 0 to 11.
    expected = weights.steps[4].clone()
    for step in (6, 8, 10):
        expected = 0.8 * expected + 0.2 * weights.steps[step]
    torch.testing.assert_close(Weights.of(model), expected)


def test_plain_average_and_one_of_the_users_own(tmp_path):
    weights, model = Weights(), Net()
    fit(tmp_path, model, weights, WeightAveraging())
    torch.testing.assert_close(Weights.of(model), torch.stack(weights.steps).mean(0))
    newest = Net()
    fit(tmp_path, newest, weights, WeightAveraging(avg_fn=lambda average, current, count: current))
    torch.testing.assert_close(Weights.of(newest), weights.steps[-1])


def test_validation_sees_the_average_and_training_does_not(tmp_path):
    seen = []

    class Look(Weights):
        def on_validation_batch_end(self, trainer, pl_module, *args):
            seen.append(self.of(pl_module))

    look, plain = Look(), Weights()
    fit(tmp_path, Net(), plain, val=True)
    fit(tmp_path, Net(), look, WeightAveraging(), val=True)
    torch.testing.assert_close(torch.stack(look.steps), torch.stack(plain.steps))
    for epoch, average in enumerate(seen):
        torch.testing.assert_close(average, torch.stack(plain.steps[: 4 * (epoch + 1)]).mean(0))


@pytest.mark.parametrize("kind", ["ema", "swa"])
def test_averages_survive_a_restart_bit_for_bit(tmp_path, kind):
    def make():
        scheduler = None if kind == "ema" else lambda o: torch.optim.lr_scheduler.StepLR(o, 1, 0.5)
        callback = (
            EMAWeightAveraging(decay=0.9)
            if kind == "ema"
            else StochasticWeightAveraging(0.05, swa_epoch_start=1, annealing_epochs=2)
        )
        return Net(norm=True, scheduler=scheduler), callback, ModelCheckpoint(tmp_path / kind, "{epoch}", save_top_k=-1)

    whole, callback, _ = make()
    fit(tmp_path, whole, callback, epochs=5)
    model, *callbacks = make()
    fit(tmp_path, model, *callbacks, epochs=5)
    for epoch in (0, 2):
        model, *callbacks = make()
        fit(tmp_path, model, *callbacks, epochs=5, ckpt_path=tmp_path / kind / f"epoch={epoch}.ckpt")
        for (name, tensor), (_, expected) in zip(model.state_dict().items(), whole.state_dict().items(), strict=True):
            assert torch.equal(tensor, expected), name


def test_a_checkpoint_holds_the_average(tmp_path):
    weights = Weights()
    checkpoint = ModelCheckpoint(tmp_path / "c", "{epoch}", save_top_k=-1)
    fit(tmp_path, Net(), weights, WeightAveraging(), checkpoint)
    loaded = Net.load_from_checkpoint(tmp_path / "c" / "epoch=1.ckpt")
    torch.testing.assert_close(Weights.of(loaded), torch.stack(weights.steps[:8]).mean(0))


class Logs(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.log("from_callback", float(batch_idx), on_epoch=True, on_step=False)

    def on_validation_epoch_end(self, trainer, pl_module):
        self.log_dict({"a": 1.0, "b": 2.0})


def test_a_callback_logs_as_the_module_does(tmp_path):
    logs = Logs()
    trainer = fit(tmp_path, Net(), logs, val=True, epochs=1)
    found = {name: float(trainer.callback_metrics[name]) for name in ("from_callback", "a", "b")}
    assert found == {"from_callback": 1.5, "a": 1.0, "b": 2.0}
    assert "_module" not in vars(logs)
    with pytest.raises(LoggingError, match=r"Logs.log\('x', ...\) was called outside"):
        logs.log("x", 1.0)


def test_swa_averages_epochs_and_changes_the_learning_rate(tmp_path):
    weights, model = Weights(), Net(scheduler=lambda o: torch.optim.lr_scheduler.ConstantLR(o, 1.0))
    swa = StochasticWeightAveraging(0.01, swa_epoch_start=0.5, annealing_epochs=1, annealing_strategy="linear")
    trainer = fit(tmp_path, model, weights, swa, epochs=4)
    torch.testing.assert_close(Weights.of(model), torch.stack(weights.epochs[1:]).mean(0))
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.01)
    assert type(trainer.lr_scheduler_configs[0].scheduler).__name__ == "SWALR"


def test_swa_gives_batch_norm_new_statistics(tmp_path):
    model = Net(norm=True)
    fit(tmp_path, model, StochasticWeightAveraging(0.01, swa_epoch_start=1))
    with torch.no_grad():
        hidden = torch.stack([model.layer[0](batch[0]).mean(0) for batch in data()]).mean(0)
    torch.testing.assert_close(model.layer[1].running_mean, hidden)
    assert model.layer[1].momentum == 0.1


@pytest.mark.parametrize(
    "make",
    [
        lambda: EMAWeightAveraging(decay=2), lambda: EMAWeightAveraging(update_every_n_steps=0),
        lambda: StochasticWeightAveraging(0), lambda: StochasticWeightAveraging([]),
        lambda: StochasticWeightAveraging(0.1, swa_epoch_start=1.5),
        lambda: StochasticWeightAveraging(0.1, swa_epoch_start=0),
        lambda: StochasticWeightAveraging(0.1, annealing_strategy="sin"), lambda: GradientAccumulationScheduler({}),
        lambda: GradientAccumulationScheduler({-1: 2}), lambda: GradientAccumulationScheduler({0: 0}),
        lambda: LambdaCallback(on_no_such_hook=print), lambda: LambdaCallback(state_dict=print),
        lambda: ThroughputMonitor(len, window_size=1), lambda: LearningRateMonitor("batch"),
        lambda: BasePredictionWriter("step"),
    ],
)  # fmt: skip
def test_bad_arguments(make):
    with pytest.raises(ConfigError):
        make()


def test_accumulation_by_epoch(tmp_path):
    steps = []
    note = LambdaCallback(on_train_epoch_end=lambda trainer, module: steps.append(trainer.global_step))
    fit(tmp_path, Net(), GradientAccumulationScheduler({1: 2, 2: 4}), note)
    assert steps == [4, 6, 7]
    with pytest.raises(ConfigError, match="contradict"):
        fit(tmp_path, Net(), GradientAccumulationScheduler({1: 2}), accumulate_grad_batches=2)


def test_learning_rates_in_the_log(tmp_path):
    class Groups(Net):
        def configure_optimizers(self):
            named = {"params": self.layer[0].parameters(), "name": "body", "lr": 0.2}
            optimizer = torch.optim.SGD([named, {"params": self.layer[2].parameters()}], lr=0.1, momentum=0.5)
            return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5), "name": "rate"}]

    monitor = LearningRateMonitor(log_momentum=True, log_weight_decay=True)
    fit(tmp_path, Groups(), monitor, logger=CSVLogger(tmp_path), log_every_n_steps=2)
    assert {name: [round(v, 4) for v in values] for name, values in monitor.lrs.items()} == {
        "rate/body": [0.2, 0.1, 0.05],
        "rate/pg2": [0.1, 0.05, 0.025],
    }
    by_step = LearningRateMonitor("step")
    fit(tmp_path, Net(), by_step, logger=CSVLogger(tmp_path), log_every_n_steps=2, accumulate_grad_batches=2)
    assert by_step.lrs == {"lr-SGD": [0.02] * 3}
    with pytest.raises(ConfigError, match="needs a logger"):
        fit(tmp_path, Net(), LearningRateMonitor())


def test_throughput_and_device_statistics(tmp_path):
    throughput = ThroughputMonitor(lambda batch: len(batch[0]), lambda batch: batch[0].numel(), window_size=3)
    fit(tmp_path, Net(), throughput, DeviceStatsMonitor(), logger=CSVLogger(tmp_path), log_every_n_steps=4, val=True)
    text = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()
    columns = text[0].split(",")
    rows = [dict(zip(columns, line.split(","), strict=True)) for line in text[1:]]
    measured = [row for row in rows if row["train/samples"]]
    assert [(row["step"], row["train/batches"], row["train/samples"], row["train/items"]) for row in measured] == [
        ("3", "4", "8", "16"), ("7", "8", "16", "32"), ("11", "12", "24", "48"),
    ]  # fmt: skip
    last = measured[-1]
    per_second = float(last["train/device/batches_per_sec"])
    assert float(last["train/samples_per_sec"]) == pytest.approx(2 * per_second)
    assert float(last["train/device/items_per_sec"]) == pytest.approx(4 * per_second)
    assert float(last["train/flops_per_sec"]) == pytest.approx(1000 * per_second)
    stats = [row for row in rows if row.get("DeviceStatsMonitor.on_train_batch_end/process_rss_bytes")]
    assert [row["step"] for row in stats] == ["3", "7", "11"]


def test_throughput_leaves_validation_out(tmp_path, monkeypatch):
    class Clock:
        now = 0.0

        def perf_counter(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr("trainer.callbacks.throughput.time", clock)

    class Ticks(Callback):
        def on_train_batch_start(self, *args):
            clock.now += 1

        def on_validation_batch_start(self, *args):
            clock.now += 100

    throughput = ThroughputMonitor(lambda batch: 2)
    fit(tmp_path, Net(), throughput, Ticks(), logger=CSVLogger(tmp_path), val=True, epochs=2)
    assert throughput.state_dict() == {"totals": [8.0, 8, 16, 0], "flops": None}


class Writer(BasePredictionWriter):
    def __init__(self, interval):
        super().__init__(interval)
        self.batches, self.whole = [], None

    def write_on_batch_end(self, trainer, pl_module, prediction, batch_indices, batch, batch_idx, dataloader_idx):
        self.batches.append((dataloader_idx, batch_idx, batch_indices, prediction.tolist()))

    def write_on_epoch_end(self, trainer, pl_module, predictions, batch_indices):
        self.whole = predictions, batch_indices


def test_prediction_writers(tmp_path):
    writer = Writer("batch_and_epoch")
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[writer],
                      enable_checkpointing=False, default_root_dir=tmp_path)  # fmt: skip
    assert trainer.predict(Net(), data(3), return_predictions=False) is None
    assert [(i, n, ids) for i, n, ids, _ in writer.batches] == [(0, 0, [0, 1]), (0, 1, [2])]
    predictions, indices = writer.whole
    assert [p.tolist() for p in predictions] == [p for *_, p in writer.batches]
    assert indices == [[[0, 1], [2]]]
    trainer.predict(Net(), [data(2), data(1)])
    assert writer.whole[1] == [[[0, 1]], [[0]]]


def test_a_writer_must_write(tmp_path):
    class Half(BasePredictionWriter):
        def write_on_batch_end(self, *args):
            pass

    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[Half("epoch")],
                      enable_checkpointing=False, default_root_dir=tmp_path)  # fmt: skip
    with pytest.raises(ConfigError, match="write_on_epoch_end"):
        trainer.predict(Net(), data(2))
