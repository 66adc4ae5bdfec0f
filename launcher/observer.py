"""For a supervisor, of ranks while they run: how far they are and how fast, where in their code, and what they take.

All of it comes from the nodes' messages, and is told to people and the record. Only one thing follows from it for the
run: that its ranks hang.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from launcher.gang import Phase
from launcher.pace import Paces
from launcher.progress import Progress
from launcher.samples import Recorder
from launcher.stacks import Census
from launcher.surroundings import Note
from launcher.vitals import ANSWER, Audience

if TYPE_CHECKING:
    from collections.abc import Callable

    from launcher.channel import Message
    from launcher.crew import Agent, Crew
    from launcher.gang import Gang
    from launcher.runs import RunFolder

__all__ = ["Observer"]

_NOTE_WITHIN_S = 2.0
_SHOWN_EVERY_S = 30.0  # a write to a shared file system


class Observer:
    """say: how to tell a person. Where a method returns a text, the ranks are to be ended, for this reason."""

    def __init__(self, run: RunFolder, gang: Gang, crew: Crew, say: Callable[[str], None]) -> None:
        self.live: Progress | None = None  # of rank 0, a moment ago
        self._ended: Progress | None = None  # of this attempt's ranks that have ended
        self._run = run
        self._gang = gang
        self._crew = crew
        self._say = say
        self._shown = 0.0
        self._census: Census | None = None  # of stacks, while nodes still answer
        self._paces: Paces | None = None
        self._note: Note | None = None
        self._samples = Recorder(run.path, sum(run.spec.slots), len(run.spec.slots))
        self._audience = Audience(run.path)

    @property
    def progress(self) -> Progress | None:
        """Of the last attempt's ranks that have ended; of rank 0 as it ran, if all were lost with their agents."""
        return self._ended or self.live

    def attempt_begins(self) -> None:
        if self._note is None:
            self._note = Note(self._run.path, self._run.spec, self._gang.attempt)
        self._ended = self.live = None
        for agent in self._crew:
            if agent.joined:
                self._ask_for_clock(agent)

    def attempt_over(self) -> None:
        self._census = None  # of ranks that are no more

    def rank_ended(self, attempt: int, progress: Progress | None) -> None:
        if attempt == self._gang.attempt and progress is not None:
            self._ended = progress.and_of(self._ended)

    def called(self) -> None:
        """Somebody wants to know something: what the ranks take from here on, or where they are now."""
        if not self._audience.called(time.monotonic()):
            self._take_census(None)

    def heard(self, agent: Agent, index: int, message: Message) -> str | None:
        """A message of the agent of a node, if it is one of those that are meant for here."""
        if "stalled" in message:
            self._stalled(**message["stalled"])
        elif "stacks" in message:
            answer = message["stacks"], index, message["groups"], message["still"], message["lacking"]
            if self._census is not None and self._census.answered(*answer):
                return self._end_census(self._census)
        elif "progress" in message:
            self._at_step(Progress(**message["progress"]))
        elif "vitals" in message:
            if self._audience.answered(index, agent.host, message["vitals"]):
                self._show_vitals()
        elif "clock" in message:
            agent.clock.answered(message["clock"], message["ns"], time.monotonic_ns())
            self._ask_for_clock(agent)
        elif "beat" in message:
            self._ask_for_clock(agent)
        elif "pace" in message:
            self._compare(agent, index, message["pace"], message["attempt"])
        return None

    def due(self) -> list[float]:
        """When (monotonic) there is something to look at that nobody tells."""
        found = [] if self._census is None else [self._census.by]
        return found if self._audience.due is None else [*found, self._audience.due]

    def look(self) -> str | None:
        """What is due."""
        why = None
        if self._census is not None and time.monotonic() >= self._census.by:
            why = self._end_census(self._census)
        if self._audience.due is not None and time.monotonic() >= self._audience.due:
            self._ask_for_vitals()
        return why

    def close(self) -> None:
        self._samples.close(time.monotonic())
        if self._note is not None:
            self._note.wait(_NOTE_WITHIN_S)
        if self._audience.due is not None:
            self._audience.close()

    def _at_step(self, progress: Progress) -> None:
        """Rank 0 is so far: what people see of a run that runs."""
        self.live = progress
        if time.monotonic() - self._shown >= _SHOWN_EVERY_S:
            self._shown = time.monotonic()
            self._run.set_state(progress=progress.to_json())

    def _ask_for_clock(self, agent: Agent) -> None:
        """How far its clock is from ours now; ours is that of all agents that were started on this machine."""
        now = time.monotonic_ns()
        if self._crew.far(agent) and agent.clock.wants(now):
            self._crew.tell(agent, {"clock": now})

    def _compare(self, agent: Agent, index: int, pace: dict[str, Any], attempt: int) -> None:
        """A node tells how fast its ranks are: name those that hold up the others."""
        gang = self._gang
        if gang.phase is not Phase.RUNNING or attempt != gang.attempt:
            return
        self._samples.take(attempt, pace, time.monotonic())
        if self._paces is None or self._paces.attempt != attempt:
            self._paces = Paces(attempt, len(gang.nodes))
        for slow in self._paces.told(index, agent.host, pace, time.monotonic()):
            self._run.event("slow", attempt=attempt, **slow.to_json())
            self._say(str(slow))

    # -------------------------------------------------------------------------------------------- who watches

    def _ask_for_vitals(self) -> None:
        """Somebody watches: ask the agents what their ranks do."""
        if self._audience.unwritten:
            self._show_vitals()
        nodes, most = self._audience.ask(time.monotonic(), self._gang.busy)
        for node in nodes:
            self._crew.send(node, {"vitals": {"most": most}})
        if not nodes and self._audience.due is not None:
            self._show_vitals()

    def _show_vitals(self) -> None:
        gang = self._gang
        about = {"attempt": gang.attempt, "phase": gang.phase.value, "hosts": self._crew.hosts(gang.members),
                 "slow": [] if self._paces is None else self._paces.slow}  # fmt: skip
        self._run.keep(ANSWER, lambda: self._audience.write(about))

    # -------------------------------------------------------------------------------------------- stacks

    def _stalled(self, rank: int, seconds: float, *, tells: bool) -> None:
        if self._gang.phase is Phase.RUNNING and (self._census is None or self._census.hang is None):
            what = "has made no step" if tells else "has printed nothing"
            self._take_census(f"rank {rank} {what} for {seconds:.0f} s")

    def _take_census(self, hang: str | None) -> None:
        """Ask all ranks where they are. hang: why they are to be ended then; None: a person wants to know."""
        if self._gang.phase is not Phase.RUNNING:
            return
        if self._census is None:
            name = f"attempt-{self._gang.attempt}-{time.strftime('%H%M%S')}"
            self._census = Census(name, set(self._gang.busy))
            for node in self._census.awaited:
                self._crew.send(node, {"stacks": name})
        self._census.hang = self._census.hang or hang

    def _end_census(self, census: Census) -> str | None:
        self._census = None
        told = census.told()
        self._run.write(f"stacks/{census.name}/groups.json", census.to_json())  # the nodes have put the whole beside
        self._run.event("stacks", name=census.name, attempt=self._gang.attempt, hang=census.hang, told=told)
        went_on = "; it goes on now" if census.hang is not None and not census.hangs else ""
        self._say(f"{census.hang or 'stacks'}{went_on}: {told} (all of it: {self._run.path / 'stacks' / census.name})")
        return f"{census.hang}: {told}" if census.hangs else None
