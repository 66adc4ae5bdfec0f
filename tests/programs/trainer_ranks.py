"""Checks of fit, validate and predict that need several ranks; every rank asserts, all exit 0."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, TensorDataset

import trainer as T
from trainer.errors import DistributedError, LoggingError

FOLDER = Path(sys.argv[1])
QUIET = {
    "accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
    "enable_model_summary": False, "default_root_dir": str(FOLDER),
}  # fmt: skip
RANK = T.Trainer(**QUIET).global_rank
SIZE = T.Trainer(**QUIET).world_size


class Model(T.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(RANK)  # the ranks must end up with rank 0's weights all the same
        self.layer = torch.nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.mse_loss(self.layer(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def loader(n=32, batch_size=4):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 4, generator=generator)
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=batch_size)


def same_everywhere(tensor) -> bool:
    everyone = [torch.empty_like(tensor) for _ in range(SIZE)]
    dist.all_gather(everyone, tensor)
    return all(torch.equal(t, everyone[0]) for t in everyone)


def check_training_equals_one_process() -> None:
    model = Model()
    trainer = T.Trainer(max_epochs=2, accumulate_grad_batches=2, **QUIET)
    trainer.fit(model, loader(36, 2))
    assert same_everywhere(model.layer.weight.data)
    torch.manual_seed(0)
    alone = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.1)
    for _ in range(2):
        batches = list(loader(36, 2 * SIZE))
        for first in range(0, len(batches), 2):
            window = batches[first : first + 2]
            optimizer.zero_grad()
            for x, y in window:
                (torch.nn.functional.mse_loss(alone(x), y) / 2).backward()
            optimizer.step()
    assert torch.allclose(alone.weight, model.layer.weight, atol=1e-5), (alone.weight, model.layer.weight)


def check_metrics() -> None:
    class Logs(Model):
        def training_step(self, batch, batch_idx):
            self.log("step", float(RANK), sync_dist=True, on_epoch=True)
            self.log("mine", float(RANK), sync_dist=False, on_step=False, on_epoch=True)
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            self.log("mean", float(RANK))
            self.log("sum", 1.0, reduce_fx="sum")
            self.log("max", float(RANK), reduce_fx="max")
            if RANK == 0:
                self.log("zero", 1.0, rank_zero_only=True)

        def on_validation_epoch_end(self):
            seen = self.all_gather(torch.tensor(float(RANK)))
            assert seen.tolist() == [float(r) for r in range(SIZE)]
            self.log("late", float(RANK))

    rows = []

    class Rows(T.loggers.Logger):
        name, version = "rows", 0

        def log_metrics(self, metrics, step=None):
            rows.append(dict(metrics))

        def log_hyperparams(self, params, *args, **kwargs):
            pass

    trainer = T.Trainer(max_epochs=1, log_every_n_steps=4, **(QUIET | {"logger": Rows()}))
    trainer.fit(Logs(), loader(16 * SIZE), loader(8 * SIZE))
    mean = (SIZE - 1) / 2
    metrics = trainer.callback_metrics
    assert metrics["mean"] == metrics["late"] == metrics["step_epoch"] == mean, metrics
    assert metrics["sum"] == 2 * SIZE
    assert metrics["max"] == SIZE - 1
    assert metrics["mine"] == RANK
    assert "zero" not in metrics
    assert [r["step_step"] for r in rows if "step_step" in r] == [mean]


def check_different_names() -> None:
    class Differs(Model):
        def validation_step(self, batch, batch_idx):
            self.log("common", 1.0)
            if RANK == SIZE - 1:
                self.log("odd", 1.0)

    try:
        T.Trainer(**QUIET).validate(Differs(), loader(8 * SIZE), verbose=False)
        raise AssertionError("no error")
    except LoggingError as error:
        assert f"'odd' in validation_step(): logged by rank {SIZE - 1}, not by rank 0" in str(error), error

    class DiffersInSteps(Model):
        def training_step(self, batch, batch_idx):
            if RANK == 0:
                self.log("only_zero", 1.0, sync_dist=True)
            return super().training_step(batch, batch_idx)

    try:
        T.Trainer(max_epochs=1, log_every_n_steps=1, **(QUIET | {"logger": T.loggers.CSVLogger(FOLDER)})).fit(
            DiffersInSteps(), loader(8 * SIZE)
        )
        raise AssertionError("no error")
    except LoggingError as error:
        assert "'only_zero' in training_step(): logged by rank 0, not by rank 1" in str(error), error


def check_prepare_data() -> None:
    class Data(T.DataModule):
        def prepare_data(self):
            assert RANK == 0
            (FOLDER / "prepared").write_text("x")

        def setup(self, stage):
            assert (FOLDER / "prepared").exists()

        def train_dataloader(self):
            return loader(8 * SIZE)

    T.Trainer(max_epochs=1, **QUIET).fit(Model(), Data())

    class Fails(Data):
        def prepare_data(self):
            raise OSError("disk full")

    try:
        T.Trainer(max_epochs=1, **QUIET).fit(Model(), Fails())
        raise AssertionError("no error")
    except OSError as error:
        assert RANK == 0, error
    except DistributedError as error:
        assert RANK != 0
        assert "prepare_data() failed on another rank" in str(error)


def check_uneven_data() -> None:
    seen = []

    class Look(Model):
        def validation_step(self, batch, batch_idx):
            self.log("count", float(len(batch[0])), reduce_fx="sum")

        def predict_step(self, batch, batch_idx):
            seen.extend(batch[0][:, 0].tolist())
            return batch[0][:, 0]

    # 13 samples, batches of 4: some ranks have fewer.
    metrics = T.Trainer(**QUIET).validate(Look(), loader(13), verbose=False)
    assert metrics == [{"count": 13.0}], metrics
    predictions = T.Trainer(**QUIET).predict(Look(), loader(13))
    everyone = [None] * SIZE
    dist.all_gather_object(everyone, torch.cat(predictions).tolist() if predictions else [])
    assert sorted(v for part in everyone for v in part) == sorted(loader(13).dataset.tensors[0][:, 0].tolist())


def collectives(run) -> int:
    with profile(activities=[ProfilerActivity.CPU]) as found:
        run()
    return sum(e.name.startswith(("c10d::", "gloo:")) for e in found.events())


def check_collectives_per_step() -> None:
    """As many per step as a hand-written DDP loop has, also with values logged and reduced per epoch."""
    hand = DistributedDataParallel(torch.nn.Linear(4, 1))
    optimizer = torch.optim.SGD(hand.parameters(), lr=0.1)
    batches = list(loader(40 * SIZE))

    def steps(which) -> None:
        for x, y in which:
            optimizer.zero_grad()
            torch.nn.functional.mse_loss(hand(x), y).backward()
            optimizer.step()

    steps(batches[:5])
    by_hand = collectives(lambda: steps(batches[5:25]))

    class Logs(Model):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("a", loss, on_epoch=True, sync_dist=True)
            return loss

    counts = []

    class Batches:
        def __len__(self):
            return 30

        def __iter__(self):
            yield from batches[:5]
            counts.append(collectives(lambda: None))
            found = profile(activities=[ProfilerActivity.CPU])
            found.start()
            yield from batches[5:25]
            found.stop()
            counts.append(sum(e.name.startswith(("c10d::", "gloo:")) for e in found.events()))
            yield from batches[25:30]

    T.Trainer(max_epochs=1, strategy="ddp", **QUIET).fit(Logs(), Batches())
    assert counts[1] == by_hand > 0, (counts, by_hand)


if __name__ == "__main__":
    # One group for all Trainers of this script, as a user's script may have it.
    dist.init_process_group("gloo")
    for name, check in list(globals().items()):
        if name.startswith("check_"):
            check()
            dist.barrier()
            if RANK == 0:
                print("passed", name, flush=True)
    dist.destroy_process_group()
