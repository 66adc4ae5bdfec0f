"""Feeds: every kind of loader, its place in the data, its random state, and its workers."""

from __future__ import annotations

import collections
import random
import signal
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    get_worker_info,
)
from torchdata.stateful_dataloader import StatefulDataLoader

from trainer.errors import DataError
from trainer.loading import make_feed, map_tensors, to_device


def world(rank=0, size=1):
    return SimpleNamespace(rank=rank, size=size)


class Noisy(Dataset):
    """Sample i is (i, what each generator gives)."""

    def __init__(self, size=23):
        self.size = size
        self.opened = 0

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return torch.tensor(
            [index, torch.rand(()), random.random(), np.random.rand(), self.opened], dtype=torch.float64
        )


class Batched(Noisy):
    def __getitems__(self, indices):
        return [torch.cat([self[i], torch.tensor([len(indices)])]) for i in indices]


class Stream(IterableDataset):
    def __init__(self, size=7):
        self.size = size

    def __iter__(self):
        for i in range(self.size):
            yield torch.tensor([i, random.random()], dtype=torch.float64)


class Counting(Stream):
    """An iterable dataset that knows where it is."""

    def __init__(self, size=7):
        super().__init__(size)
        self.at = 0

    def __iter__(self):
        while self.at < self.size:
            self.at += 1
            yield torch.tensor([self.at - 1, random.random()], dtype=torch.float64)
        self.at = 0

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


def open_files(worker):
    get_worker_info().dataset.opened = worker + 1


class Sub(DataLoader):
    """A subclass with an __init__ of its own and a changed iteration."""

    def __init__(self, dataset, scale):
        super().__init__(dataset, batch_size=4, shuffle=True)
        self.factor = scale

    def __iter__(self):
        for batch in super().__iter__():
            yield batch * self.factor


def ids(batch):
    return [int(i) for i in np.atleast_2d(np.asarray(batch))[:, 0]]


def epoch(loader, *, size=1, start=0, number=3, train=True, seed=5, stop=None, **options):
    """The batches of all ranks: [(batch, weight, position), ...] per rank."""
    found = []
    for rank in range(size):
        feed = make_feed(loader(), world=world(rank, size), seed=seed, train=train, **options)
        batches = feed.batches(number, start)
        found.append([(b, feed.weight, feed.position) for b, _ in zip(batches, range(stop or 10**6), strict=False)])
        batches.close()
        if feed.sized and stop is None:
            assert len(found[-1]) == len(feed) - feed.batches_done(start)
        feed.close()
    return found


def seen(found):
    return [i for rank in found for batch, weight, _ in rank if weight for i in ids(batch)]


class Every3(Sampler):
    def __iter__(self):
        return iter(torch.randperm(21)[::3].tolist())

    def __len__(self):
        return 7


class ByLength(Sampler):
    """Batches of unequal size, another number of them in each epoch, and so no length."""

    def __iter__(self):
        order = torch.randperm(23).tolist()
        while order:
            n = random.randint(1, 5)
            yield order[:n]
            order = order[n:]


class Own(DistributedSampler):
    """A user's own way to share: halves."""

    def __iter__(self):
        return iter(range(self.rank * 10, self.rank * 10 + 10))

    def __len__(self):
        return 10


LOADERS = {
    "sequential": lambda: DataLoader(Noisy(), 4),
    "shuffled": lambda: DataLoader(Noisy(), 4, shuffle=True),
    "own generator": lambda: DataLoader(Noisy(), 4, shuffle=True, generator=torch.Generator().manual_seed(1)),
    "batch_size None": lambda: DataLoader(Noisy(), batch_size=None, shuffle=True),
    "distributed": lambda: DataLoader(Noisy(), 4, sampler=DistributedSampler(range(23), 2, 0)),
    "made BatchSampler": lambda: DataLoader(Noisy(), batch_sampler=BatchSampler(RandomSampler(range(23)), 4, False)),
    "subset": lambda: DataLoader(Noisy(30), 4, sampler=SubsetRandomSampler(range(23))),
    "bucketed": lambda: DataLoader(Noisy(), batch_sampler=ByLength()),
    "batched": lambda: DataLoader(Batched(), 4, shuffle=True),
    "subclass": lambda: Sub(Noisy(), 1.0),
    "stateful": lambda: StatefulDataLoader(Noisy(), 4, shuffle=True),
    "collate": lambda: DataLoader(Noisy(), 4, shuffle=True, collate_fn=np.stack),
}


@pytest.mark.parametrize("kind", LOADERS)
def test_every_sample_once_from_every_position_on_any_number_of_ranks(kind):
    before = torch.get_rng_state()
    whole = epoch(LOADERS[kind])
    assert sorted(seen(whole)) == list(range(23))
    positions = [p for _, _, p in whole[0]]
    for at in range(0, len(positions), 2):
        head = seen([whole[0][: at + 1]])
        for size in (1, 2, 3):
            rest = epoch(LOADERS[kind], size=size, start=positions[at])
            assert sorted(head + seen(rest)) == list(range(23)), (at, size)
            if size == 1:
                assert [ids(b) for b, _, _ in rest[0]] == [ids(b) for b, _, _ in whole[0][at + 1 :]]
    # What was drawn from the main process's generators was drawn by the samples, and by nothing of ours.
    loader = LOADERS[kind]()
    torch.set_rng_state(before)
    feed = make_feed(loader, world=world(), seed=5, train=True)
    batches = feed.batches(3, 0)
    first = next(batches)
    batches.close()
    count = len(ids(first))
    torch.set_rng_state(before)
    drawn = [torch.rand(()).item() for _ in range(count)]
    assert np.atleast_2d(np.asarray(first))[:, 1].tolist() == pytest.approx(drawn)


def test_epochs_and_seeds_differ_and_repeat():
    def order(**options):
        return seen(epoch(LOADERS["shuffled"], **options))

    assert order() == order()
    assert len({tuple(order(number=n, seed=s)) for n in range(4) for s in range(4)}) == 16
    assert order(shuffle_override=False) == list(range(23))


def test_weights():
    found = epoch(lambda: DataLoader(Noisy(9), 4), size=3, train=True)
    # 9 samples in one batch of 12: 3 each; then in 4 ranks' terms a rank without any.
    assert [[w for _, w, _ in r] for r in found] == [[1.0], [1.0], [1.0]]
    found = epoch(lambda: DataLoader(Noisy(10), 2), size=4)
    assert [[w for _, w, _ in r] for r in found] == [[1.0, 2.0], [1.0, 2.0], [1.0, 0.0], [1.0, 0.0]]
    found = epoch(lambda: DataLoader(Noisy(10), 2), size=4, train=False)
    assert [[w for _, w, _ in r] for r in found] == [[1.0, 1.0], [1.0, 1.0], [1.0, 0.0], [1.0, 0.0]]
    assert [ids(r[1][0]) for r in found] == [[8], [9], [8], [8]]
    found = epoch(lambda: DataLoader(Noisy(10), 2, drop_last=True), size=4)
    assert [len(r) for r in found] == [1, 1, 1, 1]


def test_samplers_that_repeat_or_share_by_themselves():
    weights = torch.ones(23)
    drawn = epoch(lambda: DataLoader(Noisy(), 4, sampler=WeightedRandomSampler(weights, 40)), size=2)
    assert len(seen(drawn)) == 40
    assert len({i for r in drawn for b, _, _ in r for i in ids(b)}) < 24
    assert sorted(seen(epoch(lambda: DataLoader(Noisy(), 2, sampler=Every3()), size=2))) == sorted(
        seen(epoch(lambda: DataLoader(Noisy(), 2, sampler=Every3())))
    )
    # A subclass of DistributedSampler, and any sampler with distribute=False, share by themselves.
    for rank in range(2):
        loader = DataLoader(Noisy(), 5, sampler=Own(range(20), 2, rank))
        feed = make_feed(loader, world=world(rank, 2), seed=1, train=True)
        assert [i for b in feed.batches(0, 0) for i in ids(b)] == list(range(rank * 10, rank * 10 + 10))
        loader = DataLoader(Noisy(), 5, sampler=DistributedSampler(range(20), 2, rank, shuffle=False))
        feed = make_feed(loader, world=world(rank, 2), seed=1, train=True, distribute=False)
        assert [i for b in feed.batches(0, 0) for i in ids(b)] == list(range(rank, 20, 2))
        feed = make_feed(DataLoader(Noisy(), 5), world=world(rank, 2), seed=1, train=True, distribute=False)
        assert len(feed) == 5


def test_a_samplers_generator_is_the_users_before_and_after():
    generator = torch.Generator().manual_seed(3)
    before = generator.get_state()
    sampler = WeightedRandomSampler(torch.ones(23), 10, generator=generator)
    first = seen(epoch(lambda: DataLoader(Noisy(), 5, sampler=sampler)))
    assert torch.equal(generator.get_state(), before)
    assert first == seen(epoch(lambda: DataLoader(Noisy(), 5, sampler=sampler)))
    assert first != seen(epoch(lambda: DataLoader(Noisy(), 5, sampler=sampler), number=4))


def test_samplers_that_cannot_be_used():
    class Wrong(SequentialSampler):
        def __len__(self):
            return 5

    class Endless(Sampler):
        def __iter__(self):
            while True:
                yield 0

    with pytest.raises(DataError, match=r"Wrong gave 23 items in epoch 0, but its len\(\) is 5"):
        list(make_feed(DataLoader(Noisy(), sampler=Wrong(range(23))), world=world(), seed=0, train=True).batches(0, 0))
    with pytest.raises(DataError, match="Endless gave more than 100000 items without an end"):
        list(make_feed(DataLoader(Noisy(), sampler=Endless()), world=world(), seed=0, train=True).batches(0, 0))
    feed = make_feed(DataLoader(Noisy(), 4), world=world(), seed=0, train=True)
    with pytest.raises(DataError, match="position 24 is outside of a dataset of 23"):
        list(feed.batches(0, 24))


@pytest.mark.parametrize("persistent", [False, True], ids=["anew", "kept"])
def test_workers(persistent, request):
    """Augmentation is keyed by the place in the epoch: the same from any position, on any ranks; nothing else drawn."""

    def loader(workers=2, **options):
        options = {"persistent_workers": persistent} | options
        return DataLoader(Noisy(11), 2, shuffle=True, num_workers=workers, worker_init_fn=open_files, **options)

    state = torch.get_rng_state()
    feed = make_feed(loader(), world=world(), seed=5, train=True)
    request.addfinalizer(feed.close)
    whole = list(feed.batches(3, 0))
    children = psutil.Process().children()
    assert (
        bool([c for c in children if "fork" not in c.name() and "tracker" not in " ".join(c.cmdline())]) is persistent
    )
    # Prefetched batches do not count, and an abandoned iteration leaves no trace in the next.
    batches = feed.batches(3, 0)
    next(batches)
    assert feed.position == 2
    batches.close()
    again = [torch.equal(a, b) for a, b in zip(feed.batches(3, 4), whole[2:], strict=True)]
    other = list(feed.batches(4, 0))
    feed.close()
    assert torch.equal(torch.get_rng_state(), state)
    rows = torch.cat(whole)
    columns = rows[rows[:, 0].argsort()][:, :4]
    assert all(again[i] or persistent for i in range(len(again)))
    assert (rows[:, 4] >= 1).all()  # worker_init_fn got hold of the user's own dataset
    assert not torch.equal(torch.cat(other)[:, :4], rows[:, :4])
    assert len(columns[:, 1:].unique()) == 33
    if not persistent:
        for size, workers in ((2, 1), (3, 2)):
            found = epoch(lambda workers=workers: loader(workers), size=size)
            rows = torch.cat([b for r in found for b, w, _ in r if w])
            assert torch.equal(rows[rows[:, 0].argsort()][:, :4], columns)


def test_oversampled_samples_are_augmented_each_in_its_own_way():
    loader = DataLoader(Noisy(2), 4, sampler=WeightedRandomSampler(torch.ones(2), 12), num_workers=1)
    rows = torch.cat(list(make_feed(loader, world=world(), seed=5, train=True).batches(0, 0)))
    assert len(rows[:, 1].unique()) == 12


def test_workers_leave_sigterm_to_the_rank_and_end_with_the_iteration():
    for loader in (DataLoader(Noisy(), 1, num_workers=1), DataLoader(Stream(23), 1, num_workers=1)):
        feed = make_feed(loader, world=world(), seed=5, train=True)
        batches = feed.batches(0, 0)
        next(batches)
        (worker,) = psutil.Process().children()
        worker.send_signal(signal.SIGTERM)
        for _ in range(20):
            next(batches)
        assert worker.is_running()
        batches.close()
        assert not worker.is_running()
        assert loader.worker_init_fn is None
        assert loader.generator is None


@pytest.mark.parametrize(
    ("end", "context"),
    [("raise RuntimeError('from the step')", "fork"), ("sys.exit(3)", "spawn"), ("os.kill(os.getpid(), 9)", "fork")],
)
def test_workers_end_with_the_rank(end, context, tmp_path):
    """Also those that are stuck in a sample, and though they are deaf to the SIGTERM of multiprocessing."""
    script = tmp_path / "job.py"
    script.write_text(
        textwrap.dedent(f"""
        import os, sys, time
        from types import SimpleNamespace
        from torch.utils.data import DataLoader
        from trainer.loading import make_feed

        def main():
            alone = SimpleNamespace(rank=0, size=1)
            loader = DataLoader(range(99), 1, num_workers=1, multiprocessing_context="{context}")
            feed = make_feed(loader, world=alone, seed=0, train=True)
            globals()["kept"] = batches = feed.batches(0, 0)
            next(batches)
            print(*[w.pid for w in __import__("multiprocessing").active_children()], flush=True)
            {end}

        if __name__ == "__main__":
            main()
        """)
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60, check=False)
    workers = [int(p) for p in done.stdout.split()]
    assert len(workers) == 1
    assert done.returncode == {"r": 1, "s": 3, "o": -9}[end[0]]
    if end[0] != "o":  # torch's own watchdog in the worker looks every 5 s
        assert "killed by signal" not in done.stderr
        assert not psutil.pid_exists(workers[0])
    else:
        psutil.wait_procs([psutil.Process(p) for p in workers if psutil.pid_exists(p)], timeout=20)
        assert not [p for p in workers if psutil.pid_exists(p)]


def test_streams():
    """Without a length the loop looks one batch ahead; the state is still that of the batch in hand."""

    def stateful(size=7):
        return StatefulDataLoader(Counting(size), batch_size=None)

    class Indexed(list):
        pass

    state = torch.get_rng_state()
    whole = list(make_feed(stateful(), world=world(), seed=5, train=True).batches(2, 0))
    for at in range(1, 6):
        feed = make_feed(stateful(), world=world(), seed=5, train=True)
        batches = feed.batches(2, 0)
        for _ in range(at):
            batch = next(batches)
        mine = feed.position
        following = next(batches)
        feed.position = mine  # as the loop does
        kept = feed.state_dict()
        assert torch.equal(batch, whole[at - 1])
        assert torch.equal(following, whole[at])
        other = make_feed(stateful(), world=world(), seed=5, train=True)
        other.load_state_dict(kept)
        rest = list(other.batches(2, mine))
        assert [b.tolist() for b in rest] == [b.tolist() for b in whole[at:]]
        assert other.position == 7
    assert torch.equal(torch.get_rng_state(), state)
    # A list of batches, and a plain iterable dataset.
    feed = make_feed(Indexed([10, 20, 30]), world=world(1, 2), seed=5, train=True)
    assert (len(feed), list(feed.batches(0, 0)), list(feed.batches(0, 2)), feed.batches_done(2)) == (
        3,
        [10, 20, 30],
        [30],
        2,
    )
    feed = make_feed(DataLoader(Stream(), 2), world=world(), seed=5, train=True)
    assert not feed.sized
    assert [ids(b) for b in feed.batches(0, 0)] == [[0, 1], [2, 3], [4, 5], [6]]
    with pytest.raises(
        DataError, match=r"after 2 batches of a DataLoader that cannot say where it was.*StatefulDataLoader"
    ):
        list(feed.batches(0, 2))
    with pytest.raises(DataError, match="this rank has none: the number of ranks has changed"):
        list(make_feed(stateful(), world=world(), seed=5, train=True).batches(0, 2))


def test_stateful_streams_with_workers():
    def loader():
        return StatefulDataLoader(Stream(9), batch_size=2, num_workers=1)

    feed = make_feed(loader(), world=world(), seed=5, train=True)
    batches = feed.batches(0, 0)
    first, second = next(batches), next(batches)
    kept = feed.state_dict()
    rest = [ids(b) for b in batches]
    assert [ids(first), ids(second), *rest] == [[0, 1], [2, 3], [4, 5], [6, 7], [8]]
    other = make_feed(loader(), world=world(), seed=5, train=True)
    other.load_state_dict(kept)
    assert [ids(b) for b in other.batches(0, 2)] == rest


def test_ranks_have_other_worker_seeds():
    rows = [
        torch.cat(
            list(make_feed(DataLoader(Stream(), num_workers=1), world=world(r, 2), seed=5, train=True).batches(0, 0))
        )
        for r in range(2)
    ]
    assert torch.equal(rows[0][:, 0], rows[1][:, 0])
    assert not torch.equal(rows[0][:, 1], rows[1][:, 1])


def test_to_device():
    Pair = collections.namedtuple("Pair", "a b")

    @dataclass(frozen=True)
    class Record:
        x: torch.Tensor
        name: str

    class Graph:
        def __init__(self):
            self.moved = None

        def to(self, device):
            self.moved = device

    one = torch.ones(2)
    packed = pack_sequence([torch.ones(3), torch.ones(2)])
    batch = {
        "list": [one, "text", 3, None], "tuple": (one, Pair(one, 1)), "record": Record(one, "r"), "packed": packed,
        "mapping": collections.OrderedDict(a=one), "default": collections.defaultdict(list, a=one), "graph": Graph(),
    }  # fmt: skip
    meta = torch.device("meta")
    batch.pop("packed")
    moved = to_device(batch, meta)
    assert moved["list"][0].device == meta
    assert moved["list"][1:] == ["text", 3, None]
    assert moved["tuple"][1].a.device == meta
    assert type(moved["tuple"][1]) is Pair
    assert moved["record"].x.device == meta
    assert batch["record"].x.device.type == "cpu"
    assert moved["mapping"]["a"].device == moved["default"]["a"].device == meta
    assert type(moved["default"]) is collections.defaultdict
    assert moved["graph"].moved == meta
    assert batch["mapping"]["a"].device.type == "cpu"
    assert isinstance(to_device(packed, torch.device("cpu")), PackedSequence)
    assert map_tensors([one, Graph()], lambda t: t + 1)[0].tolist() == [2.0, 2.0]


@pytest.mark.soak
def test_a_run_goes_on_in_mid_epoch_on_another_number_of_ranks(gang, tmp_path):
    """4 -> 2 -> 3: every sample of the epoch once, and the epoch ends with its validation."""

    def ids_of(results):
        return [
            int(i)
            for r in results
            for line in r.stdout.splitlines()
            if line.startswith("seen")
            for i in line.split()[1:]
        ]

    first, second = str(tmp_path / "a.ckpt"), str(tmp_path / "b.ckpt")
    seen = ids_of(gang.ok(4, "parallel_elastic.py", "stop", "2", first))
    assert len(seen) == 16
    seen += ids_of(gang.ok(2, "parallel_elastic.py", "stop", "5", second, first))
    assert len(seen) == 28
    results = gang.ok(3, "parallel_elastic.py", "end", second)
    seen += ids_of(results)
    assert sorted(seen) == list(range(53))
    assert all("validated" in r.stdout for r in results)


@pytest.mark.slow
def test_a_rank_that_joins_after_an_epochs_last_batch_reports_with_the_others(gang, tmp_path):
    file, small = str(tmp_path / "a.ckpt"), {"SIZE": "6"}
    gang.ok(1, "parallel_elastic.py", "stop", "3", file, env=small)
    gang.ok(2, "parallel_elastic.py", "end", file, env=small)
