"""Who am I: the environments of launch, torchrun, srun, a person and nobody."""

from __future__ import annotations

import pytest

from trainer.errors import RanksError
from trainer.ranks import Ranks, first_host, rank_zero_info, rank_zero_only, rank_zero_warn, read_ranks

TORCHRUN = {
    "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "1",
    "GROUP_WORLD_SIZE": "2",
    "MASTER_ADDR": "node1", "MASTER_PORT": "29500", "TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_RESTART_COUNT": "3",
}  # fmt: skip
LAUNCH = TORCHRUN | {
    "LAUNCH_RUN_ID": "swift-owl", "LAUNCH_RUN_DIR": "/runs/swift-owl", "LAUNCH_ATTEMPT": "4", "LAUNCH_GRACE_S": "30.5",
    "LAUNCH_PROGRESS": "/dev/shm/p5",
}  # fmt: skip
SRUN = {
    "SLURM_JOB_ID": "1234", "SLURM_STEP_ID": "2", "SLURM_PROCID": "6", "SLURM_LOCALID": "2", "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "7", "SLURM_NTASKS": "12", "SLURM_STEP_NUM_NODES": "2", "SLURM_NNODES": "3",
    "SLURM_STEP_TASKS_PER_NODE": "4,3", "SLURM_STEP_NODELIST": "gpu[03-05,9],login", "SLURM_JOB_NODELIST": "other",
}  # fmt: skip


def test_launch_and_torchrun():
    common = {
        "rank": 5, "world_size": 8, "local_rank": 1, "local_world_size": 4, "node_rank": 1, "num_nodes": 2,
        "master_addr": "node1", "master_port": 29500, "restart_count": 3,
    }  # fmt: skip
    assert read_ranks(TORCHRUN) == Ranks(**common, started_by="torchrun")
    assert read_ranks(LAUNCH) == Ranks(
        **common, started_by="launch", run_id="swift-owl", run_dir="/runs/swift-owl", attempt=4, grace_s=30.5,
        progress_page="/dev/shm/p5",
    )  # fmt: skip
    # Under srun, the launcher's word goes before Slurm's.
    assert read_ranks(SRUN | TORCHRUN).started_by == "torchrun"


def test_srun():
    found = read_ranks(SRUN)
    assert found.started_by == "slurm"
    assert (found.rank, found.world_size, found.local_rank, found.local_world_size) == (6, 7, 2, 3)
    assert (found.node_rank, found.num_nodes, found.master_addr) == (1, 2, "gpu03")
    assert 12000 <= found.master_port < 32000
    # The same port on every task, another one in another step.
    assert (
        read_ranks(SRUN | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}).master_port
        == found.master_port
    )
    assert read_ranks(SRUN | {"SLURM_STEP_ID": "3"}).master_port != found.master_port
    assert read_ranks(SRUN | {"MASTER_ADDR": "head", "MASTER_PORT": "5"}).master_addr == "head"


@pytest.mark.parametrize(
    "change",
    [
        {"SLURM_STEP_ID": ""},  # the batch script itself
        {"SLURM_STEP_ID": "4294967290"},  # salloc's interactive step
        {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"},
    ],
)
def test_slurm_that_started_no_ranks(change):
    assert read_ranks(SRUN | change) == Ranks()


def test_alone_and_by_hand():
    assert read_ranks({"PATH": "/bin"}) == Ranks() == Ranks(rank=0, world_size=1, started_by="python")
    by_hand = read_ranks({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"})
    assert by_hand.started_by == "environment"
    assert (by_hand.local_rank, by_hand.local_world_size, by_hand.num_nodes) == (1, 2, 1)
    by_hand = read_ranks({"RANK": "5", "WORLD_SIZE": "6", "LOCAL_WORLD_SIZE": "4"})
    assert (by_hand.local_rank, by_hand.node_rank, by_hand.num_nodes) == (1, 1, 2)


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"RANK": "0"}, "RANK=0 is set but WORLD_SIZE is not"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 is set but RANK is not"),
        (TORCHRUN | {"RANK": "8"}, r"RANK=8 is outside 0 to 7 \(WORLD_SIZE=8\)"),
        (TORCHRUN | {"LOCAL_RANK": "4"}, r"LOCAL_RANK=4 is outside 0 to 3"),
        (TORCHRUN | {"GROUP_RANK": "2"}, r"GROUP_RANK=2 is outside 0 to 1"),
        (TORCHRUN | {"WORLD_SIZE": "3", "RANK": "1"}, "LOCAL_WORLD_SIZE=4 is more than WORLD_SIZE=3"),
        (TORCHRUN | {"RANK": "five"}, "RANK='five' is not a whole number"),
        (LAUNCH | {"LAUNCH_GRACE_S": "soon"}, "LAUNCH_GRACE_S='soon' is not a number of seconds"),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "4*2"}, "not of Slurm's form"),
    ],
)
def test_contradictions(environ, message):
    with pytest.raises(RanksError, match=message):
        read_ranks(environ)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("a", "a"), ("a,b", "a"), ("n[7]", "n7"), ("n[007-9,3],m", "n007"), ("r[1-2]n[05-06]-ib,x", "r1n05-ib")],
)
def test_first_host(nodes, first):
    assert first_host(nodes) == first


def test_rank_zero_only(monkeypatch, capsys):
    @rank_zero_only
    def where():
        return "here"

    assert (where(), rank_zero_only.rank) == ("here", 0)
    rank_zero_info("once")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert (where(), rank_zero_only.rank) == (None, 1)
    rank_zero_info("twice")
    rank_zero_warn("nobody hears it")
    assert capsys.readouterr().err == "once\n"
    monkeypatch.setenv("RANK", "0")
    with pytest.warns(UserWarning, match="heard"):
        rank_zero_warn("heard")
