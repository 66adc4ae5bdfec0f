"""For a supervisor: who says hello, as which node it is let in, where the others reach it, and what it is told."""

from __future__ import annotations

import hmac
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from launcher.addresses import Addresses

if TYPE_CHECKING:
    from collections.abc import Callable

    from launcher.crew import Agent, Crew
    from launcher.gang import Action, Gang
    from launcher.runs import RunFolder
    from launcher.scheduling import Scheduler

__all__ = ["Reception"]


class Reception:
    """local, token, scheduler: as of the supervisor; fleet: whether the local ones are started on other machines; say:
    how to tell a person.
    """

    def __init__(
        self,
        run: RunFolder,
        gang: Gang,
        crew: Crew,
        say: Callable[[str], None],
        *,
        local: tuple[int | None, ...],
        token: str,
        fleet: bool,
        scheduler: Scheduler | None,
    ) -> None:
        self._run = run
        self._gang = gang
        self._crew = crew
        self._say = say
        self._local = local
        self._token = token
        self._fleet = fleet
        self._scheduler = scheduler
        self._addresses = Addresses(run.spec.local_addr)

    def greet(self, agent: Agent, hello: dict[str, Any]) -> list[Action] | None:
        """Let an agent in, or refuse it and end its connection (None)."""
        if agent.process is None and not hmac.compare_digest(str(hello["token"]), self._token):
            self._refuse(agent, "the run's token differs: this node was started for another run (compare --rdzv-id)")
            return None
        gang, index = self._gang, hello["node_rank"]
        if index is None:
            taken = () if agent.process is not None else self._local
            index = next((i for i in gang.missing if i not in taken), None)
        if index is None or not 0 <= index < len(gang.nodes):
            self._refuse(
                agent, f"node rank {hello['node_rank']} is outside 0..{len(gang.nodes) - 1}, or all nodes are here"
            )
            return None
        # The node whose agent is started right here has its place even before that agent has said hello.
        if index in gang.here or (agent.process is None and index in self._local):
            self._refuse(agent, f"node rank {index} is taken by another node; give each its own --node-rank")
            return None
        host, pid, started = str(hello["host"]), int(hello["pid"]), int(hello["started"])
        self._crew.admit(agent, index, host=host, pid=pid, started=started)
        if self._crew.far(agent):
            agent.clock.told(hello["now_ns"], time.monotonic_ns())
        slots = self._run.spec.slots[index]
        agent.link.send(
            {
                "spec": replace(self._run.spec, procs=slots).to_json(),
                "run_id": self._run.run_id,
                "run_dir": str(self._run.path),
                "created": self._run.created,
                "heir": self._scheduler.heir if self._scheduler is not None and index == 0 else [],
                "scheduled": self._scheduler is not None,
                "orphan_grace_s": self._orphan_grace_s(),
            }
        )
        self._locate(agent, index, hello["address"])
        procs = hello["procs"] if isinstance(hello["procs"], int) else slots
        return gang.node_here(index, procs, self._addresses.of(index), agent.host)

    def _refuse(self, agent: Agent, why: str) -> None:
        self._crew.tell(agent, {"refused": why})
        self._say(f"refused a node: {why}")
        self._crew.drop(agent)

    def _orphan_grace_s(self) -> float:
        """How long the ranks have to leave when this process is gone."""
        if self._scheduler is not None:
            return self._scheduler.orphan_grace_s
        # On other machines the way here may be what is gone: that is no reason to lose what was trained.
        return self._run.spec.grace if self._fleet else 1.0

    def _locate(self, agent: Agent, index: int, told: str | None) -> None:
        """Learn where the others reach a node."""
        if self._fleet:
            self._addresses.by_ssh(index, told)
        elif agent.process is not None:
            self._addresses.spawned_here(index)
        else:
            self._addresses.connected(index, str(told), str(agent.link.sock.getsockname()[0]))
        for node, address in self._addresses.of_all_here().items():
            self._gang.nodes[node].address = address  # it may have come before anybody had reached this host
