"""What a run's ranks did over time, recorded in bounded room."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from launcher.pace import Pace, Taken, summary
from launcher.progress import Progress
from launcher.samples import Recorder, read

if TYPE_CHECKING:
    from pathlib import Path

MIB = 1 << 20


def told(ranks: range, own: float = 0.1, **more: int) -> dict[str, object]:
    return summary(
        [Pace(r, own + r / 1000, 1.0) for r in ranks],
        [Taken(r, (100 + r) * MIB) for r in ranks],
        Progress(step=more["step"], saved=more.get("saved"), save_s=2.0, stall_s=0.5) if more else None,
    )


def test_a_line_holds_the_worst_of_its_time(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, ranks=4, nodes=2)
    recorder.take(0, told(range(2), step=3), 0.0)
    recorder.take(0, told(range(2), own=0.3, step=5, saved=4), 3.0)
    recorder.take(0, told(range(2), own=0.2, step=6), 4.8)  # writes the line of what came before
    recorder.take(1, told(range(2, 4)), 5.0)  # another attempt
    recorder.close(6.0)
    first, second, third = read(tmp_path)
    assert (first.attempt, first.seconds, first.each, first.step, first.save) == (0, 4.8, 1, 5, (4, 2.0, 0.5))
    assert first.rows == {"own_s": [0.3, 0.301, None, None], "step_s": [1.0, 1.0, None, None],
                          "rss": [100.0, 101.0, None, None]}  # fmt: skip
    assert (second.step, second.save, second.rows["own_s"][0]) == (6, None, 0.2)
    assert (third.attempt, third.rows["rss"]) == (1, [None, None, 102.0, 103.0])


def test_a_hundred_thousand_ranks_for_a_month_are_a_few_megabytes(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, ranks=100_000, nodes=4000)
    one = told(range(100_000))
    for second in range(0, 30 * 86400, 600):  # each stands for all the messages of its time
        recorder.take(0, {**one, "ranks": [], "own_s": [], "step_s": [], "alive": [], "rss": [], "gpu": []}, second)
        if second < 6000:
            recorder.take(0, one, second + 1.0)
    found = list(read(tmp_path))
    assert len(found[1].rows["own_s"]) == 256
    assert found[1].each == 391
    assert found[1].rows["own_s"][:2] == [0.49, 0.881]  # the worst of 391
    line = max(len(text) for text in (tmp_path / "samples.jsonl").read_text().splitlines())
    assert len(found) * line < 10e6


def test_a_full_disk_ends_the_record_and_not_the_run(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "absent", ranks=2, nodes=1)
    recorder.take(0, told(range(2)), 0.0)
    recorder.take(0, told(range(2)), 10.0)
    recorder.close(20.0)
    assert list(read(tmp_path / "absent")) == []


def test_a_line_that_was_cut_is_passed_over(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, ranks=2, nodes=1)
    recorder.take(0, told(range(2)), 0.0)
    recorder.close(5.0)
    with open(tmp_path / "samples.jsonl", "a") as file:
        file.write(json.dumps({"attempt": 1})[:-1] + "\n")
    assert [s.attempt for s in read(tmp_path)] == [0]


@pytest.mark.slow
def test_what_a_run_does_is_recorded(launch) -> None:
    """A program that fills its page by hand, and has made a checkpoint."""
    script = launch.script(
        "import mmap, os, struct, time\nfrom pathlib import Path\n"
        "with open(os.environ['LAUNCH_PROGRESS'], 'r+b') as file:\n    page = mmap.mmap(file.fileno(), 128)\n"
        "struct.pack_into('<QQIIQ', page, 0, 0x4D55535445520002, 5, 1, 0, time.monotonic_ns())\n"
        "struct.pack_into('<Qd', page, 40, 3, 2.5)\nstruct.pack_into('<d', page, 72, 0.25)\n"
        "print('up', flush=True)\nwhile not Path('go').exists(): time.sleep(0.01)\n"
    )
    job = launch.start("--procs", "2", "--preload", "json", "--show-ranks", "all", "--run", "here", script)
    job.says("up", 2)
    job.until(lambda: list(read(job.run.path)), "a line of samples", timeout=60)
    (launch.cwd / "go").touch()
    assert job.wait().returncode == 0
    first = next(read(job.run.path))
    assert (first.attempt, first.each, first.step, first.save) == (0, 1, 5, (3, 2.5, 0.25))
    assert len(first.rows["rss"]) == 2
    assert all(value is not None and value > 1 for value in first.rows["rss"])


def test_a_later_launch_of_the_run_knows_how_long_the_record_is(tmp_path: Path) -> None:
    (tmp_path / "samples.jsonl").write_text("{}\n" * 7)
    assert Recorder(tmp_path, ranks=1, nodes=1)._lines == 7
