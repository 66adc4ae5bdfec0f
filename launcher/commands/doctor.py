"""`launch doctor`: whether machines are fit for a run."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from launcher import hosts, runs
from launcher.backends.slurm_records import query_environment
from launcher.backends.slurm_script import batch_script, submission_environment
from launcher.backends.slurm_tools import ask
from launcher.commands import options
from launcher.commands.table import width
from launcher.doctor import cluster, facts, ways
from launcher.doctor.examination import Place, examine
from launcher.doctor.verdicts import Finding, judge, table
from launcher.errors import ClusterError, UsageError
from launcher.options import SBATCH
from launcher.starting import python_command

if TYPE_CHECKING:
    from collections.abc import Sequence

    from launcher.backends.slurm_script import Value

__all__ = ["run"]

COMMAND = click.Command(
    "doctor",
    params=[
        click.Option(["--hosts"], metavar="A,B|@FILE", help="these machines, by ssh"),
        click.Option(["--partition"], metavar="P", help="machines of a partition of Slurm's, by a short job there"),
        click.Option(["--nodes"], type=int, metavar="N", help="how many [all of --hosts or the allocation; a job: 2]"),
        click.Option(["--gpus"], type=click.IntRange(min=0), metavar="N", help="GPUs on each, as a run will ask"),
        click.Option(["--run"], metavar="DIR", help="folder that all are to share [runs, or here]"),
        click.Option(
            ["--master-port"], type=click.IntRange(1, 65535), metavar="P", help="port that a run will ask for"
        ),
        click.Option(["--sbatch"], multiple=True, metavar="OPTION[=VALUE]", help="any other option of sbatch"),
        click.Option(["--setup"], multiple=True, metavar="COMMAND", help="shell line before the job's check"),
        click.Option(["--json", "as_json"], is_flag=True, help="findings: check, status, found, fix"),
        *(click.Option(["--" + name.replace("_", "-")], hidden=True) for name in SBATCH if name != "partition"),
    ],
    help="Look at machines before a run is started there: interpreter and package versions, shared folder, clocks, "
    "/dev/shm, limits, GPUs, ports, bandwidth between all, a short all-reduce; on Slurm also what preemption and time "
    "limits mean for a job. Without options: this machine, or inside a Slurm job its nodes. A line for each check, and "
    "what to do where it is bad. Exit code: 0; 1 if something is bad.",
)


def run(argv: Sequence[str]) -> int:
    """Exit code: see the help."""
    o = options(COMMAND, argv)
    submits = [name for name in ("sbatch", "setup", *SBATCH) if o[name]]
    if o["hosts"] and submits:
        raise UsageError(f"--hosts looks at machines by ssh, --{submits[0].replace('_', '-')} asks Slurm: give one")
    if o["nodes"] is not None and o["nodes"] < 1:
        raise UsageError(f"--nodes {o['nodes']}: give a whole number >= 1")
    inside = "SLURM_JOB_ID" in os.environ and not submits
    if submits or (o["nodes"] is not None and not o["hosts"] and not inside):
        findings = _by_job(o)
    else:
        findings = _by_hand(o, inside=inside)
    if o["as_json"]:
        click.echo(json.dumps([finding.to_json() for finding in findings]))
    else:
        show(findings)
    return int(any(finding.status == "bad" for finding in findings))


def show(findings: Sequence[Finding], *, err: bool = False) -> None:
    """Print findings; in colours on a terminal."""
    for line in table(findings, width()):
        colour = {"ok": "green", "poor": "yellow", "BAD": "red"}.get(line.split(" ", 1)[0])
        click.echo(click.style(line[:5], fg=colour, bold=True) + line[5:], err=err)


def _say(line: str) -> None:
    click.echo(f"launch: {line}", err=True)


def _by_hand(o: dict[str, Any], *, inside: bool) -> list[Finding]:
    """Machines that can be reached from here."""
    cwd = Path.cwd()
    place = Place(_folder(o), o["master_port"] or 0, o["gpus"], facts.required(cwd))
    if o["hosts"]:
        named = [host.name for host in hosts.parse(o["hosts"], cwd)]
        if o["nodes"] is not None and o["nodes"] > len(named):
            raise UsageError(f"--nodes {o['nodes']}: --hosts names {len(named)}")
        way = ways.by_ssh(named[: o["nodes"]], str(cwd))
    elif inside:
        there = int(os.environ.get("SLURM_JOB_NUM_NODES", "1"))
        if o["nodes"] is not None and o["nodes"] > there:
            raise UsageError(f"--nodes {o['nodes']}: the allocation that this is in has {there}")
        way = ways.by_srun(os.environ, str(cwd), o["nodes"])
    else:
        way = ways.here(str(cwd))
    with way as reached:
        report = examine(reached, place, _say)
    return judge(report, place)


def _folder(o: dict[str, Any]) -> Path:
    """What all machines are to share: the run folder, or the nearest above it that is there."""
    folder = runs.resolve(o["run"], Path.cwd()) if o["run"] else runs.default_root(Path.cwd())
    return next(path for path in (folder, *folder.parents) if path.is_dir())


# ------------------------------------------------------------------------------------------------ as a job


def _by_job(o: dict[str, Any]) -> list[Finding]:
    """Nodes that Slurm chooses: the same command as a job, and what the cluster says of itself."""
    if shutil.which("sbatch") is None:
        raise UsageError(f"there is no sbatch on {socket.gethostname()}: look at machines by ssh with --hosts a,b")
    environ = query_environment(os.environ)
    config = ask("scontrol", "show", "config", environ=environ)
    told = cluster.settings(config, ask("scontrol", "show", "partition", environ=environ), o["partition"])
    if any(finding.status == "bad" for finding in told):
        return told
    return [*_ask_job(o), *told]


def _ask_job(o: dict[str, Any]) -> list[Finding]:
    nodes = o["nodes"] or 2
    chosen: dict[str, Value] = {"job-name": "doctor", "time": "10", "nodes": nodes, "ntasks-per-node": 1}
    chosen |= {name.replace("_", "-"): o[name] for name in SBATCH if o[name]}
    for text in o["sbatch"]:
        name, equals, value = text.partition("=")
        chosen[name.strip().removeprefix("--")] = value if equals else True
    if o["gpus"]:
        chosen["gres"] = f"gpu:{o['gpus']}"
    words = ["doctor", "--json", "--run", str(_folder(o))]
    words += [word for name in ("gpus", "master_port") if o[name] is not None
              for word in (f"--{name.replace('_', '-')}", str(o[name]))]  # fmt: skip
    path = _folder(o) / f".doctor-{secrets.token_hex(4)}.out"
    chosen["output"] = str(path).replace("%", "%%")
    script = batch_script(chosen, python_command("launcher.cli", *words), setup=o["setup"])
    try:
        code = _wait_for_job(script, submission_environment(os.environ, chosen), nodes)
        try:
            text = path.read_text()
        except OSError as error:
            what = f"what the job wrote into {path.parent} is not seen here ({error.strerror})"
            return [
                Finding("shared folder", "bad", what, "give a folder that login and compute nodes share: --run DIR")
            ]
    finally:
        path.unlink(missing_ok=True)
    lines = text.strip().splitlines()
    try:
        return [Finding(**one) for one in json.loads(lines[-1])]
    except (ValueError, IndexError, TypeError):
        raise ClusterError(
            f"the job ended with code {code} and no findings; it said: {text.strip() or 'nothing'}"
        ) from None


def _wait_for_job(script: str, environ: dict[str, str], nodes: int) -> int:
    with subprocess.Popen(
        ["sbatch", "--parsable", "--wait"], env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(script)
        process.stdin.close()
        job_id = process.stdout.readline().strip().partition(";")[0]
        if not job_id:
            raise ClusterError("sbatch refused the job; what it said stands above")
        _say(f"job {job_id} on {nodes} node{'s' if nodes > 1 else ''}: waiting for it (Ctrl-C cancels it)")
        try:
            return process.wait()
        except BaseException:
            subprocess.run(["scancel", job_id], check=False)
            raise
