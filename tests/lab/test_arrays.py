"""Arrays and sweeps on a real cluster: their states and results, what becomes of elements, and how Slurm is asked."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from netns import wait_for

pytestmark = [pytest.mark.lab, pytest.mark.timeout(400)]

LAUNCH = Path(sys.executable).with_name("launch")

ELEMENT = """
import os, pathlib, signal, sys, time
index, attempt, here = os.environ["LAUNCH_ARRAY_INDEX"], int(os.environ["LAUNCH_ATTEMPT"]), pathlib.Path.cwd()
assert index == os.environ["SLURM_ARRAY_TASK_ID"]
seed = dict(word.lstrip("-").split("=") for word in sys.argv[1:])["seed"]
if seed in ("17", "18", "19") and attempt == 0:
    signal.signal(signal.SIGTERM, lambda *_: os._exit(75))
    (here / f"long-{seed}").touch()
    while True: time.sleep(60)
if seed in ("3", "11") and not (here / "mended").exists(): sys.exit(9)
(here / f"result-{seed}").write_text(f"{sys.argv[1:]} {attempt}")
"""


class Project:
    """A folder with a script, and `launch` on the login node in it."""

    def __init__(self, lab, folder: Path) -> None:
        self.lab, self.folder = lab, folder
        self.environment = {"OMP_NUM_THREADS": "1", "XDG_STATE_HOME": str(folder / "state"), "LAUNCH_SITE_CONFIG": ""}

    def launch(self, *words: str | Path, code: int | None = 0, **variables: str) -> str:
        done = self.lab.try_run(LAUNCH, *words, cwd=self.folder, environment=self.environment | variables)
        assert code is None or done.returncode == code, f"exit {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    def standings(self, *names: str) -> dict[str, dict]:
        return {one["name"]: one for one in json.loads(self.launch("ls", "--json", *names))}

    def statuses(self, name: str) -> dict[str, str]:
        return {element: one["status"] for element, one in self.standings(name).items()}


@pytest.fixture
def project(lab, tmp_path):
    return Project(lab, tmp_path)


def test_an_array_with_preempted_and_failing_elements(lab, project) -> None:
    (project.folder / "job.py").write_text(ELEMENT)
    words = ["--procs", "1", "--no-preload", "--no-snapshot", "--run", "sweep", "--sweep", "seed=0:20", "--array", "%4"]
    job = project.launch(*words, "job.py", "--lr=0.1").strip()
    names = [f"sweep_{index}" for index in range(20)]
    long, failing = names[17:], [names[3], names[11]]  # the last ones, so that the others have all four places

    def others_are_over() -> bool:
        found = project.statuses(job)
        assert sum(status == "running" for status in found.values()) <= 4
        return all((project.folder / f"long-{index}").exists() for index in (17, 18, 19)) and all(
            found[name] in ("finished", "failed") for name in names if name not in long
        )

    wait_for(others_are_over, 300, "all elements to have run but the three that wait")
    found = project.standings("sweep")
    assert [name for name in names if found[name]["status"] == "failed"] == failing
    # Nobody else is to be on their nodes.
    wait_for(lambda: set(lab.queue()) <= {found[name]["job_id"] for name in long}, 60, "the others to have left")
    # By node: several of them may share one.
    for name in {lab.job(found[name]["job_id"])["NodeList"]: name for name in long}.values():
        lab.preempt(found[name]["job_id"])

    def all_finished() -> bool:
        now = project.statuses("sweep")
        return all(now[name] == "finished" for name in long)

    wait_for(all_finished, 200, "the preempted elements to finish")
    assert project.launch("wait", "sweep", code=9) == ""
    for name in long:
        (shown,) = json.loads(project.launch("show", "--json", name))
        causes = [(a["status"], a["cause"].split(";")[0]) for a in shown["history"]["attempts"]]
        assert causes[0] == ("stopped", "preempted"), shown
        assert causes[-1][0] == "finished"
    assert {p.name for p in project.folder.glob("result-*")} == {f"result-{i}" for i in range(20) if i not in (3, 11)}
    assert (project.folder / "result-18").read_text() == "['--lr=0.1', '--seed=18'] 1"

    (project.folder / "mended").touch()
    again = project.launch("retry", job, "--failed").strip()
    assert again != job
    found = project.standings("sweep")
    assert {n for n in names if found[n]["job_id"].startswith(f"{again}_")} == set(failing)
    project.launch("wait", again, "--timeout", "120")
    assert set(project.statuses("sweep").values()) == {"finished"}
    result = (project.folder / "result-11").read_text()
    assert result == "['--lr=0.1', '--seed=11'] 1", project.launch("show", "sweep_11")
    assert project.launch("retry", "sweep") == ""  # nothing to do


def test_a_thousand_elements_are_asked_about_once(lab, project) -> None:
    """Held in the queue: how often each of Slurm's tools is called is what counts, not how fast this machine is."""
    (project.folder / "job.py").write_text("")
    tools, calls = project.folder / "tools", project.folder / "calls"
    tools.mkdir()
    for tool in ("squeue", "sacct", "scontrol", "sbatch", "scancel"):
        real = lab.run("bash", "-c", f"command -v {tool}").strip()
        (tools / tool).write_text(f'#!/bin/sh\necho "{tool} $*" >> {calls}\nexec {real} "$@"\n')
        (tools / tool).chmod(0o755)

    def counted(*words: str | Path) -> tuple[str, list[str]]:
        calls.write_text("")
        said = project.launch(*words, PATH=f"{tools}:{os.environ['PATH']}:/usr/sbin:/sbin")
        return said, sorted(line.split()[0] for line in calls.read_text().splitlines())

    job, made = counted(
        "--procs", "1", "--no-snapshot", "--sbatch", "hold", "--array", "0-999%50", "--run", "many", "job.py"
    )
    assert made.count("sbatch") == 2, made  # one of them only tests
    assert set(made) <= {"sbatch", "scontrol"}
    assert made.count("scontrol") <= 2
    text, asked = counted("ls")
    assert asked == ["squeue"]
    assert "1000 waiting" in text
    for words in (["ls", "many"], ["show", "many_17"], ["wait", "--timeout", "0", "many"]):
        calls.write_text("")
        project.launch(*words, code=None, PATH=f"{tools}:{os.environ['PATH']}:/usr/sbin:/sbin")
        assert [line.split()[0] for line in calls.read_text().splitlines()] in (["squeue"], ["squeue", "squeue"])
    assert "scancel" in counted("cancel", "many")[1]
    wait_for(lambda: not lab.queue(), 60, "the array to be gone")
    text, asked = counted("ls")
    assert asked in (["squeue"], ["sacct", "squeue"])
    assert "1000 stopped" in text
    with pytest.raises(AssertionError, match="indices up to 10000"):
        project.launch("--procs", "1", "--no-snapshot", "--array", "10001", "job.py")
    assert job.strip().isdigit()
    dry = project.launch("--procs", "1", "--dry-run", "--sweep", "a=x y,z", "--array", "%2", "job.py")
    assert "#SBATCH --array=0-1%2\n" in dry
    assert "# element 0: '--a=x y'\n# element 1: --a=z\n" in dry
    assert not lab.queue()
