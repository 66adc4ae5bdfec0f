"""A run that `launch -d` submitted, as a test sees it: its folder, its Slurm job, its processes on the nodes."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from netns import Process, wait_for

from launcher.history import History, read

if TYPE_CHECKING:
    from lab import Lab

HERE = Path(__file__).parent
LAUNCH = Path(sys.executable).with_name("launch")


class Job:
    """One submitted run. Waits are generous: a loaded machine takes 10 s to bring four ranks up."""

    def __init__(self, lab: Lab, folder: Path, job_id: str) -> None:
        self.lab, self.folder, self.id = lab, folder, job_id
        self._held: float | None = None  # since when it is seen to wait for its start time

    @classmethod
    def submit(cls, lab: Lab, cwd: Path, *options: str, program: tuple[str | Path, ...] = ("train.py",)) -> Job:
        """`launch -d --nodes 2 --procs 2 OPTIONS train.py`, or another program."""
        folder = cwd / "runs" / "job"
        program = tuple(HERE / w if w == "train.py" else w for w in program)
        words = [LAUNCH, "-d", "--nodes", "2", "--procs", "2", "--run", "job", *options, *program]
        job_id = lab.run(*words, cwd=cwd, environment={"OMP_NUM_THREADS": "1", "XDG_STATE_HOME": str(cwd / "state")})
        return cls(lab, folder, job_id.strip())

    # ------------------------------------------------------------------------------------------ what it says

    @property
    def events(self) -> list[dict[str, Any]]:
        path = self.folder / "events.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def of(self, what: str) -> list[dict[str, Any]]:
        """The events of one kind."""
        return [e for e in self.events if e["event"] == what]

    @property
    def state(self) -> dict[str, Any]:
        path = self.folder / "state.json"
        return json.loads(path.read_text()) if path.exists() else {}

    @property
    def history(self) -> History:
        return read(self.folder)

    @property
    def output(self) -> str:
        path = Path(json.loads((self.folder / "slurm.json").read_text())["output"])
        return path.read_text() if path.exists() else ""

    def stop(self, attempt: int = 0) -> dict[str, Any]:
        return json.loads((self.folder / f"stop-{attempt}.json").read_text())

    @property
    def markers(self) -> list[str]:
        return sorted(p.name for p in self.folder.glob("requeue-*.json"))

    @property
    def result(self) -> str:
        return (self.folder / "result").read_text()

    def step(self, attempt: int) -> int:
        """The last step that rank 0 told of in an attempt; -1 before the first."""
        path = self.folder / "logs" / f"attempt-{attempt}" / "rank-0.log"
        steps = re.findall(r"^step (\d+)$", path.read_text(), re.MULTILINE) if path.exists() else []
        return int(steps[-1]) if steps else -1

    # ------------------------------------------------------------------------------------------ waiting

    def wait(self, condition, what: str, timeout: float = 90) -> Any:
        def check():
            if self.state.get("status") in ("finished", "failed", "stopped") and self.state.get("goes_on") is False:
                assert condition(), f"the run is over before {what}\n{self.story()}"
            return condition()

        try:
            return wait_for(check, timeout, what)
        except Exception as error:
            raise AssertionError(f"{error}\n{self.story()}") from None

    def wait_step(self, step: int, attempt: int = 0) -> None:
        self.wait(lambda: self.step(attempt) >= step, f"step {step} of attempt {attempt}")

    def lift_hold(self) -> None:
        """Let a requeued job start now, as a launch that follows it does."""
        waits = self.state.get("goes_on") and self.lab.job(self.id)
        if not waits or (waits.get("JobState"), waits.get("Reason")) != ("PENDING", "BeginTime"):
            self._held = None
        elif self._held is None:
            self._held = time.monotonic()
        elif time.monotonic() - self._held >= 1:  # the last life is really over
            self.lab.try_run("scontrol", "update", f"JobId={self.id}", "StartTime=now")

    def wait_attempts(self, number: int, timeout: float = 90) -> None:
        """Until so many attempts have begun, none of which Slurm holds back."""
        self.wait(lambda: self.lift_hold() or len(self.of("attempt")) >= number, f"attempt {number - 1}", timeout)

    def wait_over(self, timeout: float = 120) -> dict[str, Any]:
        """Until nothing more will come of it; its state."""
        over = ("finished", "failed", "stopped")
        self.wait(
            lambda: self.lift_hold() or (self.state.get("status") in over and self.state["goes_on"] is False),
            "its end",
            timeout,
        )
        wait_for(lambda: self.id not in self.lab.queue(), 60, f"Slurm to have done with job {self.id}")
        return self.state

    def story(self) -> str:
        events = "\n".join(map(json.dumps, self.events))
        slurm = self.lab.job(self.id)
        return f"--- events\n{events}\n--- state\n{self.state}\n--- output\n{self.output}\n--- Slurm\n{slurm}"

    # ------------------------------------------------------------------------------------------ its processes

    def processes(self, node: str, role: str) -> list[Process]:
        """supervisor, agent, zygote or rank: those of this run on a node."""
        found = self.lab.node_processes(node)
        if role == "supervisor":
            return [p for p in found if "launcher.backends.slurm_job" in p.command and str(self.folder) in p.command]
        ours = {p.pid: p for p in found if "from launcher.agent" in p.command and "srun" in p.command.split()[-3:]}
        generation = {pid: self._generation(pid, ours) for pid in ours}
        wanted = {"agent": 0, "zygote": 1, "rank": 2}[role]
        return [ours[pid] for pid, depth in generation.items() if depth == wanted]

    @staticmethod
    def _generation(pid: int, ours: dict[int, Process]) -> int:
        depth, parent = 0, psutil.Process(pid).ppid()
        while parent in ours:
            depth, parent = depth + 1, psutil.Process(parent).ppid()
        return depth

    def kill(self, node: str, role: str, index: int = 0, number: int = signal.SIGKILL) -> None:
        """Send a signal to one of the run's processes."""
        wait_for(lambda: len(self.processes(node, role)) > index, 10, f"the {role} on {node}")
        os.kill(self.processes(node, role)[index].pid, number)
