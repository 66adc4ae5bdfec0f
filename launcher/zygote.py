"""The zygote: a preloaded process with one thread, parent and subreaper of a node's ranks.

It is forked from the agent after the preload and before anything starts a thread (a fork after the rendezvous store
was started hung in 1 of 2 tries). It forks ranks on request in milliseconds, reports every exit at once, and when its
agent is gone it kills what it started and leaves.

In the child, `serve` returns the order that the rank must carry out; the caller then runs it from the bottom of the
stack (see worker.py), so that the rank's life is that of an ordinary interpreter, exit handlers included.
"""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import select
import signal
import time
from typing import TYPE_CHECKING, Any

from launcher.processes import become_subreaper, children_of, descendants, kill_tree
from launcher.stacks import SIGNAL

if TYPE_CHECKING:
    from launcher.channel import Channel

__all__ = ["serve"]


class Rank:
    """What the zygote knows of a child it forked; the pidfd keeps a signal from ever reaching a reused pid."""

    def __init__(self, key: str, pid: int) -> None:
        self.key = key
        self.pid = pid
        self.pidfd = os.pidfd_open(pid)

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, number)


def serve(channel: Channel) -> dict[str, Any]:
    """Fork ranks until told to leave; returns, in each child only, the order with its descriptors under `fds`.

    Orders from the agent: start (key and all that worker.py needs), signal (key, number), kill (key), sweep (end
    orphans: SIGTERM, after `grace_s` SIGKILL), quit. Reports: started (key, pid), exited (key, pid, code, ns), swept.
    """
    become_subreaper()
    # The agent's death is seen as the end of the channel; a stopped zygote would not see it, hence the kernel's help
    # is not used here: ranks have it themselves (worker.py), and the agent reaps if the zygote dies.
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)  # the ranks keep theirs; we hold three descriptors for each
    resource.setrlimit(resource.RLIMIT_NOFILE, (limits[1], limits[1]))
    wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    # What was ignored when launch began (nohup) stays ignored in the ranks. SIGINT is ours to ignore on a terminal.
    own = (signal.SIGINT, signal.SIGPIPE, signal.SIGXFSZ)
    ignored = [int(n) for n in signal.valid_signals() if n not in own and signal.getsignal(n) is signal.SIG_IGN]
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2):
        # Slurm signals every process of a step; the zygote leaves when its agent says so and not before.
        signal.signal(number, signal.SIG_IGN)
    signal.signal(SIGNAL, signal.SIG_IGN)  # a rank that was just forked may be asked for its stacks at once
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    gc.collect()
    gc.freeze()  # collections in the ranks must not touch, and thereby copy, the pages shared with us
    ranks: dict[int, Rank] = {}
    poll = select.poll()
    poll.register(channel.fileno(), select.POLLIN)
    poll.register(wake_read, select.POLLIN)
    sweep_deadline: float | None = None

    def reap() -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            rank = ranks.pop(pid, None)
            if rank is not None:
                now = time.monotonic_ns()
                os.close(rank.pidfd)
                code = os.waitstatus_to_exitcode(status)
                channel.send({"exited": rank.key, "pid": pid, "code": code, "ns": now})

    def orphans() -> list[int]:
        return [pid for pid in children_of(os.getpid()) if pid not in ranks]

    def leave() -> None:
        for pid in list(ranks):
            kill_tree(pid)
        while True:
            for pid in descendants(os.getpid()):
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            try:
                os.waitpid(-1, 0)
            except ChildProcessError:
                os._exit(0)

    while True:
        timeout = None if sweep_deadline is None else max(0.0, sweep_deadline - time.monotonic())
        poll.poll(None if timeout is None else timeout * 1000 + 1)
        with contextlib.suppress(BlockingIOError):
            os.read(wake_read, 4096)
        try:
            reap()
            orders = channel.receive()
            while orders:
                order = orders.pop(0)
                what = order["order"]
                if what == "start":
                    pid = os.fork()
                    if pid == 0:
                        # What must differ from the parent before anything else can happen.
                        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
                        signal.set_wakeup_fd(-1)
                        os.close(wake_read)
                        os.close(wake_write)
                        for rank in ranks.values():
                            os.close(rank.pidfd)
                        channel.close()
                        for other in orders:  # a rank must not hold another's pipes open
                            for fd in other.get("fds", ()):
                                os.close(fd)
                        order["parent"] = os.getppid()
                        order["ignored"] = ignored
                        return order
                    ranks[pid] = Rank(order["key"], pid)
                    for fd in order.get("fds", ()):
                        os.close(fd)
                    channel.send({"started": order["key"], "pid": pid})
                elif what in ("signal", "kill"):
                    for rank in list(ranks.values()):
                        if rank.key == order["key"]:
                            if what == "signal":
                                rank.signal(order["number"])
                            else:
                                kill_tree(rank.pid)
                elif what == "sweep":
                    sweep_deadline = time.monotonic() + order["grace_s"]
                    for pid in orphans():
                        with contextlib.suppress(OSError):
                            os.kill(pid, signal.SIGTERM)
                elif what == "quit":
                    leave()
            if channel.closed:
                leave()
            if sweep_deadline is not None:
                left = orphans()
                if left and time.monotonic() >= sweep_deadline:
                    for pid in left:
                        kill_tree(pid)
                    sweep_deadline = time.monotonic() + 0.02
                elif not left:
                    sweep_deadline = None
                    channel.send({"swept": True})
        except ConnectionError:
            leave()
