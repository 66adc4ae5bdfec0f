"""Batches that come ahead: in order, counted when they are trained, and on the GPU beside what it computes."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

import trainer as T
from trainer.loading import draws_apart, make_feed
from trainer.prefetch import Prefetched


class Noisy(Dataset):
    """Each sample its number, and something drawn at random."""

    def __init__(self, length=10, broken=None):
        self.length, self.broken = length, broken

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        if index == self.broken:
            raise ValueError(f"sample {index} is broken")
        return torch.tensor([float(index)]), torch.rand(1)


class Endless(IterableDataset):
    def __iter__(self):
        return iter(range(9))


class Places:
    """A world of one rank, or what a feed wants to know of one."""

    rank, size = 0, 1


def feed(dataset, **options):
    return make_feed(DataLoader(dataset, **options), world=Places(), seed=3, train=True)


def test_order_places_and_what_is_begun_when():
    plain, events = feed(Noisy(), batch_size=3, shuffle=True), []
    ahead = Prefetched(feed(Noisy(), batch_size=3, shuffle=True), lambda b: (events.append("begin"), b)[1],
                       lambda b: (events.append("finish"), b)[1])  # fmt: skip
    assert len(ahead) == len(plain) == 4
    expected = [(b[0].tolist(), plain.position, plain.weight, plain.indices) for b in plain.batches(1, 3)]
    found = []
    for batch in ahead.batches(1, 3):
        events.append("step")
        found.append((batch[0].tolist(), ahead.position, ahead.weight, ahead.indices))
    assert found == expected
    assert [position for _, position, *_ in found] == [6, 9, 10]
    assert events == ["begin", "finish", "begin", "step", "finish", "begin", "step", "finish", "step"]
    assert ahead.batches_done(6) == 2
    assert ahead.waited_ns > 0


def test_an_error_comes_with_its_batch():
    ahead = Prefetched(feed(Noisy(broken=2), batch_size=1), lambda b: b, lambda b: b)
    batches = ahead.batches(0, None)
    assert [int(next(batches)[0]), int(next(batches)[0])] == [0, 1]
    with pytest.raises(ValueError, match="sample 2 is broken"):
        next(batches)


def test_only_loaders_that_draw_in_their_workers_come_ahead():
    assert draws_apart(feed(Noisy(), num_workers=1))
    assert not draws_apart(feed(Noisy()))
    assert not draws_apart(feed(Endless(), num_workers=1))
    assert not draws_apart(object())


class Net(T.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.seen = torch.nn.Linear(1, 1), []

    def training_step(self, batch, batch_idx):
        number, noise = batch
        self.seen.append((number.flatten().tolist(), [round(x, 6) for x in noise.flatten().tolist()]))
        # As dropout does, from the process's own generator.
        return (self.net(number) + noise + torch.rand(1, device=self.device)).square().mean() / 100

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(tmp_path, *, stop_after=None, ckpt_path=None, accelerator="cpu"):
    class Stop(T.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == stop_after:
                trainer.save_checkpoint(tmp_path / "mid.ckpt")
                trainer.should_stop = True

    model = Net()
    T.seed_everything(1, verbose=False)
    trainer = T.Trainer(
        max_epochs=2, accelerator=accelerator, devices=1, callbacks=[Stop()], logger=False, min_epochs=0,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(model, DataLoader(Noisy(), 2, shuffle=True, num_workers=1), ckpt_path=ckpt_path)
    return model


@pytest.fixture
def _seeded(monkeypatch):
    # seed_everything leaves them behind.
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    monkeypatch.setenv("PL_SEED_WORKERS", "0")


@pytest.mark.slow
@pytest.mark.usefixtures("_seeded")
def test_a_run_with_batches_ahead_is_the_same_and_goes_on_exactly(tmp_path, monkeypatch):
    plain = fit(tmp_path)

    def prefetch(run):
        assert draws_apart(run.feed)
        run.feed = Prefetched(run.feed, lambda b: b, lambda b: b)

    monkeypatch.setattr("trainer.feeding.prefetch", prefetch)
    whole = fit(tmp_path)
    first = fit(tmp_path, stop_after=3)
    rest = fit(tmp_path, ckpt_path=tmp_path / "mid.ckpt")
    assert len(whole.seen) == 10
    assert whole.seen == plain.seen
    assert first.seen + rest.seen == plain.seen
    assert torch.equal(whole.net.weight, plain.net.weight)
    assert torch.equal(rest.net.weight, plain.net.weight)


class Reloads(Net):
    """Loaders with and without workers in turn; each batch is moved by a hook."""

    def __init__(self):
        super().__init__()
        self.moved = []

    def train_dataloader(self):
        return DataLoader(Noisy(4), 2, num_workers=1 - self.trainer.current_epoch % 2)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        self.moved.append((self.trainer.current_epoch, batch[0].device.type))
        return batch


def reload(tmp_path, accelerator):
    module = Reloads()
    T.Trainer(
        max_epochs=3, reload_dataloaders_every_n_epochs=1, accelerator=accelerator, devices=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    ).fit(module)  # fmt: skip
    return module.moved


@pytest.mark.filterwarnings("ignore:.*num_workers:UserWarning")
def test_a_later_loader_that_does_not_come_ahead_is_moved(tmp_path, monkeypatch):
    def prefetch(run):
        if draws_apart(run.feed):
            run.feed, run.move = Prefetched(run.feed, lambda b: b, lambda b: b), None

    monkeypatch.setattr("trainer.feeding.prefetch", prefetch)
    assert reload(tmp_path, "cpu") == [(1, "cpu")] * 2


@pytest.mark.gpu
def test_on_a_gpu_a_later_loader_that_does_not_come_ahead_is_moved(tmp_path):
    assert reload(tmp_path, "cuda") == [(epoch, "cuda") for epoch in (0, 0, 1, 1, 2, 2)]


@pytest.mark.gpu
@pytest.mark.usefixtures("_seeded")
def test_on_a_gpu_batches_are_copied_beside_the_computing(tmp_path, monkeypatch):
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        ahead = fit(tmp_path, accelerator="cuda")
    events = seen.profiler.kineto_results.events()
    copies = {e.device_resource_id() for e in events if "Memcpy HtoD (Pinned" in e.name()}
    kernels = {e.device_resource_id() for e in events if "gemm" in e.name().lower() or "elementwise" in e.name()}
    assert copies - kernels
    monkeypatch.setattr("trainer.feeding.prefetch", lambda run: None)
    plain = fit(tmp_path, accelerator="cuda")
    assert ahead.seen == plain.seen
    assert torch.equal(ahead.net.weight, plain.net.weight)
    first = fit(tmp_path, stop_after=3, accelerator="cuda")
    monkeypatch.undo()
    rest = fit(tmp_path, ckpt_path=tmp_path / "mid.ckpt", accelerator="cuda")
    assert first.seen + rest.seen == plain.seen
    assert torch.equal(rest.net.weight, plain.net.weight)


@pytest.mark.gpu
def test_on_a_gpu_memory_is_not_given_away_while_it_is_used():
    from trainer.prefetch import SideStream

    device = torch.device("cuda", torch.cuda.current_device())
    lane = SideStream(device, None)
    wrong = 0
    for number in range(50):
        host = torch.full((1 << 20,), float(number)).pin_memory()
        batch = lane.finish(lane.begin({"x": host}))
        torch.cuda._sleep(10_000_000)  # the computing stream is late
        wrong += (batch["x"] != number).sum()
        del batch
        lane.begin({"x": torch.full((1 << 20,), -1.0).pin_memory()})
    assert int(wrong) == 0
