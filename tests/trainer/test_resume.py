"""Stopping and going on anywhere gives what an undisturbed run gives: weights, optimizer, and every logged row."""

from __future__ import annotations

import json
import os
import signal
import struct
from typing import TYPE_CHECKING

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torchmetrics import MeanMetric

import trainer as T
from trainer import saves
from trainer.errors import DataError
from trainer.progress import DONE, MAGIC

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.slow
def test_two_ranks_stop_together_die_and_go_on(gang, tmp_path):
    """One rank alone is told to stop; later one is killed; the end is that of an undisturbed run."""

    def end(folder):
        return json.loads((folder / "end.json").read_text())

    whole, hurt = tmp_path / "whole", tmp_path / "hurt"
    whole.mkdir()
    hurt.mkdir()
    gang.ok(2, "soak_job.py", env={"LAUNCH_RUN_DIR": str(whole), "LAUNCH_ATTEMPT": "0"})
    hurts = [["SIGTERM", 1, "validation", 3, 0.0], ["SIGKILL", 0, "train", 14, 0.0]]
    environment = {"LAUNCH_RUN_DIR": str(hurt), "HURT": json.dumps(hurts)}
    stopped = gang(2, "soak_job.py", env=environment | {"LAUNCH_ATTEMPT": "0"})
    assert [r.returncode for r in stopped] == [75, 75], stopped
    killed = gang(2, "soak_job.py", env=environment | {"LAUNCH_ATTEMPT": "1"})
    assert killed[0].returncode == -signal.SIGKILL
    assert killed[1].returncode != 0
    gang.ok(2, "soak_job.py", env=environment | {"LAUNCH_ATTEMPT": "2"})
    assert end(hurt) == end(whole)


@pytest.mark.soak
def test_virtual_ranks_end_alike_after_a_kill_on_another_number_of_ranks(gang, tmp_path):
    def variables(name, attempt, hurts=()):
        (tmp_path / name).mkdir(exist_ok=True)
        return {"LAUNCH_RUN_DIR": str(tmp_path / name), "LAUNCH_ATTEMPT": str(attempt), "VIRTUAL": "3", "EPOCHS": "1",
                "HURT": json.dumps(hurts)}  # fmt: skip

    gang.ok(1, "soak_job.py", env=variables("whole", 0))
    hurts = [["SIGTERM", 1, "train", 3, 0.0], ["SIGKILL", 0, "train", 4, 0.0]]
    stopped = gang(3, "soak_job.py", env=variables("hurt", 0, hurts))
    assert [r.returncode for r in stopped] == [75, 75, 75], stopped
    # (Rank 0: without it nobody waits for the others' parts of a checkpoint.)
    killed = gang(2, "soak_job.py", env=variables("hurt", 1, hurts))
    assert killed[0].returncode == -signal.SIGKILL
    gang.ok(1, "soak_job.py", env=variables("hurt", 2))
    ends = [json.loads((tmp_path / name / "end.json").read_text()) for name in ("whole", "hurt")]
    assert ends[0] == ends[1]


class Died(Exception):
    """Ends an attempt like a crash: nothing is saved."""


class Noisy(Dataset):
    """Random augmentation in the dataset."""

    def __init__(self, n, noise):
        self.x = torch.randn(n, 4, generator=torch.Generator().manual_seed(5))
        self.noise = noise

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i] + self.noise * torch.randn(4), self.x[i].sum().unsqueeze(0)


class Model(T.Module):
    """Dropout, a metric object, step and epoch values, schedulers by step and by monitor."""

    def __init__(self, hurt=None):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.Dropout(0.2), torch.nn.Linear(16, 1))
        self.mean, self.val_mean = MeanMetric(), MeanMetric()
        self.hurt, self.counts = hurt, {}

    def place(self, where):
        self.counts[where] = self.counts.get(where, 0) + 1
        if self.hurt is not None and self.hurt[1:] == (where, self.counts[where]):
            if self.hurt[0] == "die":
                raise Died
            os.kill(os.getpid(), self.hurt[0])

    def training_step(self, batch, batch_idx):
        self.place("train")
        loss = torch.nn.functional.mse_loss(self.net(batch[0]), batch[1])
        self.mean(loss)
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log("mean", self.mean, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        if not self.trainer.sanity_checking:
            self.place("validation")
        noise = 0.01 * torch.randn(())  # validation draws random numbers too
        loss = torch.nn.functional.mse_loss(self.net(batch[0]), batch[1]) + noise
        self.val_mean(loss)
        self.log("val", loss)
        self.log("val_mean", self.val_mean)

    def on_train_epoch_end(self):
        self.log("end", float(self.current_epoch))

    def on_save_checkpoint(self, checkpoint):
        self.place("save")

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=1e-2)
        return [optimizer], [
            {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 5, 0.9), "interval": "step"},
            {"scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0), "monitor": "val"},
        ]


class Rows(T.loggers.Logger):
    """A file of rows that forgets, on resume, what comes after the checkpoint."""

    name, version = "rows", 0

    def __init__(self, path: Path):
        self.path = path
        self.rows = json.loads(path.read_text()) if path.exists() else []

    def resume(self, step):
        self.rows = [row for row in self.rows if row[0] < step]

    def log_metrics(self, metrics, step=None):
        self.rows.append([step, sorted(metrics.items())])
        self.path.write_text(json.dumps(self.rows))

    def log_hyperparams(self, params, *args, **kwargs):
        pass


def attempt(folder: Path, hurt=None, **arguments):
    """One start of the job; returns everything that must come out alike, or how the attempt ended."""
    torch.manual_seed(1 if not (folder / "rows.json").exists() else 77)
    model = Model(hurt)
    rows = Rows(folder / "rows.json")
    trainer = T.Trainer(**({
        "accelerator": "cpu", "max_epochs": 3, "accumulate_grad_batches": 2, "val_check_interval": 4, "logger": rows,
        "log_every_n_steps": 2, "enable_progress_bar": False, "enable_model_summary": False,
        "callbacks": [T.callbacks.ModelCheckpoint(every_n_train_steps=2, monitor="val", save_top_k=2),
                      T.callbacks.EarlyStopping("val", patience=50)],
    } | arguments))  # fmt: skip
    loaders = DataLoader(Noisy(38, 0.1), 4, shuffle=True), DataLoader(Noisy(10, 0.0), 4)
    try:
        trainer.fit(model, *loaders)
    except Died:
        return "died"
    except SystemExit as stop:
        return stop.code
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = [v for s in trainer.optimizers[0].state_dict()["state"].values() for v in s.values()]
    return {
        "weights": torch.cat([w.flatten() for w in weights.values()]).tolist(),
        "optimizer": torch.cat([torch.as_tensor(v).flatten() for v in optimizer]).tolist(),
        "rows": json.loads((folder / "rows.json").read_text()),
        "counters": (trainer.current_epoch, trainer.global_step),
    }


@pytest.fixture
def run_folder(tmp_path, monkeypatch):
    """`run_folder(name)` makes a run folder the current one."""

    def make(name):
        folder = tmp_path / name
        folder.mkdir()
        monkeypatch.setenv("LAUNCH_RUN_DIR", str(folder))
        monkeypatch.setenv("PL_GLOBAL_SEED", "3")
        return folder

    return make


@pytest.fixture
def restarted(monkeypatch):
    """`restarted()`: what this process has trained so far, another one has."""
    return lambda: monkeypatch.setattr(saves, "_trained", {})


def test_every_place_of_a_stop_or_crash(run_folder):
    # 10 batches per epoch, in 5 windows of 2; validation after batch 4, 8 of each epoch.
    whole = attempt(run_folder("whole"))
    assert whole["counters"] == (3, 15)
    term = signal.SIGTERM
    for number, hurt in enumerate([
        (term, "train", 1), (term, "train", 4), (term, "train", 10), (term, "train", 30), (term, "validation", 1),
        (term, "validation", 3), (signal.SIGUSR1, "train", 7), (term, "save", 2), ("die", "train", 2),
        ("die", "train", 14), ("die", "validation", 8), ("die", "save", 2), ("die", "save", 4), ("die", "save", 7),
    ]):  # fmt: skip
        folder = run_folder(f"run{number}")
        ended = attempt(folder, hurt)
        # A stop that comes in the last batch finds the training complete: that is no failure and no requeue.
        assert ended == ("died" if hurt[0] == "die" else 75), (hurt, ended)
        assert attempt(folder) == whole, hurt


class Endless(IterableDataset):
    """Samples that come in an order of their own."""

    def __init__(self, n=12):
        self.n, self.given = n, []

    def __iter__(self):
        for i in range(self.n):
            self.given.append(i)
            yield torch.full((4,), i / 10)


class Going(Endless):
    """One that says where it is."""

    at = 0

    def __iter__(self):
        while self.at < self.n:
            self.at += 1
            self.given.append(self.at - 1)
            yield torch.full((4,), (self.at - 1) / 10)
        self.at = 0

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


class Streamed(Model):
    def training_step(self, batch, batch_idx):
        self.place("train")
        x = batch if isinstance(batch, torch.Tensor) else torch.cat([b for b in batch if b is not None])
        return self.net(x).square().mean()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def fit_streamed(loader, hurt=None, **arguments):
    model = Streamed(hurt)
    trainer = T.Trainer(**({"accelerator": "cpu", "max_epochs": 2, "logger": False, "enable_progress_bar": False,
                            "enable_model_summary": False} | arguments))  # fmt: skip
    try:
        trainer.fit(model, loader)
    except SystemExit:
        return None
    return torch.cat([w.flatten() for w in model.state_dict().values()]).tolist(), model.counts["train"]


def test_a_stream_that_cannot_say_where_it_was_begins_its_epoch_anew_if_that_is_wanted(run_folder):
    run_folder("stream")
    assert fit_streamed(DataLoader(Endless(), 2), (signal.SIGTERM, "train", 8)) is None
    with pytest.raises(DataError, match=r"cannot say where it was.*Trainer\(resume='epoch'\)"):
        fit_streamed(DataLoader(Endless(), 2))
    data = Endless()
    _, batches = fit_streamed(DataLoader(data, 2), resume="epoch")
    assert batches == 6
    assert data.given == list(range(12))


def test_a_dataset_with_a_state_goes_on_where_it_was(run_folder):
    run_folder("whole")
    torch.manual_seed(0)
    whole, _ = fit_streamed(DataLoader(Going(), 2))
    run_folder("stream")
    torch.manual_seed(0)
    assert fit_streamed(DataLoader(Going(), 2), (signal.SIGTERM, "train", 8)) is None
    data = Going()
    weights, batches = fit_streamed(DataLoader(data, 2))
    assert (weights, batches) == (whole, 4)
    assert data.given == list(range(4, 12))


@pytest.mark.parametrize("mode", ["min_size", "max_size_cycle", "max_size"])
def test_several_loaders_go_on_where_they_were(run_folder, mode):
    def loaders():
        sets = [torch.arange(4.0 * n).reshape(n, 4) / 100 for n in (8, 10)]
        return T.CombinedLoader([DataLoader(s, 1, shuffle=True) for s in sets], mode)

    run_folder("whole")
    torch.manual_seed(0)
    whole, batches = fit_streamed(loaders())
    assert batches == {"min_size": 16}.get(mode, 20)
    for number in (3, 9, 17):
        if number < batches:
            run_folder(f"{mode}-{number}")
            torch.manual_seed(0)
            assert fit_streamed(loaders(), (signal.SIGTERM, "train", number)) is None
            assert fit_streamed(loaders()) == (whole, batches - number)


def test_many_attempts(run_folder):
    whole = attempt(run_folder("whole"))
    folder = run_folder("many")
    for hurt in [
        (signal.SIGTERM, "train", 3),
        ("die", "train", 6),
        (signal.SIGTERM, "validation", 2),
        ("die", "save", 2),
    ]:
        assert attempt(folder, hurt) in ("died", 75)
    assert attempt(folder) == whole


class Growing(T.DataModule):
    """Its augmentation grows with every batch that it has given."""

    def __init__(self):
        super().__init__()
        self.level = 0.0

    def train_dataloader(self):
        return DataLoader(Noisy(38, 0.1), 4, shuffle=True)

    def val_dataloader(self):
        return DataLoader(Noisy(10, 0.0), 4)

    def on_before_batch_transfer(self, batch, dataloader_idx):
        if self.trainer.training:
            self.level += 0.01
        return batch[0] * (1 + self.level), batch[1]

    def state_dict(self):
        return {"level": self.level}

    def load_state_dict(self, state):
        self.level = state["level"]


class OpenWindows(T.Callback):
    """Saves when gradients of an unfinished accumulation window are there."""

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        if index % 5 == 1:
            trainer.save_checkpoint(f"{trainer.run_dir}/checkpoints/window-{trainer.train_state.batches}.ckpt")


class OneOptimizer(Model):
    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def fit_with_a_scaler(folder, hurt=None):
    torch.manual_seed(1)
    model, data = OneOptimizer(hurt), Growing()
    stopping = T.callbacks.EarlyStopping("val", patience=1, min_delta=0.3)
    swa = T.callbacks.StochasticWeightAveraging(swa_lrs=0.02, swa_epoch_start=2, annealing_epochs=2)
    trainer = T.Trainer(
        accelerator="cpu", precision="16-mixed", max_epochs=5, accumulate_grad_batches=4, logger=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[OpenWindows(), stopping, swa],
    )  # fmt: skip
    try:
        trainer.fit(model, datamodule=data)
    except Died:
        return "died"
    except SystemExit as stop:
        return stop.code
    weights = torch.cat([w.flatten() for w in model.state_dict().values()]).tolist()
    scaler = trainer.precision_object.state_dict()
    return weights, scaler, data.level, trainer.current_epoch, stopping.state_dict(), dict(trainer.callback_metrics)


def test_a_scaler_a_datamodule_swa_early_stopping_and_an_open_window(run_folder):
    whole = fit_with_a_scaler(run_folder("whole"))
    assert whole[1]["scale"] < 65536  # it has skipped steps
    assert whole[4]["wait_count"] > 0
    for number, hurt in enumerate([
        ("die", "train", 8), (signal.SIGTERM, "train", 13), ("die", "train", 28), (signal.SIGTERM, "train", 34),
    ]):  # fmt: skip
        folder = run_folder(f"hurt{number}")
        assert fit_with_a_scaler(folder, hurt) == ("died" if hurt[0] == "die" else 75), hurt
        assert fit_with_a_scaler(folder) == whole, hurt


def two_fits(folder, hurts=(None, None)):
    """Two trainings, one after the other: the second begins with the weights and the random state of the first."""
    torch.manual_seed(1)
    arguments = {"accelerator": "cpu", "max_epochs": 2, "logger": False, "enable_progress_bar": False,
                 "enable_model_summary": False}  # fmt: skip
    first, ends = None, []
    for hurt in hurts:
        model = Model(hurt)
        if first is not None:
            model.net.load_state_dict(first.net.state_dict())
            model.net[0].bias.data += torch.randn(16)
        callback = T.callbacks.ModelCheckpoint(every_n_train_steps=3, monitor="val", save_top_k=1)
        trainer = T.Trainer(callbacks=[callback], **arguments)
        try:
            trainer.fit(model, DataLoader(Noisy(20, 0.1), 4, shuffle=True), DataLoader(Noisy(8, 0.0), 4))
        except Died:
            return None
        first = model
        weights = torch.cat([w.flatten() for w in model.state_dict().values()]).tolist()
        best = torch.load(callback.best_model_path, weights_only=True)["state_dict"]["net.0.bias"].tolist()
        ends.append((weights, trainer.global_step, dict(trainer.callback_metrics), best))
    return ends


def test_a_script_of_two_fits_goes_on_in_either(run_folder, restarted):
    whole = two_fits(run_folder("whole"))
    assert [end[1] for end in whole] == [10, 10]
    assert whole[0][0] != whole[1][0]
    for number, hurts in enumerate([
        [(("die", "train", 7), None)],
        [(None, ("die", "train", 2))],  # before the second has saved anything
        [(None, ("die", "train", 8)), (None, ("die", "train", 3))],
    ]):  # fmt: skip
        folder = run_folder(f"hurt{number}")
        for attempts in hurts:
            restarted()
            assert two_fits(folder, attempts) is None
        restarted()
        assert two_fits(folder) == whole, hurts
        restarted()
        assert two_fits(folder) == whole  # all is done already


def test_a_finished_run_does_nothing_again(run_folder, restarted, tmp_path, monkeypatch):
    monkeypatch.setenv("LAUNCH_PROGRESS", str(tmp_path / "page"))
    folder = run_folder("done")
    first = attempt(folder)
    page = (tmp_path / "page").read_bytes()
    assert struct.unpack_from("<QQII", page) == (MAGIC, 15, DONE, 2)
    assert struct.unpack_from("<Q", page, 40) == (15,)
    assert struct.unpack_from("<Q", page, 64) == (1,)  # one more than the step that it began at
    model = Model()
    trainer = T.Trainer(accelerator="cpu", max_epochs=3, logger=False, enable_progress_bar=False,
                        enable_model_summary=False)  # fmt: skip
    restarted()
    with pytest.warns(UserWarning, match="callbacks that this Trainer does not have"):
        trainer.fit(model, DataLoader(Noisy(38, 0.1), 4), DataLoader(Noisy(10, 0.0), 4))
    assert model.counts == {}
    assert (trainer.global_step, trainer.current_epoch) == (15, 3)
    assert torch.cat([w.flatten() for w in model.state_dict().values()]).tolist() == first["weights"]


def test_stop_without_a_run_folder_saves_and_says_where(tmp_path, quiet, capsys, monkeypatch):
    monkeypatch.setenv("LAUNCH_PROGRESS", str(tmp_path / "page"))
    loaders = DataLoader(Noisy(38, 0.1), 4), DataLoader(Noisy(10, 0.0), 4)
    trainer = quiet(max_epochs=3, enable_checkpointing=True)
    with pytest.raises(SystemExit) as stop:
        trainer.fit(Model((signal.SIGTERM, "train", 5)), *loaders)
    assert stop.value.code == 128 + signal.SIGTERM
    saved = list((tmp_path / "checkpoints").glob("*stopped*"))
    assert len(saved) == 1
    step, _, _, _, stood_still = struct.unpack_from("<Qddqd", (tmp_path / "page").read_bytes(), 40)
    assert step == torch.load(saved[0], weights_only=True)["global_step"] > 0
    assert stood_still > 0
    assert f"ckpt_path={str(saved[0])!r}" in capsys.readouterr().err
    trainer = quiet(max_epochs=1, enable_checkpointing=True)
    trainer.fit(Model(), *loaders, ckpt_path=saved[0])
    assert trainer.global_step == 10


def test_a_damaged_checkpoint_is_passed_over(run_folder):
    whole = attempt(run_folder("whole"))
    folder = run_folder("damaged")
    assert attempt(folder, (signal.SIGTERM, "train", 14)) == 75
    newest = max((folder / "checkpoints").glob("resume-*stopped.ckpt"), key=lambda p: p.stat().st_mtime)
    newest.write_bytes(newest.read_bytes()[:100])
    with pytest.warns(UserWarning, match="trying an older one"):
        assert attempt(folder) == whole


def test_another_number_of_threads_is_told(quiet, tmp_path):
    loaders = DataLoader(Noisy(38, 0.1), 4), DataLoader(Noisy(10, 0.0), 4)
    trainer = quiet(max_epochs=1)
    trainer.fit(Model(), *loaders)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    now = torch.get_num_threads()
    torch.set_num_threads(now + 1)
    try:
        with pytest.warns(UserWarning, match=f"made with {now} intra-op threads.*OMP_NUM_THREADS={now}"):
            quiet(max_epochs=2).fit(Model(), *loaders, ckpt_path=tmp_path / "a.ckpt")
    finally:
        torch.set_num_threads(now)


def test_ckpt_path_by_name(quiet, tmp_path):
    loaders = DataLoader(Noisy(38, 0.1), 4), DataLoader(Noisy(10, 0.0), 4)
    callback = T.callbacks.ModelCheckpoint(dirpath=tmp_path / "kept", monitor="val", save_top_k=1, save_last=True)
    trainer = quiet(max_epochs=2, enable_checkpointing=True, callbacks=[callback])
    model = Model()
    trainer.fit(model, *loaders)
    best = torch.load(callback.best_model_path, weights_only=True)["state_dict"]["net.0.weight"]
    trainer.validate(ckpt_path="best", dataloaders=loaders[1], verbose=False)
    assert torch.equal(model.net[0].weight, best)
    trainer = quiet(max_epochs=3, enable_checkpointing=True, callbacks=[callback])
    trainer.fit(Model(), *loaders, ckpt_path="last")
    assert (trainer.current_epoch, trainer.global_step) == (3, 30)
