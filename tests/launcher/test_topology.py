"""Ranks and the variables that tell them who they are: the table that programs written for torchrun read."""

from __future__ import annotations

import dataclasses

import pytest

from launcher.spec import LaunchSpec, Program
from launcher.topology import Place, World, packed, places, rank_environment, unpacked

SPEC = LaunchSpec(Program("script", "job.py"), "/tmp", nodes=2, procs=2, max_restarts=3)
WORLD = World(attempt=7, restarts=2, slots=(2, 4), store_addr="10.0.0.1", store_port=99)


def environment(
    spec: LaunchSpec = SPEC, world: World = WORLD, place: Place | None = None, **base: str
) -> dict[str, str]:
    return rank_environment(
        base, spec, world, place or Place(3, 1, 1), run_id="r", run_dir="/r", error_file="/e", progress="/p"
    )


def test_places_count_through_the_nodes() -> None:
    assert places(WORLD, 0) == [Place(0, 0, 0), Place(1, 1, 0)]
    assert places(WORLD, 1) == [Place(2, 0, 1), Place(3, 1, 1), Place(4, 2, 1), Place(5, 3, 1)]
    assert WORLD.size == 6


def test_a_world_of_thousands_is_told_in_few_words() -> None:
    assert packed((8,) * 4000) == [(8, 4000)]
    for slots in ((8,) * 4000, (2, 4, 4, 1), (1,), ()):
        assert unpacked([list(row) for row in packed(slots)]) == slots  # type: ignore[misc]  # as JSON brings it


def test_the_whole_table() -> None:
    assert environment(HOME="/root") == {
        "HOME": "/root", "RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "6", "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "1",
        "GROUP_WORLD_SIZE": "2", "ROLE_NAME": "default", "ROLE_RANK": "3", "ROLE_WORLD_SIZE": "6", "NODE_RANK": "1",
        "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "99", "TORCHELASTIC_RESTART_COUNT": "2",
        "TORCHELASTIC_MAX_RESTARTS": "3", "TORCHELASTIC_RUN_ID": "r", "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_ERROR_FILE": "/e", "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1", "OMP_NUM_THREADS": "1",
        "LAUNCH_RUN_ID": "r", "LAUNCH_RUN_DIR": "/r", "LAUNCH_ATTEMPT": "7", "LAUNCH_GRACE_S": "30",
        "LAUNCH_PROGRESS": "/p",
    }  # fmt: skip


def test_what_the_user_set_stays() -> None:
    assert environment(OMP_NUM_THREADS="6")["OMP_NUM_THREADS"] == "6"
    assert environment(TORCH_NCCL_ASYNC_ERROR_HANDLING="0")["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "0"
    alone = dataclasses.replace(WORLD, slots=(1, 1))
    assert "OMP_NUM_THREADS" not in environment(world=alone, place=Place(1, 0, 1))
    assert environment(RANK="17")["RANK"] == "3"


def test_devices() -> None:
    assert environment(CUDA_VISIBLE_DEVICES="4,5")["CUDA_VISIBLE_DEVICES"] == "4,5"
    on_cpu = dataclasses.replace(SPEC, device="cpu")
    assert environment(on_cpu, CUDA_VISIBLE_DEVICES="4,5")["CUDA_VISIBLE_DEVICES"] == ""
    virtual = dataclasses.replace(SPEC, virtual_local_rank=True)
    for visible, wanted in (("4,5", "5"), ("", "1")):
        got = environment(virtual, CUDA_VISIBLE_DEVICES=visible)
        assert (got["CUDA_VISIBLE_DEVICES"], got["LOCAL_RANK"]) == (wanted, "0")


def test_the_spec_adds_variables() -> None:
    assert environment(dataclasses.replace(SPEC, environment={"A": "b"}), A="a")["A"] == "b"


@pytest.mark.parametrize(("grace", "text"), [(30.0, "30"), (0.5, "0.5"), (0.0, "0"), (3600.0, "3600")])
def test_the_grace_is_plain_seconds(grace: float, text: str) -> None:
    assert environment(dataclasses.replace(SPEC, grace_s=grace))["LAUNCH_GRACE_S"] == text
