"""The index of a person's runs: names and job ids to folders, whoever writes at the same time."""

from __future__ import annotations

import stat
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from launcher import index
from launcher.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state"


def make(folder: Path, record: str = "run.json") -> Path:
    folder.mkdir(parents=True)
    (folder / record).write_text("{}")
    return folder


def test_newest_first_and_deleted_folders_are_passed_over(tmp_path: Path, state: Path) -> None:
    runs = [make(tmp_path / "runs" / name) for name in "abc"]
    for number, run in enumerate(runs):
        assert index.register(run, 1000.5 + number) is None
    assert [e.folder.name for e in index.entries()] == ["c", "b", "a"]
    (runs[1] / "run.json").unlink()
    assert [e.folder.name for e in index.entries()] == ["c", "a"]
    # Older than 30 days and gone: forgotten for good.
    assert len(list(index.place().iterdir())) == 2
    assert stat.S_IMODE(index.place().stat().st_mode) == 0o700
    (index.place() / "000000001000500-0123456789ab.json").write_text("{half a rec")
    assert [e.folder.name for e in index.entries()] == ["c", "a"]


def test_a_run_is_one_entry_however_often_it_is_submitted(tmp_path: Path) -> None:
    run = make(tmp_path / "elsewhere" / "train")
    for job in (None, "12", "40", "12"):
        index.register(run, 5e9, job)
    assert [(e.folder, e.jobs) for e in index.entries()] == [(run, ("40", "12"))]
    assert index.find("40", tmp_path) == index.find("train", tmp_path) == index.Found(run)


def test_what_a_text_names(tmp_path: Path) -> None:
    one, two = make(tmp_path / "x" / "runs" / "same"), make(tmp_path / "y" / "runs" / "same")
    array = make(tmp_path / "x" / "runs" / "sweep_2", "array.json")
    for number, run in enumerate((one, two, array)):
        index.register(run, 5e9 + number, str(70 + number))
    assert index.find("same", tmp_path / "x") == index.Found(one)  # here wins
    with pytest.raises(UsageError, match=f"names 2 runs.*{two}, {one}"):
        index.find("same", tmp_path)
    assert index.find("../y/runs/same", tmp_path / "x") == index.Found(two)
    assert index.find("72_14", tmp_path) == index.find("sweep_2_14", tmp_path) == index.Found(array, 14)
    assert index.find("sweep_2_3", tmp_path / "x") == index.Found(array, 3)
    assert index.find("sweep_2", tmp_path) == index.Found(array)
    for text in ("nobody", "99", "same_1", "./same"):
        with pytest.raises(UsageError, match=r"no run|not the folder of a run"):
            index.find(text, tmp_path)


def test_many_writers(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from launcher import index\n"
        "for n in range(50):\n"
        "    folder = Path(sys.argv[1]) / f'{sys.argv[2]}-{n}'; folder.mkdir(); (folder / 'run.json').touch()\n"
        "    assert index.register(folder, 5e9) is None\n"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, tmp_path, str(i)]) for i in range(4)]
    while any(writer.poll() is None for writer in writers):
        list(index.entries())  # a reader beside them sees whole entries or none
    assert [writer.returncode for writer in writers] == [0] * 4
    assert len(list(index.entries())) == 200
    assert not [p for p in index.place().iterdir() if p.suffix == ".tmp"]


def test_a_home_that_cannot_be_written_is_told_and_no_reason_not_to_run(tmp_path: Path, state: Path) -> None:
    state.write_text("a file where the folder should be")
    said = index.register(make(tmp_path / "run"), 5e9)
    assert said is not None
    assert "launch ls will not show this run" in said
    assert list(index.entries()) == []


def test_launch_runs_without_an_index_and_says_so(launch, state: Path) -> None:
    state.write_text("in the way")
    done = launch.ok("--no-preload", "--run", "mine", launch.script("print('hi')"))
    assert "launch ls will not show this run" in done.stderr
    assert "hi" in done.stdout
