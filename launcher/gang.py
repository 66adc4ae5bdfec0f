"""Pure: what a job's supervisor decides. Events go in, actions come out; nothing here waits, reads or writes.

A run is a row of attempts. In each, all nodes come (MEETING), node 0 opens the attempt's store (HOSTING), ranks run
(RUNNING), and after a failure or a stop request everyone is brought down (STOPPING) before it is decided what is next.
"""

from __future__ import annotations

import re
import signal
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

from launcher.failure import RankExit, RootCause, find_root, how_it_ended, signal_name
from launcher.topology import World

if TYPE_CHECKING:
    from launcher.progress import Progress

__all__ = ["Action", "Gang", "Outcome", "Phase"]


class Phase(Enum):
    MEETING = "meeting"
    HOSTING = "hosting"
    RUNNING = "running"
    STOPPING = "stopping"
    ENDED = "ended"


@dataclass(frozen=True)
class Outcome:
    """How the run ended: `status` is finished, stopped or failed; `code` is what launch exits with."""

    status: str
    code: int
    cause: str
    root: RootCause | None = None


@dataclass(frozen=True)
class Action:
    """One thing for the supervisor to do: send (to `node`), respawn (`node`), restarting (say so), end."""

    kind: str
    node: int = -1
    message: dict[str, Any] = field(default_factory=dict)
    outcome: Outcome | None = None


@dataclass
class _Node:
    procs: int
    here: bool = False
    drained: bool = False
    address: str | None = None
    gone: str | None = None


class Gang:
    """The state of one run under one supervisor. Its methods are events, and return the actions to take, in order.

    together: the agents are one srun, so that where one is lost all are started again; restarts: failures that count
    against `max_restarts` already; failure: the last of them, as `failure` told it then.
    """

    def __init__(
        self,
        slots: list[int],
        *,
        first_attempt: int,
        max_restarts: int,
        grace_s: float,
        master_port: int | None = None,
        together: bool = False,
        restarts: int = 0,
        failure: str | None = None,
    ) -> None:
        self.nodes = [_Node(procs) for procs in slots]
        self.attempt = first_attempt
        self.restarts = restarts
        self.phase = Phase.MEETING
        self.exits: dict[int, RankExit] = {}
        self.outcome: Outcome | None = None
        self.stop_cause: str | None = None
        self._max_restarts = max_restarts
        self._grace_s = grace_s
        self._master_port = master_port
        self._together = together
        self.failure = failure  # the last one, by what it was and where: the same again is not worth another try
        self._reached: dict[int, Progress] = {}
        self._hurried = False
        self._hung: str | None = None
        self._hopeless: int | None = None

    @property
    def missing(self) -> list[int]:
        return [i for i, node in enumerate(self.nodes) if not node.here]

    def exit_codes(self) -> dict[int, list[int]]:
        """The ranks of this attempt by how they ended."""
        table: dict[int, list[int]] = {}
        for rank in sorted(self.exits):
            table.setdefault(self.exits[rank].code, []).append(rank)
        return table

    def node_here(self, index: int, procs: int, address: str | None) -> list[Action]:
        node = self.nodes[index]
        node.procs, node.here, node.address, node.gone = procs, True, address, None
        return self._meet()

    def _meet(self) -> list[Action]:
        if self.phase is not Phase.MEETING or self.missing:
            return []
        if self.stop_cause is not None:
            return self._end(Outcome("stopped", 75, self.stop_cause))
        self.phase = Phase.HOSTING
        order = {"attempt": self.attempt, "nodes": len(self.nodes), "addr": self.nodes[0].address or "127.0.0.1",
                 "port": self._master_port}  # fmt: skip
        return [Action("send", 0, {"host": order})]

    def store_ready(self, attempt: int, addr: str, port: int) -> list[Action]:
        if self.phase is not Phase.HOSTING or attempt != self.attempt:
            return []
        self.phase = Phase.RUNNING
        world = World(self.attempt, self.restarts, tuple(n.procs for n in self.nodes), addr, port)
        actions = [Action("started", message={"world_size": world.size})]
        for index, node in enumerate(self.nodes):
            node.drained = False
            actions.append(
                Action(
                    "send",
                    index,
                    {
                        "world": {
                            "attempt": world.attempt,
                            "restarts": world.restarts,
                            "slots": list(world.slots),
                            "addr": addr,
                            "port": port,
                            "node": index,
                        }
                    },
                )
            )
        return actions

    def rank_exited(self, attempt: int, ended: RankExit, progress: Progress | None = None) -> list[Action]:
        if attempt != self.attempt:
            return []
        self.exits[ended.rank] = ended
        if progress is not None:
            self._reached[ended.rank] = progress
        if self.phase is Phase.RUNNING and ended.failed:
            self.phase = Phase.STOPPING
            return self._tell({"abort": {}})
        return []

    def node_drained(self, index: int, attempt: int) -> list[Action]:
        if attempt != self.attempt:
            return []
        self.nodes[index].drained = True
        return self._next_if_quiet()

    def node_gone(
        self, index: int, how: str, *, hopeless: int | None = None, unreachable: bool = False
    ) -> list[Action]:
        """Its agent is lost, and with it (it saw to that, or the kernel did) its ranks.

        hopeless: the exit code of a run that starting the agent again cannot help (a wrong --preload); unreachable:
        its host no longer answers, so that an srun which is to start all agents again would wait for it in vain.
        """
        node = self.nodes[index]
        if self.phase is Phase.ENDED or not node.here:
            return []
        node.here, node.gone, node.drained = False, how, True
        if hopeless is not None or (unreachable and self._together):
            self._hopeless = 1 if hopeless is None else hopeless
        if self.phase in (Phase.MEETING, Phase.HOSTING):
            self.phase = Phase.STOPPING
            for other in self.nodes:
                other.drained = True  # nothing runs yet
            return self._next_if_quiet()
        actions = []
        if self.phase is Phase.RUNNING:
            self.phase = Phase.STOPPING
            actions = self._tell({"abort": {}})
        return actions + self._next_if_quiet()

    def hung(self, cause: str) -> list[Action]:
        """The ranks no longer get anywhere: they are killed, and that is a failure like another."""
        if self.phase is not Phase.RUNNING:
            return []
        self.phase, self._hung = Phase.STOPPING, cause
        return self._tell({"abort": {}})

    def stop(self, cause: str, grace_s: float | None = None) -> list[Action]:
        """A request to save and leave, within `grace_s` if it is not the usual; a second one ends the grace."""
        if self.phase is Phase.ENDED:
            return []
        if self.stop_cause is not None:
            if self._hurried:
                return []
            self._hurried = True
            return self._tell({"kill": {}})
        self.stop_cause = cause
        self._grace_s = self._grace_s if grace_s is None else grace_s
        if self.phase is Phase.MEETING:
            return self._end(Outcome("stopped", 75, cause))
        if self.phase is Phase.HOSTING:
            self.phase = Phase.STOPPING
            for node in self.nodes:
                node.drained = True
            return self._next_if_quiet()
        first = self.phase is Phase.RUNNING
        self.phase = Phase.STOPPING
        return self._tell({"stop": {"grace_s": self._grace_s}}) if first else []

    def sooner(self, cause: str, grace_s: float) -> list[Action]:
        """A stop is under way, and less time is left for it than was said."""
        self.stop_cause, self._grace_s = cause, grace_s
        return self._tell({"stop": {"grace_s": grace_s}}) if self.phase is Phase.STOPPING else []

    def _tell(self, message: dict[str, Any]) -> list[Action]:
        return [Action("send", i, message) for i, node in enumerate(self.nodes) if node.here and not node.drained]

    def _next_if_quiet(self) -> list[Action]:
        if self.phase not in (Phase.RUNNING, Phase.STOPPING) or not all(n.drained for n in self.nodes):
            return []
        root = find_root(self.exits.values())
        gone = [(i, n.gone) for i, n in enumerate(self.nodes) if n.gone is not None]
        codes = {e.code for e in self.exits.values()}
        if root is None and not gone and self._hung is None:
            if codes == {0} and len(self.exits) == sum(n.procs for n in self.nodes):
                return self._end(Outcome("finished", 0, "all ranks exited 0"))
            if self.stop_cause is None and 75 in codes:
                return self._end(Outcome("stopped", 75, "ranks left with code 75: run again"))
        if self.stop_cause is not None:
            return self._end(self._stopped(root, codes))
        # A lost agent explains the ranks that lost their peers, not a rank that failed by itself.
        cause = "; ".join(f"node {i}: {how}" for i, how in gone)
        if root is not None and not (gone and root.exit.lost_peer):
            cause = f"rank {root.exit.rank} {how_it_ended(root.exit)}"
        elif gone:
            root = None
        if self._hung is not None:
            cause, root, self._hung = self._hung, None, None
        if self._hopeless is not None:
            return self._end(Outcome("failed", self._hopeless, cause, root))
        before, self.failure = self.failure, self._told(root)
        if before is not None and before == self.failure:
            again = f"{cause}: the same exception at the same step, with no newer checkpoint, so it is not tried again"
            return self._end(Outcome("failed", root.exit_code if root is not None else 1, again, root))
        if self.restarts < self._max_restarts:
            self.restarts += 1
            self.attempt += 1
            exits, self.exits, self._reached = self.exit_codes(), {}, {}
            self.phase = Phase.MEETING
            actions = [
                Action(
                    "restarting",
                    message={"cause": cause, "restart": self.restarts, "exits": exits},
                    outcome=Outcome("failed", 1, cause, root),
                )
            ]
            if gone and self._together:
                for node in self.nodes:
                    node.here = False
                return [*actions, Action("respawn")]
            actions += [Action("respawn", i) for i, _ in gone]
            return actions + self._meet()
        code = root.exit_code if root is not None else 1
        return self._end(Outcome("failed", code, cause, root))

    def _told(self, root: RootCause | None) -> str | None:
        """A failure by its exception and place; None if it told no exception, or its program tells no steps."""
        progress = None if root is None else self._reached.get(root.exit.rank)
        if root is None or root.exit.error is None or progress is None:
            return None
        error = root.exit.error
        # Numbers in a message (addresses, times) differ where nothing else does.
        message = re.sub(r"\d+", "0", str(error.get("message", "")))
        kept = progress.began if progress.saved is None else progress.saved
        return f"{error.get('type', '')}: {message} at step {progress.step}, checkpoint {kept}"

    def _stopped(self, root: RootCause | None, codes: set[int]) -> Outcome:
        assert self.stop_cause is not None
        if root is not None:
            return Outcome(
                "failed", root.exit_code, f"{self.stop_cause}; while stopping rank {root.exit.rank} failed", root
            )
        if codes and codes <= {0, 75}:
            return Outcome("stopped", 75, self.stop_cause)
        killed = sorted(-c for c in codes if c < 0)
        if killed:
            worst = signal.SIGKILL if signal.SIGKILL in killed else killed[0]
            how = f"ranks ended by {signal_name(worst)}"
            if worst == signal.SIGKILL:
                how = (
                    f"ranks were killed, {self._grace_s:g} s of grace were over"
                    if not self._hurried
                    else "ranks were killed at once"
                )
            return Outcome("stopped", 128 + worst, f"{self.stop_cause}; {how}")
        other = sorted(codes - {0, 75})
        return Outcome("stopped", other[0] if other else 75, self.stop_cause)

    def _end(self, outcome: Outcome) -> list[Action]:
        self.phase = Phase.ENDED
        self.outcome = outcome
        return [Action("end", outcome=outcome)]
