import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from trainer.distributed import connect
from trainer.errors import ConfigError, DataError
from trainer.sampling import Permuted
from trainer.virtual import VirtualFeed, own_range, subtrees, tree_sum, virtual_shares


@given(count=st.integers(1, 70), data=st.data())
def test_ranks_share_the_virtual_ranks_out_evenly(count, data):
    world = data.draw(st.integers(1, count))
    ranges = [own_range(count, rank, world) for rank in range(world)]
    assert [v for r in ranges for v in r] == list(range(count))
    assert {len(r) for r in ranges} <= {count // world, -(-count // world)}


def test_fewer_virtual_ranks_than_ranks_are_refused():
    with pytest.raises(ConfigError, match=r"virtual_ranks=3 leaves some of 4 ranks"):
        own_range(3, 0, 4)


@given(first=st.integers(0, 100), length=st.integers(0, 100))
def test_subtrees_cover_a_range_once_in_order_and_are_few(first, length):
    found = subtrees(first, first + length)
    assert [leaf for level, i in found for leaf in range(i << level, (i + 1) << level)] == [
        *range(first, first + length)
    ]
    assert len(found) <= 2 * max(1, length.bit_length())


@settings(deadline=None)
@given(leaves=st.integers(1, 40), data=st.data())
def test_the_sum_has_the_same_bits_however_the_leaves_are_cut_into_ranges(leaves, data):
    values = torch.randn(leaves, 9, generator=torch.Generator().manual_seed(leaves)) * 10.0 ** torch.arange(9)
    whole = tree_sum({(0, i): values[i] for i in range(leaves)}, leaves)
    cuts = sorted(data.draw(st.sets(st.integers(1, leaves), max_size=5)) | {0, leaves})
    nodes = {}
    for first, stop in itertools.pairwise(cuts):
        for level, index in subtrees(first, stop):
            under = range(index << level, (index + 1) << level)
            nodes[level, index] = tree_sum({(0, n): values[leaf] for n, leaf in enumerate(under)}, len(under))
    assert torch.equal(tree_sum(nodes, leaves), whole)
    torch.testing.assert_close(whole, values.sum(0), rtol=1e-4, atol=1e-2)


@settings(deadline=None, max_examples=50)
@given(
    size=st.integers(1, 200), batch=st.integers(1, 5), count=st.integers(1, 6), data=st.data(), drop_last=st.booleans()
)
def test_shares_do_not_depend_on_the_number_of_ranks(size, batch, count, data, drop_last):
    order = Permuted(size, seed=1, epoch=2)
    world = data.draw(st.integers(1, count))

    def steps(ranks):
        """Per step: virtual rank -> ids, of all ranks together."""
        each = [
            virtual_shares(
                order, batch_size=batch, count=count, own=own_range(count, r, ranks), drop_last=drop_last
            )
            for r in range(ranks)
        ]  # fmt: skip
        return [{v: s.ids.tolist() for own in step for v, s in own} for step in zip(*each, strict=True)]

    found = steps(world)
    assert found == steps(1)
    assert all(0 in step for step in found)
    ids = [i for step in found for ids in step.values() for i in ids]
    assert len(set(ids)) == len(ids)
    assert drop_last or sorted(ids) == list(np.arange(size))


def test_weights_have_the_same_bits_on_any_number_of_ranks(gang, tmp_path):
    """Dropout, running statistics, augmentation, a last batch too small for all, and a change from 4 ranks to 3."""
    program = "virtual_weights.py"
    (alone,) = gang.ok(1, program, str(tmp_path), "-", "12", "alone")
    gang.ok(4, program, str(tmp_path), "-", "5", "begun", "1")
    for rank in gang.ok(3, program, str(tmp_path), "begun", "7", "ended"):
        assert rank.stdout == alone.stdout


@pytest.mark.parametrize("loader", [DataLoader(range(8), batch_sampler=[[1, 2], [3]]), [1, 2, 3]])
def test_loaders_without_samples_to_share_out_are_refused(loader):
    with pytest.raises(DataError, match="virtual_ranks cannot share out"):
        VirtualFeed(loader, connect(accelerator="cpu", environ={}), 4, seed=1)


@pytest.mark.soak
@pytest.mark.parametrize("schedule", [(2, 3, 4), (4, 2, 3), (5, 1, 4), (3, 3, 2)])
def test_weights_survive_any_schedule_of_ranks(gang, tmp_path, schedule):
    (alone,) = gang.ok(1, "virtual_weights.py", str(tmp_path), "-", "27", "alone")
    begin = "-"
    for number, ranks in enumerate(schedule):
        results = gang.ok(ranks, "virtual_weights.py", str(tmp_path), begin, "9", f"after{number}")
        begin = f"after{number}"
    assert {r.stdout for r in results} == {alone.stdout}
