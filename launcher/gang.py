"""Pure: what a job's supervisor decides. Events go in, actions come out; nothing here waits, reads or writes.

A run is a row of attempts. In each, all nodes come (MEETING), node 0 opens the attempt's store (HOSTING), ranks run
(RUNNING), and after a failure or a stop request everyone is brought down (STOPPING) before it is decided what is next.
"""

from __future__ import annotations

import re
import signal
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import TYPE_CHECKING, Any

from launcher.failure import RankExit, RootCause, find_root, how_it_ended, signal_name
from launcher.faults import Fault, classify
from launcher.topology import World, packed

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from launcher.progress import Progress

__all__ = ["Action", "Gang", "Outcome", "Phase"]

# A run goes on without a node that is lost, and takes it in again when it is back; not for ever, if it is lost again
# and again. With this no schedule of losses makes endlessly many attempts.
_LOSSES = 3


class Phase(Enum):
    MEETING = "meeting"
    HOSTING = "hosting"
    RUNNING = "running"
    STOPPING = "stopping"
    ENDED = "ended"


@dataclass(frozen=True)
class Outcome:
    """How the run ended: `status` is finished, stopped or failed; `code` is what launch exits with; `world_size`: of
    its last attempt, 0 if none has begun.
    """

    status: str
    code: int
    cause: str
    root: RootCause | None = None
    fault: Fault | None = None
    world_size: int = field(default=0, compare=False)


@dataclass(frozen=True)
class Action:
    """One thing for the supervisor to do: send (to `node`), started (say so), joining (nodes ask to be taken in, before
    the ranks are told), again (a new attempt comes), lost (a node that was not needed went), respawn (`node`; -1: all),
    end.
    """

    kind: str
    node: int = -1
    message: dict[str, Any] = field(default_factory=dict)
    outcome: Outcome | None = None


@dataclass
class _Node:
    procs: int
    address: str | None = None
    name: str = ""
    absent: bool = False  # known not to come for now, or it has let a last call pass: nobody waits for it
    losses: int = 0  # how often the run went on without it
    hopeless: bool = False  # starting it again cannot help
    dead: bool = False  # its host no longer answers


class Gang:
    """The state of one run under one supervisor. Its methods are events, and return the actions to take, in order.

    slots: ranks on each node that may take part; least, most: how many of them make an attempt (None: all), the others
    stand by. together: the agents are one srun, so that where one is lost all are started again; restarts: failures
    that count against `max_restarts` already; failure: the last of them, as `failure` told it then.
    """

    def __init__(
        self,
        slots: list[int],
        *,
        first_attempt: int,
        max_restarts: int,
        grace_s: float,
        least: int | None = None,
        most: int | None = None,
        master_port: int | None = None,
        together: bool = False,
        restarts: int = 0,
        failure: str | None = None,
    ) -> None:
        self.nodes = [_Node(procs) for procs in slots]
        self.least = len(slots) if least is None else least
        self.most = len(slots) if most is None else most
        self.here: set[int] = set()  # nodes whose agents are connected
        self.busy: set[int] = set()  # nodes that have ranks which are not all reaped
        self.members: tuple[int, ...] = ()  # the nodes of this attempt, or of the last, in the order of their ranks
        self.gone: dict[int, str] = {}  # nodes that were lost in this attempt, and how
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
        self._newcomers: list[int] = []  # who would be in the next attempt and is not in this one
        self._joining = False  # the ranks are asked to leave for their sake

    @property
    def missing(self) -> list[int]:
        return [i for i in range(len(self.nodes)) if i not in self.here]

    @property
    def standing_by(self) -> list[int]:
        return sorted(self.here.difference(self.members))

    @property
    def calling(self) -> bool:
        """Whether a last call is under way, for nodes that may still come before an attempt begins, or ends for the
        sake of those that have come; `call_over` ends it.
        """
        if self.phase is Phase.MEETING:
            return len(self.here) >= self.least
        return self.phase is Phase.RUNNING and bool(self._newcomers)

    def exit_codes(self) -> dict[int, list[int]]:
        """The ranks of this attempt by how they ended."""
        table: dict[int, list[int]] = {}
        for rank in sorted(self.exits):
            table.setdefault(self.exits[rank].code, []).append(rank)
        return table

    def node_here(self, index: int, procs: int, address: str | None, name: str = "") -> list[Action]:
        """name: for people."""
        node = self.nodes[index]
        node.procs, node.address, node.name, node.absent = procs, address, name, False
        self.here.add(index)
        self._look_for_newcomers()
        return self._meet()

    def node_absent(self, index: int) -> list[Action]:
        """It is known not to come for now, though it may later."""
        self.nodes[index].absent = index not in self.here
        return self._meet()

    def call_over(self) -> list[Action]:
        """Whoever is here now is taken, and nobody else is waited for."""
        if self.phase is Phase.MEETING:
            return self._meet(called=True)
        if self.phase is not Phase.RUNNING or not self._newcomers:
            return []
        self.phase, self._joining = Phase.STOPPING, True
        joining = Action("joining", message={"cause": self._joined(), "grace_s": self._grace_s})
        return [joining, *self._tell({"stop": {"grace_s": self._grace_s}})]

    def _choice(self, pool: set[int]) -> tuple[int, ...]:
        """Who of `pool` makes an attempt: members stay, others follow as they are listed, and whoever was lost too
        often is only there to fill the minimum up.
        """
        members = set(self.members)
        worn = {i for i in pool if self.nodes[i].losses >= _LOSSES}
        ranked = sorted(pool, key=lambda i: (i in worn, i not in members, i))
        return tuple(sorted(ranked[: min(self.most, max(self.least, len(pool) - len(worn)))]))

    def _awaited(self) -> Iterator[int]:
        return (i for i, n in enumerate(self.nodes) if not (n.absent or n.hopeless or i in self.here))

    def _choice_may_change(self) -> bool:
        """Whether anybody who may still come would be chosen."""
        if len(self.here) < self.most:
            return any(True for _ in self._awaited())
        return self._choice(self.here.union(self._awaited())) != self._choice(self.here)

    def _look_for_newcomers(self) -> None:
        if self.phase is Phase.RUNNING:
            members = set(self.members)
            self._newcomers = [i for i in self._choice(self.here) if i not in members]

    def _joined(self) -> str:
        names = [self.nodes[i].name or str(i) for i in self._newcomers]
        return f"{'a node' if len(names) == 1 else 'nodes'} joined: {', '.join(names)}"

    def _meet(self, *, called: bool = False) -> list[Action]:
        if self.phase is not Phase.MEETING or len(self.here) < self.least:
            return []
        if not called and self._choice_may_change():
            return []
        self.members = self._choice(self.here)
        for index in self.missing:
            self.nodes[index].absent = True
        self.phase = Phase.HOSTING
        first = self.members[0]
        order = {"attempt": self.attempt, "nodes": len(self.members), "addr": self.nodes[first].address or "127.0.0.1",
                 "port": self._master_port}  # fmt: skip
        return [Action("send", first, {"host": order})]

    def store_ready(self, attempt: int, addr: str, port: int) -> list[Action]:
        if self.phase is not Phase.HOSTING or attempt != self.attempt:
            return []
        self.phase = Phase.RUNNING
        self.busy = set(self.members)
        world = World(self.attempt, self.restarts, tuple(self.nodes[i].procs for i in self.members), addr, port)
        told = {
            "attempt": world.attempt,
            "restarts": world.restarts,
            "slots": packed(world.slots),
            "addr": addr,
            "port": port,
        }
        actions = [Action("started", message={"world_size": world.size})]
        actions += [Action("send", index, {"world": told | {"node": n}}) for n, index in enumerate(self.members)]
        self._look_for_newcomers()
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
        self.busy.discard(index)
        return self._next_if_quiet()

    def node_gone(
        self, index: int, how: str, *, hopeless: int | None = None, unreachable: bool = False
    ) -> list[Action]:
        """Its agent is lost, and with it (it saw to that, or the kernel did) its ranks.

        hopeless: the exit code of a run that starting the agent again cannot help (a wrong --preload); unreachable:
        its host no longer answers, so that an srun which is to start all agents again would wait for it in vain.
        """
        node = self.nodes[index]
        if self.phase is Phase.ENDED or index not in self.here:
            return []
        self.here.discard(index)
        self.busy.discard(index)
        node.hopeless, node.dead = hopeless is not None, unreachable
        if hopeless is not None and sum(not n.hopeless for n in self.nodes) < self.least:
            self._hopeless = hopeless
        if unreachable and self._together and len(self.here) < self.least:
            self._hopeless = 1
        waiting = self.phase is Phase.MEETING
        if self._enough(waiting=waiting) and (waiting or index not in self.members):
            self._look_for_newcomers()
            lost = Action("lost", index, {"how": how})
            return [lost, *self._do_without(index), *self._meet()]
        self.gone[index] = how
        if self.phase in (Phase.MEETING, Phase.HOSTING):
            self.phase = Phase.STOPPING  # nothing runs yet
        actions = []
        if self.phase is Phase.RUNNING:
            self.phase = Phase.STOPPING
            actions = self._tell({"abort": {}})
        return actions + self._next_if_quiet()

    def _enough(self, *, waiting: bool = False) -> bool:
        """Whether the nodes that are here make an attempt, or (waiting) those that are still awaited with them."""
        able = len(self.here) + (sum(1 for _ in self._awaited()) if waiting else 0)
        return able >= self.least and len(self.nodes) > self.least

    def _do_without(self, index: int) -> list[Action]:
        node = self.nodes[index]
        node.losses, node.absent = node.losses + 1, True
        # Where a scheduler has to start it, a host that is silent would only hold that up.
        vain = node.hopeless or node.losses >= _LOSSES or (node.dead and self._together)
        return [] if vain else [Action("respawn", index)]

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
            return self._next_if_quiet()
        first = self.phase is Phase.RUNNING or self._joining
        self.phase = Phase.STOPPING
        return self._tell({"stop": {"grace_s": self._grace_s}}) if first else []

    def sooner(self, cause: str, grace_s: float) -> list[Action]:
        """A stop is under way, and less time is left for it than was said."""
        self.stop_cause, self._grace_s = cause, grace_s
        return self._tell({"stop": {"grace_s": grace_s}}) if self.phase is Phase.STOPPING else []

    def _tell(self, message: dict[str, Any]) -> list[Action]:
        return [Action("send", i, message) for i in sorted(self.busy)]

    def _next_if_quiet(self) -> list[Action]:
        if self.phase not in (Phase.RUNNING, Phase.STOPPING) or self.busy:
            return []
        root = find_root(self.exits.values())
        gone = sorted(self.gone.items())
        codes = {e.code for e in self.exits.values()}
        # Also if an agent was lost after its ranks were done.
        if codes == {0} and len(self.exits) == sum(self.nodes[i].procs for i in self.members):
            return self._end(Outcome("finished", 0, "all ranks exited 0"))
        if root is None and not gone and self._hung is None:
            if self.stop_cause is None and self._joining:
                return self._again(self._joined(), status="stopped")
            if self.stop_cause is None and 75 in codes:
                return self._end(Outcome("stopped", 75, "ranks left with code 75: run again"))
        if self.stop_cause is not None:
            return self._end(self._stopped(root, codes))
        # A lost agent explains the ranks that lost their peers, not a rank that failed by itself.
        cause = "; ".join(f"node {i}: {how}" for i, how in gone)
        if root is not None and not (gone and root.follows_a_lost_node):
            cause = f"rank {root.exit.rank} {how_it_ended(root.exit)}"
        elif gone:
            root = None
        hung, self._hung = self._hung, None
        if hung is not None:
            cause, root = hung, None
        fault = classify(root, gone="; ".join(how for _, how in gone), hung=hung, early=self._early(root))
        failed = Outcome("failed", root.exit_code if root is not None else 1, cause, root, fault)
        if self._hopeless is not None:
            return self._end(replace(failed, code=self._hopeless))
        if gone and root is None and not hung and self._enough():
            without = [action for index, _ in gone for action in self._do_without(index)]
            return self._again(cause, outcome=failed, then=without)
        before, self.failure = self.failure, self._told(root)
        if before is not None and before == self.failure:
            again = f"{cause}: the same exception at the same step, with no newer checkpoint, so it is not tried again"
            return self._end(replace(failed, cause=again))
        if self.restarts >= self._max_restarts:
            return self._end(failed)
        if not fault.again:
            again = f"{cause}: another try would end in the same way, so it is not made"
            return self._end(replace(failed, cause=again))
        self.restarts += 1
        if not (gone and self._together):
            for index, _ in gone:
                self.nodes[index].absent = False  # the next attempt waits for it
            respawn = [Action("respawn", index) for index, _ in gone]
        else:
            self.here.clear()
            respawn = [Action("respawn")]
        return self._again(cause, outcome=failed, then=respawn, restart=self.restarts)

    def _again(
        self,
        cause: str,
        *,
        status: str = "failed",
        outcome: Outcome | None = None,
        then: Sequence[Action] = (),
        restart: int | None = None,
    ) -> list[Action]:
        """Another attempt. restart: which one of those that count; None: it does not."""
        message = {"cause": cause, "status": status, "exits": self.exit_codes(), "restart": restart}
        self.attempt += 1
        self.exits, self._reached, self.gone = {}, {}, {}
        self._newcomers, self._joining = [], False
        self.phase = Phase.MEETING
        return [Action("again", message=message, outcome=outcome), *then, *self._meet()]

    def _early(self, root: RootCause | None) -> bool:
        """Whether this is the first attempt of all, and the rank that failed has told of no step."""
        progress = None if root is None else self._reached.get(root.exit.rank)
        return self.attempt == 0 and (progress is None or progress.step == (progress.began or 0))

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
                "failed",
                root.exit_code,
                f"{self.stop_cause}; while stopping rank {root.exit.rank} failed",
                root,
                classify(root),
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
        self.outcome = replace(outcome, world_size=sum(self.nodes[i].procs for i in self.members))
        return [Action("end", outcome=self.outcome)]
