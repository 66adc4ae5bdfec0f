"""Seeds and the random state of a process."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch

from trainer.errors import ConfigError
from trainer.seed import chosen_seed, isolate_rng, rng_state, seed_everything, set_rng_state


@pytest.fixture(autouse=True)
def own_state(monkeypatch):
    """seed_everything writes the environment, as Lightning's does."""
    monkeypatch.setenv("PL_GLOBAL_SEED", "")
    monkeypatch.setenv("PL_SEED_WORKERS", "")
    with isolate_rng():
        yield


def draw():
    return random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(3).tolist()


def test_seed_everything(monkeypatch, capsys):
    assert seed_everything(7) == 7
    first = draw()
    assert seed_everything(np.int64(7), verbose=False) == 7
    assert draw() == first
    assert chosen_seed() == 7
    assert seed_everything(8) == 8
    assert draw() != first
    assert capsys.readouterr().err == "Seed set to 7\nSeed set to 8\n"
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    assert seed_everything(None) == 7
    assert draw() == first
    monkeypatch.delenv("PL_GLOBAL_SEED")
    assert chosen_seed() is None
    assert seed_everything() == 0


@pytest.mark.parametrize("seed", [-1, 2**32, 1.5, "3", True])
def test_no_seeds(seed):
    with pytest.raises(ConfigError, match="whole number from 0 to 4294967295"):
        seed_everything(seed)


def test_a_broken_variable(monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "x")
    with pytest.raises(ConfigError, match="PL_GLOBAL_SEED='x'"):
        seed_everything()
    assert chosen_seed() is None


def test_state_comes_back_exactly_from_plain_values(tmp_path):
    random.gauss(0, 1)  # leaves its second value behind
    np.random.randn()
    state = rng_state()
    torch.save(state, tmp_path / "s")
    json.dumps(state["python"])
    first = draw()
    with isolate_rng():
        draw()
        seed_everything(3)
    second = draw()
    set_rng_state(torch.load(tmp_path / "s", weights_only=True))
    assert (draw(), draw()) == (first, second)
