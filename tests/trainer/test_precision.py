"""Number formats: by their names, in a step, and through a checkpoint."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from trainer.errors import ConfigError
from trainer.precision import make_precision

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("given", "name"),
    [
        (32, "32-true"),
        ("32", "32-true"),
        ("bf16", "bf16-mixed"),
        (16, "16-mixed"),
        ("64", "64-true"),
        ("bf16-true", "bf16-true"),
    ],
)
def test_names(given, name):
    precision = make_precision(given, CPU)
    assert precision.name == name
    assert precision.plain is (name == "32-true")
    assert (precision.scaler is not None) is (name == "16-mixed")


def test_unknown_names():
    with pytest.raises(ConfigError, match=r"precision='8': one of 32-true, 64-true, 16-mixed.* is possible"):
        make_precision("8", CPU)
    with pytest.raises(ConfigError, match="mps has no double precision"):
        make_precision("64-true", torch.device("mps"))


@pytest.mark.parametrize(
    ("name", "weights", "outputs"),
    [
        ("32-true", torch.float32, torch.float32),
        ("64-true", torch.float64, torch.float64),
        ("bf16-true", torch.bfloat16, torch.bfloat16),
        ("16-true", torch.float16, torch.float16),
        ("bf16-mixed", torch.float32, torch.bfloat16),
        ("16-mixed", torch.float32, torch.float16),
    ],
)
def test_a_step(name, weights, outputs):
    precision = make_precision(name, CPU)
    module = precision.convert_module(nn.Linear(4, 2))
    assert module.weight.dtype == weights
    batch = {"x": torch.ones(3, 4), "ids": torch.arange(3), "names": ["a"]}
    converted = precision.convert_batch(batch)
    assert (converted is batch) is precision.keeps_batches
    assert converted["ids"].dtype == torch.int64
    for _ in range(2):  # the context is entered again for every step
        with precision.context():
            out = module(converted["x"])
            made = torch.zeros(1)
        assert out.dtype == outputs
        assert made.dtype == weights  # so that a step's own tensors fit the weights
        assert torch.get_default_dtype() == torch.float32
    out.float().sum().backward()
    assert module.weight.grad.dtype == weights


def test_the_scaler_skips_overflows_and_goes_on_from_a_checkpoint():
    def train(precision, module, optimizer, factors):
        for factor in factors:
            optimizer.zero_grad()
            with precision.context():
                loss = module(torch.ones(1, 4)).square().mean() * factor
            precision.scaler.scale(loss).backward()
            precision.scaler.step(optimizer)
            precision.scaler.update()

    module = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    precision = make_precision("16-mixed", CPU)
    before = module.weight.detach().clone()
    train(precision, module, optimizer, [float("inf")])
    assert torch.equal(module.weight, before)
    assert precision.state_dict()["scale"] == 32768
    resumed = make_precision("16-mixed", CPU)
    resumed.load_state_dict(precision.state_dict())
    assert resumed.scaler.get_scale() == 32768
    plain = make_precision("32", CPU)
    assert plain.state_dict() == {}
    plain.load_state_dict({})
