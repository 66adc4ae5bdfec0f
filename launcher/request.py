"""Options -> what is to be done: the checked spec, and under which name."""

from __future__ import annotations

import os
import re
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from launcher import sweep
from launcher.errors import UsageError
from launcher.hardware import find_gpus
from launcher.options import REFUSED, SBATCH, read
from launcher.spec import LaunchSpec, Meeting, Output, Program, Slurm, Ssh
from launcher.where import Surroundings, Where, least_and_most, many, spares_of, where_to_run

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["Request", "parse"]

_INSTEAD = {
    "requeue": "; see --requeue",
    "no-requeue": "; say --requeue no",
    "ntasks": ": one per node; ranks are --gpus or --procs",
    "output": ": a file in the run folder",
    "error": ": a file in the run folder",
}


@dataclass(frozen=True)
class Request:
    """What a command line asks for. where: on this machine ("here"), with nodes that are started one by one
    ("meeting"), on other hosts by ssh ("hosts"), as a new job ("job"), in the allocation that this process has
    ("allocation"), as one node of it ("step").

    elements: of an array, by index, each with its arguments; throttle: how many of them at once. snapshot: whether a
    copy of the code is to be run; insist: that was asked for, and not just usual.
    """

    spec: LaunchSpec
    where: Literal["here", "meeting", "hosts", "job", "allocation", "step"]
    name: str | None = None
    detach: bool = False
    dry_run: bool = False
    elements: dict[int, tuple[str, ...]] | None = None
    throttle: int | None = None
    snapshot: bool = False
    insist: bool = False


def parse(argv: Sequence[str], surroundings: Surroundings | None = None) -> Request:
    """What a command line asks for, checked. Raises `UsageError`."""
    o = read(argv)
    where = where_to_run(o, Surroundings.of(os.environ) if surroundings is None else surroundings)
    spec = _spec_from(o, where)
    place = "meeting" if spec.meeting is not None else where.place
    elements, throttle = _elements(o)
    if o["snapshot"] and o["no_snapshot"]:
        raise UsageError("--snapshot and --no-snapshot contradict each other: give one of them")
    if o["sync"] and (place != "hosts" or o["no_snapshot"]):
        other = "--no-snapshot" if place == "hosts" else "no --hosts"
        raise UsageError(f"--sync copies a snapshot of the code to --hosts, and there is {other}")
    if o["preflight"] and (place in ("meeting", "step") or elements is not None):
        raise UsageError(
            "--preflight looks at machines that launch itself starts one run on; here say launch doctor before, on "
            "each of them"
        )
    snapshot = o["snapshot"] or o["sync"] or (place == "job" and not o["no_snapshot"])
    return Request(
        spec, place, o["run"], o["detach"], o["dry_run"], elements, throttle, snapshot,
        insist="snapshot" in o["given"] or o["sync"],
    )  # fmt: skip


def _elements(o: Mapping[str, Any]) -> tuple[dict[int, tuple[str, ...]] | None, int | None]:
    if not many(o):
        return None, None
    if o["sweep"] and o["sweep_file"]:
        raise UsageError("--sweep and --sweep-file both say what to run: give one of them")
    arguments = sweep.grid(o["sweep"]) if o["sweep"] else None
    if o["sweep_file"]:
        arguments = sweep.of_file(Path(o["sweep_file"]))
    return sweep.choose(o["array"], arguments)


def _ssh(o: Mapping[str, Any], where: Where, procs: int) -> Ssh | None:
    if where.place != "hosts":
        return None
    given = any(o[name] is not None for name in ("gpus", "procs", "nproc_per_node"))
    for host in where.hosts:
        if given and host.slots is not None and host.slots < procs:
            raise UsageError(f"{procs} ranks on each host: {host.name} has {host.slots} slot(s)")
    slots = tuple(procs if given else host.slots or 1 for host in where.hosts)
    names = tuple(text for text in o["env"] if "=" not in text)
    return Ssh(tuple(host.name for host in where.hosts), slots, names, o["sync"])


def _environment(o: Mapping[str, Any]) -> dict[str, str]:
    """The variables that are given with a value, which the run folder's record shows."""
    found = {}
    for text in o["env"]:
        name, equals, value = text.partition("=")
        if not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise UsageError(f"--env {text!r}: give NAME or NAME=VALUE")
        if equals:
            found[name] = value
        elif name not in os.environ:
            raise UsageError(f"--env {name}: there is no such variable here; give NAME=VALUE, or export it")
    return found


def _spec_from(o: dict[str, Any], where: Where) -> LaunchSpec:
    _refuse_unsupported(o)
    cwd = Path.cwd()
    program = _program(o)
    program.check(cwd)
    least, nodes, meeting = _nodes(o, where)
    procs, device = _procs(o, where)
    restarts, grace = o["max_restarts"], o["grace"]
    settings: dict[str, Any] = {}
    if o["signals_to_handle"]:
        settings["stop_signals"] = tuple(s.strip() for s in o["signals_to_handle"].split(",") if s.strip())
    preload = tuple(m.strip() for m in o["preload"].split(",") if m.strip()) if o["preload"] else ("torch",)
    if "last_call_timeout" in (conf := _rdzv_conf(o)):
        settings["last_call_s"] = _seconds(conf["last_call_timeout"])
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
        least=None if least == nodes else least,
        spares=spares_of(o),
        procs=procs,
        device=device,
        max_restarts=restarts,
        grace_s=grace,
        hang_timeout_s=_hang_timeout(o["hang_timeout"]),
        notify=o["notify"],
        preflight=o["preflight"],
        preload=preload,
        output=_output(o),
        meeting=meeting,
        slurm=_slurm(o, where, (least, nodes), procs, device),
        ssh=_ssh(o, where, procs),
        environment=_environment(o),
        role=o["role"],
        local_addr=o["local_addr"],
        master_port=o["master_port"] if meeting is None else None,
        virtual_local_rank=o["virtual_local_rank"],
        **settings,
    )


def _hang_timeout(text: str | None) -> float | None:
    if text is None or text == "off":
        return None if text is None else 0.0
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not seconds > 0:
        raise UsageError(f"--hang-timeout {text!r}: give seconds, or off")
    return seconds


def _refuse_unsupported(o: dict[str, Any]) -> None:
    """Say so instead of running without what was asked for."""
    for name, why in REFUSED.items():
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


def _nodes(o: dict[str, Any], where: Where) -> tuple[int, int, Meeting | None]:
    """The least and the most nodes of an attempt, and where they meet if each is started by somebody else."""
    if o["nodes"] is not None and o["nnodes"] is not None:
        raise UsageError("--nodes and --nnodes are the same thing: give one of them")
    spares = spares_of(o)
    least = nodes = where.nodes - spares if where.place == "allocation" else where.nodes
    for name in ("nodes", "nnodes"):
        if o[name] is not None:
            least, nodes = least_and_most(f"--{name}", o[name])
    by_hand = o["rdzv_endpoint"] or o["node_rank"] is not None or o["master_addr"]
    if o["standalone"] and nodes > 1:
        raise UsageError(f"--standalone is one node, --nnodes asks for {nodes}")
    if where.place != "here" or o["backend"] == "local":
        if by_hand and nodes > 1:
            who = "--backend local starts all nodes here" if where.place == "here" else "Slurm starts all nodes"
            raise UsageError(f"{who}; leave --rdzv-endpoint, --node-rank and --master-addr out")
        if where.place == "allocation":
            nodes = max(least, min(nodes, where.nodes - spares))
        if nodes < 1:
            raise UsageError(f"{nodes} nodes, {spares} spares: the {where.place} that this is in has {where.nodes}")
        if where.place in ("allocation", "step") and nodes + spares > where.nodes:
            raise UsageError(f"{nodes + spares} nodes: the {where.place} that this is in has {where.nodes}")
        if where.place == "step" and nodes != where.nodes:
            raise UsageError(f"{nodes} nodes: srun started this on {where.nodes}; leave --nodes out")
        if where.place == "step" and (spares or least < nodes):
            flag = f"--spares {spares}" if spares else f"--nodes {least}:{nodes}"
            raise UsageError(f"{flag}: srun starts all nodes of its step at once; leave it, or srun, out")
        return least, nodes, None
    if o["standalone"] or (nodes == 1 and not spares and not o["rdzv_endpoint"]):
        if o["node_rank"]:
            raise UsageError(f"--node-rank {o['node_rank']} of 1 node: give --nnodes and --rdzv-endpoint as well")
        if spares:
            raise UsageError(f"--standalone is one node, --spares {spares} asks for more")
        return least, nodes, None
    if not by_hand:
        if where.sbatch:
            raise UsageError(f"--nnodes {nodes} without --rdzv-endpoint: for a Slurm job say --nodes {nodes}")
        raise UsageError(
            f"{nodes + spares} nodes, but no word on where: there is no cluster scheduler on {socket.gethostname()}. "
            "Rehearse them on this machine with --backend local, or start one launch per node with "
            "--node-rank R --rdzv-endpoint HOST:PORT"
        )
    return least, nodes, _meeting(o, nodes + spares)


def _meeting(o: dict[str, Any], nodes: int) -> Meeting:
    backend = o["rdzv_backend"] or "static"
    if backend not in ("static", "c10d"):
        raise UsageError(f"--rdzv-backend {backend!r} is not supported: static and c10d are")
    conf = _rdzv_conf(o)
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
    timeout = _seconds(conf.get("join_timeout", conf.get("timeout", "600")))
    return Meeting(endpoint, rank, o["rdzv_id"] or "none", is_host, timeout)


def _rdzv_conf(o: Mapping[str, Any]) -> dict[str, str]:
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
    return conf


def _seconds(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise UsageError(f"--rdzv-conf: {error}; give seconds") from error


def _procs(o: dict[str, Any], where: Where) -> tuple[int, Any]:
    given = [f"--{n.replace('_', '-')}" for n in ("gpus", "procs", "nproc_per_node") if o[n] is not None]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} both say how many ranks a node has: give one of them")
    if o["procs"] is not None:
        return o["procs"], "cpu"
    if where.place in ("job", "hosts"):
        return _procs_elsewhere(o)
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
                + (", or add --nodes 1 to submit a Slurm job" if where.sbatch and where.place == "here" else "")
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


def _procs_elsewhere(o: dict[str, Any]) -> tuple[int, Any]:
    """Ranks on nodes that this host can say nothing of."""
    for flag, text in (("--gpus", o["gpus"]), ("--nproc-per-node", o["nproc_per_node"])):
        if text is not None and (not text.isdigit() or int(text) < 1):
            raise UsageError(f"{flag} {text!r}: on other hosts it must be a number; give one")
    if o["gpus"] is not None:
        return int(o["gpus"]), "gpu"
    return int(o["nproc_per_node"] or 1), "any"


def _slurm(o: dict[str, Any], where: Where, nodes: tuple[int, int], procs: int, device: str) -> Slurm | None:
    if where.place not in ("job", "allocation"):
        return None
    options: dict[str, str | int | bool] = {}
    if where.place == "job":
        least, most = nodes
        places = most + spares_of(o)
        if least < most:
            # With --ntasks-per-node 22.05 gives the least of a range even where all nodes are idle.
            options["nodes"] = f"{least}-{places}"
        else:
            options |= {"nodes": places, "ntasks-per-node": 1}
        if least < places:
            options["no-kill"] = True  # Slurm else ends a job that loses a node
        each = 1 if o["cpus_per_rank"] is None else o["cpus_per_rank"]
        if each < 1:
            raise UsageError(f"--cpus-per-rank {each}: give a whole number >= 1")
        options["cpus-per-task"] = each * procs
        if device == "gpu":
            options["gres"] = f"gpu:{procs}"
        options |= {name.replace("_", "-"): o[name] for name in SBATCH if o[name] is not None}
        _check_time(o["time"])
        options |= _more_options(o["sbatch"])
    return Slurm(options, tuple(o["setup"]), o["requeue"] or "yes", o["max_timeouts"], o["stop_lead"])


def _check_time(text: str | None) -> None:
    from launcher.backends.slurm_notation import duration

    if text is not None:
        try:
            duration(text)
        except ValueError as error:
            raise UsageError(f"--time {error}") from error


def _more_options(texts: Sequence[str]) -> dict[str, str | int | bool]:
    found: dict[str, str | int | bool] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        key = key.strip().removeprefix("--").replace("_", "-")
        if key in ("array", "output", "error", "wrap", "open-mode", "requeue", "no-requeue", "ntasks", "export"):
            raise UsageError(f"--sbatch {text!r}: launch sets {key} itself" + _INSTEAD.get(key, ""))
        if not key:
            raise UsageError(f"--sbatch {text!r}: give the long name of an option of sbatch, and =VALUE if it has one")
        found[key] = value if equals else True
    return found


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
