"""The agents of one job: the ways to them, which of them is which node, and signs of life. Nothing is decided here."""

from __future__ import annotations

import contextlib
import os
import selectors
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from launcher.channel import Channel, keep_alive
from launcher.clocks import Offset
from launcher.pulse import Presence, Pulse
from launcher.starting import spawn_agent

if TYPE_CHECKING:
    import socket
    import subprocess
    from collections.abc import Iterable, Iterator

    from launcher.channel import Message
    from launcher.fleet import Fleet

__all__ = ["Agent", "Crew"]


@dataclass(eq=False)
class Agent:
    """One connection. It is an agent of ours once it has joined."""

    link: Channel
    node: int | None = None  # the one that it was started for
    index: int | None = None
    host: str = ""
    process: subprocess.Popen[bytes] | None = None
    joined: bool = False
    given_up: bool = False
    pid: int = 0
    started: int = 0  # when, in clock ticks since its host's boot
    why: str | None = None  # it leaves, as it said itself
    clock: Offset = field(default_factory=Offset)
    hopeless: int | None = None  # exit code if starting it again cannot help


class Crew:
    """cwd, own_session: of agents on this machine; fleet: starts them on others. `selector` is told of every link."""

    def __init__(
        self, selector: selectors.BaseSelector, *, cwd: str, own_session: bool, fleet: Fleet | None = None
    ) -> None:
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith("PET_")}
        self.pulse = Pulse(time.monotonic())
        self.presence = Presence()
        self._selector = selector
        self._cwd = cwd
        self._own_session = own_session
        self._fleet = fleet
        self._agents: list[Agent] = []
        self._of: dict[int, Agent] = {}  # by node
        self._host_of: dict[int, str] = {}  # also of those that are gone

    def __iter__(self) -> Iterator[Agent]:
        return iter(tuple(self._agents))

    def __len__(self) -> int:
        return len(self._agents)

    def of(self, node: int) -> Agent | None:
        """Its agent, as long as that is here."""
        return self._of.get(node)

    def spawn(self, node: int | None) -> None:
        """Start an agent, for a node or for whichever place is free."""
        environment = dict(self.environment)
        if node is not None:
            environment["LAUNCH_NODE_RANK"] = str(node)
        if self._fleet is not None and node is not None:
            link, process = self._fleet.start(node, environment)
        else:
            link, process = spawn_agent(environment, cwd=self._cwd, own_session=self._own_session)
        self._take(Agent(link, node, process=process))

    def accept(self, listener: socket.socket) -> None:
        """Take an agent that somebody else has started."""
        with contextlib.suppress(OSError):
            sock, _ = listener.accept()
            keep_alive(sock)
            self._take(Agent(Channel(sock)))

    def _take(self, agent: Agent) -> None:
        self._agents.append(agent)
        self._selector.register(agent.link, selectors.EVENT_READ, agent)

    def admit(self, agent: Agent, index: int, *, host: str, pid: int, started: int) -> None:
        """It is the agent of this node from here on."""
        agent.index, agent.joined, agent.host, agent.pid, agent.started = index, True, host, pid, started
        self._of[index] = agent
        self._host_of[index] = host
        if self.far(agent):  # the others see by the end of the connection that we are gone
            self.presence.add(agent.link)

    def far(self, agent: Agent) -> bool:
        """Whether it was not started right here, and may have another clock, and another end."""
        return agent.process is None or self._fleet is not None

    def hosts(self, nodes: Iterable[int]) -> list[str]:
        """The names of nodes that are or were here, empty for others."""
        return [self._host_of.get(node, "") for node in nodes]

    def receive(self, agent: Agent) -> list[Message]:
        """What it has said; all of it is a sign of life."""
        messages = agent.link.receive()
        if messages and agent.index is not None:
            self.pulse.heard(agent.index, time.monotonic(), sign=any("beat" in m for m in messages))
        return messages

    def tell(self, agent: Agent, message: Message) -> None:
        # Its end is on the way, as the end of the connection: also where the kernel gave up (ETIMEDOUT, EHOSTUNREACH).
        with contextlib.suppress(OSError):
            agent.link.send(message)

    def send(self, node: int, message: Message) -> None:
        if (agent := self._of.get(node)) is not None:
            self.tell(agent, message)

    def drop(self, agent: Agent) -> None:
        """End the connection; its process, if it is ours, is the caller's to end."""
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(agent.link)
        self.presence.discard(agent.link)
        agent.link.close()
        self._agents.remove(agent)
        if agent.index is not None and self._of.get(agent.index) is agent:
            del self._of[agent.index]
            self.pulse.forget(agent.index)
