import copy
import pickle

import pytest
import torch
from torch import nn

from trainer.errors import ConfigError
from trainer.recompute import recompute


class Block(nn.Module):
    calls = 0

    def __init__(self):
        super().__init__()
        self.linear, self.drop = nn.Linear(5, 5), nn.Dropout(0.5)

    def forward(self, x, *, scale=1.0):
        Block.calls += 1
        return x + self.drop(torch.tanh(self.linear(x))) * scale


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x):
        for block in self.blocks:
            x = block(x, scale=0.5)
        return x.sum()


def gradients(model):
    torch.manual_seed(8)
    model.zero_grad()
    Block.calls = 0
    model(torch.ones(2, 5)).backward()
    return [p.grad.clone() for p in model.parameters()], Block.calls


def test_layers_run_again_in_backward_with_equal_gradients_and_names():
    torch.manual_seed(1)
    model = Model()
    expected, calls = gradients(model)
    assert calls == 3
    names = list(model.state_dict())
    assert recompute(model, Block) == 3
    found, calls = gradients(model)
    assert calls == 6
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert list(model.state_dict()) == names
    assert isinstance(model.blocks[0], Block)
    with torch.no_grad():
        gradients_off = Block.calls
        model(torch.ones(1, 5))
        assert Block.calls == gradients_off + 3
    assert recompute(model, Block) == 3
    assert gradients(model)[1] == 6  # twice is once


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_recompute_their_own_layers(duplicate):
    torch.manual_seed(1)
    model = Model()
    recompute(model, lambda layer: isinstance(layer, Block))
    twin = duplicate(model)
    expected, _ = gradients(model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    found, calls = gradients(twin)
    assert calls == 6
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_no_such_layer_is_an_error_that_names_those_there_are():
    with pytest.raises(ConfigError, match="It has: Block, Dropout, Linear, ModuleList"):
        recompute(Model(), nn.Conv2d)
