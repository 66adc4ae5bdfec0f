"""What people get wrong: each ends in an error that says what was given and what to do, before any work is lost.

No row may end in a traceback of ours, and what is refused with exit code 2 has left nothing behind.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.utils.data import DataLoader

import trainer as T
from launcher import cli
from launcher.runs import RunFolder
from launcher.spec import LaunchSpec, Program
from trainer import errors as wrong
from trainer.callbacks import EarlyStopping, ModelCheckpoint
from trainer.checkpoint import Store, load_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable


# ------------------------------------------------------------------------------------------------ the command line


@dataclass(frozen=True)
class Row:
    """A command line, what its error says, its exit code, and the files that are there."""

    line: str
    says: str
    code: int = 2
    files: dict[str, str | bytes] = field(default_factory=dict)


RUN_OF_TOMORROW = json.dumps({"version": 99, "run_id": "old", "created": 0, "spec": {}})

ROWS = [
    # commands and options
    Row("", "no program given. Usage: launch [options] script.py"),
    Row("shwo", "there is no command 'shwo', nor a script of that name here; did you mean launch show?"),
    Row("resum night", "did you mean launch resume?"),
    Row("ls --nubmer 3", "No such option '--nubmer'. Did you mean '--number'?"),
    Row("ls -n many", "'many' is not a valid integer"),
    Row("completion tcsh", "'tcsh' is not one of 'bash', 'zsh', 'fish'"),
    Row("config x", "Got unexpected extra argument (x)"),
    Row("--porcs 2 job.py", "No such option '--porcs'"),
    Row("--procs two job.py", "Invalid value for '--procs': 'two' is not a valid integer"),
    Row("--procs 0 job.py", "procs is 0; it must be a whole number >= 1"),
    Row("--procs 2 --gpus 2 job.py", "both say how many ranks a node has: give one of them"),
    Row("--backend cloud job.py", "'cloud' is not one of 'local', 'slurm', 'ssh'"),
    Row("--backend local --nodes 4:2 --procs 1 job.py", "give N >= 1, or MIN:MAX with 1 <= MIN <= MAX"),
    Row("--backend local --nodes 1-4 --procs 1 job.py", "--nodes '1-4': give N or MIN:MAX"),
    Row("--master-port 80000 --procs 1 job.py", "--master-port 80000: give a port from 1 to 65535"),
    Row("--nnodes 2 --rdzv-endpoint host:http --procs 1 job.py", "'host:http': give host:port"),
    Row("--hang-timeout soon --procs 1 job.py", "--hang-timeout 'soon': give seconds, or off"),
    Row("--env API-KEY --procs 1 job.py", "--env 'API-KEY': give NAME or NAME=VALUE"),
    Row("--env NOT_THERE --procs 1 job.py", "there is no such variable here; give NAME=VALUE, or export it"),
    Row("--nodes 2 --backend slurm --gpus 1 --time soon job.py", "--time 'soon' is no length of time; give minutes"),
    Row("--sweep lr --backend local --procs 1 job.py", "--sweep 'lr': give KEY=VALUE,VALUE"),
    Row("--array a-b --backend local --procs 1 job.py", "--array 'a-b' is no array; give indices and ranges"),
    # files
    Row("--procs 2 jobb.py", "there is no script 'jobb.py'"),
    Row("--procs 2 broken.py", "broken.py does not compile", files={"broken.py": "def ("}),
    Row("--procs 2 folder", "folder is a folder without __main__.py; name a script, or use -m", files={"folder/a": ""}),
    Row("--no-python --procs 1 nothing-on-path", "no program 'nothing-on-path' on PATH, or it is not executable"),
    Row("-m --procs 1 job.py.x-y", "is no module name; for a file leave -m out"),
    Row("--hosts @hosts --procs 1 job.py", "a hostfile has one `host slots=N` a line"),
    Row("--hosts a,,b --procs 1 job.py", "names no host; give names like a,b:4"),
    Row("--sweep-file runs.jsonl --backend local --procs 1 job.py", "runs.jsonl cannot be read"),
    Row("--sweep-file runs.jsonl --backend local --procs 1 job.py", "line 1 is no JSON", files={"runs.jsonl": "lr: 1"}),
    Row("job.py", "launch.toml: 'prcs' is no default that can be set; allowed are", files={"launch.toml": "prcs = 2"}),
    Row("job.py", "launch.toml: procs = 'two': give a whole number", files={"launch.toml": "procs = 'two'"}),
    Row("job.py", "launch.toml is no TOML", files={"launch.toml": "procs = ["}),
    Row("job.py", "launch.toml cannot be read", files={"launch.toml": b"\xff\xfe"}),
    # run folders
    Row("--run a:b --procs 1 job.py", "a name has letters, digits, '.', '_', '-' and at most 128"),
    Row("--run ./taken --procs 1 job.py", "taken is a file, no run folder; choose another --run", files={"taken": ""}),
    Row("--run ./full --procs 1 job.py", "is not a run folder; choose another --run", files={"full/mine.txt": ""}),
    Row("--run /proc/no/run --procs 1 job.py", "cannot be written: No such file or directory; give one with --run"),
    Row("--run ./cut --procs 1 job.py", "run.json cannot be read", files={"cut/run.json": "{"}),
    Row("--run ./old --procs 1 job.py", "another version of launch", files={"old/run.json": RUN_OF_TOMORROW}),
    Row("show nothing", "there is no run 'nothing'; give a name, a job id or a folder"),
    Row("resume nothing", "there is no run 'nothing'"),
    Row("logs", "Missing argument"),
]  # fmt: skip


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    (folder / "job.py").write_text("print(1)\n")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return folder


@pytest.mark.parametrize("row", ROWS, ids=[f"{n} {row.line}" for n, row in enumerate(ROWS)])
def test_command_lines(row: Row, here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for name, content in row.files.items():
        (here / name).parent.mkdir(exist_ok=True)
        (here / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    before = sorted(here.rglob("*"))
    with pytest.raises(SystemExit) as left:
        cli.main(row.line.split())
    told = capfd.readouterr().err
    assert (left.value.code, row.says in told) == (row.code, True), told
    assert told.startswith("launch: error: ")
    assert "Traceback" not in told
    assert sorted(here.rglob("*")) == before


def test_two_launches_into_one_run_folder(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    spec = LaunchSpec(program=Program("script", "job.py"), cwd=str(here))
    with RunFolder.open(here / "runs" / "night", spec), pytest.raises(SystemExit) as left:
        cli.main(["--run", "night", "--procs", "1", "job.py"])
    told = capfd.readouterr().err
    assert left.value.code == 2
    assert f"run night is being worked on by pid {os.getpid()} on " in told
    assert "wait for it, or cancel it" in told


# ---------------------------------------------------------------------------------------------------- the trainer


class Model(T.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
        self.steps = 0

    def training_step(self, batch: torch.Tensor) -> Any:
        self.steps += 1
        return self.layer(batch).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class WithoutStep(T.Module):
    pass


class WithoutSuper(T.Module):
    def __init__(self) -> None:
        self.rate = 1


class Text(Model):
    def training_step(self, batch: torch.Tensor) -> Any:
        return "loss"


class Vector(Model):
    def training_step(self, batch: torch.Tensor) -> Any:
        self.log("loss", torch.ones(3))
        return super().training_step(batch)


class Nothing(T.DataModule):
    def __init__(self) -> None:  # does not call super().__init__()
        pass


def trainer(**settings: Any) -> T.Trainer:
    defaults = {"max_epochs": 1, "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
                "enable_checkpointing": False}  # fmt: skip
    return T.Trainer(**{**defaults, **settings})


def fit(model: Any = None, data: Any = None, ckpt_path: str | None = None, **settings: Any) -> None:
    trainer(**settings).fit(
        Model() if model is None else model, loader() if data is None else data, ckpt_path=ckpt_path
    )


def loader() -> DataLoader:
    return DataLoader(torch.ones(4, 2), batch_size=2)


def saving(**settings: Any) -> dict[str, Any]:
    return {"enable_checkpointing": True, "callbacks": [ModelCheckpoint(**settings)]}


def damaged_store() -> None:
    store = Store("store")
    store.save({"x": torch.arange(1000)}, step=1)
    (shard,) = Path("store").rglob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    store.load_newest()


def store_of_tomorrow() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainer.checkpoint.manifest.FORMAT", 99)
        Store("later").save({"x": torch.arange(3)}, step=1)
    Store("later").load_newest()


CALLS: list[tuple[str, Callable[[], Any], type[Exception], str]] = [
    ("max_epoch", lambda: trainer(max_epoch=3), wrong.ConfigError, "Trainer has no argument 'max_epoch'. Allowed: "),
    ("position", lambda: T.Trainer(5), wrong.ConfigError, "all arguments are keywords"),
    ("gpus", lambda: trainer(gpus=2), wrong.ConfigError, "accelerator='gpu', devices=N"),
    ("max_epochs", lambda: trainer(max_epochs="5"), wrong.ConfigError, "max_epochs='5' is not allowed. Allowed: "),
    ("max_time", lambda: trainer(max_time="soon"), wrong.ConfigError, "write DD:HH:MM:SS"),
    ("limit", lambda: trainer(limit_train_batches=1.5), wrong.ConfigError, "an int >= 0 (batches) or a float in"),
    ("save_every", lambda: trainer(save_every="often"), wrong.ConfigError, "a time such as '30s'"),
    ("devices", lambda: trainer(devices="two"), wrong.ConfigError, "Allowed: a count, a list of different indices"),
    ("four", lambda: fit(devices=4), wrong.ConfigError, "devices=4 needs 4 processes"),
    ("nodes", lambda: fit(num_nodes=2), wrong.ConfigError, "num_nodes=2 contradicts the launcher"),
    ("strategy", lambda: fit(strategy="dpp"), wrong.ConfigError, "strategy='dpp': one of auto, single, ddp"),
    ("strategy's type", lambda: trainer(strategy=3), wrong.ConfigError, "or a DDP or FSDP object"),
    ("precision", lambda: fit(precision="8-bit"), wrong.ConfigError, "precision='8-bit': one of 32-true"),
    ("accelerator", lambda: fit(accelerator="tpu"), wrong.ConfigError, "cpu, gpu (cuda) and mps are"),
    ("logger", lambda: trainer(logger="tensorboard"), wrong.ConfigError, "a Logger object such as CSVLogger"),
    ("root", lambda: trainer(default_root_dir=5), wrong.ConfigError, "a path or a URL"),
    ("callback", lambda: trainer(callbacks=[EarlyStopping]), wrong.ConfigError, "is not a trainer.Callback"),
    ("mode", lambda: EarlyStopping("loss", mode="up"), wrong.ConfigError, "Allowed: 'min', 'max'"),
    ("monitor", lambda: fit(callbacks=[EarlyStopping("acc")]), wrong.ConfigError, "nothing was logged under that name"),
    ("no step", lambda: fit(WithoutStep()), wrong.ModuleError, "needs WithoutStep.training_step()"),
    ("super", lambda: fit(WithoutSuper()), wrong.ModuleError, "WithoutSuper.__init__ does not call super().__init__()"),
    ("class", lambda: fit(Model), wrong.ModuleError, "it needs a trainer.Module"),
    ("nn.Module", lambda: fit(torch.nn.Linear(1, 1)), wrong.ModuleError, "it needs a trainer.Module"),
    ("loss", lambda: fit(Text()), wrong.ModuleError, "training_step returned str; allowed are a tensor"),
    ("vector", lambda: fit(Vector()), wrong.LoggingError, "tensor of shape (3,); one number is needed"),
    ("no data", lambda: trainer().fit(Model()), wrong.DataError, "There is no train_dataloader: pass a loader"),
    ("empty module", lambda: fit(data=Nothing()), wrong.DataError, "There is no train_dataloader"),
    ("text", lambda: fit(data="data/train"), wrong.DataError, "A str was given as train loader"),
    ("number", lambda: fit(data=5), wrong.DataError, "A int was given as train loader"),
    ("nowhere", lambda: fit(ckpt_path="no.ckpt"), wrong.CheckpointError, "There is no checkpoint at no.ckpt"),
    ("not one", lambda: fit(ckpt_path="job.py"), wrong.CheckpointError, "is not a torch file"),
    ("best", lambda: fit(ckpt_path="best"), wrong.ConfigError, "needs a ModelCheckpoint callback; pass a path"),
    ("protocol", lambda: fit(**saving(dirpath="s4://bucket")), wrong.CheckpointError, "neither a path nor a URL"),
    ("a file's", lambda: fit(**saving(dirpath="job.py/ckpt")), wrong.CheckpointError, "is no folder; give another"),
    ("logs", lambda: fit(logger=True, default_root_dir="/proc/no"), wrong.ConfigError, "lightning_logs cannot"),
    ("load", lambda: load_checkpoint("job.py"), wrong.CheckpointDamagedError, "is not a torch file"),
    ("damage", damaged_store, wrong.CheckpointDamagedError, "rank-00000.safetensors"),
    ("tomorrow", store_of_tomorrow, wrong.CheckpointError, "has checkpoint format 99; this version reads 1. Update"),
    ("object", lambda: Store("s").save({"x": print}, step=1), wrong.CheckpointError, "x"),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("call", "kind", "says"), [c[1:] for c in CALLS], ids=[c[0] for c in CALLS])
def test_calls(call: Callable[[], Any], kind: type[Exception], says: str, here: Path) -> None:
    with pytest.raises(kind) as raised:
        call()
    assert says in str(raised.value)


def test_a_place_that_takes_no_checkpoint_is_found_before_the_first_batch(here: Path) -> None:
    model = Model()
    with pytest.raises(wrong.CheckpointError):
        fit(model, **saving(dirpath="job.py/ckpt"))
    assert model.steps == 0
