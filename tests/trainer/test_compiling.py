"""torch.compile: around the step or around units, counted, and never seen in a checkpoint."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from trainer.errors import ConfigError
from trainer.optimizers import unwrap

EAGER = {"backend": "aot_eager"}


@pytest.fixture(autouse=True)
def nothing_compiled():
    """No test finds what another one compiled."""
    torch._dynamo.reset()


@pytest.mark.slow
def test_trains_as_it_does_uncompiled(boring, data, quiet, capsys):
    ends = []
    for given in (False, EAGER, EAGER | {"blocks": nn.Linear}):
        torch.manual_seed(1)
        module = boring()
        trainer = quiet(compile=given, max_epochs=2)
        trainer.fit(module, data(10, 4), data(4, 4))
        ends.append({k: v.clone() for k, v in module.state_dict().items()})
        assert list(ends[-1]) == ["layer.weight", "layer.bias"]
        assert trainer.callback_metrics.keys() >= {"loss", "val_loss"}
        if given is EAGER:
            # A whole batch, and the last one of the epoch, which is smaller.
            assert trainer.compiling.compiled >= 2
            assert trainer.compiling.recompiled == 1
            assert trainer.compiling.seconds > 0
            assert trainer.compiling.first_step_s > 0
        assert module.layer._compiled_call_impl is None
    for end in ends[1:]:
        for name, value in ends[0].items():
            torch.testing.assert_close(end[name], value)
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("compile: ")]
    assert len(told) == 2
    assert "the first step took" in told[0]


@pytest.mark.slow
def test_numbers_that_change_and_metrics_do_not_compile_anew(boring, data, quiet):
    torchmetrics = pytest.importorskip("torchmetrics")

    class Counting(boring):
        def __init__(self):
            super().__init__()
            self.mean = torchmetrics.MeanMetric()

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if batch_idx % 7 == 3:
                loss = loss * 2
            self.mean(loss.detach())
            self.log("mean", self.mean, on_step=True)
            return loss

    module, trainer = Counting(), quiet(compile=EAGER, max_epochs=1)
    trainer.fit(module, data(80, 4))
    assert trainer.compiling.recompiled == 1  # the other branch
    assert module.mean._update_count == 20
    assert "compiler" not in str(type(module).log) + str(torchmetrics.MeanMetric.update)
    assert torch.compiler.config.dynamic_sources == ""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:torch.compile has compiled")
def test_every_shape_is_compiled(boring, quiet):
    """Also the ninth, at which torch would give up: a resumed run, which meets others first, computes the same."""
    ran = []

    def backend(graph, inputs):
        def compiled(*args):
            ran.append(args)
            return graph(*args)

        return compiled

    class Lengths(boring):
        def training_step(self, batch, batch_idx):
            return self.layer(batch).square().mean()

    batches = DataLoader([torch.randn(n, 4) for n in range(2, 14)] * 2, batch_size=None)
    limit = torch._dynamo.config.recompile_limit
    trainer = quiet(compile={"backend": backend}, max_epochs=1)
    trainer.fit(Lengths(), batches)
    assert len(ran) == 24
    assert trainer.compiling.recompiled == 11
    assert torch._dynamo.config.recompile_limit == limit


@pytest.mark.slow
def test_what_keeps_being_compiled_is_told(boring, quiet):
    """A batch of another length each time, each compiled for itself."""

    class Lengths(boring):
        def training_step(self, batch, batch_idx):
            return self.layer(batch).square().mean()

    batches = DataLoader([torch.randn(n, 4) for n in range(2, 9)], batch_size=None)
    with pytest.warns(UserWarning, match="has compiled training_step .* 5 times, and goes on with.*size mismatch"):
        quiet(compile=EAGER, max_epochs=1).fit(Lengths(), batches)
    trainer = quiet(compile=EAGER | {"dynamic": True}, max_epochs=1)
    trainer.fit(Lengths(), batches)
    assert trainer.compiling.recompiled <= 1


def test_manual_optimization_compiles_the_children(boring, data, quiet):
    class Manual(boring):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            unwrap(optimizer)
            optimizer.step()

    trainer = quiet(compile=EAGER | {"fullgraph": True}, max_epochs=1)
    trainer.fit(Manual(), data(16, 4))
    assert trainer.compiling.compiled == 1
    assert trainer.global_step == 4


def test_goes_on_compiled_or_not(boring, data, quiet, tmp_path):
    ends = []
    for first, then in ((False, False), (EAGER, False), (False, EAGER)):
        torch.manual_seed(1)
        trainer = quiet(compile=first, max_steps=3)
        trainer.fit(boring(), data())
        trainer.save_checkpoint(tmp_path / "half.ckpt")
        assert list(torch.load(tmp_path / "half.ckpt")["state_dict"]) == ["layer.weight", "layer.bias"]
        module = boring()
        quiet(compile=then, max_steps=6).fit(module, data(), ckpt_path=tmp_path / "half.ckpt")
        ends.append(module.layer.weight.detach().clone())
    torch.testing.assert_close(ends[1], ends[0])
    torch.testing.assert_close(ends[2], ends[0])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("yes", r"Allowed: True, False, or a dict with keys of backend, mode, options, dynamic, fullgraph, blocks"),
        ({"full_graph": True}, "Allowed: True, False, or a dict with keys"),
        ({"backend": "inductr"}, "torch has .*inductor"),
        ({"mode": "fast"}, "one of default, .*reduce-overhead"),
        ({"mode": "default", "options": {}}, "give one of them"),
        ({"blocks": "Block"}, "a class of layers"),
    ],
)
def test_what_cannot_be_compiled(quiet, given, message):
    with pytest.raises(ConfigError, match=message):
        quiet(compile=given)


def test_contradictions(boring, data, quiet):
    with pytest.raises(ConfigError, match=r"virtual_ranks=2 and compile=.* contradict"):
        quiet(compile=True, virtual_ranks=2)
    with pytest.raises(ConfigError, match=r"Boring has no such layer. It has: Linear"):
        quiet(compile={"blocks": nn.Conv2d}, max_steps=1).fit(boring(), data())


@pytest.mark.slow
def test_on_ranks(gang):
    """DDP's buckets and FSDP2's units, compiled: as uncompiled, with the same names."""
    for rank in gang.ok(2, "compiled_ranks.py", timeout=110):
        assert rank.stdout == "alike ddp\nalike fsdp\n"


@pytest.mark.soak  # the first use of a compiler takes a minute
@pytest.mark.timeout(300)
def test_code_for_the_cpu_goes_on_to_the_bit(gang):
    """Compiled by the inductor, with dropout and a last smaller batch: broken off and resumed as if nothing was."""
    assert gang.ok(1, "compiled_resume.py", timeout=280)[0].stdout == "the same\n"
