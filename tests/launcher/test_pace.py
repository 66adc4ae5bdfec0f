"""Ranks that are slower than the others, although all steps take equally long."""

from __future__ import annotations

import re

import pytest

from launcher.pace import Meter, Pace, Paces, Slow, every_s, summary
from launcher.progress import Beat


def test_a_meter_tells_own_time_of_steps() -> None:
    meter = Meter(3)
    assert meter.look(None, 0.0) is None
    assert meter.look(Beat(10, 1, 100.0, 5.0), 100.0, (1.0, 0.0)) is None
    assert meter.look(Beat(12, 1, 102.0, 6.0), 102.0, (1.5, 0.5)) is None  # two steps say nothing
    assert meter.look(Beat(12, 2, 103.0, 6.0), 103.0, (1.5, 0.5)) is None  # it validates
    assert meter.look(Beat(20, 1, 110.0, 7.0), 110.0, (6.0, 2.0)) == Pace(3, 0.2, 1.0, 0.5, 0.2)
    assert meter.look(Beat(5, 1, 120.0, 1.0), 120.0) is None  # a second fit counts from its own begin
    assert meter.look(Beat(15, 1, 140.0, 6.0), 140.0) == Pace(3, 0.5, 2.0)


def test_a_program_that_tells_no_own_time_is_measured_by_its_steps() -> None:
    meter = Meter(0)
    meter.look(Beat(1, 1, 1.0), 1.0)
    assert meter.look(Beat(11, 1, 6.0), 6.0) == Pace(0, 0.5, 0.5)


def node(*own: float, first: int = 0, step: float = 1.0) -> dict[str, object]:
    return summary(Pace(first + i, s, step) for i, s in enumerate(own))


def test_a_nodes_message_does_not_grow_with_its_ranks() -> None:
    message = node(*(0.001 * i for i in range(192)))
    assert (message["ranks"], message["median_s"]) == (192, 0.095)
    assert [p["rank"] for p in message["slowest"]] == [191, 190, 189, 188]


def hear(paces: Paces, now: float, *messages: dict[str, object]) -> list[Slow]:
    return [s for i, m in enumerate(messages) for s in paces.told(i, f"host{i}", m, now + 0.001 * i)]


def test_a_slow_rank_is_named_once_and_it_is_told_when_that_is_over() -> None:
    paces = Paces(0, 2)
    well, ill = (node(0.2, 0.2), node(0.2, 0.21, first=2)), (node(0.2, 0.2), node(0.2, 0.5, first=2))
    assert hear(paces, 0.0, *well) == []
    assert hear(paces, 6.0, *ill) == []
    assert hear(paces, 12.0, *ill) == []  # once may be chance
    (slow,) = hear(paces, 18.0, *ill)
    assert (slow.pace.rank, slow.host, slow.median_s) == (3, "host1", 0.2)
    assert str(slow) == (
        "rank 3 on host1 is slow: each step needs 500 ms of its own, 2.5 times the 200 ms of the median; "
        "a step takes 1.0 s"
    )
    assert hear(paces, 24.0, *ill) == []
    assert hear(paces, 30.0, *well) == []
    assert hear(paces, 36.0, *well) == []
    (over,) = hear(paces, 42.0, *well)
    assert str(over) == "rank 3 on host1 keeps up again"


@pytest.mark.parametrize(
    "messages",
    [
        (node(0.2, 0.2), node(0.2, 0.24, first=2)),  # a little
        (node(0.002, 0.002), node(0.002, 0.02, first=2)),  # much, but of a step of a second nothing is lost by it
        (node(0.5, 0.5), node(0.5, 0.5, first=2)),
    ],
)
def test_who_is_not_slow(messages: tuple[dict[str, object], ...]) -> None:
    paces = Paces(0, 2)
    assert [s for now in range(0, 60, 6) for s in hear(paces, float(now), *messages)] == []


def test_of_two_ranks_the_slow_one_is_slow() -> None:
    paces = Paces(0, 1)
    (slow,) = [s for now in range(0, 60, 6) for s in paces.told(0, "a", node(0.1, 0.3), float(now))]
    assert slow.pace.rank == 1


def test_a_node_that_tells_rarely_is_not_forgotten() -> None:
    """Its steps are long: other nodes' messages in between say nothing about it."""
    paces = Paces(0, 2)
    found = []
    for now in range(0, 60, 6):
        found += paces.told(0, "a", node(0.2, 0.2), float(now))
        if now % 18 == 0:
            found += paces.told(1, "b", node(0.6, first=2), now + 0.1)
    assert [s.pace.rank for s in found] == [2]


def test_many_nodes_tell_less_often() -> None:
    assert [every_s(n) for n in (1, 500, 4000)] == [5.0, 5.0, 40.0]


SLOW = """
import os, subprocess, sys, time, torch, trainer
def throttle():
    os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
    return [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(3)]
class Data(torch.utils.data.Dataset):
    def __len__(self): return 10**6
    def __getitem__(self, i):
        if os.environ["RANK"] == "1":
            {data}
        return torch.randn(8), torch.randn(1)
class Model(trainer.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(8, 1)
    def training_step(self, batch, _):
        x, y = batch
        sum(range(200_000))  # what all ranks do
        return torch.nn.functional.mse_loss(self.net(x), y)
    def configure_optimizers(self): return torch.optim.SGD(self.parameters(), 0.01)
hogs = throttle() if os.environ["RANK"] == "1" and {throttled} else []
trainer.Trainer(accelerator="cpu", max_steps=10**6, logger=False, enable_progress_bar=False,
                enable_checkpointing=False).fit(Model(), torch.utils.data.DataLoader(Data(), 4))
"""


@pytest.mark.parametrize(
    ("data", "throttled"),
    [
        pytest.param("sum(range(400_000))", False, id="computes", marks=pytest.mark.slow),
        pytest.param("time.sleep(0.01)", False, id="sleeps", marks=pytest.mark.soak),
        pytest.param("pass", True, id="throttled", marks=pytest.mark.soak),
    ],
)
def test_a_slow_rank_is_named_while_it_trains(launch, data, throttled) -> None:
    script = launch.script(SLOW.format(data=data, throttled=throttled))
    job = launch.start("--procs", "2", "--run", "here", script)
    job.until(lambda: "is slow" in job.stderr, "rank 1 to be named", timeout=120)
    (told,) = re.findall(r"rank \d on \S+ is slow: .*", job.stderr)
    assert told.startswith("rank 1 on ")
    (event,) = [e for e in job.run.events if e["event"] == "slow"]
    assert (event["rank"], event["attempt"], event["told"]) == (1, 0, told)
    assert event["own_s"] > 1.25 * event["median_s"]
    assert told in " ".join(launch.ok("show", "here").stdout.split())
    launch.ok("cancel", "here")
    assert job.wait().returncode != 0
