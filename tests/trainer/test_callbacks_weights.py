"""Callbacks that freeze and prune weights during training."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader, TensorDataset

from trainer import Module
from trainer.callbacks import BackboneFinetuning, BaseFinetuning, Callback, ModelCheckpoint, ModelPruning
from trainer.errors import ConfigError


class Net(Module):
    def __init__(self, trained_only=True):
        super().__init__()
        torch.manual_seed(1)
        self.backbone = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
        self.head = nn.Linear(4, 1)
        self.trained_only = trained_only

    def training_step(self, batch, batch_idx):
        return (self.head(self.backbone(batch[0])) - batch[0].sum(1, keepdim=True)).square().mean()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        parameters = [p for p in self.parameters() if p.requires_grad or not self.trained_only]
        return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def loader():
    x = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x), batch_size=4)


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


class Rates(Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 0:
            self.seen.append([group["lr"] for group in trainer.optimizers[0].param_groups])


def test_backbone_is_frozen_then_trained_with_a_growing_rate(quiet):
    model, rates = Net(), Rates()
    before = weights(model)
    finetuning = BackboneFinetuning(1, lambda epoch: 3.0, train_bn=False, verbose=True)
    trainer = quiet(max_epochs=1, callbacks=[finetuning])
    trainer.fit(model, loader())
    after = weights(model)
    assert {n for n in before if not torch.equal(before[n], after[n])} == {"head.weight", "head.bias"}

    quiet(max_epochs=5, callbacks=[BackboneFinetuning(1, lambda epoch: 3.0, train_bn=False), rates]).fit(
        model, loader()
    )
    assert rates.seen == [[0.05], *([0.05, pytest.approx(v)] for v in (0.005, 0.015, 0.045, 0.05))]
    after = weights(model)
    # The bias before a BatchNorm has no effect, and so no gradient; with train_bn=False the BatchNorm stays as it is.
    trained = {"backbone.0.weight", "backbone.2.weight", "backbone.2.bias", "head.weight", "head.bias"}
    assert all(not torch.equal(before[n], after[n]) for n in trained)


class Stepwise(BaseFinetuning):
    """Unfreezes one layer after the other, from the back."""

    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.backbone, train_bn=False)

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch in (1, 2):
            self.unfreeze_and_add_param_group(pl_module.backbone[2 if epoch == 1 else 0], optimizer)


@pytest.mark.parametrize("kind", ["finetuning", "pruning"])
def test_a_resumed_run_goes_on_exactly(quiet, tmp_path, kind):
    def run(epochs, folder, **options):
        model = Net(trained_only=kind == "finetuning")
        callback = Stepwise() if kind == "finetuning" else ModelPruning("l1_unstructured", amount=0.3)
        saving = ModelCheckpoint(tmp_path / folder, filename="{epoch}", save_top_k=-1)
        trainer = quiet(max_epochs=epochs, callbacks=[callback, saving], enable_checkpointing=True)
        trainer.fit(model, loader(), **options)
        return trainer, model

    _, whole = run(4, "whole")
    run(2, "parts")
    trainer, parts = run(4, "parts", ckpt_path=tmp_path / "parts" / "epoch=1.ckpt")
    assert trainer.global_step == 12
    assert_same(weights(parts), weights(whole))
    files = [torch.load(tmp_path / f / "epoch=3.ckpt", weights_only=True) for f in ("whole", "parts")]
    assert_same(files[0]["state_dict"], files[1]["state_dict"])


def zeros(model, *names):
    return sum(int((model.get_parameter(n) == 0).sum()) for n in names)


@pytest.mark.parametrize("lottery", [False, True])
def test_pruning_zeroes_the_smallest_and_keeps_them_so(quiet, capfd, lottery):
    model = Net(trained_only=False)
    first, names = weights(model), ("backbone.0.weight", "backbone.2.weight", "head.weight")
    pruning = ModelPruning(
        "l1_unstructured", [(model.backbone[0], "weight"), (model.backbone[2], "weight"), (model.head, "weight")],
        amount=lambda epoch: 0.25 if epoch < 2 else 0, use_lottery_ticket_hypothesis=lottery, verbose=2,
    )  # fmt: skip
    quiet(max_epochs=2 if lottery else 4, callbacks=pruning).fit(model, loader())
    # A quarter of 60, then a quarter of what was left.
    assert zeros(model, *names) == 15 + 11
    assert dict(model.named_parameters()).keys() == {n for n in first if "running" not in n and "num_" not in n}
    assert "0.00% -> 25.00% of 60" in capfd.readouterr().err
    if lottery:
        left = model.head.weight != 0
        assert torch.equal(model.head.weight[left], first["head.weight"][left])


def test_pruning_layer_by_layer_with_a_method_of_ones_own(quiet):
    class Last(prune.BasePruningMethod):
        PRUNING_TYPE = "structured"

        def __init__(self, amount):
            self.amount = amount

        def compute_mask(self, t, default_mask):
            mask = default_mask.clone()
            mask.view(-1)[-self.amount :] = 0
            return mask

    for method, options, count in (
        (Last, {"amount": 3}, 3),
        ("ln_structured", {"amount": 0.5, "pruning_dim": 0, "pruning_norm": 2}, 12),
        ("random_structured", {"amount": 1, "pruning_dim": 1}, 8),
    ):
        model = Net(trained_only=False)
        pruning = ModelPruning(
            method, [(model.backbone[0], "weight")], use_global_unstructured=False, prune_on_train_epoch_end=False,
            make_pruning_permanent=False, **options,
        )  # fmt: skip
        quiet(max_epochs=1, callbacks=pruning, num_sanity_val_steps=1).fit(model, loader(), loader())
        assert int((model.backbone[0].weight_mask == 0).sum()) == count


def test_wrong_arguments_are_refused(quiet):
    for arguments, text in (
        ({"pruning_fn": "l3"}, "l1_unstructured"),
        ({"pruning_fn": "ln_structured", "pruning_dim": 0, "pruning_norm": 1}, "use_global_unstructured=False"),
        ({"pruning_fn": "ln_structured", "use_global_unstructured": False}, "pruning_dim"),
        ({"pruning_fn": "l1_unstructured", "amount": 1.5}, "amount=1.5"),
    ):
        with pytest.raises(ConfigError, match=text):
            ModelPruning(**arguments)
    with pytest.raises(ConfigError, match="not in Net"):
        quiet(max_epochs=1, callbacks=ModelPruning("l1_unstructured", [(nn.Linear(1, 1), "weight")])).fit(
            Net(), loader()
        )
    model = Net()
    del model.backbone
    with pytest.raises(ConfigError, match="backbone"):
        quiet(max_epochs=1, callbacks=BackboneFinetuning()).fit(model, loader())


def test_unfrozen_layers_are_trained_by_all_ranks(gang):
    [alone] = gang.ok(1, "finetuning_ranks.py", "single")
    for rank in gang.ok(2, "finetuning_ranks.py", "ddp", "fsdp"):
        assert rank.stdout == 2 * alone.stdout
