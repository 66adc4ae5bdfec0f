"""The proof of exact resume: scripts that resume exactly pass, leaks are named, what cannot be named is no success."""

from __future__ import annotations

import collections
import functools
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import trainer as T
from tests.soak.table import keep
from trainer import prove_resume
from trainer.errors import ConfigError, TrainerError
from trainer.fingerprint import fingerprint
from trainer.prove import Difference, _compare

LEAKS = Path(__file__).resolve().parents[1] / "programs" / "leaks.py"
# What names the cause of each leak; None: it cannot be seen, and must be reported as unknown.
NAMED = {
    "callback": "callback Warmup.count",
    "dataset attribute": "training loader.dataset.drawn",
    "dataset generator": "training loader.dataset.generator",
    "global random in a transform": "global jitter",
    "hidden iterator": None,
    "buffer that is not saved": "model.running",
    "attribute of the module": "model.factor",
    "global variable": "global table['calls']",
    "attempt": None,
    "scheduler that is not returned": "model.mine.last_epoch",
}


def drill(*arguments):
    command = [sys.executable, "-c", "import sys; from launcher.cli import main; sys.exit(main())", "drill", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_script_that_resumes_exactly_passes(tmp_path):
    done = drill("--kills", "1", "--stops", "0", "--folder", str(tmp_path / "runs"), str(LEAKS), "none")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("1 of 1 disturbed runs came out like the undisturbed one.")
    assert (tmp_path / "runs" / "trial-0-0" / "checkpoints").exists()


@pytest.mark.soak
@pytest.mark.timeout(300)
def test_a_leak_is_named():
    proof = prove_resume(LEAKS, ["callback"], kills=0, stops=1)
    assert not proof.exact
    (trial,) = proof.trials
    assert trial.difference is not None
    assert NAMED["callback"] in trial.difference.states
    assert f"the first state that differs is {NAMED['callback']}" in str(proof)


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("workers", ["0", "2"])
def test_every_leak_is_named_or_unknown(workers):
    began, named, unknown = time.monotonic(), 0, 0
    assert prove_resume(LEAKS, ["none", workers], kills=2, stops=2).exact
    for leak, cause in NAMED.items():
        proof = prove_resume(LEAKS, [leak, workers], kills=1, stops=1)
        # State of a dataset lives in the loader's workers, if there are any. They begin each epoch (of 10 batches) with
        # the dataset as it was made: a run that went on at an epoch's edge has lost nothing.
        hidden = workers != "0" and ("dataset" in leak or "transform" in leak)
        trials = [t for t in proof.trials if not (hidden and t.exact and t.resumed_at % 10 == 0)]
        # Killed before anything was saved, it began anew.
        trials = [t for t in trials if not (t.exact and t.resumed_at == 0)]
        assert not any(trial.exact for trial in trials), f"{leak}: {proof}"
        if cause is None or hidden:
            assert all("unknown cause" in str(trial) for trial in trials), str(proof)
            unknown += 1
        else:
            assert all(cause in trial.difference.states[:2] for trial in trials), str(proof)
            named += 1
    proof = prove_resume(LEAKS, ["time", workers], kills=1, stops=0)
    assert proof.irreproducible is not None
    keep("drill", f"leaks, {workers} loader workers", time.monotonic() - began,
         named=named, unknown=unknown, passed=0)  # fmt: skip


# ------------------------------------------------------------------------------------------------ what can be seen

table = {"calls": 0}
outside = nn.Linear(2, 2)


class Settings:
    best = 0.0


def with_default(calls=[0]):  # noqa: B006 - that is the leak
    calls[0] += 1


def counted():
    counted.calls = getattr(counted, "calls", 0) + 1


@functools.lru_cache
def kept(n):
    return n


def numbers():
    n = 0
    while True:
        n += 1
        yield n


class Teacher:
    __slots__ = ("momentum",)

    def __init__(self):
        self.momentum = {}


class Data(Dataset):
    def __init__(self):
        self.rng, self.old, self.order = np.random.default_rng(), np.random.RandomState(1), list(range(300))
        self.large = torch.zeros(1 << 19)

    def __len__(self):
        return 8

    def __getitem__(self, i):
        return torch.ones(4)


class Model(T.Module):
    def __init__(self):
        super().__init__()
        self.net, self.teacher, self.recent = nn.Linear(4, 1), Teacher(), collections.deque(maxlen=3)
        self.register_buffer("running", torch.zeros(()), persistent=False)

    def training_step(self, batch, index):
        return self.net(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class History(T.Callback):
    def __init__(self):
        self.losses, self.random, self.numbers = [], random.Random(3), numbers()
        self.place = iter([1, 2, 3])


def collate():
    seen = [0]

    def stack(samples):
        return torch.stack(samples)

    def count():
        seen[0] += 1

    stack.count = count
    return stack


class Looks(T.Callback):
    """Changes one piece of state after another, and looks at what its hash says."""

    def on_train_batch_start(self, trainer, module, batch, index):
        if index:
            return
        history, data, loader = trainer.callbacks[0], trainer.data.raw("train").dataset, trainer.data.raw("train")
        changes = {
            "random numbers of python": random.random,
            "random numbers of numpy": np.random.rand,
            "random numbers of torch": lambda: torch.rand(1),
            "weight net.bias": lambda: module.net.bias.data.add_(1),
            "model.running": lambda: module.running.add_(1),
            "model.teacher.momentum": lambda: module.teacher.momentum.update(w=torch.ones(2)),
            "model.recent": lambda: module.recent.append(1.5),
            "optimizer 0 (SGD) group 0['lr']": lambda: trainer.optimizers[0].param_groups[0].update(lr=0.2),
            "callback History.losses": lambda: history.losses.append(1.0),
            "callback History.random": history.random.random,
            "callback History.numbers": lambda: next(history.numbers),
            "callback History.place": lambda: next(history.place),
            "training loader.dataset.rng": data.rng.normal,
            "training loader.dataset.old": data.old.rand,
            "training loader.dataset.order": lambda: data.order.reverse(),
            "training loader.dataset.large": lambda: data.large[-1].add_(1),
            "training loader.collate_fn.count (its variable seen)": loader.collate_fn.count,
            f"{__name__} table['calls']": lambda: table.update(calls=1),
            f"{__name__} outside.bias": lambda: outside.bias.data.add_(1),
            f"{__name__} Settings.best": lambda: setattr(Settings, "best", 1.0),
            f"{__name__} with_default": with_default,
            f"{__name__} counted": counted,
            f"{__name__} kept": lambda: kept(1),
        }
        before = fingerprint(trainer, batch)
        assert fingerprint(trainer, batch) == before
        for name, change in changes.items():
            change()
            after = fingerprint(trainer, batch)
            changed = {n for n in {**before, **after} if before.get(n) != after.get(n)}
            assert changed, name
            assert all(n.startswith(name) for n in changed), (name, changed)
            before = after


class InFolder(T.Callback):
    def __init__(self, folder):
        self.folder, self.best = Path(folder), {f"{folder}/a.ckpt": 1.0}

    def on_train_batch_start(self, trainer, module, batch, index):
        self.seen = fingerprint(trainer, batch)


def test_the_path_of_the_run_folder_says_nothing(quiet, monkeypatch):
    seen = []
    for folder in ("/runs/one", "/runs/two"):
        monkeypatch.setenv("LAUNCH_RUN_DIR", folder)
        torch.manual_seed(1)
        callback = InFolder(folder)
        data = Data()
        data.rng = None
        quiet(max_epochs=1, fast_dev_run=True, callbacks=[callback]).fit(Model(), DataLoader(data, 4))
        seen.append({name: found for name, found in callback.seen.items() if name.startswith("callback")})
    assert seen[0] == seen[1]
    assert "callback InFolder.best['/a.ckpt']" in seen[0]


def test_what_a_script_may_hold_is_seen_and_called_by_its_name(quiet):
    loader = DataLoader(Data(), 4, collate_fn=collate())
    quiet(max_epochs=1, callbacks=[History(), Looks()]).fit(Model(), loader)


# ------------------------------------------------------------------------------------------------ what is said


def test_without_another_state_that_differs_the_cause_is_unknown():
    whole = {(0, 0, n, False): {"batch[0]": "a", "weight w": "a", "model.x": "a", "global t": "a"} for n in range(3)}
    events = {at: dict(state) for at, state in list(whole.items())[1:]}
    assert _compare(0, whole, events, frozenset(), resumed=True) is None
    events[0, 0, 2, False]["batch[0]"] = events[0, 0, 2, False]["global t"] = "b"
    found = _compare(0, whole, events, frozenset({"global t"}), resumed=True)
    assert found == Difference(0, 2, ("batch[0]",), ())
    assert "unknown cause" in str(found)
    assert "with num_workers=0 they can" in str(found)
    events[0, 0, 1, False]["model.x"] = "b"
    found = _compare(0, whole, events, frozenset({"global t"}), resumed=True)
    assert found is not None
    assert "the first state that differs is model.x. Then: batch[0]" in str(found)


def test_bad_arguments(tmp_path):
    with pytest.raises(ConfigError, match="there is no such script"):
        prove_resume(tmp_path / "none.py")
    for arguments in ({"ranks": 0}, {"kills": -1}, {"kills": 0, "stops": 0}):
        with pytest.raises(ConfigError, match="at least"):
            prove_resume(LEAKS, **arguments)
    (tmp_path / "old").touch()
    with pytest.raises(ConfigError, match="is not empty"):
        prove_resume(LEAKS, folder=tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_script_that_fails_or_trains_nothing_is_told(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("print('nothing')")
    with pytest.raises(TrainerError, match=r"fewer than two batches with trainer\.Trainer"):
        prove_resume(script)
    script.write_text("raise KeyError('mine')")
    done = drill(str(script))
    assert done.returncode == 2
    assert "The undisturbed script failed with exit code 1" in done.stderr
    assert "KeyError: 'mine'" in done.stderr
