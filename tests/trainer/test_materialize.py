import pytest
import torch
from torch import nn

from trainer.errors import ModuleError
from trainer.materialize import is_meta, materialize

CPU = torch.device("cpu")


class Rotary(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("cosines", torch.empty(4), persistent=False)
        self.reset_parameters()

    def reset_parameters(self):
        self.cosines.copy_(torch.arange(4.0).cos())


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.linear, self.rotary = nn.LayerNorm(4), nn.Linear(4, 4), Rotary()
        self.bn = nn.BatchNorm1d(4)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight


class Scaled(Model):
    def _init_weights(self, layer):
        if isinstance(layer, nn.Linear):
            nn.init.constant_(layer.weight, 7.0)


def made(kind=Model):
    with torch.device("meta"):
        return kind()


def test_every_layer_gets_its_memory_and_weights():
    model = made()
    assert is_meta(model)
    state = torch.get_rng_state()
    materialize(model, CPU, seed=1)
    assert not is_meta(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.head.weight is model.embedding.weight
    assert model.embedding.weight.requires_grad
    assert torch.equal(model.blocks[0].norm.weight, torch.ones(4))
    assert torch.equal(model.blocks[2].rotary.cosines, torch.arange(4.0).cos())
    assert model.blocks[1].bn.num_batches_tracked == 0
    assert not torch.equal(model.blocks[0].linear.weight, model.blocks[1].linear.weight)
    assert model.blocks[0].linear.weight.abs().max() <= 0.5  # what nn.Linear(4, 4) draws
    assert set(model.state_dict()) == set(Model().state_dict())


def test_weights_depend_on_seed_and_name_and_not_on_the_order():
    whole, parts, other = made(), made(), made()
    materialize(whole, CPU, seed=1)
    for block in reversed(parts.blocks):
        materialize(parts, CPU, seed=1, part=block)
    assert is_meta(parts)
    materialize(parts, CPU, seed=1)
    materialize(other, CPU, seed=2)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, parts.state_dict()[name]), name
    assert not torch.equal(whole.embedding.weight, other.embedding.weight)


def test_a_module_above_may_change_what_layers_draw():
    model = made(Scaled)
    materialize(model, CPU, seed=1)
    assert (model.blocks[0].linear.weight == 7).all()
    assert torch.equal(model.blocks[0].norm.weight, torch.ones(4))


def test_what_exists_already_is_left_alone():
    model = Model()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    materialize(model, CPU, seed=1)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("helper", [False, True])
def test_a_layer_that_nothing_fills_is_named(helper):
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(3))

    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.ModuleDict({"bare": Bare()})

    if helper:
        Holder._init_weights = Scaled._init_weights
    with pytest.raises(ModuleError, match=r"inner\.bare \(Bare\) is on the meta device, and nothing fills"):
        materialize(made(Holder), CPU, seed=1)
