"""Collectives of a step and the bytes in them are those of a loop written by hand, counted on both sides."""

import pytest


@pytest.mark.parametrize(
    ("ranks", "strategies"),
    [(2, ["ddp", "fsdp"]), pytest.param(4, ["ddp", "fsdp", "hsdp"], marks=pytest.mark.soak)],
)
@pytest.mark.slow
def test_what_a_step_sends(gang, ranks, strategies):
    """With accumulation and clipping, with and without buffers."""
    for rank in gang.ok(ranks, "traffic.py", *strategies, timeout=110):
        assert rank.stdout.splitlines()[-1] == "equal"
