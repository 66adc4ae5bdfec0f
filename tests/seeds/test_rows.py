"""Rows of docs/seeds.md that no other test is about, and that the table itself is right."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import trainer as T
from trainer.errors import ConfigError, ModuleError

REPO = Path(__file__).parents[2]


class Net(T.Module):
    def __init__(self, optimizer=None):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 1)
        self.make = optimizer or (lambda p: torch.optim.SGD(p, lr=0.1))

    def training_step(self, batch, batch_idx):
        return (self.layer(batch[0]) - batch[1]).square().mean()

    def configure_optimizers(self):
        return self.make(self.parameters())


def loader(**options):
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=4, **options)


def quiet(**options):
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return T.Trainer(**({"accelerator": "cpu", "max_epochs": 1} | off | options))


def test_the_table_has_every_row_and_every_test_in_it_exists():
    rows = re.findall(r"^\| (\d+) \|.*\| ([^|]*) \|$", (REPO / "docs" / "seeds.md").read_text(), re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, 71))
    names: dict[str, set[str]] = {}
    for number, tests in rows:
        found = re.findall(r"`([\w/]+\.py)`::(\w+)", tests)
        assert found, f"row {number} names no test"
        for file, name in found:
            if file not in names:
                tree = ast.parse((REPO / "tests" / file).read_text())
                names[file] = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}
            assert name in names[file], f"row {number}: {file} has no {name}"


def test_row_12_the_raw_or_the_wrapped_optimizer():
    seen = []

    class Manual(Net):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            seen.extend([self.optimizers(), self.optimizers(use_pl_optimizer=False)])
            self.manual_backward(super().training_step(batch, batch_idx))
            seen[batch_idx % 2].step()

    trainer = quiet()
    trainer.fit(Manual(), loader())
    assert seen[0].optimizer is seen[1]
    assert all(isinstance(o, torch.optim.SGD) for o in seen)
    assert trainer.global_step == 1  # the raw one's steps are the user's business


def test_row_34_arguments_from_the_environment(monkeypatch):
    monkeypatch.setenv("PL_TRAINER_MAX_EPOCHS", "7")
    monkeypatch.setenv("PL_TRAINER_PRECISION", "bf16-mixed")
    monkeypatch.setenv("PL_TRAINER_ACCUMULATE_GRAD_BATCHES", "3")
    trainer = T.Trainer(logger=False, accumulate_grad_batches=2)
    assert (trainer.max_epochs, trainer.precision, trainer.accumulate_grad_batches) == (7, "bf16-mixed", 2)
    monkeypatch.setenv("PL_TRAINER_MAX_EPOCHS", "many")
    with pytest.raises(ConfigError, match="max_epochs='many'"):
        T.Trainer()


def test_row_34_the_signature_names_every_argument():
    import inspect

    names = inspect.signature(T.Trainer).parameters
    assert len(names) >= 41
    assert {"accelerator", "max_epochs", "enable_autolog_hparams"} <= set(names)
    with pytest.raises(ConfigError, match="all arguments are keywords"):
        T.Trainer("gpu")


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (1, 1),
        ("1", 1),
        (-1, -1),
        ("-1", -1),
        ("auto", "auto"),
        ([1], [1]),
        ((1, 3), [1, 3]),
        ("0,2", [0, 2]),
        ("3,", [3]),
    ],
)
def test_row_44_forms_of_devices(given, meant):
    assert quiet(devices=given).config.devices == meant


@pytest.mark.parametrize("given", [0, -2, [], [0, 0], [-1], "two", "0,x", True, 1.5])
def test_row_44_devices_that_are_none(given):
    with pytest.raises(ConfigError, match="Allowed: a count"):
        quiet(devices=given)


@pytest.mark.parametrize("accelerator", ["tpu", "ipu"])
def test_row_45_and_46_accelerators_that_are_not_supported(accelerator):
    with pytest.raises(ConfigError, match=f"'{accelerator}' is not supported; cpu, gpu"):
        quiet(accelerator=accelerator).fit(Net(), loader())


@pytest.mark.parametrize("hook", ["configure_apex", "init_ddp_connection", "tbptt_split_batch"])
def test_row_60_hooks_that_are_gone(hook):
    model = Net()
    setattr(model, hook, lambda *a: None)
    with pytest.raises(ModuleError, match=f"{hook}.. is never called any more. Today: "):
        quiet().fit(model, loader())


def test_row_64_plugins_are_answered_by_arguments():
    with pytest.raises(ConfigError, match=r"plugins=.*precision="):
        T.Trainer(plugins=[])


@pytest.mark.parametrize(
    "name",
    sorted(
        n for n, o in vars(torch.optim).items()
        if isinstance(o, type) and issubclass(o, torch.optim.Optimizer) and o is not torch.optim.Optimizer
    ),
)  # fmt: skip
def test_row_66_every_optimizer_of_torch(name):
    if name == "Muon":  # of matrices only
        make = lambda p: torch.optim.Muon([q for q in p if q.ndim == 2])  # noqa: E731
    elif name == "SparseAdam":
        pytest.skip("of sparse gradients only")
    else:
        make = getattr(torch.optim, name)
    model = Net(make)
    before = model.layer.weight.detach().clone()
    quiet().fit(model, loader())
    assert not torch.equal(model.layer.weight, before)


def test_row_68_a_seed_makes_runs_equal(monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "")
    monkeypatch.setenv("PL_SEED_WORKERS", "")

    def run(seed):
        T.seed_everything(seed, verbose=False)
        model = Net()
        model.layer = nn.Linear(4, 1)
        quiet(deterministic=True, max_epochs=2).fit(model, loader(shuffle=True))
        return model.layer.weight.detach()

    try:
        first = run(3)
        assert torch.equal(first, run(3))
        assert not torch.equal(first, run(4))
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


NOTEBOOK = """
import nbformat, sys
from nbclient import NotebookClient
cells = [nbformat.v4.new_code_cell(c) for c in (
    "import torch, trainer as T\\nfrom torch.utils.data import DataLoader, TensorDataset",
    "class Net(T.Module):\\n"
    "    def __init__(self):\\n        super().__init__()\\n        self.layer = torch.nn.Linear(2, 1)\\n"
    "    def training_step(self, batch, batch_idx):\\n"
    "        loss = self.layer(batch[0]).square().mean()\\n"
    "        self.log('loss', loss, prog_bar=True)\\n        return loss\\n"
    "    def configure_optimizers(self):\\n        return torch.optim.SGD(self.parameters(), lr=0.1)",
    "model = Net()\\ndata = DataLoader(TensorDataset(torch.ones(8, 2)))\\n"
    "trainer = T.Trainer(accelerator='cpu', max_epochs=2)\\ntrainer.fit(model, data)\\ntrainer.global_step",
    "T.Trainer(accelerator='cpu', max_epochs=1, logger=False).fit(model, data)",
    "try:\\n    T.Trainer(accelerator='cpu', devices=2).fit(model, data)\\n"
    "except Exception as error:\\n    print(error)",
    "import launcher\\ndef train(epochs):\\n    model = Net()\\n"
    "    trainer = T.Trainer(accelerator='cpu', max_epochs=epochs, enable_progress_bar=False)\\n"
    "    trainer.fit(model, data)\\n    return trainer.world_size, trainer.global_step, model.layer.weight.tolist()\\n"
    "first, second = launcher.launch(train, 3, procs=2, run='two')\\nassert first == second\\nfirst[:2]",
)]
notebook = nbformat.v4.new_notebook(cells=cells)
NotebookClient(notebook, timeout=90, kernel_name="python3").execute()
print(notebook.cells[2].outputs[-1].data["text/plain"])
print(notebook.cells[4].outputs[-1].text)
print("".join(o.get("text", "") for o in notebook.cells[5].outputs), notebook.cells[5].outputs[-1].data["text/plain"])
"""


@pytest.mark.slow
def test_row_69_a_notebook(tmp_path):
    pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", NOTEBOOK], cwd=tmp_path, capture_output=True, text=True, timeout=110,
        check=False,
        env=os.environ | {
            "TMPDIR": str(tmp_path), "IPYTHONDIR": str(tmp_path / "ipython"),
            "JUPYTER_RUNTIME_DIR": str(tmp_path / "rt"), "PYTHONPATH": str(REPO), "HOME": str(tmp_path),
        },
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    steps, error = done.stdout.split("\n", 1)
    assert steps == "16"
    assert "devices=2 needs 2 processes" in error
    assert "fit ends: max_epochs=3 reached." in error  # what rank 0 said
    assert error.endswith("(2, 12)\n")
