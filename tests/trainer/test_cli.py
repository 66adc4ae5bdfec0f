"""MusterCLI: flags, YAML, subcommands, chosen classes, and the configuration that is kept."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import yaml
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import trainer as T
from trainer.callbacks import EarlyStopping
from trainer.cli import LightningCLI, LRSchedulerCallable, MusterCLI, OptimizerCallable
from trainer.errors import ConfigError


class Net(T.Module):
    def __init__(self, width: int = 3, lr: float = 0.1, act: nn.Module | None = None):
        super().__init__()
        self.save_hyperparameters()
        self.layers = nn.Sequential(nn.Linear(4, width), act or nn.ReLU(), nn.Linear(width, 1))

    def training_step(self, batch, batch_idx):
        loss = self.layers(batch[0]).square().mean()
        self.log("loss", loss)
        return loss

    def test_step(self, batch, batch_idx):
        self.log("test", self.layers(batch[0]).mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.hparams.lr)


class Deep(Net):
    def __init__(self, depth: int = 2, width: int = 3):
        super().__init__(width)


class Data(T.DataModule):
    def __init__(self, batch_size: int = 4):
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.ones(8, 4)), batch_size=self.batch_size)

    test_dataloader = train_dataloader


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # seed_everything writes the environment
    monkeypatch.setenv("PL_SEED_WORKERS", "0")

    def make(*args, classes=(Net, Data), cli=MusterCLI, **options):
        defaults = {
            "default_root_dir": str(tmp_path), "accelerator": "cpu", "enable_progress_bar": False,
            "enable_model_summary": False, "max_epochs": 1, "enable_checkpointing": False,
        }  # fmt: skip
        return cli(*classes, args=list(map(str, args)), trainer_defaults=defaults, **options)

    return make


def test_fit_by_flags_and_again_by_its_saved_config(run, tmp_path):
    cli = run("fit", "--model.width", 5, "--data.batch_size", 2, "--trainer.max_epochs", 2, "--seed_everything", 7)
    assert cli.trainer.global_step == 8
    assert cli.model.hparams == {"width": 5, "lr": 0.1, "act": None}
    saved = tmp_path / "lightning_logs" / "version_0" / "config.yaml"
    config = yaml.safe_load(saved.read_text())
    assert (config["model"]["width"], config["trainer"]["max_epochs"], config["seed_everything"]) == (5, 2, 7)
    again = run("fit", "--config", saved, "--data.batch_size", 8)
    assert again.trainer.global_step == 2
    assert again.model.layers[0].out_features == 5


def test_classes_are_chosen_by_name(run):
    # Its optimizer, as a module sees it, is of a class that is called Adam too.
    earlier = run("fit", "--optimizer=Adam", "--optimizer.lr=0.5", "--trainer.fast_dev_run=1", classes=(Net, Data))
    cli = run(
        "fit", f"--model={__name__}.Deep", "--model.depth=4", f"--data={__name__}.Data", "--data.batch_size=8",
        "--trainer.callbacks=EarlyStopping", "--trainer.callbacks.monitor=loss", "--trainer.logger=CSVLogger",
        "--trainer.logger.save_dir=logs", "--optimizer=Adam", "--optimizer.lr=0.5", "--lr_scheduler=StepLR",
        "--lr_scheduler.step_size=1", "--trainer.fast_dev_run=1", classes=(None, None),
    )  # fmt: skip
    assert type(earlier.model.optimizers()).__name__ == "Adam"
    assert type(cli.model).__name__ == "Deep"
    assert any(isinstance(c, EarlyStopping) for c in cli.trainer.callbacks)
    assert isinstance(cli.trainer.optimizers[0], torch.optim.Adam)
    assert cli.trainer.optimizers[0].param_groups[0]["initial_lr"] == 0.5
    assert isinstance(cli.trainer.lr_scheduler_configs[0].scheduler, torch.optim.lr_scheduler.StepLR)


def test_an_object_as_argument_is_made_and_left_out_of_the_checkpoint(run):
    cli = run("fit", "--model.act=torch.nn.Tanh", "--trainer.fast_dev_run=true")
    assert isinstance(cli.model.layers[1], nn.Tanh)
    assert cli.model.hparams == {"width": 3, "lr": 0.1}


class Chooses(Net):
    def __init__(
        self, optimizer: OptimizerCallable = torch.optim.Adam,
        scheduler: LRSchedulerCallable = torch.optim.lr_scheduler.ConstantLR,
    ):  # fmt: skip
        super().__init__()
        self.optimizer, self.scheduler = optimizer, scheduler

    def configure_optimizers(self):
        optimizer = self.optimizer(self.parameters())
        return [optimizer], [self.scheduler(optimizer)]


def test_a_module_takes_its_optimizer_and_scheduler_as_arguments(run):
    cli = run("fit", classes=(Chooses, Data))
    assert isinstance(cli.trainer.optimizers[0], torch.optim.Adam)
    cli = run(
        "fit", "--model.optimizer=SGD", "--model.optimizer.lr=0.5", "--model.scheduler=StepLR",
        "--model.scheduler.step_size=1", classes=(Chooses, Data),
    )  # fmt: skip
    [optimizer], [scheduler] = cli.trainer.optimizers, cli.trainer.lr_scheduler_configs
    assert (type(optimizer), optimizer.param_groups[0]["initial_lr"]) == (torch.optim.SGD, 0.5)
    assert isinstance(scheduler.scheduler, torch.optim.lr_scheduler.StepLR)


def test_own_arguments_links_and_hooks(run):
    seen = []

    class Mine(LightningCLI):
        def add_arguments_to_parser(self, parser):
            parser.add_argument("--note", default="none")
            parser.add_lightning_class_args(EarlyStopping, "stopping")
            parser.set_defaults({"stopping.monitor": "loss", "stopping.patience": 9})
            parser.link_arguments("data.batch_size", "model.width")
            parser.add_optimizer_args(torch.optim.Adam)

        def before_test(self):
            seen.append(self.config.test.note)

        def after_test(self):
            seen.append(self.trainer.callback_metrics)

    cli = run("test", "--note", "hello", "--data.batch_size", 2, "--optimizer.lr", 0.3, cli=Mine)
    assert seen[0] == "hello"
    assert "test" in seen[1]
    assert cli.model.layers[0].out_features == 2
    assert next(c for c in cli.trainer.callbacks if isinstance(c, EarlyStopping)).patience == 9
    assert cli.model.configure_optimizers().param_groups[0]["lr"] == 0.3


def test_without_running_only_the_objects_are_made(run):
    cli = run("--model.lr", 0.2, run=False, seed_everything_default=False)
    assert cli.subcommand is None
    assert cli.model.hparams.lr == 0.2
    assert cli.trainer.global_step == 0
    cli = MusterCLI(Net, Data, args={"model": {"width": 9}, "trainer": {"accelerator": "cpu"}}, run=False)
    assert cli.model.layers[0].out_features == 9


def test_the_run_folder_keeps_the_config_and_no_other(run, tmp_path, monkeypatch):
    monkeypatch.setenv("LAUNCH_RUN_DIR", str(tmp_path / "run"))
    (tmp_path / "run").mkdir()
    for _ in range(2):  # the second finds the same configuration, and a finished run
        run("fit", "--seed_everything", 1)
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["seed_everything"] == 1
    with pytest.raises(ConfigError, match="another configuration"):
        run("fit", "--seed_everything", 2)


def test_print_config_and_wrong_values(run, capsys):
    with pytest.raises(SystemExit) as ended:
        run("fit", "--print_config")
    assert ended.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"] == {"width": 3, "lr": 0.1, "act": None}
    for arguments in (["fit", "--model.width", "wide"], ["fit", "--trainer.gpus", "2"], ["train"]):
        with pytest.raises(SystemExit) as ended:
            run(*arguments)
        assert ended.value.code == 2


def test_jsonargparse_is_imported_late():
    code = "import trainer, sys; trainer.Trainer; assert not {'jsonargparse', 'trainer.tuning'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)
