"""The loop of one node's agent: it starts the ranks, hears the supervisor, the zygote and the ranks' pipes, and sees to
it that nothing is left of what it has started.
"""

from __future__ import annotations

import contextlib
import os
import resource
import selectors
import signal
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.channel import Channel, PipeChannel
from launcher.errors import LaunchError
from launcher.failure import RankExit, exception_in, read_error_file, signal_name
from launcher.logs import NO_ROOM, Console, Forwarded, RankLog, prefix_for
from launcher.processes import end_descendants
from launcher.spec import LaunchSpec, keeps_terminal
from launcher.telling import Telling
from launcher.topology import Place, World, places, rank_environment
from launcher.waking import Waking
from launcher.watching import Ranks, RankView

if TYPE_CHECKING:
    from launcher.channel import Link, Message
    from launcher.pulse import Beating

__all__ = ["Node"]

_ABORT_GRACE_S = 1.0  # after a failure nothing can be saved any more


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
        self.orders = list(orders)  # from the supervisor, for the rendezvous: host, world, end
        self.ranks = Ranks()
        self._kill_at: float | None = None
        self._killed = False
        self._swept = False
        self._paused: set[int] = set()
        self._oom_kills = _oom_kills()
        self._selector = selectors.DefaultSelector()
        self._waking = Waking()
        self._forwarded = Forwarded(link) if isinstance(link, PipeChannel) else None
        self._heard = time.monotonic()
        self.console = Console(
            on_drained=self.wake, write=os.write if self._forwarded is None else self._forwarded.write
        )
        self._telling = Telling(
            self.ranks, spec, run_dir, self.host, base, self.console,
            report=self._report, signal=self._signal, rouse=self.wake, progress=scheduled,
        )  # fmt: skip
        for source in (link, zygote, self._waking):
            self._selector.register(source, selectors.EVENT_READ)
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # three descriptors a rank; the ranks keep their limit
        for name in {*spec.stop_signals, "SIGTERM", "SIGUSR1", "SIGUSR2"}:
            # Slurm signals every process of a step; what it means is the supervisor's to find out.
            self._waking.on(signal.Signals[name])
        if keeps_terminal(spec):
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C on the terminal is the rank's own

    def wake(self) -> None:
        """Have `turn` return, from any thread."""
        self._waking.rouse()

    # ------------------------------------------------------------------------------------------ starting

    def start(self, world: World, node: int) -> dict[int, int]:
        """Start this node's ranks; returns their pids by local rank."""
        self._swept = False
        self._signalled_ns = None
        self.ranks.begin(world)
        self._telling.attempt_begins()
        self._oom_kills = _oom_kills()
        folder = self.run_dir / "logs" / f"attempt-{world.attempt}"
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            if error.errno not in NO_ROOM:  # the logs tell of it
                raise
        for place in places(world, node):
            self._start_rank(world, place, folder)
        while len(self.ranks.pids) + len(self.ranks.exits) < len(self.ranks.places):
            self.turn(None)
        return dict(self.ranks.pids)

    def _start_rank(self, world: World, place: Place, folder: Path) -> None:
        spec, local = self.spec, place.local_rank
        error_file = folder / f"rank-{place.rank}.error.json"
        with contextlib.suppress(OSError):
            error_file.unlink(missing_ok=True)
        view = self.ranks.views[local] = RankView(place.rank, spec.hang_timeout_s)
        terminal = keeps_terminal(spec)
        ends: tuple[int, ...] = ()
        if not terminal:
            log = self._open_log(world, place, folder)
            self.ranks.logs[local] = log
            ends = log.open_pipes()
            for pipe in log.pipes:
                self._selector.register(pipe, selectors.EVENT_READ, local)
        self.ranks.places[local] = place
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
        if self.ranks.asked_ns is None:
            self.ranks.asked_ns = time.monotonic_ns()
            for local in self.ranks.pids:
                self._signal(local, signal.SIGTERM)
        deadline = time.monotonic() + grace_s
        self._kill_at = deadline if self._kill_at is None else min(self._kill_at, deadline)

    def _signal(self, local: int, number: int) -> None:
        self.zygote.send({"order": "signal", "key": str(local), "number": int(number)})

    @property
    def asked_to_leave(self) -> bool:
        """Whether the ranks of this attempt have been told to, or are to be as soon as they are there."""
        return self.ranks.asked_ns is not None

    @property
    def drained(self) -> bool:
        """Every rank of this attempt is reaped and nothing that they started is left."""
        return not self.ranks.pids and self._swept

    # ------------------------------------------------------------------------------------------ the loop

    def turn(self, timeout_s: float | None) -> None:
        """Wait for the next event (at most `timeout_s`) and deal with all that have come."""
        due = self._telling.due()
        if self._kill_at is not None and self.ranks.pids:
            due.append(self._kill_at)
        if self._silent_s is not None and not self.link.closed:
            due.append(self._heard + self._silent_s)
        if due:
            left = max(0.0, min(due) - time.monotonic())
            timeout_s = left if timeout_s is None else min(timeout_s, left)
        for key, _ in self._selector.select(timeout_s):
            if key.fileobj is self.link:
                self._hear_supervisor()
            elif key.fileobj is self.zygote:
                self._hear_zygote()
            elif key.fileobj is self._waking:
                self._awake()
            elif isinstance(key.fileobj, int):
                self._read(key.fileobj, key.data)
        self._telling.look()
        if self._silent_s is not None and not self.link.closed and time.monotonic() - self._heard > self._silent_s:
            # What held this loop up (a file system, say) may have held up nobody else: its words may be waiting.
            if not any(key.fileobj is self.link for key, _ in self._selector.select(0)):
                self.link.closed = self.link.unreachable = True
            self._hear_supervisor()
        if self._kill_at is not None and self.ranks.pids and time.monotonic() >= self._kill_at:
            self._killed = True
            for local in self.ranks.pids:
                self.zygote.send({"order": "kill", "key": str(local)})
            self._kill_at = time.monotonic() + 1.0  # a rank in an uninterruptible sleep is asked again

    def _awake(self) -> None:
        self._waking.heard()
        while self._waking.signals:
            number = self._waking.signals.pop(0)
            if self._scheduled and self._signalled_ns is None:
                self._signalled_ns = time.monotonic_ns()  # Slurm has signalled the ranks too
            self._report({"signalled": number})
        if self._paused and not self.console.full:
            for pipe in self._paused:
                for local, log in self.ranks.logs.items():
                    if pipe in log.pipes:
                        self._selector.register(pipe, selectors.EVENT_READ, local)
            self._paused.clear()

    def _read(self, pipe: int, local: int) -> None:
        log = self.ranks.logs.get(local)
        if log is None or pipe not in log.pipes:
            return  # its rank was reaped, and its pipes read to the end, earlier in this turn
        self.ranks.views[local].printed()
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
                self._telling.ask_for_stacks(message["stacks"])
            elif "vitals" in message:
                self._telling.vitals(message["vitals"]["most"])
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
                    self.ranks.asked_ns = self._kill_at = None
                    self._killed = False
                self.orders.append(message)
        if self.link.closed:
            self._selector.unregister(self.link)
            if self.ranks.pids or not self.dismissed:
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
            while self.ranks.pids and time.monotonic() < deadline:
                self.turn(0.1)
            self.zygote.send({"order": "quit"})
        raise ConnectionResetError("the supervisor is gone" if self._given_up is None else self._given_up)

    def _hear_zygote(self) -> None:
        for report in self.zygote.receive():
            if "started" in report:
                self.ranks.pids[int(report["started"])] = report["pid"]
                if self.ranks.asked_ns is not None:
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
        place, world = self.ranks.places[local], self.ranks.world
        assert world is not None
        self.ranks.pids.pop(local, None)
        folder = self.run_dir / "logs" / f"attempt-{world.attempt}"
        tail: tuple[str, ...] = ()
        log = self.ranks.logs.pop(local, None)
        if log is not None:
            for pipe in log.pipes:
                with contextlib.suppress(KeyError):
                    self._selector.unregister(pipe)
                self._paused.discard(pipe)
            log.close()
            tail = tuple(log.tail)
        view = self.ranks.views.pop(local)
        progress = view.progress
        view.close()
        error = read_error_file(folder / f"rank-{place.rank}.error.json")
        printed = exception_in(tail) if error is None and report["code"] not in (0, 75) else None
        told_ns = None if error is None else error.get("monotonic_ns")
        asked = any(t is not None and (told_ns or report["ns"]) >= t for t in (self.ranks.asked_ns, self._signalled_ns))
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
        self.ranks.exits[local] = ended
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
        if not self.ranks.pids and len(self.ranks.exits) == len(self.ranks.places):
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
