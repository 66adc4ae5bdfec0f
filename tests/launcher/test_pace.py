"""Ranks that are slower than the others, although all steps take equally long."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from launcher.history import read
from launcher.pace import Meter, Pace, Paces, Slow, every_s, summary
from launcher.progress import Beat

if TYPE_CHECKING:
    from pathlib import Path


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


def test_a_nodes_message_is_two_numbers_a_rank() -> None:
    message = summary([*(Pace(i, 0.1 + i / 3e6, 1 / 3) for i in range(192)), Pace(192, 0.2, 1.0, 0.5, 0.4)])
    assert len(json.dumps(message)) < 192 * 32
    assert (message["ranks"][7], message["own_s"][7], message["step_s"][7]) == (7, 0.1, 0.3333)
    assert list(message["shares"]) == ["192", "191", "190", "189"]
    assert message["shares"]["192"] == [0.5, 0.4]


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


@pytest.mark.parametrize("whole", [True, False])
def test_many_slow_ranks_do_not_take_turns(whole: bool) -> None:
    """Which of them are the slowest is another one at every look."""
    paces = Paces(0, 2)
    other = 0.2 if whole else 0.1  # else one rank of the node is as fast as the others
    found = []
    for look in range(12):
        ill = [0.2 + 0.01 * ((i * 5 + look * 3) % 7) for i in range(7)]
        found += hear(paces, 6.0 * look, node(*[0.1] * 16), node(*ill, other, first=16))
    assert [s.over for s in found] == [False] * len(found)
    if whole:
        (slow,) = found
        assert str(slow) == (
            "node 1 (host1): all its 8 ranks are slow: half of them need 230 ms of their own or more for each step, "
            "2.3 times the 100 ms of the median; a step takes 1.0 s"
        )
        assert paces.slow == list(range(16, 24))
    else:
        assert len(found) == 4
        assert set(paces.slow) == {s.pace.rank for s in found} <= set(range(16, 23))


def test_a_slow_node_speaks_for_its_ranks_until_it_keeps_up_again() -> None:
    paces = Paces(0, 2)
    well, one = node(0.1, 0.1, 0.1), node(0.3, 0.1, 0.1, first=3)
    both, most = node(0.3, 0.3, 0.3, first=3), node(0.3, 0.3, 0.1, first=3)
    told = []
    for look, second in enumerate([one] * 3 + [both] * 3 + [most] * 3 + [one] * 3 + [node(0.1, 0.1, 0.1, first=3)] * 3):
        told += [str(slow).partition(":")[0] for slow in hear(paces, 6.0 * look, well, second)]
    assert [text.partition(" is slow")[0] for text in told] == [
        "rank 3 on host1",
        "node 1 (host1)",
        "node 1 (host1) keeps up again",
        "rank 3 on host1",
        "rank 3 on host1 keeps up again",
    ]


def test_who_is_at_the_border_does_not_come_and_go() -> None:
    paces = Paces(0, 1)
    own = [0.2, 0.26, 0.26, *[0.24, 0.24, 0.26, 0.26] * 4]
    assert len([s for look, o in enumerate(own) for s in paces.told(0, "a", node(0.2, 0.2, o), 6.0 * look)]) == 1


def test_one_far_worse_than_those_named_is_named_too() -> None:
    paces = Paces(0, 1)
    ill = [0.2] * 6
    for look in range(3):
        paces.told(0, "a", node(*[0.1] * 9, *ill), 6.0 * look)
    assert len(paces.slow) == 4
    found = [s for look in range(3, 6) for s in paces.told(0, "a", node(*[0.1] * 9, *ill, 0.9), 6.0 * look)]
    assert [s.pace.rank for s in found] == [15]


def test_history_knows_who_is_slow_still(tmp_path: Path) -> None:
    """A node's word takes the place of its ranks'."""
    slow = [
        Slow(Pace(3, 0.3, 1.0), "b", 0.1),
        Slow(Pace(0, 0.3, 1.0), "a", 0.1),
        Slow(Pace(4, 0.3, 1.0), "b", 0.1, node=1, ranks=(3, 4)),
    ]
    events = [{"event": "attempt", "attempt": 0, "hosts": ["a", "b"], "world_size": 5, "time": 1.0}]
    events += [{"event": "slow", "attempt": 0, "time": 2.0, **s.to_json()} for s in slow]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    assert read(tmp_path).attempts[0].slow == {"rank 0": str(slow[1]), "node 1": str(slow[2])}
    with open(tmp_path / "events.jsonl", "a") as file:
        file.writelines(
            json.dumps({"event": "slow", "attempt": 0, "time": 3.0, **replace(one, over=True).to_json()}) + "\n"
            for one in slow[1:]
        )
    assert read(tmp_path).attempts[0].slow == {}


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
