"""A run as one page: what it shows, that nothing in it can act, and that no secret is in it."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from launcher.commands.report import run
from launcher.pace import Pace, Taken, summary
from launcher.progress import Progress
from launcher.report import curves
from launcher.report.charts import Bar, Series, heat_map, lines, number, timeline
from launcher.report.gathering import Part
from launcher.report.page import _overlaid, _table_of
from launcher.samples import Recorder
from launcher.scrub import HIDDEN, arguments, scrubbed

if TYPE_CHECKING:
    from pathlib import Path

HOSTILE = "</title></style><script>alert(1)</script><img src=x onerror='alert(2)'>\"'&<b>"
SECRETS = ("hunter2", "9876543", "hf_" + "a" * 30, "sk-" + "b" * 30, "AKIA" + "C" * 16, "pa55word")


# ------------------------------------------------------------------------------------------------ secrets


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("--token=hunter2", f"--token={HIDDEN}"),
        ('wandb_api_key: "hunter2"', f"wandb_api_key: {HIDDEN}"),
        ('{"password": "hunter2", "lr": 1}', f'{{"password": {HIDDEN}, "lr": 1}}'),
        ("+AWS_SECRET_ACCESS_KEY=hunter2", f"+AWS_SECRET_ACCESS_KEY={HIDDEN}"),
        ("s3://key:hunter2@host/x", f"s3://{HIDDEN}@host/x"),
        ("x hf_" + "a" * 30, f"x {HIDDEN}"),
        ("-----BEGIN RSA PRIVATE KEY-----\nabc\n-----END RSA PRIVATE KEY-----\nx", f"{HIDDEN}\nx"),
        ("max_tokens=2048 token=5 tokenizer=gpt2", "max_tokens=2048 token=5 tokenizer=gpt2"),
        ("token = tokenizer.next(x)", "token = tokenizer.next(x)"),
        ("pad_token='<pad>'", "pad_token='<pad>'"),
        ("key=lambda x: x, password=None", "key=lambda x: x, password=None"),
        ("DB_PASSWORD=123456", f"DB_PASSWORD={HIDDEN}"),
        ('api_key: str | None = "hunter2"', f"api_key: str | None = {HIDDEN}"),
        (r'{"password": "hun\"ter2", "lr": 1}', f'{{"password": {HIDDEN}, "lr": 1}}'),
        ("password='hunter2", f"password={HIDDEN}"),
        ("https://x.org/?q=1&access_token=hunter2&z=3", f"https://x.org/?q=1&access_token={HIDDEN}&z=3"),
        ("redis://:hunter2@host", f"redis://{HIDDEN}@host"),
        ("curl -H 'Authorization: Bearer hunter2hunter2'", f"curl -H 'Authorization: {HIDDEN}'"),
        ("sent Bearer hunter2hunter2 to it", f"sent Bearer {HIDDEN} to it"),
        ("-d @- https://hooks.slack.com/services/T0/B0/x y", f"-d @- https://hooks.slack.com/{HIDDEN} y"),
        ("https://discord.com/api/webhooks/1/x", f"https://discord.com/api/webhooks/{HIDDEN}"),
    ],
)
def test_what_looks_like_a_secret_is_hidden(text: str, shown: str) -> None:
    assert scrubbed(text) == shown
    assert scrubbed(shown) == shown


def test_an_option_and_its_secret_may_be_two_words() -> None:
    words = ["--api-key", "hunter2", "--lr", "0.1", "--token", "--seed", "3", "url=http://a:b@c"]
    assert arguments(words) == [
        "--api-key", HIDDEN, "--lr", "0.1", "--token", "--seed", "3", f"url=http://{HIDDEN}@c",
    ]  # fmt: skip


@pytest.mark.parametrize("word", ["--password -geheim", "X_TOKEN=abc(def", "Y_SECRET=one two three", "--token=12345"])
def test_all_of_an_options_secret_is_hidden(word: str) -> None:
    shown = " ".join(arguments(word.split(" ") if word.startswith("-") else [word]))
    assert shown.endswith(HIDDEN)
    assert len(shown) == len(word.partition("=")[0].split(" ")[0]) + 1 + len(HIDDEN)


@pytest.mark.parametrize(
    "text",
    ["_" * 10**5, "a_" * 10**5, "a." * 10**5, "eyJ-" * 10**5, "Zm9_dGhl-cXVp" * 10**4, "token=" * 10**5 + "(",
     "token=" + "x" * 10**5 + "(", "token='x token=\"" * 10**4, "a" + " " * 10**5, "://a:" * 10**5,
     "-----BEGIN " * 10**4, "authorization:'" * 10**4],
    ids=lambda text: text[:12],
)  # fmt: skip
def test_a_long_text_takes_no_longer_than_it_is_long(text: str) -> None:
    """Where a pattern had two ways to match, this would not end today."""
    assert isinstance(scrubbed(text), str)


# ------------------------------------------------------------------------------------------------ charts


def test_a_chart_has_round_numbers_units_and_every_point() -> None:
    drawn = lines("loss", [Series("loss", [(0, 0.1), (50, math.nan), (100, 0.9)])], x="step", y="nats")
    for shown in (">0.2<", ">0.8<", ">100<", ">step<", "<small>nats</small>", 'aria-label="loss"'):
        assert shown in drawn
    assert drawn.count("<circle") == 2
    assert drawn.count("M") == 2  # the line is broken where there is no number
    assert lines("none", [Series("none", [(1, math.nan), (2, math.inf)])], x="", y="") == ""
    assert "<svg" in lines("flat", [Series("flat", [(3, 0.0)])], x="", y="")


ANY = st.floats(allow_nan=True, allow_infinity=True)


@given(st.lists(st.tuples(ANY, ANY), max_size=5), st.booleans(), st.booleans())
@example([(0.0, -1e20)], False, False)
@example([(1e17, 1e308), (1e17, -1e308)], False, True)
@example([(0.0, 5e-324), (1.0, 0.0)], True, False)
def test_whatever_was_logged_is_drawn_or_left_out(
    points: list[tuple[float, float]], zero: bool, time_axis: bool
) -> None:
    drawn = lines("a", [Series("a", points)], x="x", y="y", zero=zero, time_axis=time_axis, smooth=True)
    assert not re.search(r'"[^"]*\b(?:nan|inf)\b', drawn.replace('aria-label="a"', ""))


def test_a_spike_is_seen_in_a_million_points() -> None:
    drawn = lines("a", [Series("a", [(i, float(i == 777_777)) for i in range(1_000_000)])], x="", y="")
    assert len(drawn) < 20_000
    (path,) = [part for part in drawn.split('d="')[1:] if part.startswith("M")]
    assert min(float(pair.split()[1]) for pair in path.partition('"')[0][1:].split("L")) < 30


def test_noise_is_smoothed_and_a_course_is_not() -> None:
    course = [(float(i), math.cos(i / 100)) for i in range(300)]
    noise = [(x, y + (-1) ** int(x)) for x, y in course]
    assert "faint" not in lines("a", [Series("a", course)], x="", y="", smooth=True)
    assert lines("a", [Series("a", noise)], x="", y="", smooth=True).count('class="line s0') == 2


def test_numbers_are_short() -> None:
    assert [number(v) for v in (0, 0.00012345, 3.14159, 1234.5, 56789, 7.1e6, -2e9)] == [
        "0", "0.000123", "3.14", "1234", "56.8k", "7.1M", "-2G",
    ]  # fmt: skip


def test_neighbours_of_one_colour_are_one_rectangle() -> None:
    times = [(float(i), i + 1.0) for i in range(100)]
    drawn = heat_map("h", "", ["rank 0"], times, [[1.0] * 50 + [None] * 10 + [9.0] * 40], str)
    assert drawn.count("<rect") == 2 * 2  # for wide and for narrow pages
    assert heat_map("h", "", ["rank 0"], times, [[None] * 100], str) == ""


def test_texts_in_charts_are_escaped() -> None:
    drawn = lines(HOSTILE, [Series(HOSTILE, [(0, 1), (1, 2)]), Series("b", [(0, 1)])], x=HOSTILE, y=HOSTILE)
    drawn += heat_map(HOSTILE, HOSTILE, [HOSTILE], [(0, 1)], [[1.0]], lambda _: HOSTILE)
    drawn += timeline([Bar(HOSTILE, HOSTILE, 0, 1, HOSTILE, 1, [(0.5, HOSTILE, HOSTILE)])])
    assert inspect(drawn) <= {"figure", "figcaption", "b", "small", "div", "span", "i", "svg", "g", "path", "rect",
                              "line", "text", "circle", "title"}  # fmt: skip


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: dict[str, list[str]] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            self.attributes.setdefault(name, []).append(value or "")


def inspect(page: str) -> set[str]:
    """The tags of a page, in which nothing acts and nothing is fetched."""
    found = _Tags()
    found.feed(page)
    assert not {"script", "img", "iframe", "object", "embed", "link", "base", "form", "a"} & found.tags
    acting = [name for name in found.attributes if name.startswith("on") or name in ("src", "href", "style", "action")]
    assert not acting
    return found.tags


# ------------------------------------------------------------------------------------------------ metrics


def events(path: Path, *records: dict[str, Any], start: int | None = None) -> None:
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog
    from tensorboard.summary.writer.record_writer import RecordWriter

    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        writer = RecordWriter(file)
        writer.write(Event(file_version="brain.Event:2", wall_time=1.0).SerializeToString())
        if start is not None:
            log = SessionLog(status=SessionLog.START)
            writer.write(Event(step=start, wall_time=1.0, session_log=log).SerializeToString())
        for record in records:
            event = Event(step=record["step"], wall_time=record.get("at", 0.0))
            event.summary.value.add(tag=record["tag"], simple_value=record["value"])
            writer.write(event.SerializeToString())


def test_event_files_are_read_over_restarts_and_cut_ends(tmp_path: Path) -> None:
    first, second = tmp_path / "a/v/x.tfevents.1.0", tmp_path / "a/v/x.tfevents.2.0"
    events(first, *({"step": s, "tag": "loss", "value": 10.0 - s, "at": 100.0 + s} for s in range(8)))
    events(second, *({"step": s, "tag": "loss", "value": s, "at": 200.0 + s} for s in range(5, 8)), start=4)
    second.write_bytes(second.read_bytes()[:-3])
    (tmp_path / "a/v/checkpoints").mkdir()
    shutil.copy(first, tmp_path / "a/v/checkpoints/x.tfevents.9.0")
    (loss,) = curves.read(tmp_path)
    assert loss.name == "loss"
    assert loss.points == [(0, 10), (1, 9), (2, 8), (3, 7), (5, 5), (6, 6)]
    assert loss.walls[-2:] == [205, 206]


def test_metrics_in_a_table_are_read(tmp_path: Path) -> None:
    (tmp_path / "logs2").mkdir()
    (tmp_path / "logs2/metrics.csv").write_text("epoch,loss,step,val\n0,3.5,10,\n0,,20,0.5\n1,nan,30,x\n1,1.5,40,.25\n")
    loss, val = curves.read(tmp_path)
    assert (loss.name, loss.points) == ("loss", [(10, 3.5), (40, 1.5)])
    assert (val.name, val.points) == ("val", [(20, 0.5), (40, 0.25)])


# ------------------------------------------------------------------------------------------------ pages


def hostile_run(folder: Path, *, ranks: int = 4) -> None:
    """A run in whose every text stands something that wants to act, and secrets."""
    folder.mkdir(parents=True)
    told = f"{HOSTILE} password={SECRETS[0]}"
    spec = {
        "program": {"kind": "script", "target": f"{HOSTILE}.py", "args": [told, "--api-key", SECRETS[0], SECRETS[2]]},
        "cwd": HOSTILE, "nodes": 1, "procs": ranks, "max_restarts": 1, "notify": "curl -u me:hunter2 x",
        "environment": {"HF_TOKEN": "abc(hunter2", "Y_SECRET": "one hunter2 three", "DB_PASSWORD": "9876543"},
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps({"version": 1, "created": 990.0, "host": HOSTILE, "spec": spec}))
    state = {"status": "failed", "cause": told, "exit_code": 1, "attempt": 1, "host": HOSTILE}
    (folder / "state.json").write_text(json.dumps(state))
    exits = {"progress": {"step": 40, "began": 0, "saved": 30, "save_s": 1.0}, "exits": {}}
    lines_ = [
        {"time": 1000.0, "event": "attempt", "attempt": 0, "hosts": [HOSTILE], "world_size": ranks},
        {"time": 1010.0, "event": "slow", "attempt": 0, "rank": 1, "told": told, "over": False, "host": HOSTILE},
        {"time": 1020.0, "event": "stop", "attempt": 0, "cause": told},
        {"time": 1060.0, "event": "attempt-failed", "attempt": 0, "status": HOSTILE, "cause": told, **exits},
        {"time": 1070.0, "event": "attempt", "attempt": 1, "hosts": [HOSTILE], "world_size": ranks},
        {"time": 1090.0, "event": "end", "attempt": 1, "status": "failed", "code": 1, "cause": told, **exits},
    ]
    (folder / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines_))
    exit_ = {"rank": 1, "local_rank": 1, "node": 0, "host": HOSTILE, "pid": 1, "code": 1, "ended_ns": 1, "asked": False,
             "log": HOSTILE, "error": {"type": "E", "message": told, "traceback": told}, "tail": [told],
             "killed_for_memory": False}  # fmt: skip
    failure = {"cause": told, "attempt": 1, "fault": None, "first": exit_, "left_early": False, "followers": []}
    (folder / "failure.json").write_text(json.dumps(failure))
    events(folder / "tb/x.tfevents.1", *({"step": s, "tag": tag, "value": 1 / (s + 1), "at": 1000.0 + s}
                                         for s in range(40) for tag in (f"loss{HOSTILE}", "accuracy")))  # fmt: skip
    code = {"root": HOSTILE, "commit": "abc", "branch": HOSTILE, "edited": True,
            "diff": "surroundings-x.diff"}  # fmt: skip
    (folder / "surroundings-x.diff").write_text(f"diff --git a/x b/x\n-{HOSTILE}\n+{scrubbed(told)}\n@@ 1 @@")
    here = {"python": HOSTILE, "executable": HOSTILE, "system": HOSTILE, "cpus": 2, "memory": 1 << 30,
            "gpus": [HOSTILE, HOSTILE], "packages": {HOSTILE: HOSTILE, "torch": "2.15"}, "code": code}  # fmt: skip
    (folder / "surroundings-0.json").write_text(json.dumps(here))
    recorder = Recorder(folder, ranks, 1)
    for second in range(0, 60, 6):
        message = summary(
            [Pace(r, 0.01 * (1 + r % 3), 0.05) for r in range(ranks)],
            [Taken(r, (200 + second) << 20) for r in range(ranks)],
            Progress(second, saved=second, save_s=1.5, stall_s=0.25),
        )
        recorder.take(0, message, float(second))
    recorder.close(60.0)
    told_ = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    for i, line in enumerate(told_):
        line["at"] = 1006.0 + 6 * i
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in told_))
    place = folder / "checkpoints" / "c" / "0660d1a5194c2cc96de3"
    place.mkdir(parents=True)
    manifest = {"name": HOSTILE, "attempt": place.name, "step": 30, "created": 1050.0,
                "files": [{"shard_bytes": 5 << 20, "record_bytes": 100}]}  # fmt: skip
    (place / "manifest.json").write_text(json.dumps({"manifest": manifest}))


def page_of(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(folder.parent)
    assert run([f"./{folder.name}"]) == 0
    return (folder / "report.html").read_text()


def test_a_page_shows_a_run_and_nothing_in_it_acts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hostile_run(tmp_path / "bad")
    page = page_of(tmp_path / "bad", monkeypatch)
    assert {"svg", "table", "details", "pre"} <= inspect(page)
    assert "default-src 'none'" in page
    assert not [secret for secret in SECRETS if secret in page]
    for title in ("Attempts", "Failure", "Metrics", "Ranks", "Checkpoints", "Configuration", "Environment", "Code"):
        assert f"<h2>{title}</h2>" in page
    for shown in ("Throughput", "Step time of each rank", "Memory of a rank", "Time of a save",
                  "250 ms", "5.0 MiB", "2 packages", "removed since"):  # fmt: skip
        assert shown in page, shown
    assert page.count("&lt;script&gt;") > 20
    assert "prefers-color-scheme:dark" in page


@pytest.mark.slow
def test_a_page_of_a_hundred_thousand_ranks_is_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hostile_run(tmp_path / "large", ranks=100_000)
    page = page_of(tmp_path / "large", monkeypatch)
    assert len(page) < 1_000_000
    assert "each row: the slowest of 2346 ranks" in page


def test_a_run_that_tells_nothing_has_a_page_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hostile_run(tmp_path / "bare")
    for path in (tmp_path / "bare").iterdir():
        if path.name not in ("run.json", "state.json"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    page = page_of(tmp_path / "bare", monkeypatch)
    inspect(page)
    assert "Nothing was logged into the run folder" in page


def test_runs_that_diverged_come_last() -> None:
    def part(name: str, loss: float) -> Part:
        curve = curves.Curve("loss", [(0.0, 1.0), (1.0, loss)])
        return Part(SimpleNamespace(name=name, status="finished", cause=None), {}, [curve], 1.0)

    parts = [part("bad", math.nan), *(part(f"run{i}", 10.0 - i) for i in range(6)), part("over", -math.inf)]
    assert "<b>5</b>" in _table_of(parts)
    shown = _overlaid(parts)
    assert "run5" in shown
    assert "bad" not in shown
    assert "over" not in shown


SWEPT = """
import csv, os, sys
lr = float(sys.argv[1].partition("=")[2])
if lr > 0.25:
    sys.exit(3)
with open(os.path.join(os.environ["LAUNCH_RUN_DIR"], "metrics.csv"), "w", newline="") as file:
    rows = csv.writer(file)
    rows.writerow(["step", "loss"])
    rows.writerows([step, lr / (step + 1)] for step in range(10))
"""


@pytest.mark.slow
def test_the_runs_of_a_sweep_are_one_table(launch) -> None:
    launch.script(SWEPT)
    launch(
        "--backend",
        "local",
        "--procs",
        "1",
        "--preload",
        "json",
        "--run",
        "sweep",
        "--sweep",
        "lr=0.1,0.2,0.3",
        "job.py",
    )
    told = launch.ok("report", "sweep", "-o", "out.html")
    assert told.stdout == "out.html\n"
    page = (launch.cwd / "out.html").read_text()
    assert {"table", "svg"} <= inspect(page)
    for shown in ("sweep_0", ">lr<", ">0.1<", "<b>0.01</b>", ">0.02<", ">failed<", "&ndash;"):
        assert shown in page, shown


def test_where_it_cannot_be_written_is_said(launch) -> None:
    launch.ok("--procs", "1", "--preload", "json", "--run", "here", launch.script("print('up')\n"))
    folder = launch("report", "here", "-o", ".")
    assert folder.returncode == 2
    assert "this is a folder; give a file, such as" in folder.stderr
    nowhere = launch("report", "here", "-o", "/proc/x.html")
    assert nowhere.returncode != 0
    assert "cannot be written" in nowhere.stderr
    assert launch.ok("report", "here").stdout.strip().endswith("runs/here/report.html")


def test_where_a_run_was_launched_is_noted(launch) -> None:
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    script = launch.script("print('up')\n")
    hidden = ["config", "diff.external", "touch shown; :"]  # is not to be run
    for words in (["init", "-q"], hidden, ["add", "job.py"], ["commit", "-qm", "first"]):
        subprocess.run([*git, *words], cwd=launch.cwd, check=True, capture_output=True)
    script.write_text("print('up')\npassword = 'hunter2'\n")
    job = launch.ok("--procs", "1", "--preload", "json", "--run", "here", script)
    (path,) = job.run.path.glob("surroundings-*.json")
    assert path.name == "surroundings-0.json"
    here = json.loads(path.read_text())
    assert here["code"]["edited"]
    assert "+password = [hidden]" in (job.run.path / here["code"]["diff"]).read_text()
    assert not (launch.cwd / "shown").exists()
    assert here["packages"]["torch"]
