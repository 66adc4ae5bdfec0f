"""Which samples belong to whom: pure functions, tested by their properties."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DistributedSampler

from trainer.errors import DataError
from trainer.sampling import Listed, Permuted, Sequential, batch_count, shares

orders = st.sampled_from(["sequential", "permuted", "listed"])


def make(kind, size, seed=0):
    if kind == "listed":
        return Listed([f"sample {i}" for i in range(size)])
    return Sequential(size) if kind == "sequential" else Permuted(size, seed=seed, epoch=1)


@settings(deadline=None, max_examples=150)
@given(
    kind=orders,
    size=st.integers(1, 300),
    seed=st.integers(0, 2**32 - 1),
    schedule=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 7), st.integers(0, 6)), min_size=1, max_size=6),
)
def test_every_sample_is_seen_once_over_any_schedule_of_world_sizes(kind, size, seed, schedule):
    """(ranks, batch size, global batches until the stop), the last of which goes on to the end of the epoch."""
    seen, position = [], 0
    for number, (world_size, batch_size, batches) in enumerate(schedule):
        ranks = [
            list(shares(make(kind, size, seed), batch_size=batch_size, rank=r, world_size=world_size, start=position))
            for r in range(world_size)
        ]
        left = batch_count(size - position, batch_size=batch_size, world_size=world_size, drop_last=False)
        assert {len(r) for r in ranks} == {left}
        for group in list(zip(*ranks, strict=True))[: None if number == len(schedule) - 1 else batches]:
            assert len({share.position for share in group}) == 1
            assert sum(share.seen for share in group) == group[0].total
            assert all(len(share.ids) for share in group)
            # The mean of the ranks' weighted means is the mean over the samples.
            values = [float(np.mean(share.places)) * share.weight(world_size) for share in group]
            places = np.concatenate([share.places[: share.seen] for share in group])
            assert np.mean(values) == pytest.approx(np.mean(places))
            position = group[0].position
            seen += [i for share in group for i in share.ids[: share.seen].tolist()]
    ids = [f"sample {i}" for i in range(size)] if kind == "listed" else list(range(size))
    assert sorted(seen) == sorted(ids)


@given(size=st.integers(1, 100), batch_size=st.integers(1, 9), world_size=st.integers(1, 5))
def test_drop_last_drops_less_than_one_global_batch(size, batch_size, world_size):
    order = Sequential(size)
    found = [
        list(shares(order, batch_size=batch_size, rank=r, world_size=world_size, drop_last=True))
        for r in range(world_size)
    ]
    count = batch_count(size, batch_size=batch_size, world_size=world_size, drop_last=True)
    assert {len(f) for f in found} == {count}
    seen = sorted(i for f in found for share in f for i in share.ids)
    assert seen == list(range(count * batch_size * world_size))
    assert size - len(seen) < batch_size * world_size


def test_without_shuffling_it_is_torchs_distributed_sampler_where_all_divides():
    for rank in range(3):
        ours = [i for share in shares(Sequential(24), batch_size=4, rank=rank, world_size=3) for i in share.ids]
        assert ours == list(DistributedSampler(range(24), num_replicas=3, rank=rank, shuffle=False))


@pytest.mark.parametrize("size", [1, 2, 3, 255, 256, 257, 16384, 16385, 40000, 100003])
def test_permuted_is_a_permutation_with_random_access(size):
    order = Permuted(size, seed=7, epoch=2)
    ids = np.concatenate([order.ids(np.arange(a, min(a + 777, size))) for a in range(0, size, 777)])
    assert np.array_equal(np.sort(ids), np.arange(size))
    places = np.unique(np.random.default_rng(0).integers(0, size, 50))
    assert np.array_equal(Permuted(size, seed=7, epoch=2).ids(places), ids[places])
    assert len(order) == size


def test_permuted_is_the_same_for_ever():
    """A checkpoint holds a position only: a changed order would repeat and drop samples of old runs."""
    assert Permuted(10, seed=0, epoch=0).ids(np.arange(10)).tolist() == SMALL
    assert Permuted(1_000_000, seed=42, epoch=3).ids(np.arange(5)).tolist() == LARGE


SMALL = [2, 1, 8, 9, 0, 5, 7, 4, 3, 6]
LARGE = [135583, 206932, 320998, 289380, 151727]


@pytest.mark.parametrize("size", [12, 20000])
def test_permuted_looks_random(size):
    """Chi-square of where ids land (16 bins), of neighbours' distances, and over epochs; far from the 0.001 tails."""
    places = np.arange(size)
    epochs = np.stack([Permuted(size, seed=11, epoch=e).ids(places) for e in range(2000 if size < 100 else 40)])
    if size < 100:
        for place in range(size):
            counts = np.bincount(epochs[:, place], minlength=size)
            assert chi_square(counts) < 40  # 11 degrees of freedom: 31 is the 0.001 tail, over 12 places
    else:
        counts = np.bincount((epochs[:, : size // 2] * 16 // size).ravel(), minlength=16)
        assert chi_square(counts) < 38  # 15 degrees of freedom
        steps = np.diff(epochs, axis=1) % size
        assert chi_square(np.bincount((steps * 16 // size).ravel(), minlength=16)) < 60
        correlations = np.corrcoef(epochs)[np.triu_indices(len(epochs), 1)]
        assert np.abs(correlations).max() < 5 / np.sqrt(size)
    # Other seeds and neighbouring ones give other orders.
    orders = {Permuted(size, seed=s, epoch=e).ids(places).tobytes() for s in range(5) for e in range(5)}
    assert len(orders) == 25


def chi_square(counts):
    expected = counts.sum() / len(counts)
    return float(((counts - expected) ** 2 / expected).sum())


def test_a_position_outside_is_refused():
    with pytest.raises(DataError, match=r"position 11 is outside of a dataset of 10 samples"):
        next(shares(Sequential(10), batch_size=2, rank=0, world_size=1, start=11))
