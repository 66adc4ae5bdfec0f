"""ModelCheckpoint: which checkpoints there are, what they are called, and that none is lost."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from trainer import Module, Trainer
from trainer.callbacks import Callback, ModelCheckpoint, OnExceptionCheckpoint
from trainer.checkpoint import saved
from trainer.errors import ConfigError


class Scripted(Module):
    """Logs the given validation values, one per epoch."""

    def __init__(self, values=(), step_error=None):
        super().__init__()
        self.layer = nn.Linear(2, 1)
        self.values = list(values)
        self.step_error = step_error

    def training_step(self, batch, batch_idx):
        if self.step_error == self.trainer.global_step:
            raise RuntimeError("scripted")
        loss = self.layer(batch[0]).square().mean()
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("score", torch.tensor(float(self.values[self.trainer.current_epoch])))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def loader(n=4):
    return DataLoader(TensorDataset(torch.ones(n, 2)), batch_size=1)


def fit(folder, model, *callbacks, val=True, ckpt_path=None, **options):
    options = {"max_epochs": len(model.values) or 1, "limit_val_batches": 1 if val else 0} | options
    trainer = Trainer(
        default_root_dir=folder, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, callbacks=list(callbacks), **options,
    )  # fmt: skip
    trainer.fit(model, loader(), loader(1), ckpt_path=ckpt_path)
    return trainer


def names(folder):
    return sorted(p.name for p in Path(folder).iterdir())


@pytest.fixture
def removals(monkeypatch):
    """What was removed, each with what was on disk at that moment."""
    seen = []
    original = saved.remove

    def remove(path):
        seen.append((Path(path).name, names(Path(path).parent)))
        original(path)

    monkeypatch.setattr(saved, "remove", remove)
    return seen


@pytest.mark.parametrize(
    ("filename", "metrics", "expected"),
    [
        (None, {"epoch": 1, "step": 20}, "epoch=1-step=20.ckpt"),
        ("{epoch:03d}", {"epoch": 5}, "epoch=005.ckpt"),
        ("{epoch}-{val_loss:.2f}", {"epoch": 2, "val_loss": 0.123456}, "epoch=2-val_loss=0.12.ckpt"),
        ("{epoch}-{epoch_test:d}", {"epoch": 1, "epoch_test": 3}, "epoch=1-epoch_test=3.ckpt"),
        ("{missing:d}", {}, "missing=0.ckpt"),
        ("a-{val/acc:.1f}", {"val/acc": torch.tensor(0.25)}, "a-val/acc=0.2.ckpt"),
        ("plain", {}, "plain.ckpt"),
        ("{a.b:.1f}", {"a.b": 1.0}, "a.b=1.0.ckpt"),
    ],
)
def test_names(filename, metrics, expected):
    assert ModelCheckpoint(filename=filename).format_checkpoint_name(metrics) == expected


def test_name_without_inserted_metric_names():
    callback = ModelCheckpoint(filename="e{epoch}-acc{val/acc:.2f}", auto_insert_metric_name=False)
    assert callback.format_checkpoint_name({"epoch": 1, "val/acc": 0.5}, ver=2) == "e1-acc0.50-v2.ckpt"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "best"}, "'min', 'max'"),
        ({"save_top_k": -2}, "-1"),
        ({"save_top_k": 3}, "monitor"),
        ({"save_last": "yes"}, "'link'"),
        ({"every_n_epochs": -1}, "every_n_epochs"),
        ({"every_n_train_steps": 5, "every_n_epochs": 1}, "one of them"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ConfigError, match=message):
        ModelCheckpoint(**options)


def test_keeps_the_best_and_removes_only_what_is_replaced(tmp_path, removals):
    callback = ModelCheckpoint(tmp_path / "c", "{epoch}", monitor="score", save_top_k=2, save_last=True)
    fit(tmp_path, Scripted([5, 3, 4, 1, float("nan"), 2]), callback)
    assert names(callback.dirpath) == ["epoch=3.ckpt", "epoch=5.ckpt", "last.ckpt"]
    assert Path(callback.best_model_path).name == "epoch=3.ckpt"
    assert callback.best_model_score == 1
    assert callback.kth_value == 2
    assert {Path(p).name: float(v) for p, v in callback.best_k_models.items()} == {"epoch=3.ckpt": 1, "epoch=5.ckpt": 2}
    # Each removal happened while the checkpoint that replaced it was already there.
    assert [(gone, sorted(set(there) - {gone})) for gone, there in removals] == [
        ("epoch=0.ckpt", ["epoch=1.ckpt", "epoch=2.ckpt", "last.ckpt"]),
        ("epoch=2.ckpt", ["epoch=1.ckpt", "epoch=3.ckpt", "last.ckpt"]),
        ("epoch=1.ckpt", ["epoch=3.ckpt", "epoch=5.ckpt", "last.ckpt"]),
    ]
    checkpoint = torch.load(callback.best_model_path, weights_only=True)
    assert checkpoint["global_step"] == 16
    assert set(checkpoint["state_dict"]) == {"layer.weight", "layer.bias"}
    # The state inside a checkpoint knows of that checkpoint.
    assert checkpoint["callbacks"][callback.state_key]["best_model_path"] == callback.best_model_path


def test_default_is_one_file_per_run_in_the_usual_place(tmp_path):
    trainer = fit(tmp_path, Scripted(), val=False, max_epochs=2)
    assert trainer.checkpoint_callback.best_model_path == str(tmp_path / "checkpoints" / "epoch=1-step=8.ckpt")
    assert names(tmp_path / "checkpoints") == ["epoch=1-step=8.ckpt"]


def test_max_mode_all_and_weights_only(tmp_path):
    callback = ModelCheckpoint(
        tmp_path / "c", "{epoch}", monitor="score", mode="max", save_top_k=-1, save_weights_only=True
    )
    fit(tmp_path, Scripted([1, 3, 2]), callback)
    assert names(callback.dirpath) == ["epoch=0.ckpt", "epoch=1.ckpt", "epoch=2.ckpt"]
    assert Path(callback.best_model_path).name == "epoch=1.ckpt"
    assert "optimizer_states" not in torch.load(callback.best_model_path, weights_only=True)
    callback.to_yaml()
    assert '=1.ckpt": 3.0\n' in (tmp_path / "c" / "best_k_models.yaml").read_text()


def test_by_steps_by_time_and_by_epochs(tmp_path):
    steps = ModelCheckpoint(tmp_path / "steps", "{step}", save_top_k=-1, every_n_train_steps=3)
    always = ModelCheckpoint(tmp_path / "time", "{step}", save_top_k=-1, train_time_interval=timedelta(0))
    never = ModelCheckpoint(tmp_path / "never", "{step}", train_time_interval=timedelta(hours=1))
    epochs = ModelCheckpoint(tmp_path / "epochs", "{epoch}", save_top_k=-1, every_n_epochs=2)
    fit(tmp_path, Scripted(), steps, always, never, epochs, val=False, max_epochs=2, accumulate_grad_batches=2)
    assert names(tmp_path / "steps") == ["step=3.ckpt"]
    assert names(tmp_path / "time") == ["step=1.ckpt", "step=2.ckpt", "step=3.ckpt", "step=4.ckpt"]
    assert not (tmp_path / "never").exists()
    assert names(tmp_path / "epochs") == ["epoch=1.ckpt"]


def test_last_as_a_link(tmp_path):
    callback = ModelCheckpoint(tmp_path / "c", "{epoch}", save_last="link")
    fit(tmp_path, Scripted(), callback, val=False, max_epochs=2)
    link = tmp_path / "c" / "last.ckpt"
    assert link.is_symlink()
    assert link.resolve().name == "epoch=1.ckpt"
    assert names(tmp_path / "c") == ["epoch=1.ckpt", "last.ckpt"]


def test_last_is_the_state_at_the_end(tmp_path):
    callback = ModelCheckpoint(tmp_path / "c", "{epoch}", every_n_epochs=2, save_last=True)
    fit(tmp_path, Scripted(), callback, val=False, max_epochs=3)
    assert torch.load(tmp_path / "c" / "last.ckpt", weights_only=True)["global_step"] == 12
    assert names(tmp_path / "c") == ["epoch=1.ckpt", "last.ckpt"]


def test_step_trigger_waits_for_the_value_of_a_validation(tmp_path):
    callback = ModelCheckpoint(
        tmp_path / "c", "{step}-{score:.0f}", monitor="score", save_top_k=-1, every_n_train_steps=4,
        save_on_train_epoch_end=False,
    )  # fmt: skip
    fit(tmp_path, Scripted([7, 5]), callback)
    assert names(tmp_path / "c") == ["step=4-score=7.ckpt", "step=8-score=5.ckpt"]


def test_a_monitor_that_is_never_logged_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match=r"monitor='accuracy'.*'score'"):
        fit(tmp_path, Scripted([1]), ModelCheckpoint(monitor="accuracy"))


def test_does_not_overwrite_a_file_that_it_did_not_write(tmp_path):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "epoch=0.ckpt").write_text("mine")
    callback = ModelCheckpoint(tmp_path / "c", "{epoch}")
    fit(tmp_path, Scripted(), callback, val=False)
    assert (tmp_path / "c" / "epoch=0.ckpt").read_text() == "mine"
    assert names(tmp_path / "c") == ["epoch=0-v1.ckpt", "epoch=0.ckpt"]


def test_in_its_run_folder_a_step_that_is_done_again_is_written_again(tmp_path, monkeypatch):
    """A killed attempt may leave a checkpoint behind that the state it is resumed from does not know."""
    monkeypatch.setenv("LAUNCH_RUN_DIR", str(tmp_path))
    folder = tmp_path / "c"
    folder.mkdir()
    (folder / "epoch=0.ckpt").write_text("of the attempt that was killed")
    first, second = ModelCheckpoint(folder, "{epoch}"), ModelCheckpoint(folder, "{epoch}", monitor="train_loss")
    fit(tmp_path, Scripted(), first, second, val=False)
    assert torch.load(folder / "epoch=0.ckpt", weights_only=True)["global_step"] == 4
    # Two callbacks of one run still do not take each other's names.
    assert [p for p in names(folder) if p.startswith("epoch")] == ["epoch=0-v1.ckpt", "epoch=0.ckpt"]


def test_state_survives_a_restart(tmp_path):
    first = ModelCheckpoint(tmp_path / "c", "{epoch}", monitor="score", save_top_k=2, save_last=True)
    fit(tmp_path, Scripted([5, 3, 4, 1, 2, 6]), first, max_epochs=3)
    again = ModelCheckpoint(tmp_path / "c", "{epoch}", monitor="score", save_top_k=2, save_last=True)
    fit(tmp_path, Scripted([5, 3, 4, 1, 2, 6]), again, ckpt_path=first.last_model_path)
    assert names(tmp_path / "c") == ["epoch=3.ckpt", "epoch=4.ckpt", "last.ckpt"]
    assert again.best_model_score == 1
    elsewhere = ModelCheckpoint(tmp_path / "d", "{epoch}", monitor="score", save_top_k=2, save_last=True)
    with pytest.warns(UserWarning, match="wrote to"):
        fit(tmp_path, Scripted([5, 3, 4, 1, 2, 0, 9]), elsewhere, ckpt_path=again.last_model_path)
    assert names(tmp_path / "c") == ["epoch=3.ckpt", "epoch=4.ckpt", "last.ckpt"]


def test_a_removal_that_a_kill_prevented_is_made_up_for(tmp_path, monkeypatch):
    first = ModelCheckpoint(tmp_path / "c", "{epoch}")
    with monkeypatch.context() as patched:
        patched.setattr(saved, "remove", lambda path: None)
        fit(tmp_path, Scripted(), first, val=False, max_epochs=2)
    assert names(tmp_path / "c") == ["epoch=0.ckpt", "epoch=1.ckpt"]
    again = ModelCheckpoint(tmp_path / "c", "{epoch}")
    fit(tmp_path, Scripted(), again, val=False, max_epochs=3, ckpt_path=tmp_path / "c" / "epoch=1.ckpt")
    # epoch=1 stays, because it is what the user started from.
    assert names(tmp_path / "c") == ["epoch=1.ckpt", "epoch=2.ckpt"]


def test_the_checkpoint_that_a_run_started_from_is_kept(tmp_path):
    first = ModelCheckpoint(tmp_path / "c", "{epoch}")
    fit(tmp_path, Scripted(), first, val=False)
    fit(tmp_path, Scripted(), ModelCheckpoint(tmp_path / "c", "{epoch}"), val=False, max_epochs=3,
        ckpt_path=first.best_model_path)  # fmt: skip
    assert names(tmp_path / "c") == ["epoch=0.ckpt", "epoch=2.ckpt"]


def test_the_checkpoint_that_a_run_goes_on_from_by_itself_is_replaced(tmp_path, monkeypatch):
    """Nobody named it, so it is not kept, also where it lies outside the run folder."""
    (tmp_path / "run").mkdir()
    monkeypatch.setenv("LAUNCH_RUN_DIR", str(tmp_path / "run"))
    with pytest.raises(RuntimeError, match="scripted"):
        fit(tmp_path, Scripted(step_error=6), ModelCheckpoint(tmp_path / "c", "{epoch}"), val=False, max_epochs=3)
    assert names(tmp_path / "c") == ["epoch=0.ckpt"]
    fit(tmp_path, Scripted(), ModelCheckpoint(tmp_path / "c", "{epoch}"), val=False, max_epochs=3)
    assert names(tmp_path / "c") == ["epoch=2.ckpt"]


def test_on_exception(tmp_path):
    one = ModelCheckpoint(tmp_path / "c", "{step}", save_on_exception=True)
    other = OnExceptionCheckpoint(tmp_path / "d")
    with pytest.raises(RuntimeError, match="scripted"):
        fit(tmp_path, Scripted(step_error=2), one, other, val=False)
    assert names(tmp_path / "c") == ["step=2.ckpt"]
    assert torch.load(other.ckpt_path, weights_only=True)["global_step"] == 2


def test_fast_dev_run_writes_nothing(tmp_path):
    fit(tmp_path, Scripted([1]), fast_dev_run=True)
    assert names(tmp_path) == []


def test_checkpoints_are_written_after_other_callbacks_acted(tmp_path):
    order = []

    class Other(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            order.append("other")

    class Last(ModelCheckpoint):
        def on_train_epoch_end(self, trainer, pl_module):
            order.append("checkpoint")

    fit(tmp_path, Scripted(), Last(), Other(), val=False)
    assert order == ["other", "checkpoint"]


def test_time_is_asked_of_rank_zero_only_now_and_then():
    from trainer.callbacks.interval import AgreedInterval

    class Strategy:
        asked = 0

        def broadcast(self, value):
            self.asked += 1
            return value

    class Fake:
        strategy, is_global_zero = Strategy(), True

    interval = AgreedInterval(3600)
    assert not any(interval.passed(Fake) for _ in range(100_000))
    assert Fake.strategy.asked < 40
