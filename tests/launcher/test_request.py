"""Where a command line runs: here, as a job, in the allocation, as one node of a step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from launcher.errors import UsageError
from launcher.request import parse
from launcher.where import Surroundings, slurm_name

if TYPE_CHECKING:
    from pathlib import Path

DESK = Surroundings()
LOGIN = Surroundings(sbatch=True)
INSIDE = Surroundings(sbatch=True, job="7", nodes=3)
STEP = Surroundings(sbatch=True, job="7", nodes=3, step=True, tasks=2, step_nodes=2)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (tmp_path / "job.py").write_text("print(1)\n")


def ask(text: str, surroundings: Surroundings):
    return parse([*text.split(), "job.py"], surroundings)


@pytest.mark.parametrize(
    ("text", "surroundings", "where", "nodes"),
    [
        ("--procs 2", DESK, "here", 1),
        ("--procs 2", LOGIN, "here", 1),
        ("--nproc-per-node 2 --standalone", LOGIN, "here", 1),
        ("--nnodes 2 --rdzv-endpoint h:1", LOGIN, "meeting", 2),
        ("--nodes 2 --rdzv-endpoint h:1", LOGIN, "meeting", 2),
        ("--backend local --nodes 2", LOGIN, "here", 2),
        ("--nodes 1 --gpus 8", LOGIN, "job", 1),
        ("--nodes 2 --procs 4", LOGIN, "job", 2),
        ("--nodes 2:4", LOGIN, "job", 4),
        ("--nodes 2:4", INSIDE, "allocation", 3),
        ("--nodes 2 --spares 1", INSIDE, "allocation", 2),
        ("--spares 1", INSIDE, "allocation", 2),
        ("-d --procs 4", LOGIN, "job", 1),
        ("--partition p", LOGIN, "job", 1),
        ("--sbatch gres=x", LOGIN, "job", 1),
        ("--backend slurm", LOGIN, "job", 1),
        ("--procs 2", INSIDE, "allocation", 3),
        ("--nodes 2", INSIDE, "allocation", 2),
        ("--backend slurm --nodes 2", INSIDE, "job", 2),
        ("--standalone --procs 2", INSIDE, "here", 1),
        ("--procs 2", STEP, "step", 2),
        ("--procs 2", Surroundings(True, "7", 1, True, 1, 1), "here", 1),
    ],
)
def test_where(text: str, surroundings: Surroundings, where: str, nodes: int) -> None:
    request = ask(text, surroundings)
    assert (request.where, request.spec.nodes) == (where, nodes)
    assert (request.spec.slurm is not None) == (where in ("job", "allocation"))


@pytest.mark.parametrize(
    ("text", "surroundings", "says"),
    [
        ("--partition p", DESK, "--partition submits a Slurm job, but there is no sbatch"),
        ("--backend slurm", DESK, "no sbatch on"),
        ("--backend local --partition p", LOGIN, "--partition is for a Slurm job"),
        ("--nodes 2", DESK, "there is no cluster scheduler"),
        ("--nnodes 2", LOGIN, "say --nodes 2"),
        ("--gpus 2", LOGIN, "add --nodes 1 to submit"),
        ("--gpus all --nodes 1", LOGIN, "on other hosts it must be a number"),
        ("--nodes 4", INSIDE, "4 nodes: the allocation that this is in has 3"),
        ("--spares 3", INSIDE, "0 nodes, 3 spares"),
        ("--nodes 4:5", INSIDE, "4 nodes: the allocation that this is in has 3"),
        ("--nodes 3 --spares 1", INSIDE, "4 nodes: the allocation that this is in has 3"),
        ("--nodes 1:2", STEP, "--nodes 1:2: srun starts all nodes of its step at once"),
        ("--nodes 1", STEP, "srun started this on 2; leave --nodes out"),
        ("--time 5", INSIDE, "inside job 7"),
        ("--procs 2", Surroundings(True, "7", 2, True, 8, 2), "srun --ntasks-per-node=1"),
        ("--backend slurm --nodes 2 --node-rank 1", LOGIN, "Slurm starts all nodes"),
        ("--nodes 1 --time soon", LOGIN, "--time 'soon' is no length of time"),
        ("--nodes 1 --cpus-per-rank 0", LOGIN, "--cpus-per-rank 0"),
        ("--nodes 1 --max-timeouts -1", LOGIN, "--max-timeouts is -1"),
        ("--nodes 1 --stop-lead -1", LOGIN, "--stop-lead is -1"),
        ("--nodes 1 --sbatch output=x", LOGIN, "launch sets output itself"),
        ("--nodes 1 --sbatch =x", LOGIN, "give the long name"),
    ],
)
def test_refused(text: str, surroundings: Surroundings, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        ask(text, surroundings)
    assert says in str(caught.value)


def test_what_sbatch_is_asked_for() -> None:
    slurm = ask(
        "--nodes 2 --gpus 4 --cpus-per-rank 8 --mem 9G --job-name j --sbatch mail-type=END --sbatch exclusive "
        "--sbatch gres=gpu:h100:4 --setup true --requeue resubmit --max-timeouts 3 --stop-lead 7.5", LOGIN,
    ).spec.slurm  # fmt: skip
    assert slurm is not None
    assert slurm.options == {
        "nodes": 2, "ntasks-per-node": 1, "cpus-per-task": 32, "gres": "gpu:h100:4", "mem": "9G", "job-name": "j",
        "mail-type": "END", "exclusive": True,
    }  # fmt: skip
    assert (slurm.setup, slurm.requeue, slurm.max_timeouts, slurm.stop_lead_s) == (("true",), "resubmit", 3, 7.5)


def test_surroundings_are_read_from_what_slurm_sets() -> None:
    batch = {"SLURM_JOB_ID": "5", "SLURM_JOB_NUM_NODES": "2", "SLURM_PROCID": "0"}
    inside = Surroundings.of(batch)
    assert (inside.job, inside.nodes, inside.step) == ("5", 2, False)
    step = batch | {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "2"}
    assert Surroundings.of(step).step
    assert not Surroundings.of(batch | {"SLURM_STEP_ID": "4294967290"}).step  # salloc's own shell
    assert not Surroundings.of({}).step
    assert (slurm_name(batch), slurm_name(step)) == ("5", "5.0")
    element = batch | {"SLURM_ARRAY_JOB_ID": "3", "SLURM_ARRAY_TASK_ID": "4"}
    assert slurm_name(element) == "3_4"


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("--nodes 3", {"nodes": 3, "ntasks-per-node": 1}),
        ("--nodes 2:3", {"nodes": "2-3", "no-kill": True}),
        ("--nodes 2:3 --spares 1", {"nodes": "2-4", "no-kill": True}),
        ("--nodes 3 --spares 1", {"nodes": 4, "ntasks-per-node": 1, "no-kill": True}),
    ],
)
def test_what_slurm_is_asked_for_where_nodes_may_come_and_go(text: str, options: dict) -> None:
    slurm = ask(text, LOGIN).spec.slurm
    assert slurm is not None
    assert slurm.options == options | {"cpus-per-task": 1}
