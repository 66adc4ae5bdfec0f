"""What a run's ranks do and take, while somebody watches."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from typing import TYPE_CHECKING

import pytest

from launcher.commands.top import screen
from launcher.nvml import of_rank
from launcher.progress import Beat
from launcher.vitals import ANSWER, REQUEST, Audience, Rate, gathered, memory_of

if TYPE_CHECKING:
    from pathlib import Path


def row(rank: int, **more: object) -> dict[str, object]:
    return {"rank": rank, "pid": 100 + rank, "rss": 1 << 20, "host": "a"} | more


def test_rates_are_those_between_two_questions() -> None:
    rate = Rate()
    assert rate.look(Beat(10, 1, 100.0)) is None
    assert rate.look(Beat(30, 1, 110.0)) == 2.0
    assert rate.look(Beat(30, 1, 110.0)) == 2.0  # a step that takes longer than the pause between two questions
    assert rate.look(Beat(31, 1, 120.0)) == 0.1
    assert rate.look(Beat(1, 1, 121.0)) is None


def test_who_failed_or_is_behind_comes_first() -> None:
    rows = [row(0, step=5, age_s=0.1, rate=1.0), row(1, step=4, age_s=0.1, rate=2.0), row(2, exit=-9, step=None),
            row(3, step=5, age_s=9.0, rate=3.0)]  # fmt: skip
    told = gathered(rows, 3)
    assert [r["rank"] for r in told["rows"]] == [2, 1, 3]
    assert (told["ranks"], told["rss"], told["step"], told["rate"]) == (4, 4 << 20, [4, 5], 2.0)


def test_memory_is_that_of_a_tree() -> None:
    own = memory_of(os.getpid())
    assert own > 1 << 20
    assert memory_of(2**22 + 1) == 0


def ask(folder: Path, who: str, signals: int) -> None:
    (folder / REQUEST).write_text(json.dumps({"who": who, "signals": signals, "time": time.time()}))


def test_an_audience_is_asked_for_and_forgotten(tmp_path: Path) -> None:
    audience = Audience(tmp_path)
    assert not audience.called(0.0)  # a signal alone asks for stacks
    ask(tmp_path, "me", 1)
    assert audience.called(0.0)
    assert not audience.called(0.0)  # the second one was somebody's who wants stacks
    ask(tmp_path, "you", 1)
    assert audience.called(0.0)
    ask(tmp_path, "me", 1)
    assert not audience.called(0.0)  # however many watch
    assert audience.due == 0.0
    assert audience.ask(0.0, {0, 1}) == ({0, 1}, 2048)
    assert not audience.answered(0, "a", gathered([row(0, step=7)], 9))
    assert not audience.answered(0, "a", gathered([row(0, step=7)], 9))  # it was not asked twice
    assert audience.answered(1, "b", gathered([row(1, step=8)], 9))
    audience.write({"slow": [1]})
    told = json.loads((tmp_path / ANSWER).read_text())
    assert (told["ranks"], told["step"], [(r["rank"], r["host"]) for r in told["rows"]]) == (
        2,
        [7, 8],
        [(1, "b"), (0, "a")],
    )
    assert audience.due == 1.0
    audience.ask(1.0, {0, 1})
    assert audience.unwritten
    audience.write({"slow": []})
    assert json.loads((tmp_path / ANSWER).read_text())["silent_nodes"] == [0, 1]
    assert audience.ask(50.0, {0}) == ({0}, 4096)
    ask(tmp_path, "me", 1)  # renewed; the clock of the file is another
    (tmp_path / REQUEST).write_text((tmp_path / REQUEST).read_text() + " ")
    assert audience.ask(55.0, {0})[0] == {0}
    assert audience.ask(116.0, {0}) == (set(), 0)
    assert list(tmp_path.iterdir()) == []
    assert audience.due is None


def test_many_nodes_are_asked_less_often_and_tell_less(tmp_path: Path) -> None:
    audience = Audience(tmp_path)
    ask(tmp_path, "me", 1)
    assert audience.called(0.0)
    asked, most = audience.ask(0.0, range(4000))
    assert (len(asked), most, audience.due) == (4000, 1, 20.0)


def test_the_gpu_of_a_rank() -> None:
    gpus = [{"index": i, "uuid": f"GPU-{i}f"} for i in range(4)]
    assert of_rank(gpus, None, 1) == gpus[1]
    assert of_rank(gpus, "2,3", 1) == gpus[3]
    assert of_rank(gpus, "GPU-2f", 0) == gpus[2]
    for visible, local in (("", 0), ("7", 0), ("0,1", 2), (None, 9)):
        assert of_rank(gpus, visible, local) is None


def test_a_screen_fits() -> None:
    rows = [row(0, exit=-9, step=None), row(7, step=90, rate=1.234, age_s=3.21, phase="train", line="x" * 200),
            *(row(8 + i, step=100, rate=2.0, age_s=0.1, phase="train",
                  gpu={"use": 97, "used": 3 << 30, "total": 80 << 30}) for i in range(100))]  # fmt: skip
    answer = {"attempt": 2, "phase": "running", "hosts": ["a", "b"], "slow": [7], "ranks": 5000, "rss": 3 << 30,
              "step": [90, 100], "rate": 2.0, "silent_nodes": [1], "rows": rows}  # fmt: skip
    text = screen("run-1", answer, 80, 24)
    assert len(text) <= 24
    assert max(map(len, text)) <= 80
    assert text[0] == "run-1  attempt 2, running, 5000 ranks on 2 nodes, steps 90 to 100, 2 steps/s, 3…"
    assert text[1] == "node 1 did not answer"
    assert text[2].startswith("rank 7 (*) holds up the others")
    failed, slow, other = text[5:8]
    assert failed.split()[:4] == ["!", "0", "a", "exit"]
    assert slow.split()[:9] == ["*", "7", "a", "train", "90", "1.23", "3.2s", "1.0M", "-"]
    assert "97% 3.0G/80G" in other
    drawn = screen("r", answer | {"rows": [row(0, step=1, line="\x1b[32m 10%\r\x1b[1m 20%\tdone\x1b[0m\r")]}, 80, 24)
    assert drawn[-2].endswith("1.0M   20% done")
    assert text[-1] == f"  and {5000 - 18} more, none of them behind these"


STEPPER = """
import mmap, os, struct, time
from pathlib import Path
with open(os.environ["LAUNCH_PROGRESS"], "r+b") as file:
    page = mmap.mmap(file.fileno(), 128)
struct.pack_into("<QQIIQ", page, 0, 0x4D55535445520002, 5, 1, 0, time.monotonic_ns())
print("up", flush=True)
while not Path("go").exists():
    struct.pack_into("<Q", page, 8, struct.unpack_from("<Q", page, 8)[0] + 1)
    struct.pack_into("<Q", page, 24, time.monotonic_ns())
    time.sleep(0.01)
"""


# A stand-in for NVIDIA's library, by the prototypes of nvml.h: two GPUs, of which the second does not tell its use.
NVML = """
#include <stdio.h>
static char gpus[2];
int nvmlInit_v2(void) { return 0; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 2; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) { *device = &gpus[index]; return 0; }
int nvmlDeviceGetUUID(void *device, char *uuid, unsigned length) {
    return snprintf(uuid, length, "GPU-%d", (int)((char *)device - gpus)) < 0;
}
int nvmlDeviceGetMemoryInfo(void *device, unsigned long long *memory) {
    memory[0] = 80ull << 30; memory[2] = ((char *)device - gpus + 1ull) << 30; memory[1] = memory[0] - memory[2];
    return 0;
}
int nvmlDeviceGetUtilizationRates(void *device, unsigned *use) { use[0] = 97; return device == gpus ? 0 : 3; }
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler for the stand-in")
def test_gpus_are_watched(launch, tmp_path) -> None:
    library = tmp_path / "libnvidia-ml.so.1"
    subprocess.run(["cc", "-shared", "-fPIC", "-x", "c", "-o", library, "-"], input=NVML, text=True, check=True)
    script = launch.script(STEPPER)
    job = launch.start(
        "--nproc-per-node", "2", "--preload", "json", "--show-ranks", "all", "--run", "here", script,
        env={"LD_LIBRARY_PATH": str(tmp_path)},
    )  # fmt: skip
    job.says("up", 2)
    told = json.loads(launch.ok("top", "here", "--json").stdout)
    assert {r["rank"]: (r["gpu"]["use"], r["gpu"]["used"] >> 30, r["gpu"]["total"] >> 30) for r in told["rows"]} == {
        0: (97, 1, 80), 1: (None, 2, 80),
    }  # fmt: skip
    text = launch.ok("top", "here").stdout
    assert "97% 1.0G/80G" in text
    assert "? 2.0G/80G" in text
    (launch.cwd / "go").touch()
    assert job.wait().returncode == 0


def test_a_run_is_watched_and_goes_on(launch) -> None:
    job = launch.start(
        "--procs", "2", "--preload", "json", "--show-ranks", "all", "--run", "here", launch.script(STEPPER)
    )
    job.says("up", 2)
    told = json.loads(launch.ok("top", "here", "--json").stdout)
    assert (told["ranks"], told["phase"], told["silent_nodes"]) == (2, "running", [])
    assert all(r["rate"] > 0 and r["rss"] > 1 << 20 and r["line"] == "up" and r["age_s"] < 60 for r in told["rows"])
    assert "ranks 0-1" in launch.ok("stacks", "here").stdout  # also while somebody watches
    text = launch.ok("top", "here").stdout.splitlines()
    assert text[0].startswith("here  attempt 0, running, 2 ranks on 1 node, step")
    assert [line.split()[2] for line in text[3:]] == ["train", "train"]
    (launch.cwd / "go").touch()
    assert job.wait().returncode == 0
    assert not [name for name in (REQUEST, ANSWER) if (job.run.path / name).exists()]
    ended = launch("top", "here")
    assert ended.returncode == 2
    assert "is finished: only a run that runs can be watched" in ended.stderr
