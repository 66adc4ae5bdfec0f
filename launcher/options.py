"""The command line of `launch`: every option, and the help that tells of them."""

from __future__ import annotations

import os
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from launcher import config
from launcher.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["COMMAND", "PARAMETERS", "REFUSED", "read"]

_HELP = """\
Start a program on every rank, keep it running, and say what happened.

  launch --gpus 4 train.py --lr 0.1           4 ranks here, one GPU each
  launch --procs 4 train.py                   4 ranks here, on the CPU
  launch --procs 4 -m package.train           a module, as with python -m
  launch --nodes 2 --gpus 4 train.py          a Slurm job, followed (-d: not)
  launch ls, show, logs, wait, cancel, retry  see to runs: launch ls --help, ...
  launch --hosts a,b --gpus 4 train.py        4 ranks on each host, by ssh
  launch --backend local --nodes 2 --procs 2 train.py   rehearse a 2-node job

A torchrun line works with its first word replaced.
"""

_EPILOG = """\
Exit code: 0 finished; 75 stopped cleanly, run again; 2 wrong usage; else the first failing rank's (128+n: signal n).
"""

# torchrun's flags whose effect we do not have.
REFUSED = {
    "logs_specs": "logs are files per rank in the run folder; see --tee, --redirects and --log-dir",
    "numa_binding": "ranks are not bound to NUMA nodes; start the program under numactl with --no-python",
    "duplicate_stdout_filters": "filter the rank's log in the run folder instead",
    "duplicate_stderr_filters": "filter the rank's log in the run folder instead",
}

# sbatch's options that have a flag of the same name and meaning here.
SBATCH = ("partition", "account", "qos", "time", "mem", "constraint", "nodelist", "exclude", "dependency",
          "reservation", "job_name", "comment")  # fmt: skip

_GROUPS = (
    ("Ranks", ("gpus", "procs", "nodes", "spares", "hosts", "sync", "backend", "preload", "no_preload")),
    ("Program", ("module", "no_python", "env")),
    ("Run", ("run", "max_restarts", "grace", "hang_timeout", "preflight", "notify", "snapshot", "no_snapshot")),
    ("Many runs", ("array", "sweep", "sweep_file")),
    ("Output", ("show_ranks", "log_dir", "tee", "redirects", "local_ranks_filter")),
    ("Slurm (any of these, or --nodes, submits a job)",
     ("detach", "dry_run", "cpus_per_rank", "sbatch", "setup", "requeue", "max_timeouts", "stop_lead")),
)  # fmt: skip


class _Command(click.Command):
    """Help in groups; an unknown option names the nearest one (click does)."""

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write("Usage: launch [options] script.py [args ...]\n\n" + _HELP)
        by_name = {p.name: p for p in self.params}
        for title, names in _GROUPS:
            rows = [r for name in names if (r := by_name[name].get_help_record(ctx)) is not None]
            with formatter.section(title):
                formatter.write_dl(rows, col_max=29)
        options = [p for p in self.params if isinstance(p, click.Option)]
        same = " ".join(p.opts[-1] for p in options if p.name in SBATCH)
        accepted = [p.opts[-1] for p in options if p.hidden and p.envvar and p.name not in REFUSED]
        for text in (
            f"sbatch's, with its meaning: {same}",
            "torchrun's, with its meaning: " + " ".join(sorted(accepted)),
            _EPILOG,
        ):
            formatter.write("\n" + textwrap.fill(text, formatter.width, break_on_hyphens=False) + "\n")


def _torchrun(*names: str, **settings: Any) -> click.Option:
    """An option of torchrun's, with its PET_ variable."""
    variable = "PET_" + names[-1].lstrip("-").replace("-", "_").upper()
    return click.Option(names, envvar=variable, hidden=True, **settings)


PARAMETERS: list[click.Parameter] = [
    click.Option(["--gpus"], metavar="N|all", help="ranks per node, one GPU each"),
    click.Option(["--procs"], type=int, metavar="N", help="ranks per node on the CPU"),
    click.Option(["--nodes"], metavar="N|MIN:MAX", help="nodes; MIN:MAX goes on with as many as there are"),
    click.Option(["--spares"], type=int, default=0, metavar="N", help="hosts beyond --nodes that stand by [0]"),
    click.Option(["--hosts"], metavar="A,B:4|@FILE", help="run there by ssh; ranks per host as slots"),
    click.Option(["--sync"], is_flag=True, help="copy the code to hosts that share no folder"),
    click.Option(["--backend"], type=click.Choice(["local", "slurm", "ssh"]),
                 help="run here, submit a job, or run on --hosts"),
    click.Option(["--preload"], metavar="M,...", help="modules imported before the fork [torch]"),
    click.Option(["--no-preload"], is_flag=True, help="plain interpreters instead of forked ranks"),
    click.Option(["-m", "--module"], is_flag=True, envvar="PET_MODULE", help="the program is a Python module"),
    click.Option(["--no-python"], is_flag=True, envvar="PET_NO_PYTHON", help="the program is any command"),
    click.Option(["--env"], multiple=True, metavar="NAME[=VALUE]",
                 help="variable of the ranks [value: as here]"),
    click.Option(["--run"], metavar="NAME|DIR", help="name or folder; goes on if it is there"),
    click.Option(["max_restarts", "--max-failures", "--max-restarts"], type=int, default=0,
                 envvar="PET_MAX_RESTARTS", metavar="N", help="failures to start again after [0]"),
    click.Option(["--grace", "--shutdown-timeout"], type=float, envvar="PET_SHUTDOWN_TIMEOUT",
                 metavar="S", help="seconds from SIGTERM to SIGKILL [30, or till Slurm's deadline]"),
    click.Option(["--hang-timeout"], metavar="S|off", help="no step for so long is a failure [learned]"),
    click.Option(["--preflight"], is_flag=True, help="look at the machines first"),
    click.Option(["--notify"], metavar="COMMAND", help="told of failures, requeues and the end"),
    click.Option(["--show-ranks"], metavar="0,3|all|none", help="global ranks shown on the console [0]"),
    click.Option(["--log-dir"], envvar="PET_LOG_DIR", metavar="DIR", help="where --tee and --redirects write too"),
    click.Option(["-t", "--tee"], envvar="PET_TEE", metavar="0-3|R:N",
                 help="streams to show: 1 stdout, 2 stderr, 3 both"),
    click.Option(["-r", "--redirects"], envvar="PET_REDIRECTS", metavar="0-3|R:N", help="streams not to show"),
    click.Option(["--local-ranks-filter"], envvar="PET_LOCAL_RANKS_FILTER", metavar="0,1",
                 help="local ranks shown on the console"),
    click.Option(["--array"], metavar="0-9%4", help="run once per index, at most 4 at once"),
    click.Option(["--sweep"], multiple=True, metavar="KEY=V,V|A:B",
                 help="run once per value, as --KEY=V; several make a grid"),
    click.Option(["--sweep-file"], metavar="FILE", help="run once per line, a JSON object of arguments"),
    click.Option(["--snapshot"], is_flag=True, help="run a copy of the code [Slurm jobs do]"),
    click.Option(["--no-snapshot"], is_flag=True, help="run the code as it is when the job begins"),
    click.Option(["-d", "--detach"], is_flag=True, help="print the job's id or run's name, do not wait"),
    click.Option(["--dry-run"], is_flag=True, help="print what would be submitted"),
    click.Option(["--cpus-per-rank"], type=int, metavar="N", help="CPUs for each rank [1]"),
    click.Option(["--sbatch"], multiple=True, metavar="KEY=VALUE", help="any other option of sbatch; repeatable"),
    click.Option(["--setup"], multiple=True, metavar="COMMAND",
                 help='shell line before the ranks start: "module load cuda"; repeatable'),
    click.Option(["--requeue"], type=click.Choice(["yes", "resubmit", "no"]),
                 help="after a stop: same job, new one, none [yes]"),
    click.Option(["--max-timeouts"], type=int, metavar="N",
                 help="time limits to go on after [as long as there is progress]"),
    click.Option(["--stop-lead"], type=float, metavar="S",
                 help="stop so many seconds before the time limit [as saves take]"),
    *(click.Option(["--" + name.replace("_", "-")], hidden=True) for name in SBATCH),
    _torchrun("--nproc-per-node"),
    _torchrun("--nnodes"),
    _torchrun("--node-rank", type=int),
    _torchrun("--standalone", is_flag=True),
    _torchrun("--rdzv-backend"),
    _torchrun("--rdzv-endpoint"),
    _torchrun("--rdzv-id"),
    _torchrun("--rdzv-conf", multiple=True),
    _torchrun("--master-addr"),
    _torchrun("--master-port", type=int),
    _torchrun("--local-addr"),
    _torchrun("--role", default="default"),
    _torchrun("--run-path", is_flag=True),
    _torchrun("--monitor-interval", type=float),
    _torchrun("--start-method", type=click.Choice(["spawn", "fork", "forkserver"])),
    _torchrun("--event-log-handler"),
    _torchrun("--logs-specs"),
    _torchrun("--numa-binding"),
    _torchrun("--duplicate-stdout-filters"),
    _torchrun("--duplicate-stderr-filters"),
    _torchrun("--log-line-prefix-template"),
    _torchrun("--signals-to-handle"),
    _torchrun("--virtual-local-rank", is_flag=True),
    click.Argument(["program"], nargs=-1, type=click.UNPROCESSED),
]  # fmt: skip

COMMAND = _Command(
    "launch",
    params=PARAMETERS,
    context_settings={
        "allow_interspersed_args": False,
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda token: (
            token.replace("_", "-") if token.startswith("--") or "_" in token else token
        ),
        "max_content_width": 100,
    },
)
COMMAND.params.append(
    click.Option(["--version"], is_flag=True, is_eager=True, expose_value=False, hidden=True,
                 callback=lambda ctx, _, given: _show_version(ctx) if given else None)
)  # fmt: skip


def _show_version(ctx: click.Context) -> None:
    from importlib.metadata import version

    click.echo(f"launch (muster {version('muster')})")
    ctx.exit()


def read(argv: Sequence[str]) -> dict[str, Any]:
    """The options of a command line by name, `program` among them; `given`: those that it, or the environment, says.

    Where neither says anything the files of config.py do. Raises `UsageError`: no program; what a file may not say.
    """
    with COMMAND.make_context("launch", list(argv)) as ctx:
        options = dict(ctx.params)
        said = (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT)
        given = {name for name in options if ctx.get_parameter_source(name) in said}
    if not options["program"]:
        raise UsageError("no program given. Usage: launch [options] script.py [args ...]; launch --help shows the rest")
    options = config.apply(options, given, config.load(PARAMETERS, Path.cwd(), os.environ))
    return options | {"given": given}
