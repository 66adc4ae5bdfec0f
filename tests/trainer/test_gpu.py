"""What a GPU must show: the speed of a loop written by hand, no wait in the step, a save that costs its copy, AMP.

The figures are printed: `make gpu` shows them. The benchmark itself is tried on the CPU, at a size that says nothing.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from argparse import Namespace

import pytest
import torch

from tests.conftest import REPO
from trainer import Guard

CUDA = torch.device("cuda")
SMALL = Namespace(size="1M", context=16, batch_size=1, steps=2)
LARGE = Namespace(size="350M", context=1024, batch_size=16, steps=30)


@pytest.fixture
def gpu(monkeypatch):
    """benchmarks/gpu.py as a module."""
    monkeypatch.syspath_prepend(str(REPO / "benchmarks"))
    spec = importlib.util.spec_from_file_location("gpu_benchmark", REPO / "benchmarks" / "gpu.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.modules.pop("facts", None)


def show(capsys, **found):
    with capsys.disabled():
        print("\n" + json.dumps(found))


@pytest.mark.soak
def test_the_benchmark_itself_on_the_cpu(gpu, tmp_path):
    cpu = torch.device("cpu")
    ways = {
        "by hand": lambda m, d: gpu.by_hand(m, d, compiled=False),
        "ours": lambda m, d: gpu.ours(m, d, compiled=False),
    }
    found = gpu.speed(SMALL, cpu, ways, 1)
    assert all(way["tokens/s"] > 0 and way["MFU"] is None for way in found.values())
    waits = gpu.syncs(SMALL, cpu)
    # A value on the CPU is read at once where it is logged, which by hand nothing is; all else is the same.
    assert waits["ours"]["aten::_local_scalar_dense"] - waits["by hand"]["aten::_local_scalar_dense"] == 10, waits
    stall = gpu.stall(0.01, cpu, str(tmp_path))
    assert stall["stall s"] > 0
    assert {f.name for f in tmp_path.glob("*.ckpt")} == {"0.ckpt", "1.ckpt"}


@pytest.mark.gpu
@pytest.mark.timeout(1800)
def test_tokens_per_second_are_those_of_a_loop_written_by_hand(gpu, capsys):
    torch.set_float32_matmul_precision("high")
    ways = {
        "by hand": lambda m, d: gpu.by_hand(m, d, compiled=True),
        "ours": lambda m, d: gpu.ours(m, d, compiled=True),
    }
    if importlib.util.find_spec("lightning") is not None:
        ways["Fabric"] = lambda m, d: gpu.fabric(m, d, compiled=True)
    found = gpu.speed(LARGE, CUDA, ways, 3)
    show(capsys, speed=found)
    assert found["ours"]["tokens/s"] > 0.99 * found["by hand"]["tokens/s"], found


@pytest.mark.gpu
@pytest.mark.timeout(600)
def test_no_step_waits_for_the_gpu(gpu, capsys):
    found = gpu.syncs(Namespace(size="10M", context=256, batch_size=8), CUDA)
    show(capsys, syncs=found)
    assert found["ours"] == found["by hand"], found


@pytest.mark.gpu
@pytest.mark.timeout(600)
def test_a_save_costs_its_copy(gpu, capsys, tmp_path):
    found = gpu.stall(8.0, CUDA, str(tmp_path))
    show(capsys, stall=found)
    assert found["stall s"] < 1.5 * found["copy s"] + 0.1, found


@pytest.mark.gpu
@pytest.mark.timeout(600)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed", "bf16-true"])
def test_number_formats_train(gpu, capsys, precision):
    model = gpu.model_of("1M", 128, 8, CUDA)
    data = gpu.Batches(128, 8, 30, CUDA)
    with torch.no_grad():
        before = float(model.loss(data.batch))
    trainer = gpu.ours(model, data, compiled=False, precision=precision)
    after = float(trainer.callback_metrics["train_loss"])
    show(capsys, precision=precision, loss=[before, after])
    assert after < before


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True, {"mode": "reduce-overhead"}])
@pytest.mark.timeout(600)
def test_a_guarded_run_leaves_a_batch_out_and_nothing_else(boring, data, quiet, compiled):
    """The norm of a step is read one step later; what followed the guilty one is undone with it."""

    def train(bad, skip):
        torch.manual_seed(1)
        batches = list(data(160, 4))
        if bad is not None:
            batches[bad][1][0] = float("nan")
        module = boring()
        loader = torch.utils.data.DataLoader([b for i, b in enumerate(batches) if i != skip], batch_size=None)
        arguments = {"accelerator": "gpu", "max_epochs": 1, "gradient_clip_val": 1.0, "compile": compiled}
        quiet(**arguments, guard=Guard(snapshot_every=10) if bad is not None else False).fit(module, loader)
        return module.layer.weight.detach().cpu()

    with pytest.warns(UserWarning, match="guard: the gradients of step 24"):
        found = train(23, None)
    assert torch.equal(found, train(None, 23))
