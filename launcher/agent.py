"""One agent per node: torch elastic's agent with our workers.

It imports what the ranks will need, forks the zygote while it still has one thread, then lives in torch elastic's
`SimpleElasticAgent.run`: `_invoke_run` is ours, because torch's sleeps between polls and does not see a peer that
left. The supervisor decides who belongs to the gang; its decision reaches torch elastic through `GangRendezvous`, a
`RendezvousHandler`. Every attempt gets a store of its own, held by the agent of node 0 before anybody hears of it:
torch's default reads the last attempt's addresses from the shared one and meets nobody (1 of 10 restarts came back).
"""

from __future__ import annotations

import contextlib
import importlib
import os
import resource
import selectors
import signal
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher import worker
from launcher.arrival import connect, first_messages, look_around, own_stdio, parse, tell_why
from launcher.channel import Channel, PipeChannel, pair
from launcher.errors import LaunchError, UsageError
from launcher.failure import RankExit, exception_in, read_error_file, signal_name
from launcher.hangs import EVERY_S
from launcher.logs import NO_ROOM, Console, Forwarded, RankLog, prefix_for
from launcher.native import Search
from launcher.nvml import GpuWatch, of_rank
from launcher.pace import Taken, every_s, summary
from launcher.processes import (
    become_subreaper,
    die_with_parent,
    end_descendants,
    outlive_parent,
    start_ticks,
    threads_of,
)
from launcher.pulse import Beating
from launcher.spec import LaunchSpec, keeps_terminal
from launcher.stacks import SIGNAL
from launcher.topology import Place, World, places, rank_environment
from launcher.vitals import gathered, memory_of
from launcher.watching import RankView
from launcher.zygote import serve

if TYPE_CHECKING:
    from launcher.channel import Link, Message
    from launcher.progress import Progress

__all__ = ["main"]

_PROGRESS_EVERY_S = 5.0  # rank 0's node tells the supervisor, if anything has changed
# The supervisor says every second that it is there. One that does not stands still, or the way to it is cut, which over
# TCP shows in the kernel: what is left there is a process that was stopped, and that somebody may yet let go on.
_SILENT_S = {"fd": None, "stdio": 10.0, "tcp": 120.0}
_STACKS_WITHIN_S = 1.0  # a rank that can write its stacks at all does so in milliseconds
_ABORT_GRACE_S = 1.0  # after a failure nothing can be saved any more


def main(argv: list[str]) -> dict[str, Any] | None:
    """Run a node's agent. Returns only in a forked rank, with its order; the agent itself exits.

    argv: `fd N` (a socket inherited from the supervisor), `tcp HOST PORT` (token in LAUNCH_TOKEN), `srun PORT` (the
    same, started by the supervisor's srun: Slurm says where it is, and which node this is), or `stdio` (started by the
    supervisor's ssh, over which all goes).
    LAUNCH_STARTER_PID: the process that started it and must not be outlived. Once an `fd` agent listens to its socket,
    that tells it of the end, and leaves it time to ask its ranks to leave.
    """
    if starter := os.environ.pop("LAUNCH_STARTER_PID", ""):
        die_with_parent(int(starter))
    secret = os.environ.pop("LAUNCH_TOKEN", "")
    base = dict(os.environ)
    join_timeout_s = float(os.environ.pop("LAUNCH_JOIN_TIMEOUT_S", "600"))
    own_spec = os.environ.pop("LAUNCH_NODE_SPEC_FD", "")
    for name in ("LAUNCH_JOIN_TIMEOUT_S", "LAUNCH_NODE_SPEC_FD"):
        base.pop(name, None)
    become_subreaper()
    if argv[0] == "srun":
        base["LAUNCH_NODE_RANK"] = os.environ["LAUNCH_NODE_RANK"] = os.environ["SLURM_PROCID"]
        argv = ["tcp", os.environ["SLURM_LAUNCH_NODE_IPADDR"], argv[1]]
    link: Link | None = None
    node: Node | None = None
    heir: list[str] = []
    try:
        if argv[0] == "fd":
            link = Channel(socket.socket(fileno=int(argv[1])))
        elif argv[0] == "stdio":
            link = own_stdio()
        else:
            link = Channel(connect(argv[1], int(argv[2]), join_timeout_s))
        spec: LaunchSpec | None = None
        if own_spec:
            with open(int(own_spec)) as file:
                spec = LaunchSpec.from_json(parse(file.read()))
        node_rank = os.environ.get("LAUNCH_NODE_RANK")
        base.pop("LAUNCH_NODE_RANK", None)
        link.send(
            {
                "hello": {
                    "token": secret,
                    "host": socket.gethostname(),
                    "pid": os.getpid(),
                    "started": start_ticks(os.getpid()),
                    "now_ns": time.monotonic_ns(),
                    "node_rank": None if node_rank is None else int(node_rank),
                    "procs": None if spec is None else spec.procs,
                    "address": link.local_address,
                }
            }
        )
        welcome, orders = first_messages(link, join_timeout_s)
        if "end" in welcome:  # stopped before it began
            os._exit(int(welcome["end"]["code"]))
        heir = welcome["heir"]
        if spec is None:
            spec = LaunchSpec.from_json(welcome["spec"])
        if argv[0] == "stdio":
            look_around(spec, Path(welcome["run_dir"]), welcome["created"])
        zygote, zygote_pid, order = _fork_zygote(spec, base, link)
        if order is not None:
            return order
        node = Node(
            spec,
            welcome["run_id"],
            Path(welcome["run_dir"]),
            base,
            link,
            zygote,
            zygote_pid,
            orders,
            scheduled=welcome["scheduled"],
            silent_s=_SILENT_S[argv[0]],
            orphan_grace_s=welcome["orphan_grace_s"],
        )
        code = _run(node, listens_to_starter=argv[0] == "fd")
    except LaunchError as error:
        code = error.exit_code
        tell_why(link, error)
    except ConnectionError as error:
        code = 1  # the supervisor is gone; on its own machine it, or whoever killed it, tells the story
        if argv[0] == "tcp":
            where = f"{argv[1]} port {argv[2]}"
            sys.stderr.write(f"launch: agent on {socket.gethostname()}: lost the supervisor at {where}: {error}\n")
        if heir and not (node is not None and node.dismissed):
            sys.stderr.flush()
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # what ended the supervisor is after us too
            os.execve(heir[0], heir, base)
    sys.stderr.flush()
    os._exit(code)


def _fork_zygote(spec: LaunchSpec, base: dict[str, str], link: Link) -> tuple[Channel, int, dict[str, Any] | None]:
    """Preload and fork: the channel to the zygote and its pid; in a forked rank the last value is its order."""
    ours, theirs = pair()
    if spec.procs > 1:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    # numpy's OpenBLAS starts its threads when it is loaded; worker.py gives each rank its number after the fork.
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    if spec.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    preload = () if spec.program.kind == "command" else spec.preload
    path = list(sys.path)
    first = [] if spec.code is None else spec.code.first(path)
    for name in preload:
        sys.path[:] = [spec.entry, *first, *path]
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UsageError(f"--preload {name}: {error}; preload what the ranks import anyway") from error
        finally:
            sys.path[:] = path
        threads = threads_of()
        if len(threads) > 1:
            raise UsageError(
                f"--preload {name} started {len(threads) - 1} thread(s) ({', '.join(threads[1:])}); a process with "
                "threads cannot be forked safely. Leave it out of --preload, or use --no-preload"
            )
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        raise UsageError(
            "a preloaded module initialised CUDA, which does not survive a fork: leave it out of --preload"
        )
    pid = os.fork()
    if pid == 0:
        ours.close()
        link.close()
        return theirs, 0, serve(theirs)
    theirs.close()
    os.environ.clear()
    os.environ.update(base)
    return ours, pid, None


def _run(node: Node, *, listens_to_starter: bool) -> int:
    """The agent after the fork: torch elastic from here on."""
    from launcher.elastic import run_agent  # a second or more of torch

    if listens_to_starter:
        outlive_parent()
    node.beating = Beating(node.link)  # from here on nothing holds a thread up for seconds, as importing torch does
    try:
        return run_agent(node)
    finally:
        node.close()


class Node:
    """The agent's event loop and all that it watches: supervisor, zygote, ranks, their pipes, signals."""

    def __init__(
        self,
        spec: LaunchSpec,
        run_id: str,
        run_dir: Path,
        base: dict[str, str],
        link: Link,
        zygote: Channel,
        zygote_pid: int,
        orders: list[Message],
        *,
        scheduled: bool,
        silent_s: float | None,
        orphan_grace_s: float,
    ) -> None:
        self.spec = spec
        self.run_id = run_id
        self.run_dir = run_dir
        self.host = socket.gethostname()
        self.base = base
        self.link = link
        self.zygote = zygote
        self._zygote_pid = zygote_pid
        self._orphan_grace_s = orphan_grace_s  # what is left to the ranks when the supervisor is gone
        self._scheduled = scheduled
        self._silent_s = silent_s
        self.beating: Beating | None = None
        self._given_up: str | None = None  # by the supervisor, and why
        self._signalled_ns: int | None = None
        self.dismissed = False
        self._told: Progress | None = None
        self._tell_at = 0.0
        self.orders = list(orders)  # from the supervisor, for the rendezvous: host, world, end
        self.exits: dict[int, RankExit] = {}  # by local rank
        self._pids: dict[int, int] = {}  # alive, by local rank
        self._logs: dict[int, RankLog] = {}
        self._views: dict[int, RankView] = {}
        self._look_at = 0.0
        self._pace_at = 0.0
        self._gpus = GpuWatch()
        self._asked_for: str | None = None  # stacks, under this name
        self._collect_at = 0.0
        self._search: Search | None = None  # for where they are below Python
        self._places: dict[int, Place] = {}
        self._world: World | None = None
        self._asked_ns: int | None = None
        self._kill_at: float | None = None
        self._killed = False
        self._swept = False
        self._paused: set[int] = set()
        self._oom_kills = _oom_kills()
        self._selector = selectors.DefaultSelector()
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._forwarded = Forwarded(link) if isinstance(link, PipeChannel) else None
        self._heard = time.monotonic()
        self.console = Console(
            on_drained=self.wake, write=os.write if self._forwarded is None else self._forwarded.write
        )
        self._signals: list[int] = []
        for source in (link, zygote, self._wake_read):
            self._selector.register(source, selectors.EVENT_READ)
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # three descriptors a rank; the ranks keep their limit
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        for name in {*spec.stop_signals, "SIGTERM", "SIGUSR1", "SIGUSR2"}:
            # Slurm signals every process of a step; what it means is the supervisor's to find out.
            signal.signal(signal.Signals[name], lambda number, _: self._signals.append(number))
        if keeps_terminal(spec):
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C on the terminal is the rank's own

    def wake(self) -> None:
        """Have `turn` return, from any thread."""
        with contextlib.suppress(BlockingIOError, OSError):
            os.write(self._wake_write, b"\0")

    # ------------------------------------------------------------------------------------------ starting

    def start(self, world: World, node: int) -> dict[int, int]:
        """Start this node's ranks; returns their pids by local rank."""
        self._world, self._swept = world, False
        self._signalled_ns = None
        self._look_at = time.monotonic() + EVERY_S
        self.exits, self._pids, self._oom_kills = {}, {}, _oom_kills()
        folder = self.run_dir / "logs" / f"attempt-{world.attempt}"
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            if error.errno not in NO_ROOM:  # the logs tell of it
                raise
        for place in places(world, node):
            self._start_rank(world, place, folder)
        while len(self._pids) + len(self.exits) < len(self._places):
            self.turn(None)
        return dict(self._pids)

    def _start_rank(self, world: World, place: Place, folder: Path) -> None:
        spec, local = self.spec, place.local_rank
        error_file = folder / f"rank-{place.rank}.error.json"
        with contextlib.suppress(OSError):
            error_file.unlink(missing_ok=True)
        view = self._views[local] = RankView(place.rank, spec.hang_timeout_s)
        terminal = keeps_terminal(spec)
        ends: tuple[int, ...] = ()
        if not terminal:
            log = self._open_log(world, place, folder)
            self._logs[local] = log
            ends = log.open_pipes()
            for pipe in log.pipes:
                self._selector.register(pipe, selectors.EVENT_READ, local)
        self._places[local] = place
        environment = rank_environment(
            self.base,
            spec,
            world,
            place,
            run_id=self.run_id,
            run_dir=str(self.run_dir),
            error_file=str(error_file),
            progress=view.page,
        )
        first: list[str] = []
        if spec.code is not None:
            first = spec.code.first(sys.path)
            below = environment.get("PYTHONPATH", "")
            environment["PYTHONPATH"] = os.pathsep.join([*first, *filter(None, [below])])
        program = spec.program
        order = {
            "order": "start",
            "key": str(local),
            "program": {"kind": program.kind, "target": spec.target, "args": list(program.args)},
            "entry": spec.entry,
            "path": first,
            "python": sys.executable,
            "env": environment,
            "cwd": spec.cwd,
            "terminal": terminal,
            "stdin": spec.procs == 1 and spec.places == 1,
            "fork": bool(spec.preload),
            "stacks": view.stacks,
            "tracer": os.getpid(),
        }
        self.zygote.send(order, ends)
        for end in ends:
            os.close(end)

    def _open_log(self, world: World, place: Place, folder: Path) -> RankLog:
        output, local = self.spec.output, place.local_rank
        wanted = output.streams(output.tee, local) | output.streams(output.redirects, local)
        copies = {}
        if output.log_dir is not None:
            # torchrun's own layout, for tools that look there.
            below = Path(output.log_dir, self.run_id, f"attempt_{world.restarts}", str(local))
            copies = {s: below / name for s, name in ((1, "stdout.log"), (2, "stderr.log")) if wanted & s}
        return RankLog(
            folder / f"rank-{place.rank}.log",
            console=self.console,
            shown={s: output.shown(place.rank, local, s) for s in (1, 2)},
            prefix=prefix_for(output.prefix, rank=place.rank, local_rank=local, role=self.spec.role, host=self.host),
            copies=copies,
        )

    # ------------------------------------------------------------------------------------------ stopping

    def stop(self, grace_s: float) -> None:
        """SIGTERM to the ranks themselves, not to what they started; SIGKILL of the trees when the grace is over."""
        if self._asked_ns is None:
            self._asked_ns = time.monotonic_ns()
            for local in self._pids:
                self._signal(local, signal.SIGTERM)
        deadline = time.monotonic() + grace_s
        self._kill_at = deadline if self._kill_at is None else min(self._kill_at, deadline)

    def _signal(self, local: int, number: int) -> None:
        self.zygote.send({"order": "signal", "key": str(local), "number": int(number)})

    @property
    def asked_to_leave(self) -> bool:
        """Whether the ranks of this attempt have been told to, or are to be as soon as they are there."""
        return self._asked_ns is not None

    @property
    def drained(self) -> bool:
        """Every rank of this attempt is reaped and nothing that they started is left."""
        return not self._pids and self._swept

    # ------------------------------------------------------------------------------------------ the loop

    def turn(self, timeout_s: float | None) -> None:
        """Wait for the next event (at most `timeout_s`) and deal with all that have come."""
        if self._kill_at is not None and self._pids:
            left = max(0.0, self._kill_at - time.monotonic())
            timeout_s = left if timeout_s is None else min(timeout_s, left)
        if self._silent_s is not None and not self.link.closed:
            left = max(0.0, self._heard + self._silent_s - time.monotonic())
            timeout_s = left if timeout_s is None else min(timeout_s, left)
        if self._pids:
            at = min(self._look_at, self._collect_at) if self._asked_for is not None else self._look_at
            left = max(0.0, at - time.monotonic())
            timeout_s = left if timeout_s is None else min(timeout_s, left)
        tells = self._scheduled and 0 in self._pids and self._places[0].rank == 0
        if tells:
            left = max(0.0, self._tell_at - time.monotonic())
            timeout_s = left if timeout_s is None else min(timeout_s, left)
        for key, _ in self._selector.select(timeout_s):
            if key.fileobj is self.link:
                self._hear_supervisor()
            elif key.fileobj is self.zygote:
                self._hear_zygote()
            elif key.fileobj == self._wake_read:
                self._awake()
            elif isinstance(key.fileobj, int):
                self._read(key.fileobj, key.data)
        if tells and time.monotonic() >= self._tell_at:
            self._tell_progress()
        if time.monotonic() >= self._look_at:
            self._look_at = time.monotonic() + EVERY_S
            self._look_for_hangs()
            self._tell_pace()
        if self._asked_for is not None and time.monotonic() >= self._collect_at:
            self._collect_stacks(self._asked_for)
        if self._search is not None and self._search.over:
            self._tell_stacks(self._search)
        if self._silent_s is not None and not self.link.closed and time.monotonic() - self._heard > self._silent_s:
            self.link.closed = self.link.unreachable = True
            self._hear_supervisor()
        if self._kill_at is not None and self._pids and time.monotonic() >= self._kill_at:
            self._killed = True
            for local in self._pids:
                self.zygote.send({"order": "kill", "key": str(local)})
            self._kill_at = time.monotonic() + 1.0  # a rank in an uninterruptible sleep is asked again

    def _awake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while os.read(self._wake_read, 4096):
                pass
        for number in self._signals:
            if self._scheduled and self._signalled_ns is None:
                self._signalled_ns = time.monotonic_ns()  # Slurm has signalled the ranks too
            self._report({"signalled": number})
        self._signals.clear()
        if self._paused and not self.console.full:
            for pipe in self._paused:
                for local, log in self._logs.items():
                    if pipe in log.pipes:
                        self._selector.register(pipe, selectors.EVENT_READ, local)
            self._paused.clear()

    def _read(self, pipe: int, local: int) -> None:
        log = self._logs.get(local)
        if log is None or pipe not in log.pipes:
            return  # its rank was reaped, and its pipes read to the end, earlier in this turn
        self._views[local].printed()
        if log.held_up(pipe):
            self._selector.unregister(pipe)
            self._paused.add(pipe)
            if not self.console.full:  # it drained in between, and nobody will wake us
                self.wake()
            return
        # The number is free for reuse as soon as the log closes it: leave the selector first, come back if it lives.
        self._selector.unregister(pipe)
        if log.read(pipe):
            self._selector.register(pipe, selectors.EVENT_READ, local)

    def _tell_progress(self) -> None:
        self._tell_at = time.monotonic() + _PROGRESS_EVERY_S
        if 0 in self._views and (progress := self._views[0].progress) not in (None, self._told):
            self._told = progress
            self._report({"progress": progress.to_json()})

    def _look_for_hangs(self) -> None:
        for local, view in self._views.items():
            if local in self._pids and self._asked_ns is None and (stalled := view.stalled()) is not None:
                seconds, tells = stalled
                self._report({"stalled": {"rank": view.rank, "seconds": seconds, "tells": tells}})

    def _tell_pace(self) -> None:
        """How fast the ranks are of themselves, and what they take."""
        now, world = time.monotonic(), self._world
        if world is None or not self._pids or now < self._pace_at:
            return
        self._pace_at = now + every_s(len(world.slots)) - EVERY_S / 2
        views = {local: (self._views[local], pid) for local, pid in self._pids.items()}
        paces = [view.pace(pid, now) for view, pid in views.values()]
        taken = [Taken(v.rank, memory_of(pid), self._gpu_memory(local)) for local, (v, pid) in views.items()]
        progress: Progress | None = None
        for view, _ in views.values():
            if (one := view.progress) is not None:
                progress = one.and_of(progress)
        self._report({"pace": summary(filter(None, paces), taken, progress), "attempt": world.attempt})

    def _gpu_memory(self, local: int) -> int | None:
        gpus = [] if self.spec.device == "cpu" else self._gpus.look()
        gpu = of_rank(gpus, self.base.get("CUDA_VISIBLE_DEVICES"), local)
        return None if gpu is None else int(gpu["used"])

    def _tell_vitals(self, most: int) -> None:
        """Somebody watches: what each rank does and takes. most: of how many it is to be told one by one."""
        gpus = [] if self.spec.device == "cpu" else self._gpus.look()
        rows: list[dict[str, Any]] = [{"rank": e.rank, "rss": 0, "exit": e.code} for e in self.exits.values()]
        for local, pid in self._pids.items():
            row = self._views[local].vitals(pid)
            if local in self._logs and (tail := self._logs[local].tail):
                row["line"] = tail[-1][:200]
            if (gpu := of_rank(gpus, self.base.get("CUDA_VISIBLE_DEVICES"), local)) is not None:
                row["gpu"] = gpu
            rows.append(row)
        self._report({"vitals": gathered(rows, most)})

    def _ask_for_stacks(self, name: str) -> None:
        if self._asked_for is None:
            self._asked_for, self._collect_at = name, time.monotonic() + _STACKS_WITHIN_S
            for local in self._pids:
                self._views[local].forget_stacks()
                self._signal(local, SIGNAL)

    def _collect_stacks(self, name: str) -> None:
        """What the ranks have written; where they are below Python is looked for beside everything else."""
        self._asked_for = None
        groups = [self._views[local].place(pid) for local, pid in sorted(self._pids.items())]
        pids = {self._views[local].rank: pid for local, pid in self._pids.items()}
        self._search = Search(name, self._places[0].node if groups else -1, groups, pids)
        self._search.start(self.wake)

    def _tell_stacks(self, search: Search) -> None:
        """Whole into this node's file, and what tells the ranks apart to the supervisor."""
        self._search = None
        if search.groups:
            path = self.run_dir / "stacks" / search.name / f"node-{search.node}.txt"
            try:
                path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                path.write_text(search.whole(self.host))
            except OSError as error:
                self.console.write(2, f"launch: {path}: {error.strerror}; these stacks are lost\n".encode())
        stalled = any(self._views[local].stalled() is not None for local in self._pids)
        self._report({"stacks": search.name, "still": stalled, **search.told()})

    def _report(self, message: Message) -> None:
        if not self.link.closed:  # without a supervisor the ranks are still brought to their end
            self.link.send(message)

    def _hear_supervisor(self) -> None:
        self._heard = time.monotonic()
        for message in self.link.receive():
            if "stop" in message:
                self.stop(message["stop"]["grace_s"])
            elif "abort" in message:
                self.stop(_ABORT_GRACE_S)
            elif "kill" in message:
                self.stop(0.0)
            elif "stacks" in message:
                self._ask_for_stacks(message["stacks"])
            elif "vitals" in message:
                self._tell_vitals(message["vitals"]["most"])
            elif "clock" in message:
                self._report({"clock": message["clock"], "ns": time.monotonic_ns()})
            elif "shown" in message and self._forwarded is not None:
                self._forwarded.shown(message["shown"])
            elif "given up" in message:
                self._given_up = message["given up"]
            elif "here" not in message:
                self.dismissed = self.dismissed or "end" in message
                if "world" in message:
                    # From here on a stop is of this attempt, also one that comes before its ranks are there.
                    self._asked_ns = self._kill_at = None
                    self._killed = False
                self.orders.append(message)
        if self.link.closed:
            self._selector.unregister(self.link)
            if self._pids or not self.dismissed:
                self._abandon()

    def _abandon(self) -> None:
        """The supervisor is gone: nothing that we started may outlive it.

        What was trained is saved, unless the run goes on elsewhere meanwhile: it must not be written by two.
        """
        fenced = self._given_up is not None or (self.beating is not None and self.beating.stood_still)
        fenced = fenced or (self.link.unreachable and self.spec.elastic)
        grace_s = 0.0 if fenced else self._orphan_grace_s
        with contextlib.suppress(ConnectionError):
            self.stop(grace_s)
            deadline = time.monotonic() + grace_s + 1
            while self._pids and time.monotonic() < deadline:
                self.turn(0.1)
            self.zygote.send({"order": "quit"})
        raise ConnectionResetError("the supervisor is gone" if self._given_up is None else self._given_up)

    def _hear_zygote(self) -> None:
        for report in self.zygote.receive():
            if "started" in report:
                self._pids[int(report["started"])] = report["pid"]
                if self._asked_ns is not None:
                    self._signal(int(report["started"]), signal.SIGTERM)
            elif "exited" in report:
                self._reaped(int(report["exited"]), report)
            elif "swept" in report:
                self._swept = True
        if self.zygote.closed:
            _, status = os.waitpid(self._zygote_pid, 0)
            code = os.waitstatus_to_exitcode(status)
            end_descendants()
            how = f"was killed by {signal_name(-code)}" if code < 0 else f"left with code {code}"
            raise LaunchError(f"its zygote (pid {self._zygote_pid}) {how}, and its ranks with it")

    def _reaped(self, local: int, report: Message) -> None:
        place, world = self._places[local], self._world
        assert world is not None
        self._pids.pop(local, None)
        folder = self.run_dir / "logs" / f"attempt-{world.attempt}"
        tail: tuple[str, ...] = ()
        log = self._logs.pop(local, None)
        if log is not None:
            for pipe in log.pipes:
                with contextlib.suppress(KeyError):
                    self._selector.unregister(pipe)
                self._paused.discard(pipe)
            log.close()
            tail = tuple(log.tail)
        view = self._views.pop(local)
        progress = view.progress
        view.close()
        error = read_error_file(folder / f"rank-{place.rank}.error.json")
        printed = exception_in(tail) if error is None and report["code"] not in (0, 75) else None
        told_ns = None if error is None else error.get("monotonic_ns")
        asked = any(t is not None and (told_ns or report["ns"]) >= t for t in (self._asked_ns, self._signalled_ns))
        if printed is not None and report["code"] == -signal.SIGTERM:
            asked = False  # who dies of it prints nothing any more: the exception was there before
        if report["code"] == -signal.SIGKILL and not self._killed and not self._scheduled:
            asked = False  # not by us: its end, which others noticed, took the kernel longer than theirs
        ended = RankExit(
            rank=place.rank,
            local_rank=local,
            node=place.node,
            host=self.host,
            pid=report["pid"],
            code=report["code"],
            ended_ns=report["ns"],
            asked=asked,
            log="" if log is None else str(log.path),
            error=error or printed,
            tail=tail,
            killed_for_memory=report["code"] == -signal.SIGKILL and not asked and _oom_kills() > self._oom_kills,
        )
        self.exits[local] = ended
        self._report(
            {
                "exited": ended.to_json(),
                "attempt": world.attempt,
                "progress": None if progress is None else progress.to_json(),
            }
        )
        if ended.failed and not self._scheduled:
            # Where there is a scheduler, it may be its signal that the rank died of: the supervisor finds out.
            self.stop(_ABORT_GRACE_S)
        if not self._pids and len(self.exits) == len(self._places):
            self.zygote.send({"order": "sweep", "grace_s": _ABORT_GRACE_S})

    def close(self) -> None:
        """End the zygote and whatever is still below us, write the console out."""
        with contextlib.suppress(ConnectionError):
            self.zygote.send({"order": "quit"})
        end_descendants()
        if self._forwarded is not None:
            self._forwarded.open()  # nobody hears here any more that there is room
        self.console.close()
        signal.set_wakeup_fd(-1)
        self._selector.close()


def _oom_kills() -> int:
    """How often the kernel has killed for want of memory since boot; -1 where it does not say."""
    try:
        with open("/proc/vmstat") as file:
            for line in file:
                if line.startswith("oom_kill "):
                    return int(line.split()[1])
    except OSError:
        pass
    return -1


def bootstrap() -> None:
    """Entry of the agent's interpreter: the agent exits inside `main`; a forked rank comes back here and runs."""
    order = main(sys.argv[1:])
    if order is not None:
        worker.run(order)
