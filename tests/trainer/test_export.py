"""Modules as ONNX, TorchScript and exported programs, before and after training."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

from trainer import Module
from trainer.errors import ConfigError, ModuleError


class Net(Module):
    def __init__(self):
        super().__init__()
        self.save_hyperparameters()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 1))
        self.example_input_array = torch.randn(2, 4)

    def forward(self, x):
        return self.layers(x)

    def training_step(self, batch, batch_idx):
        loss = self(batch[0]).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def trained(quiet, data):
    model = Net()
    quiet(max_epochs=1).fit(model, data())
    return model


# A process of its own: the exporter leaves threads and warnings, and onnxruntime has its own pool.
ONNX = """
import sys, torch, numpy, onnxruntime
sys.path.insert(0, sys.argv[2])
from test_export import Net
model = Net().train()
batch = torch.export.Dim("batch")
model.to_onnx(sys.argv[1] + "/model.onnx", torch.randn(3, 4), input_names=["x"], dynamic_shapes={"x": {0: batch}})
assert model.training and model.layers.training
session = onnxruntime.InferenceSession(sys.argv[1] + "/model.onnx")
x = torch.randn(5, 4)
[found] = session.run(None, {session.get_inputs()[0].name: x.numpy()})
numpy.testing.assert_allclose(found, model.eval()(x).detach().numpy(), rtol=1e-4, atol=1e-6)
print("same")
"""


@pytest.mark.soak
def test_to_onnx_gives_what_onnxruntime_computes(tmp_path, request):
    for package in ("onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ONNX, str(tmp_path), str(request.path.parent)],
        capture_output=True, text=True, timeout=110, check=False,
        env=os.environ | {"TMPDIR": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "same"


@pytest.mark.parametrize("method", ["script", "trace"])
def test_to_torchscript_runs_without_us(trained, tmp_path, method):
    trained.train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls TorchScript deprecated
        trained.to_torchscript(tmp_path / "model.pt", method=method)
        loaded = torch.jit.load(tmp_path / "model.pt")
    assert trained.layers.training
    assert trained.trainer is not None
    x = torch.randn(3, 4)
    assert torch.equal(loaded(x), trained.eval()(x))


def test_torch_export_takes_a_module_as_it_is(trained):
    x = torch.randn(3, 4)
    program = torch.export.export(trained.eval(), (x,))
    torch.testing.assert_close(program.module()(x), trained(x))


def test_what_cannot_be_exported_is_said(trained):
    trained.example_input_array = None
    with pytest.raises(ModuleError, match="example_input_array"):
        trained.to_torchscript(method="trace")
    with pytest.raises(ConfigError, match="'script', 'trace'"):
        trained.to_torchscript(method="compile")
