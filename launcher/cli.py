"""argv -> LaunchSpec -> a backend. The only module that prints and exits."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import socket
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from launcher import commands, index, runs
from launcher.errors import LaunchError, UsageError
from launcher.hardware import find_gpus
from launcher.spec import LaunchSpec, Meeting, Output, Program, keeps_terminal

if TYPE_CHECKING:
    from collections.abc import Sequence

    from launcher.gang import Outcome

__all__ = ["main"]

_HELP = """\
Start a program on every rank, keep it running, and say what happened.

  launch --gpus 4 train.py --lr 0.1           4 ranks here, one GPU each
  launch --procs 4 train.py                   4 ranks here, on the CPU
  launch --procs 4 -m package.train           a module, as with python -m
  launch --gpus 4 --max-restarts 3 train.py   go on after crashes
  launch resume NAME                          go on with a stopped run
  launch --backend local --nodes 2 --procs 2 train.py   rehearse a 2-node job

A torchrun line works with its first word replaced.
"""

_EPILOG = """\
Exit code: 0 finished; 75 stopped cleanly, run again; 2 wrong usage; else the first failing rank's (128+n: signal n).
"""

# torchrun's flags whose effect we do not have.
_REFUSED = {
    "logs_specs": "logs are files per rank in the run folder; see --tee, --redirects and --log-dir",
    "numa_binding": "ranks are not bound to NUMA nodes; start the program under numactl with --no-python",
    "duplicate_stdout_filters": "filter the rank's log in the run folder instead",
    "duplicate_stderr_filters": "filter the rank's log in the run folder instead",
}

_GROUPS = (
    ("Ranks", ("gpus", "procs", "nodes", "backend", "preload", "no_preload")),
    ("Program", ("module", "no_python")),
    ("Run", ("run", "max_restarts", "grace")),
    ("Output", ("show_ranks", "log_dir", "tee", "redirects", "local_ranks_filter")),
)


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Entry of the `launch` command."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if arguments[:1] == ["resume"]:
            code = resume(arguments[1:])
        elif arguments and arguments[0] in commands.NAMES:
            code = commands.run(arguments[0], arguments[1:])
        else:
            code = start(arguments)
    except click.exceptions.Exit as done:
        code = done.exit_code
    except click.ClickException as error:
        _complain(error.format_message())
        code = 2
    except LaunchError as error:
        _complain(str(error))
        code = error.exit_code
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        code = 128 + signal.SIGPIPE
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        # `launch logs NAME | head`: the interpreter flushes once more, and would say so.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def say(line: str) -> None:
    """One line to the person, apart from the ranks' stdout."""
    _print_err(f"launch: {line}")


def _print_err(text: str) -> None:
    """A reader that left (`2>&1 | head`) or a full disk behind stderr is no reason to end a run."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stderr.write(text + "\n")
        sys.stderr.flush()


def _complain(text: str) -> None:
    say(f"error: {text}")


# ------------------------------------------------------------------------------------------------ options


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
        accepted = [p.opts[-1] for p in options if p.hidden and p.envvar and p.name not in _REFUSED]
        for text in ("torchrun's, with its meaning: " + " ".join(sorted(accepted)), _EPILOG):
            formatter.write("\n" + textwrap.fill(text, formatter.width, break_on_hyphens=False) + "\n")


def _torchrun(*names: str, **settings: Any) -> click.Option:
    """An option of torchrun's, with its PET_ variable."""
    variable = "PET_" + names[-1].lstrip("-").replace("-", "_").upper()
    return click.Option(names, envvar=variable, hidden=True, **settings)


_PARAMETERS: list[click.Parameter] = [
    click.Option(["--gpus"], metavar="N|all", help="ranks per node, one GPU each"),
    click.Option(["--procs"], type=int, metavar="N", help="ranks per node on the CPU"),
    click.Option(["--nodes"], type=int, metavar="N", help="number of nodes"),
    click.Option(["--backend"], type=click.Choice(["local"]), help="where to run"),
    click.Option(["--preload"], metavar="M,...", help="modules that ranks have imported from birth [torch]"),
    click.Option(["--no-preload"], is_flag=True, help="plain interpreters instead of forked ranks"),
    click.Option(["-m", "--module"], is_flag=True, envvar="PET_MODULE", help="the program is a Python module"),
    click.Option(["--no-python"], is_flag=True, envvar="PET_NO_PYTHON", help="the program is any command"),
    click.Option(["--run"], metavar="NAME|DIR", help="name or folder; goes on if it is there"),
    click.Option(["--max-restarts"], type=int, default=0, envvar="PET_MAX_RESTARTS", metavar="N",
                 help="restarts after failures [0]"),
    click.Option(["--grace", "--shutdown-timeout"], type=float, default=30.0, envvar="PET_SHUTDOWN_TIMEOUT",
                 metavar="S", help="seconds from SIGTERM to SIGKILL [30]"),
    click.Option(["--show-ranks"], metavar="0,3|all|none", help="global ranks shown on the console [0]"),
    click.Option(["--log-dir"], envvar="PET_LOG_DIR", metavar="DIR", help="where --tee and --redirects write too"),
    click.Option(["-t", "--tee"], envvar="PET_TEE", metavar="0-3|R:N",
                 help="streams to show: 1 stdout, 2 stderr, 3 both"),
    click.Option(["-r", "--redirects"], envvar="PET_REDIRECTS", metavar="0-3|R:N", help="streams not to show"),
    click.Option(["--local-ranks-filter"], envvar="PET_LOCAL_RANKS_FILTER", metavar="0,1",
                 help="local ranks shown on the console"),
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

_COMMAND = _Command(
    "launch",
    params=_PARAMETERS,
    context_settings={
        "allow_interspersed_args": False,
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda token: (
            token.replace("_", "-") if token.startswith("--") or "_" in token else token
        ),
        "max_content_width": 100,
    },
)
_COMMAND.params.append(
    click.Option(["--version"], is_flag=True, is_eager=True, expose_value=False, hidden=True,
                 callback=lambda ctx, _, given: _show_version(ctx) if given else None)
)  # fmt: skip


def _show_version(ctx: click.Context) -> None:
    from importlib.metadata import version

    print(f"launch (muster {version('muster')})")
    ctx.exit()


def parse(argv: Sequence[str]) -> tuple[LaunchSpec, str | None]:
    """The spec that a command line asks for, and the run's name if one was given."""
    with _COMMAND.make_context("launch", list(argv)) as ctx:
        options = dict(ctx.params)
    if not options["program"]:
        raise UsageError("no program given. Usage: launch [options] script.py [args ...]; launch --help shows the rest")
    return _spec_from(options), options["run"]


def _spec_from(o: dict[str, Any]) -> LaunchSpec:
    _refuse_unsupported(o)
    cwd = Path.cwd()
    program = _program(o)
    program.check(cwd)
    nodes, meeting = _nodes(o)
    procs, device = _procs(o)
    restarts, grace = o["max_restarts"], o["grace"]
    settings: dict[str, Any] = {}
    if o["signals_to_handle"]:
        settings["stop_signals"] = tuple(s.strip() for s in o["signals_to_handle"].split(",") if s.strip())
    preload = tuple(m.strip() for m in o["preload"].split(",") if m.strip()) if o["preload"] else ("torch",)
    if o["no_preload"]:
        if o["preload"]:
            raise UsageError("--preload and --no-preload contradict each other: give one of them")
        preload = ()
    if o["virtual_local_rank"] and device == "cpu":
        raise UsageError("--virtual-local-rank numbers GPUs; with --procs there are none")
    return LaunchSpec(
        program=program,
        cwd=str(cwd),
        nodes=nodes,
        procs=procs,
        device=device,
        max_restarts=restarts,
        grace_s=grace,
        preload=preload,
        output=_output(o),
        meeting=meeting,
        role=o["role"],
        local_addr=o["local_addr"],
        master_port=o["master_port"] if meeting is None else None,
        virtual_local_rank=o["virtual_local_rank"],
        **settings,
    )


def _refuse_unsupported(o: dict[str, Any]) -> None:
    """Say so instead of running without what was asked for."""
    for name, why in _REFUSED.items():
        if o[name]:
            raise UsageError(f"--{name.replace('_', '-')} is not supported: {why}")
    if o["event_log_handler"] not in (None, "null"):
        raise UsageError("--event-log-handler: only 'null'; events.jsonl in the run folder holds what happened")
    if o["start_method"] not in (None, "spawn"):
        raise UsageError(
            f"--start-method {o['start_method']}: torchrun ignores it for scripts; here ranks are forked from a "
            "preloaded process, or plain interpreters with --no-preload"
        )


def _program(o: dict[str, Any]) -> Program:
    target, *args = o["program"]
    if o["module"] and o["no_python"]:
        raise UsageError("-m names a Python module, --no-python a program of another kind: give one of them")
    kind = "module" if o["module"] else "command" if o["no_python"] else "script"
    return Program(kind, target, tuple(args))  # type: ignore[arg-type]  # one of the three literals


def _nodes(o: dict[str, Any]) -> tuple[int, Meeting | None]:
    if o["nodes"] is not None and o["nnodes"] is not None:
        raise UsageError("--nodes and --nnodes are the same thing: give one of them")
    if o["nnodes"] is not None and not re.fullmatch(r"\d+(:\d+)?", o["nnodes"]):
        raise UsageError(f"--nnodes {o['nnodes']!r}: give N or MIN:MAX")
    nodes = o["nodes"] if o["nodes"] is not None else 1
    if o["nnodes"] is not None:
        least, _, most = o["nnodes"].partition(":")
        if most and most != least:
            raise UsageError(
                f"--nnodes {o['nnodes']}: a number of nodes that changes is not supported; give one number"
            )
        nodes = int(least)
    by_hand = o["rdzv_endpoint"] or o["node_rank"] is not None or o["master_addr"]
    if o["standalone"] or (nodes == 1 and not o["rdzv_endpoint"]):
        if o["standalone"] and nodes > 1:
            raise UsageError(f"--standalone is one node, --nnodes asks for {nodes}")
        if o["node_rank"]:
            raise UsageError(f"--node-rank {o['node_rank']} of 1 node: give --nnodes and --rdzv-endpoint as well")
        return nodes, None
    if o["backend"] == "local":
        if by_hand:
            raise UsageError(
                "--backend local starts all nodes here; leave --rdzv-endpoint, --node-rank and --master-addr out"
            )
        return nodes, None
    if not by_hand:
        raise UsageError(
            f"{nodes} nodes, but no word on where: there is no cluster scheduler on {socket.gethostname()}. "
            "Rehearse them on this machine with --backend local, or start one launch per node with "
            "--node-rank R --rdzv-endpoint HOST:PORT"
        )
    return nodes, _meeting(o, nodes)


def _meeting(o: dict[str, Any], nodes: int) -> Meeting:
    backend = o["rdzv_backend"] or "static"
    if backend not in ("static", "c10d"):
        raise UsageError(f"--rdzv-backend {backend!r} is not supported: static and c10d are")
    conf: dict[str, str] = {}
    for text in o["rdzv_conf"]:
        for item in filter(None, text.split(",")):
            key, equals, value = item.partition("=")
            if not equals:
                raise UsageError(f"--rdzv-conf {item!r}: give key=value pairs")
            conf[key.strip()] = value.strip()
    known = {"is_host", "timeout", "join_timeout", "read_timeout", "last_call_timeout", "close_timeout", "rank"}
    if unknown := sorted(conf.keys() - known):
        raise UsageError(f"--rdzv-conf {', '.join(unknown)}: not supported; known are {', '.join(sorted(known))}")
    rank = o["node_rank"]
    if rank is None and "rank" in conf:
        if not conf["rank"].isdigit():
            raise UsageError(f"--rdzv-conf rank={conf['rank']}: give a number")
        rank = int(conf["rank"])
    if backend == "static":
        rank = rank or 0
    if rank is not None and not 0 <= rank < nodes:
        raise UsageError(f"--node-rank {rank}: with {nodes} nodes it is 0 to {nodes - 1}")
    endpoint = o["rdzv_endpoint"]
    if not endpoint:
        address = o["master_addr"] or "127.0.0.1"
        endpoint = f"[{address}]" if ":" in address and not address.startswith("[") else address
        endpoint += f":{o['master_port'] or 29500}"
    is_host: bool | None = None
    if "is_host" in conf:
        is_host = conf["is_host"].lower() in ("1", "true", "t", "yes", "y")
    elif backend == "static":
        is_host = rank == 0
    try:
        timeout = float(conf.get("join_timeout", conf.get("timeout", "600")))
    except ValueError as error:
        raise UsageError(f"--rdzv-conf: {error}; give seconds") from error
    return Meeting(endpoint, rank, o["rdzv_id"] or "none", is_host, timeout)


def _procs(o: dict[str, Any]) -> tuple[int, Any]:
    given = [f"--{n.replace('_', '-')}" for n in ("gpus", "procs", "nproc_per_node") if o[n] is not None]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} both say how many ranks a node has: give one of them")
    if o["procs"] is not None:
        return o["procs"], "cpu"
    found = find_gpus()
    if o["gpus"] is not None:
        if o["gpus"] == "all":
            count = found.count
        elif o["gpus"].isdigit():
            count = int(o["gpus"])
        else:
            raise UsageError(f"--gpus {o['gpus']!r}: give a number, or all")
        if count < 1 or count > found.count:
            raise UsageError(
                f"--gpus {o['gpus']}: found {found}. Ask for at most that many, or use --procs N for ranks on the CPU"
            )
        return count, "gpu"
    wanted = o["nproc_per_node"]
    if wanted is None:
        return 1, "any"
    if wanted == "gpu":
        if not found.count:
            raise UsageError(f"--nproc-per-node gpu: found {found}")
        return found.count, "any"
    if wanted == "cpu":
        return os.cpu_count() or 1, "any"
    if wanted == "auto":
        return found.count or os.cpu_count() or 1, "any"
    if not wanted.isdigit() or int(wanted) < 1:
        raise UsageError(f"--nproc-per-node {wanted!r}: give a number >= 1, gpu, cpu or auto")
    return int(wanted), "any"


def _output(o: dict[str, Any]) -> Output:
    shown: tuple[int, ...] | None = (0,)
    if o["show_ranks"] == "all":
        shown = None
    elif o["show_ranks"] == "none":
        shown = ()
    elif o["show_ranks"] is not None:
        shown = _numbers("--show-ranks", o["show_ranks"], "0,3, all or none")
    log_dir = None if o["log_dir"] is None else str(Path(o["log_dir"]).absolute())
    filtered = _numbers("--local-ranks-filter", o["local_ranks_filter"], "0,1") if o["local_ranks_filter"] else ()
    prefix = o["log_line_prefix_template"]
    return Output(
        show_ranks=shown,
        tee=_streams("--tee", o["tee"]),
        redirects=_streams("--redirects", o["redirects"]),
        local_ranks_filter=filtered,
        log_dir=log_dir,
        **({} if not prefix else {"prefix": prefix}),
    )


def _numbers(flag: str, text: str, form: str) -> tuple[int, ...]:
    parts = [p.strip() for p in text.split(",")]
    if not all(p.isdigit() for p in parts):
        raise UsageError(f"{flag} {text!r}: give numbers like {form}")
    return tuple(map(int, parts))


def _streams(flag: str, text: str | None) -> dict[int, int]:
    """Torchrun's `3` or `0:3,1:1`: local rank -> bits; -1 is every rank."""
    if not text:
        return {}
    if re.fullmatch(r"[0-3]", text):
        return {-1: int(text)} if text != "0" else {}
    table = {}
    for item in text.split(","):
        if not (match := re.fullmatch(r"(\d+):([0-3])", item.strip())):
            raise UsageError(f"{flag} {text!r}: give 0 to 3, or local ranks like 0:3,1:1 (1 stdout, 2 stderr, 3 both)")
        table[int(match[1])] = int(match[2])
    return table


# ------------------------------------------------------------------------------------------------ commands


def start(argv: Sequence[str]) -> int:
    """`launch [options] program ...`"""
    spec, name = parse(argv)
    cwd = Path(spec.cwd)
    listener = None
    if spec.meeting is not None:
        from launcher.backends import meeting

        listener = meeting.listen(spec.meeting)
        if listener is None:
            say(f"node of run {spec.meeting.run_id!r}, meeting at {spec.meeting.endpoint}")
            return meeting.join(spec)
        if name is None and spec.meeting.run_id != "none":
            name = re.sub(r"[^A-Za-z0-9._-]+", "-", spec.meeting.run_id).strip("-.") or None
    path = runs.resolve(name, cwd) if name is not None else runs.default_root(cwd) / runs.new_name(spec.program)
    with runs.RunFolder.open(path, spec) as folder:
        return _work(folder, listener)


def resume(argv: Sequence[str]) -> int:
    """`launch resume NAME|DIR`"""
    if len(argv) != 1 or argv[0].startswith("-"):
        if argv[:1] in (["-h"], ["--help"]):
            print(
                "Usage: launch resume NAME|DIR\n\nGo on with a run that was stopped or has failed, as it was started."
            )
            return 0
        raise UsageError(f"launch resume takes one run name or folder; given: {shlex.join(argv) or 'nothing'}")
    path = runs.resolve(argv[0], Path.cwd())
    if not path.is_dir():
        known = sorted(
            (p.parent for p in runs.default_root(Path.cwd()).glob("*/run.json")), key=lambda p: p.stat().st_mtime
        )
        there = f"; runs here: {', '.join(p.name for p in known[-8:])}" if known else ""
        raise UsageError(f"there is no run {argv[0]!r} (looked for {path}){there}")
    with runs.RunFolder.open(path, None) as folder:
        folder.spec.program.check(Path(folder.spec.cwd))
        if folder.spec.meeting is not None:
            raise UsageError(
                "this run's nodes were started one by one: start each again with the same --rdzv-id and --run"
            )
        return _work(folder, None)


def _work(folder: runs.RunFolder, listener: socket.socket | None) -> int:
    spec = folder.spec
    state = folder.state()
    if state["status"] == "finished":
        say(f"run {folder.run_id} is finished already (folder {folder.path}); nothing to do")
        return 0
    nodes = f"{spec.nodes} node{'s' if spec.nodes > 1 else ''}"
    backend = "local" if listener is None else f"meeting at {spec.meeting.endpoint if spec.meeting else ''}"
    again = f", attempt {state['attempt'] + 1}" if state["attempt"] >= 0 else ""
    ranks = f"{spec.world_size} rank{'s' if spec.world_size > 1 else ''}"
    say(f"{backend}, run {folder.run_id}{again}: {ranks} on {nodes}, folder {folder.path}")
    if (why_not := index.register(folder.path, folder.created)) is not None:
        say(why_not)
    if listener is None:
        from launcher.backends import local

        outcome = local.run(folder, say)
    else:
        from launcher.backends import meeting

        outcome = meeting.host(folder, listener, say)
    _tell(folder, outcome)
    return outcome.code


def _tell(folder: runs.RunFolder, outcome: Outcome) -> None:
    from launcher.supervisor import report

    if outcome.status == "finished":
        if not keeps_terminal(folder.spec):
            say(f"run {folder.run_id} finished")
    elif outcome.status == "stopped":
        say(f"run {folder.run_id} stopped ({outcome.cause}); go on with: launch resume {_resume_name(folder)}")
    else:
        say(f"run {folder.run_id} failed with exit code {outcome.code}")
        _print_err(report(outcome, folder))


def _resume_name(folder: runs.RunFolder) -> str:
    if folder.path.parent == runs.default_root(Path.cwd()):
        return shlex.quote(folder.run_id)
    return shlex.quote(str(folder.path))
