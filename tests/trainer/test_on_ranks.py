"""Several real ranks; and the same curves as Lightning's, bit for bit."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path


def test_two_ranks(gang, tmp_path: Path) -> None:
    result = gang.ok(2, "trainer_ranks.py", str(tmp_path), timeout=110)[0]
    assert result.stdout.count("passed check_") == 6, result.stdout


def curves(text: str) -> dict[str, list[list[float]]]:
    line = next(line for line in text.splitlines() if line.startswith("CURVES "))
    return json.loads(line.removeprefix("CURVES "))


@pytest.mark.peer
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_losses_equal_lightnings_bit_for_bit(gang, ranks: int) -> None:
    """200 steps with clipping and two schedulers, with and without accumulation."""
    pytest.importorskip("lightning")
    environment = {"EPOCHS": str(5 * ranks)}
    if ranks == 1:
        # One plain process: Lightning takes RANK without torchrun's other variables for its own launcher's.
        environment |= dict.fromkeys(("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK"), "")
        environment["WORLD_SIZE"] = ""
    else:
        environment["TORCHELASTIC_RUN_ID"] = "peer"
    found = curves(gang.ok(ranks, "trainer_peer.py", "1", "4", env=environment, timeout=110)[0].stdout)
    for ours, theirs in found.values():
        assert len(ours) == 200
        assert ours == theirs
