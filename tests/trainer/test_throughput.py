"""Speed as it is told: rates, waiting, communication, FLOPs; and that measuring changes nothing."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import trainer as T
from trainer.callbacks import ThroughputMonitor
from trainer.errors import ConfigError
from trainer.loading import Feed
from trainer.loggers import CSVLogger
from trainer.throughput import PEAKS, Meter, communication_share, compute_dtype, peak_of, short

CPU, CUDA = torch.autograd.DeviceType.CPU, torch.autograd.DeviceType.CUDA


@pytest.mark.parametrize(
    ("name", "dtype", "tera"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 312), ("NVIDIA A100-PCIE-40GB", "tf32", 156), ("NVIDIA A10", "fp16", 125),
        ("NVIDIA H100 80GB HBM3", "bf16", 989.5), ("NVIDIA H100 PCIe", "bf16", 756), ("NVIDIA H100 NVL", "bf16", 835.5),
        ("NVIDIA H200", "bf16", 989.5), ("NVIDIA GH200 480GB", "bf16", 989.5), ("NVIDIA B200", "bf16", 2250),
        ("NVIDIA GB200", "bf16", None),
        ("NVIDIA L40S", "bf16", 362), ("NVIDIA L40", "bf16", 181), ("NVIDIA L4", "fp32", 30.3),
        ("AMD Instinct MI300X", "bf16", 1307.4), ("Tesla V100-SXM2-16GB", "fp16", 125),
        ("Tesla V100-PCIE-16GB", "fp16", 112), ("Tesla V100-SXM2-16GB", "bf16", None), ("NVIDIA A10G", "bf16", None),
        ("NVIDIA H100 80GB HBM3", "fp64", None), ("CPU", "fp32", None),
    ],
)  # fmt: skip
def test_peaks_are_dense_and_by_the_drivers_name(name, dtype, tera):
    assert peak_of(name, dtype) == (None if tera is None else pytest.approx(tera * 1e12))


def test_each_peak_has_its_source_and_halves_with_each_wider_format():
    for peak in PEAKS:
        assert peak.source.startswith("https://")
        assert peak.bf16 in (None, peak.fp16)
        assert peak.tf32 is None or peak.tf32 == pytest.approx(peak.fp16 / 2, rel=0.02)


def test_the_format_in_which_matrices_are_multiplied(monkeypatch):
    formats = [compute_dtype(p) for p in ("bf16-mixed", "bf16-true", "16-mixed", "16-true", "32-true", "64-true")]
    assert formats == ["bf16", "bf16", "fp16", "fp16", "fp32", "fp64"]
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert compute_dtype("32-true") == "tf32"


def test_communication_counts_what_overlaps_once():
    def event(name, start, end, device=CPU):
        return SimpleNamespace(name=name, device_type=device, time_range=SimpleNamespace(start=start, end=end))

    events = [
        event("gloo:all_reduce", 0, 100_000), event("gloo:all_reduce", 50_000, 150_000),
        event("gloo:broadcast", 20_000, 30_000), event("c10d::allreduce_", 150_000, 900_000),
        event("ncclDevKernel_AllReduce_Sum_f32_RING_LL", 200_000, 300_000, CUDA),
        event("nccl:all_reduce", 300_000, 800_000), event("gemm", 0, 900_000, CUDA),
    ]  # fmt: skip
    assert communication_share(events, 1.0) == pytest.approx(0.25)
    assert communication_share([], 1.0) == 0


def test_short_numbers():
    assert [short(n) for n in (3.14159, 999, 1234, 5_678_901, 2e9)] == ["3.14", "999", "1.23k", "5.68M", "2G"]


class Clock:
    """Stands for the module `time`; goes on only when it is told."""

    now = 0.0

    def monotonic(self):
        return self.now

    def monotonic_ns(self):
        return round(self.now * 1e9)

    def __getattr__(self, name):
        import time

        return getattr(time, name)


class Net(T.Module):
    def __init__(self, clock=None):
        super().__init__()
        torch.manual_seed(1)
        self.net, self.clock = torch.nn.Linear(4, 3, bias=False), clock

    def training_step(self, batch, batch_idx):
        if self.clock is not None:
            self.clock.now += 5 if self.trainer.global_step == 0 else 1
        return self.net(batch).square().mean()

    def validation_step(self, batch, batch_idx):
        if self.clock is not None:
            self.clock.now += 1000

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Text(Net):
    def tokens_in_batch(self, batch):
        return batch.numel()


class Data(Dataset):
    def __init__(self, clock=None, length=12):
        self.clock, self.length = clock, length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        if self.clock is not None:
            self.clock.now += 1.5
        return torch.full((4,), float(index))


def fit(tmp_path, model, *callbacks, val=False, data=None, **options):
    trainer = T.Trainer(
        **{"max_epochs": 2, "accelerator": "cpu", "logger": CSVLogger(tmp_path), "default_root_dir": tmp_path,
           "callbacks": list(callbacks), "enable_checkpointing": False, "enable_model_summary": False,
           "num_sanity_val_steps": 0, "log_every_n_steps": 2} | options,
    )  # fmt: skip
    loader = DataLoader(data or Data(), 2)
    trainer.fit(model, loader, loader if val else None)
    return trainer


def test_a_fit_ends_with_its_speed(tmp_path, monkeypatch, capsys):
    clock = Clock()
    for module in ("loading", "throughput"):
        monkeypatch.setattr(f"trainer.{module}.time", clock)
    fit(tmp_path, Net(clock), val=True, data=Data(clock), enable_progress_bar=False)
    # 2 samples of 1.5 s, and a step of 1 s; the first batch has a step of 5 s. Validations do not count.
    line = re.search("^speed: .*$", capsys.readouterr().err, re.MULTILINE)[0]
    assert line.startswith("speed: 0.5 samples/s, 4 s per batch (the first 8 s), 75.0% of it waiting for data, peak ")
    assert "communication" not in line
    assert "MFU" not in line


def test_a_short_last_batch_counts_as_what_it_has(tmp_path, monkeypatch, capsys):
    clock = Clock()
    for module in ("loading", "throughput"):
        monkeypatch.setattr(f"trainer.{module}.time", clock)
    meters = []

    class Keep(T.Callback):
        def on_train_end(self, trainer, pl_module):
            meters.append(trainer.fit_run.meter)

    fit(tmp_path, Text(clock), Keep(), data=Data(clock, 9), log_every_n_steps=50, enable_progress_bar=False)
    # Behind the first batch 7 samples in 14.5 s, then 9 in 18.5 s: 16 samples of 4 tokens in 33 s.
    assert "speed: 1.94 tokens/s, 3.67 s per batch (the first 8 s), 72.7% of it" in capsys.readouterr().err
    meter = meters[0]
    assert meter.items == pytest.approx(16 * 4 / 9)
    assert meter.flops == pytest.approx(6 * 12 * 16 * 4 / 9)
    assert meter.rate(9 / 33) == "1.94 tokens/s"


def test_batches_are_not_taken_to_be_like_a_short_one_that_a_run_began_with():
    meter, feed = Meter(Net(), torch.device("cpu"), 2, "32-true"), Feed()
    full, short_one = torch.ones(8, 4), torch.ones(1, 4)
    meter.begin(9, feed)
    meter.look(10, feed, short_one, is_last=True)
    assert not meter.knows_batches
    meter.look(11, feed, full, is_last=False)
    assert meter.knows_batches
    meter.look(20, feed, short_one, is_last=True)
    assert meter.items == 2 * (8 * 9 + 1) / 10


def test_after_a_rollback_waiting_counts_anew(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("trainer.throughput.time", clock)
    meter, feed, batch = Meter(Net(), torch.device("cpu"), 1, "32-true"), Feed(), torch.ones(2, 4)

    def pass_time(seconds, waiting):
        clock.now += seconds
        feed.waited_ns += round(waiting * 1e9)

    feed.waited_ns = 7 * 10**9  # of a fit before
    meter.begin(0, feed)
    pass_time(10, 5)
    meter.look(1, feed, batch, is_last=False)
    pass_time(10, 5)
    meter.look(11, feed, batch, is_last=False)
    pass_time(100, 90)
    meter.look(6, feed, batch, is_last=False)
    pass_time(10, 5)
    meter.look(16, feed, batch, is_last=False)
    assert (meter.batches, meter.seconds, meter.waited) == (20, 20, 10)


def test_tokens_and_flops_in_bar_log_and_end(tmp_path, capsys):
    monitor = ThroughputMonitor(peak_flops=1e9)
    trainer = fit(tmp_path, Text(), monitor)
    out, err = capsys.readouterr()
    # 2 x 4 numbers through 4 x 3 weights: forward, and the backward of the weights (the batch needs no gradient).
    assert monitor.state_dict()["flops"] == 2 * (2 * 2 * 4 * 3)
    assert re.search(r"it/s  \S+ tokens/s  MFU \d+\.\d%", out)
    assert re.search(r"speed: \S+ tokens/s, .*, MFU \d+\.\d% of 0\.001 TFLOP/s \(fp32; FLOPs counted\)\.", err)
    rows = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()
    last = dict(zip(rows[0].split(","), rows[-1].split(","), strict=True))
    assert int(last["train/items"]) == 8 * 12
    assert 0 < float(last["train/device/data_wait"]) < 1
    assert float(last["train/device/peak_memory"]) > 2**26
    rate = float(last["train/device/batches_per_sec"])
    assert float(last["train/device/mfu"]) == pytest.approx(rate * 96 / 1e9)
    assert trainer.global_step == 12


def test_without_counting_tokens_give_six_per_parameter(tmp_path, capsys):
    fit(tmp_path, Text(), ThroughputMonitor(peak_flops=1e9, count_flops=False))
    assert "FLOPs 6ND" in capsys.readouterr().err
    fit(tmp_path, Text())
    assert (
        "MFU not known: no peak of CPU in fp32 is known, ThroughputMonitor(peak_flops=...)" in capsys.readouterr().err
    )


class Sampling(ThroughputMonitor):
    """Samples a step on one rank, too."""

    def on_train_start(self, trainer, pl_module):
        super().on_train_start(trainer, pl_module)
        self._until_profile = 2

    def on_train_end(self, trainer, pl_module):
        self.found, self.under_way = self._meter.communication, self._profile is not None
        super().on_train_end(trainer, pl_module)


def test_a_profile_around_a_fit_goes_on(tmp_path):
    monitor = Sampling()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as around:
        fit(tmp_path, Net(), monitor)
        with torch.profiler.record_function("behind"):
            pass
    assert monitor.found is None
    assert any(event.name == "behind" for event in around.events())
    fit(tmp_path, Net(), again := Sampling())
    assert again.found == 0


def test_a_sample_ends_where_nobody_tells_that_an_optimizer_stepped(tmp_path):
    class Manual(Net):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.trainer.optimizers[0]
            optimizer.zero_grad()
            self.net(batch).square().mean().backward()
            optimizer.step()

    monitor = Sampling()
    trainer = fit(tmp_path, Manual(), monitor)
    assert trainer.global_step == 0
    assert not monitor.under_way
    assert monitor.found == 0


def test_after_a_rollback_what_was_measured_goes_on(tmp_path):
    class Bad(Net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * float("nan") if 14 in batch else loss

    class Windows(ThroughputMonitor):
        def compute(self, trainer, pl_module):
            counts = [batches for _, batches, *_ in self._window]
            assert counts == list(range(counts[0], counts[0] + len(counts)))
            assert counts[-1] == self._totals[1]
            return super().compute(trainer, pl_module)

    with pytest.warns(UserWarning, match="Back to step 5 and on without them"):
        fit(tmp_path, Bad(), monitor := Windows(), data=Data(length=24), max_epochs=1, guard=T.Guard(snapshot_every=5))
    assert monitor.state_dict()["totals"][1:] == [13, 26, 0]  # 11 and the 2 that were done again
    rows = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()
    at = rows[0].split(",").index("step")
    steps = [row.split(",")[at] for row in rows[1:]]
    assert len(steps) == len(set(steps)), rows


def test_measuring_changes_no_weight(tmp_path):
    weights = []
    for callbacks in ([], [ThroughputMonitor()]):
        model = Net()
        fit(tmp_path, model, *callbacks)
        weights.append(model.net.weight.detach().clone())
    assert torch.equal(*weights)


def test_a_broken_first_batch_leaves_no_counter_behind(tmp_path):
    class Broken(Net):
        def training_step(self, batch, batch_idx):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fit(tmp_path, Broken(), ThroughputMonitor())
    assert not torch.utils._python_dispatch._get_current_dispatch_mode_stack()


def test_a_peak_that_is_none(tmp_path):
    with pytest.raises(ConfigError, match="peak_flops=0"):
        ThroughputMonitor(peak_flops=0)


@pytest.mark.slow
def test_two_ranks_sample_their_communication(tmp_path, monkeypatch, gang):
    monkeypatch.chdir(tmp_path)
    zero, one = gang.ok(2, "throughput_ranks.py")
    for rank in (zero, one):
        assert "equal True" in rank.stdout
        assert 0 < float(re.search(r"communication (\S+)", rank.stdout)[1]) <= 1
        # 4 x 8 by 8 x 32 and 4 x 32 by 32 x 1: forward, backward of weights, and of the second layer's input.
        assert f"flops {2.0 * (2 * 4 * 8 * 32 + 2 * 4 * 32) + 2 * 4 * 32} counted" in rank.stdout
    assert re.search(r"speed: .*, communication in \d+% of a sampled step, ", zero.stderr)
    assert re.search(r"speed: .*, communication not measured", zero.stderr)
