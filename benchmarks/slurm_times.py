"""On a real Slurm: submission to ranks met beside `srun torchrun`, and SIGTERM to training again. Needs root, the lab.

    python benchmarks/slurm_times.py [--rounds 5] [--restarts 3] [--json FILE]

start    2 nodes x 4 ranks, one all-reduce: seconds of the command that submits, and from the start of the batch script
         to the last rank having met, for `launch -d` and for `sbatch --wrap "srun torchrun ..."`, taking turns; median
         ratio. What lies between the two is Slurm's own waiting.
restart  2 nodes x 2 ranks in mid-training, followed, preempted by a higher partition for a second, AuthInfo's
         cred_expire at its default of 120 s: from SIGTERM to the first step after it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests" / "lab"))

from facts import facts, tell  # noqa: E402
from job import LAUNCH, Job  # noqa: E402
from netns import wait_for  # noqa: E402

from lab import FOLDER, Lab, Settings  # noqa: E402

MEET = """
import os, time, torch, torch.distributed as dist
from pathlib import Path
dist.init_process_group("gloo")
dist.all_reduce(torch.ones(1))
Path(os.environ["MARKS"], os.environ["RANK"]).write_text(str(time.time()))
dist.barrier()
dist.destroy_process_group()
"""


def begun(script: Path) -> str:
    """A line for a batch script: note when Slurm began to run it."""
    return f"date +%s.%N > {script}"


def start(lab: Lab, folder: Path, how: str, number: int) -> float:
    cwd = folder / f"{how.split()[0]}-{number}"
    marks = cwd / "marks"
    marks.mkdir(parents=True)
    program = cwd / "meet.py"
    program.write_text(MEET)
    environment = {"OMP_NUM_THREADS": "1", "MARKS": str(marks), "XDG_STATE_HOME": str(cwd / "state")}
    if how == "launch":
        own = ["--sbatch", "exclusive", "--setup", begun(marks / "t0")]
        words = [LAUNCH, "-d", "--nodes", "2", "--procs", "4", *own, program]
    else:
        torchrun = Path(sys.executable).with_name("torchrun")
        line = (f"srun {torchrun} --nnodes 2 --nproc-per-node 4 --rdzv-backend c10d --rdzv-id $SLURM_JOB_ID "
                f"--rdzv-endpoint $SLURMD_NODENAME:29500 {program}")  # fmt: skip
        words = ["sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=1", "--exclusive", "--output=out",
                 f"--wrap={begun(marks / 't0')}\n{line}"]  # fmt: skip
    asked = time.monotonic()
    lab.run(*words, cwd=cwd, environment=environment)
    submitting = time.monotonic() - asked
    wait_for(lambda: len(list(marks.glob("[0-7]"))) == 8, 180, f"8 ranks of {how}")
    wait_for(lambda: not lab.queue(), 60, "the end of the job")
    met = max(float(p.read_text()) for p in marks.glob("[0-7]"))
    return submitting + met - float((marks / "t0").read_text())


def restart(lab: Lab, folder: Path, number: int) -> dict[str, float]:
    """Seconds from the word of a stop to each thing that came after it, in order."""
    cwd = folder / f"restart-{number}"
    cwd.mkdir()
    program = (ROOT / "tests" / "lab" / "train.py", "--steps", "80")
    words = [LAUNCH, "--nodes", "2", "--procs", "2", "--run", "job", *program]
    environment = {"OMP_NUM_THREADS": "1", "XDG_STATE_HOME": str(cwd / "state")}
    process = lab.popen(*words, cwd=cwd, environment=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        run = cwd / "runs" / "job"
        wait_for(lambda: (run / "slurm.json").exists(), 60, "the submission")
        job = Job(lab, run, json.loads((run / "slurm.json").read_text())["job_id"])
        job.wait_step(5)
        lab.preempt(job.id)
        job.wait(lambda: job.step(1) >= 0, "the next step", timeout=200)
        at = {"trains": time.time()}
        for event in job.events:
            at[event["event"]] = event["time"]  # the last of each kind
        asked = job.stop()["requested"]
        process.wait(120)
    finally:
        process.kill()
        process.wait()
    names = {"job-end": "all ranks have left", "requeued": "requeued", "job": "its next life begins",
             "attempt": "agents have met", "trains": "trains again"}  # fmt: skip
    return {text: at[name] - asked for name, text in names.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--restarts", type=int, default=3)
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    before = facts()
    lab = Lab.up(Settings(cred_expire=120), FOLDER.with_name(FOLDER.name + "-benchmark"))
    try:
        with tempfile.TemporaryDirectory() as name:
            times: dict[str, list[float]] = {"launch": [], "srun torchrun": []}
            for number in range(options.rounds):
                for how, found in times.items():
                    found.append(start(lab, Path(name), how, number))
            again = [restart(lab, Path(name), number) for number in range(options.restarts)]
    finally:
        lab.down()
    ratios = [a / b for a, b in zip(times["launch"], times["srun torchrun"], strict=True)]
    report = {
        "start_s": {how: [round(t, 2) for t in found] for how, found in times.items()},
        "start_ratio_median": round(statistics.median(ratios), 3) if ratios else None,
        "restart_s": [{what: round(t, 2) for what, t in one.items()} for one in again],
    }
    tell(before | report, options.json)


if __name__ == "__main__":
    main()
