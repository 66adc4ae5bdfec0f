"""Layers that ranks hold together, by a plan of torch's in configure_model."""

import pytest


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "shared"),
    [(2, 2), pytest.param(4, 2, marks=pytest.mark.soak), pytest.param(4, 4, marks=pytest.mark.soak)],
)
def test_trains_as_one_process_does(gang, tmp_path, ranks, shared):
    """Alone, and with weights sharded over the others; clipped, guarded, resumed to the bit."""
    for rank in gang.ok(ranks, "tensor_parallel.py", str(shared), str(tmp_path), timeout=115):
        assert rank.stdout == "as one\n"
