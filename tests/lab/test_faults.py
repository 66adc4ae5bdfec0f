"""Every fault that a run on several hosts meets, caused for real while it runs: it goes on, with the right sum."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
from netns import wait_for

pytestmark = [pytest.mark.lab, pytest.mark.ssh]

ROUNDS = int(os.environ.get("MUSTER_FAULT_ROUNDS", "20"))
TABLE = Path(__file__).parents[2] / "benchmarks" / "results" / "faults.md"
CGROUP = Path("/sys/fs/cgroup/memory/muster-faults")

# Sums over ranks and steps, goes on from what rank 0 saved, and does what it is told to by files in the run's folder.
JOB = """
import json, os, sys, torch, torch.distributed as dist
from datetime import timedelta
from pathlib import Path
dist.init_process_group("gloo", timeout=timedelta(seconds=120))
rank, size = dist.get_rank(), dist.get_world_size()
run = Path(os.environ["LAUNCH_RUN_DIR"])
state = torch.zeros(2, dtype=torch.float64)
if rank == 0 and (run / "saved.json").exists():
    state[:] = torch.tensor(json.loads((run / "saved.json").read_text())[:2], dtype=state.dtype)
dist.broadcast(state, 0)
step, total = int(state[0]), float(state[1])
orders = run / f"do-{rank}"
while True:
    x = torch.tensor([float(step * (rank + 1)), float(rank == 0 and (run / "enough").exists())], dtype=torch.float64)
    dist.all_reduce(x)
    step, total = step + 1, total + float(x[0])
    print("step", step, flush=True)
    if rank == 0:
        (run / "saved.tmp").write_text(json.dumps([step, total, int(os.environ["LAUNCH_ATTEMPT"])]))
        (run / "saved.tmp").replace(run / "saved.json")
    if x[1]:
        break
    with open(f"/dev/shm/batch-{rank}", "wb") as batch:
        batch.write(bytes(1 << 16))
    os.unlink(f"/dev/shm/batch-{rank}")
    if orders.exists():
        what, argument = orders.read_text().split()
        orders.unlink()
        if what == "exit":
            sys.exit(0)
        if what == "flood":
            line = b"y" * 1023 + b"\\n"
            for _ in range(int(argument)):
                os.write(1, line * 32)
        if what == "eat":
            Path(argument, "cgroup.procs").write_text("0")
            whole = bytearray(4 << 30)
dist.destroy_process_group()
"""


class Sufferer:
    """A run of four ranks on two hosts, and what is done to it. Times: seconds from the fault to the decision."""

    HOSTS = ("bob", "cyd")

    def __init__(self, machines, call) -> None:
        self.machines = machines
        self.call = call
        self.decided: dict[str, list[float]] = {}
        self.failures = 0
        self.flooded = 0

    # ------------------------------------------------------------------------------------------ what it says

    @property
    def saved(self) -> list[float]:
        path = self.call.folder / "saved.json"
        return json.loads(path.read_text()) if path.exists() else [0, 0.0, -1]

    def failed(self) -> list[dict]:
        path = self.call.folder / "events.jsonl"
        events = map(json.loads, path.read_text().splitlines()) if path.exists() else ()
        return [e for e in events if e["event"] == "attempt-failed"]

    def _alive(self) -> None:
        if self.call.process.poll() is not None:
            raise AssertionError(f"the run has ended: {self.call.process.communicate()}")

    def steps(self, count: int, within: float = 90) -> None:
        """Until the present attempt has made so many steps from here."""
        first = self.saved[0]

        def reached() -> bool:
            self._alive()
            return self.saved[2] == self.failures and self.saved[0] >= first + count

        wait_for(reached, within, f"{count} steps of attempt {self.failures}")

    def decision(self, fault: str, began: float, cause: str) -> None:
        """Until the supervisor has decided that the attempt failed, for the right reason."""

        def decided() -> bool:
            self._alive()
            return len(self.failed()) > self.failures

        wait_for(decided, 60, f"the decision after {fault}")
        event = self.failed()[self.failures]
        self.failures += 1
        self.decided.setdefault(fault, []).append(event["time"] - began)
        assert re.search(cause, event["cause"]), f"{fault}: {event['cause']}"

    # ------------------------------------------------------------------------------------------ faults

    def _signal(self, pids: list[int], number: int) -> float:
        began = time.time()
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        return began

    def _of(self, host: str, role: str) -> list[int]:
        # The newest: an agent that was cut off may still be leaving, and nobody decides anything because of that.
        count = 2 if role == "rank" else 1
        found = wait_for(lambda: self.machines.agents(host, role)[-count:], 30, f"the {role} on {host}")
        return [random.choice(found)]

    def _all(self, host: str) -> list[int]:
        return [p.pid for p in self.machines.host(host).processes()]

    def _tell(self, rank: int, what: str, argument: object = "-") -> float:
        (self.call.folder / "do.tmp").write_text(f"{what} {argument}")
        (self.call.folder / "do.tmp").replace(self.call.folder / f"do-{rank}")
        return time.time()

    def rank_killed(self, host: str) -> None:
        self.decision("SIGKILL of a rank", self._signal(self._of(host, "rank"), signal.SIGKILL), "SIGKILL")

    def rank_stopped(self, host: str) -> None:
        victim = self._of(host, "rank")
        self.decision("SIGSTOP of a rank", self._signal(victim, signal.SIGSTOP), "has (printed nothing|made no step)")

    def agent_killed(self, host: str) -> None:
        began = self._signal(self._of(host, "agent"), signal.SIGKILL)
        self.decision("SIGKILL of an agent", began, f"node {self.HOSTS.index(host)}")

    def agent_stopped(self, host: str) -> None:
        began = self._signal(self._of(host, "agent"), signal.SIGSTOP)
        self.decision("SIGSTOP of an agent", began, "no longer answers")

    def host_killed(self, host: str) -> None:
        everything = self._all(host)
        self._signal(everything, signal.SIGSTOP)  # else the agent has the time to tell of a rank that was killed
        began = self._signal(everything, signal.SIGKILL)
        self.machines.serve(host)
        self.decision("SIGKILL of all on a host", began, f"node {self.HOSTS.index(host)}")

    def host_stopped(self, host: str) -> None:
        everything = self._all(host)
        began = self._signal(everything, signal.SIGSTOP)
        try:
            self.decision("SIGSTOP of all on a host", began, "no longer answers")
        finally:
            self._signal(everything, signal.SIGCONT)

    def link_down(self, host: str) -> None:
        began = time.time()
        self.machines.network.link_down(host)
        try:
            self.decision("link down", began, "no longer answers")
        finally:
            self.machines.network.link_up(host)

    def packets_lost(self, host: str) -> None:
        with self.machines.network.bad_cable(host, loss=0.05):
            self.steps(random.randint(10, 40))

    def packets_late(self, host: str) -> None:
        with self.machines.network.bad_cable(host, delay_s=0.2):
            self.steps(random.randint(3, 10))

    def shared_memory_full(self, host: str) -> None:
        one = self.machines.host(host)
        began = time.time()
        with contextlib.suppress(Exception):
            one.run("dd", "if=/dev/zero", "of=/dev/shm/filler", "bs=1M")
        try:
            self.decision("/dev/shm full", began, "No space left on device|storage|shared memory")
        finally:
            one.run("rm", "/dev/shm/filler")

    def out_of_memory(self, host: str) -> None:
        CGROUP.mkdir(exist_ok=True)
        (CGROUP / "memory.limit_in_bytes").write_text(str(256 << 20))
        rank = 2 * self.HOSTS.index(host) + 1
        self.decision("out of memory", self._tell(rank, "eat", CGROUP), "memory")

    def rank_leaves_early(self, host: str) -> None:
        rank = 2 * self.HOSTS.index(host) + 1
        self.decision("a rank that exits 0 early", self._tell(rank, "exit"), f"rank {rank} ")

    def rank_floods(self, host: str, mb: int = 32) -> None:
        rank = 2 * self.HOSTS.index(host)
        before = sum(path.stat().st_size for path in self.call.folder.glob(f"logs/*/rank-{rank}.log"))
        blocks = mb * 32
        self._tell(rank, "flood", blocks)
        wait_for(lambda: not (self.call.folder / f"do-{rank}").exists(), 30, "the flood")
        self.steps(3)
        after = sum(path.stat().st_size for path in self.call.folder.glob(f"logs/*/rank-{rank}.log"))
        assert after - before >= blocks * 32 << 10
        self.flooded += 1

    # ------------------------------------------------------------------------------------------ the end

    def finish(self) -> None:
        """The sum is that of an undisturbed run, and nothing is left on any host."""
        (self.call.folder / "enough").touch()
        _, err = self.call.process.communicate(timeout=60)
        assert self.call.process.returncode == 0, err
        step, total, attempt = self.saved
        assert total == sum(n * (1 + 2 + 3 + 4) for n in range(int(step)))
        assert attempt == self.failures == len(self.failed())
        self.machines.wait_empty("launcher", 30, "the end of everything that was launched")
        self.machines.wait_empty(str(self.call.folder), 30, "the end of the ranks")


@pytest.fixture
def sufferer(launched, machines, tmp_path):
    (tmp_path / "job.py").write_text(JOB)
    for name in Sufferer.HOSTS:
        machines.host(name).run("mount", "-o", "remount,size=64M", "/dev/shm")
    call = launched("--hosts", ",".join(Sufferer.HOSTS), "--procs", "2", "--max-failures", "1000",
                    "--hang-timeout", "20", "--show-ranks", "none", "job.py")  # fmt: skip
    yield Sufferer(machines, call)
    with contextlib.suppress(OSError):
        CGROUP.rmdir()


@pytest.mark.timeout(240)
def test_a_run_goes_on_after_faults_that_no_other_test_causes(sufferer):
    sufferer.steps(3)
    sufferer.packets_lost("bob")
    sufferer.agent_stopped("cyd")
    sufferer.steps(3)
    sufferer.shared_memory_full("bob")
    sufferer.steps(3)
    sufferer.out_of_memory("cyd")
    sufferer.steps(3)
    sufferer.rank_leaves_early("bob")
    sufferer.steps(3)
    sufferer.rank_floods("cyd")
    sufferer.finish()


@pytest.mark.soak
@pytest.mark.timeout(3600 * 4)
def test_every_fault_many_times_at_random_moments(sufferer):
    seed = int(os.environ.get("MUSTER_FAULT_SEED", str(time.time_ns())))
    random.seed(seed)
    faults = [
        sufferer.rank_killed, sufferer.rank_stopped, sufferer.agent_killed, sufferer.agent_stopped,
        sufferer.host_killed, sufferer.host_stopped, sufferer.link_down, sufferer.packets_lost, sufferer.packets_late,
        sufferer.shared_memory_full, sufferer.out_of_memory, sufferer.rank_leaves_early,
        lambda host: sufferer.rank_floods(host, mb=1024 if sufferer.flooded == 0 else 64),
    ]  # fmt: skip
    began = time.monotonic()
    try:
        for _ in range(ROUNDS):
            for fault in random.sample(faults, len(faults)):
                sufferer.steps(random.randint(3, 30), within=180)
                fault(random.choice(Sufferer.HOSTS))
        sufferer.steps(3, within=180)
        sufferer.finish()
    except BaseException as error:
        error.args = (f"seed {seed}: {error.args[0] if error.args else error!r}",)
        raise
    write_table(sufferer.decided, time.monotonic() - began)


def write_table(decided: dict[str, list[float]], seconds: float) -> None:
    """Keep what the soak has measured."""
    git = ["git", "-C", str(TABLE.parent), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    rows = [
        f"| {fault} | {len(times)} | {statistics.median(times):.2f} | {max(times):.2f} |"
        for fault, times in sorted(decided.items())
    ]
    TABLE.write_text(
        "# From a fault to the decision\n\nWritten by `make soak` (tests/lab/test_faults.py): seconds from the moment "
        "at which a fault is caused to the one at\nwhich the supervisor has ended the attempt, ranks and all, and "
        "begins the next. One run of 4 ranks on 2 hosts\n(namespaces, real sshd) suffered all of them, in random "
        "order at random moments, and ended with the right sum.\nHangs were to be found after 20 s (`--hang-timeout "
        "20`). 5 % of packets lost, 200 ms of delay, clocks from boot that are\n2 s apart and ranks that flood "
        "stdout (64 MB, once 1 GB) needed no decision, and led to none.\n\n"
        f"Commit {commit}, {os.cpu_count()} cores, Python {sys.version.split()[0]}, load "
        f"{os.getloadavg()[2]:.1f}, {seconds:.0f} s in all, {time.strftime('%Y-%m-%d')}.\n\n"
        "| fault | times | median s | worst s |\n| --- | ---: | ---: | ---: |\n" + "\n".join(rows) + "\n"
    )
