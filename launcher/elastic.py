"""torch.distributed.elastic's two public extension points, filled: the rendezvous and the agent's run."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from torch.distributed import (  # type: ignore[attr-defined]  # its own documentation imports them here
    DistNetworkError,
    DistStoreError,
    TCPStore,
)
from torch.distributed.elastic.agent.server.api import (
    DEFAULT_ROLE,
    RunResult,
    SimpleElasticAgent,
    Worker,
    WorkerGroup,
    WorkerSpec,
    WorkerState,
)
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.rendezvous.api import (
    RendezvousClosedError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousStoreInfo,
)

from launcher.errors import MeetingError
from launcher.topology import World, places, unpacked

if TYPE_CHECKING:
    import signal
    from collections.abc import Iterator

    from torch.distributed.distributed_c10d import Store

    from launcher.node import Node

_REACH_S = 30.0

__all__ = ["GangRendezvous", "NodeAgent", "run_agent"]


class GangRendezvous(RendezvousHandler):
    """Meets the other nodes by way of the supervisor, which alone decides members, order and attempt."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._store: Store | None = None
        self._hosted = -1  # the attempt whose store is held here
        self._closed = False
        self.world: World | None = None
        self.index = -1
        self.end: dict[str, Any] | None = None

    def get_backend(self) -> str:
        return "launch"

    @property
    def use_agent_store(self) -> bool:
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        """Wait for the next gang; `RendezvousClosedError` when the run is over for this node."""
        self._store = None  # the last attempt's store, and every stale key in it, goes
        while True:
            while not self._node.orders:
                self._node.turn(None)
            order = self._node.orders.pop(0)
            if "end" in order:
                self.end = order["end"]
                self._closed = True
                raise RendezvousClosedError("the supervisor ended the run")
            if "host" in order:
                addr, port = self._host_store(order["host"])
                self._node.link.send({"store": {"addr": addr, "port": port}, "attempt": order["host"]["attempt"]})
            elif "world" in order:
                if (info := self._join(order["world"])) is not None:
                    return info
                self._node.link.send({"drained": True, "attempt": order["world"]["attempt"]})

    def _host_store(self, order: dict[str, Any]) -> tuple[str, int]:
        """Bind first, tell afterwards: a port that is known is a port that is held."""
        self._store = None  # of an attempt that never began: it may hold the port that was asked for
        alone = order["nodes"] == 1
        addr = "127.0.0.1" if alone else order["addr"]
        family = socket.AF_INET6 if ":" in addr else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((addr if alone else ("::" if family == socket.AF_INET6 else "0.0.0.0"), order["port"] or 0))
            listener.listen(2048)
        except OSError as error:
            listener.close()
            raise MeetingError(
                f"--master-port {order['port']} cannot be used on this node: {error.strerror}"
            ) from error
        port = listener.getsockname()[1]
        self._store = TCPStore(
            addr, port, None, True, wait_for_workers=False, master_listen_fd=listener.detach(), use_libuv=True
        )
        self._hosted = order["attempt"]
        return addr, port

    def _join(self, order: dict[str, Any]) -> RendezvousInfo | None:
        world = World(
            attempt=order["attempt"],
            restarts=order["restarts"],
            slots=unpacked(order["slots"]),
            store_addr=order["addr"],
            store_port=order["port"],
        )
        self.world, self.index = world, order["node"]
        if self._store is None or self._hosted != world.attempt:  # another node's, after an attempt that never began
            self._store = self._reach(world.store_addr, world.store_port)
        if self._store is None:
            return None
        return RendezvousInfo(
            self._store, self.index, len(world.slots), RendezvousStoreInfo(world.store_addr, world.store_port)
        )

    def _reach(self, address: str, port: int) -> Store | None:
        """Another node's store; None if the ranks are no longer wanted before it answers."""
        found: list[Store | Exception] = []

        def reach() -> None:
            try:
                found.append(_connected(address, port))
            except Exception as error:
                found.append(error)
            self._node.wake()

        # In a thread, for where that host is dead, or its agent stands still, torch waits; and this one must hear what
        # the supervisor says.
        threading.Thread(target=reach, name="reach", daemon=True).start()
        while not found:
            if self._node.asked_to_leave:
                return None
            self._node.turn(None)
        if isinstance(found[0], Exception):
            raise found[0]
        return found[0]

    def is_closed(self) -> bool:
        return self._closed

    def set_closed(self) -> None:
        self._closed = True

    def num_nodes_waiting(self) -> int:
        return 0  # the supervisor admits nodes between attempts

    def get_run_id(self) -> str:
        return self._node.run_id

    def shutdown(self) -> bool:
        self._closed = True
        self._store = None
        return True


def _connected(address: str, port: int) -> Store:
    """The store at an address; proven first by a connection of our own: TCPStore itself would try for minutes, and name
    no address.
    """
    deadline = time.monotonic() + _REACH_S
    while True:
        try:
            socket.create_connection((address, port), timeout=2).close()
            return TCPStore(address, port, None, False, timeout=timedelta(seconds=_REACH_S))
        except (OSError, DistNetworkError, DistStoreError) as error:
            if time.monotonic() > deadline:
                raise MeetingError(
                    f"it cannot reach node 0 at {address} port {port}: {error}. Are all ports open between the "
                    "nodes? --local-addr names another address of node 0"
                ) from error
        time.sleep(0.5)


class NodeAgent(SimpleElasticAgent):
    """torch elastic's agent on one node; starting, watching, stopping and reporting are ours."""

    def __init__(self, spec: WorkerSpec, rendezvous: GangRendezvous, node: Node) -> None:
        super().__init__(spec)
        self._rendezvous_handler = rendezvous
        self._node = node

    def _invoke_run(self, role: str = DEFAULT_ROLE) -> RunResult:  # noqa: ARG002
        group = self._worker_group
        while True:
            try:
                self._initialize_workers(group)
            except RendezvousClosedError:
                return self._monitor_workers(group)
            while not self._node.drained:
                self._node.turn(None)
            group.state = self._monitor_workers(group).state
            world = self._rendezvous_handler.world
            self._node.link.send({"drained": True, "attempt": world.attempt if world else -1})

    def _assign_worker_ranks(
        self,
        store: Store,  # noqa: ARG002
        group_rank: int,
        group_world_size: int,  # noqa: ARG002
        spec: WorkerSpec,  # noqa: ARG002
    ) -> list[Worker]:
        """Ranks follow from the supervisor's decision: no traffic, where torch's way reads a key per node on one."""
        world = self._rendezvous_handler.world
        assert world is not None
        return [
            Worker(
                local_rank=place.local_rank,
                global_rank=place.rank,
                role_rank=place.rank,
                world_size=world.size,
                role_world_size=world.size,
            )
            for place in places(world, group_rank)
        ]

    def _initialize_workers(self, worker_group: WorkerGroup) -> None:
        # torch's own, less its events: each looks up the host's full name, which hangs where DNS is ill.
        self._rendezvous(worker_group)
        for local_rank, pid in self._start_workers(worker_group).items():
            worker_group.workers[local_rank].id = pid
        worker_group.state = WorkerState.HEALTHY

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:  # noqa: ARG002
        world = self._rendezvous_handler.world
        assert world is not None
        return dict(self._node.start(world, self._rendezvous_handler.index))

    def _stop_workers(self, worker_group: WorkerGroup, *_: Any, **__: Any) -> None:  # noqa: ARG002
        self._node.stop(0.0)
        while not self._node.drained:
            self._node.turn(None)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:  # noqa: ARG002
        failures = {
            e.rank: ProcessFailure(local_rank=e.local_rank, pid=e.pid, exitcode=e.code, error_file="")
            for e in self._node.ranks.exits.values()
            if e.code
        }
        state = WorkerState.FAILED if failures else WorkerState.SUCCEEDED
        return RunResult(state, {e.rank: None for e in self._node.ranks.exits.values() if not e.code}, failures)

    def _shutdown(self, death_sig: signal.Signals | None = None, timeout: int = 30) -> None:  # noqa: ARG002
        self._rendezvous_handler.shutdown()

    @contextmanager
    def record_duration(self, state: str) -> Iterator[None]:  # noqa: ARG002
        yield

    def _record_worker_events(self, result: RunResult) -> None:
        pass  # the run folder has them, in more detail


def run_agent(node: Node) -> int:
    """Run torch elastic's agent to the end of the run; returns the exit code that the supervisor decided."""
    rendezvous = GangRendezvous(node)
    spec = WorkerSpec(
        role=node.spec.role,
        local_world_size=node.spec.procs,
        rdzv_handler=rendezvous,
        entrypoint=node.spec.program.target,
        max_restarts=node.spec.max_restarts,
    )
    NodeAgent(spec, rendezvous, node).run()
    return 1 if rendezvous.end is None else int(rendezvous.end["code"])
