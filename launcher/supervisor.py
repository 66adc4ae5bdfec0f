"""One per job, torch-free: spawns or awaits the agents, carries out what gang.py decides, writes the run's record.

The agents talk to it and not to each other: a lost agent is the end of a connection, noticed at once, and whatever a
person or a scheduler wants of the job reaches one process.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import subprocess
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from launcher import record
from launcher.crew import Crew
from launcher.errors import ClusterError, LaunchError, MeetingError, UsageError
from launcher.failure import RankExit, signal_name
from launcher.fleet import Remains, Roll
from launcher.gang import Action, Gang, Outcome, Phase
from launcher.logs import Relay
from launcher.observer import Observer
from launcher.processes import allow_files, end_descendants, kill_tree, reap, start_ticks
from launcher.progress import Progress
from launcher.reception import Reception
from launcher.scheduling import StopWatch
from launcher.stacks import SIGNAL
from launcher.starting import stop_signals
from launcher.waking import Waking

if TYPE_CHECKING:
    from collections.abc import Callable

    from launcher.channel import Message
    from launcher.crew import Agent
    from launcher.fleet import Fleet
    from launcher.runs import RunFolder
    from launcher.scheduling import Scheduler, Word

__all__ = ["Supervisor"]

# From the moment at which a node's ranks are to be dead to the one at which it is given up: its agent is stopped, or a
# rank sleeps in the kernel and cannot be killed.
_PATIENCE_S = 10.0
_CONSOLES_WITHIN_S = 10.0
_FENCED_WITHIN_S = 5.0  # what a stopped agent left on a host that can be reached
_FILES_EACH, _FILES_OWN = 3, 50  # the connection of a node, the process that leads to it, a new way beside an old one


class Supervisor:
    """Runs one job to its outcome.

    local: the node ranks of the agents to spawn here (None: by order of arrival); listener: where agents that others
    start connect, with `token`; say: how to tell a person (one line at a time). scheduler: starts all agents instead,
    and knows why and until when the job is stopped; fleet: starts the `local` ones instead, on other machines.
    restarts, failure: failures that count already, and the last one.
    """

    def __init__(
        self,
        run: RunFolder,
        *,
        local: tuple[int | None, ...],
        say: Callable[[str], None],
        listener: socket.socket | None = None,
        token: str = "",
        own_session: bool = True,
        join_timeout_s: float = 600.0,
        where: str = "",
        scheduler: Scheduler | None = None,
        fleet: Fleet | None = None,
        restarts: int = 0,
        failure: str | None = None,
    ) -> None:
        spec = run.spec
        state = run.state()
        self.run = run
        run.bear(say)
        self.gang = Gang(
            list(spec.slots),
            first_attempt=int(state.get("attempt", -1)) + 1,
            max_restarts=spec.max_restarts,
            grace_s=spec.grace,
            least=spec.least or spec.nodes,
            most=spec.nodes,
            master_port=spec.master_port,
            together=scheduler is not None,
            restarts=restarts,
            failure=failure,
        )
        self.unreachable: set[str] = set()  # hosts that fell silent
        self._scheduler = scheduler
        self._step: subprocess.Popen[bytes] | None = None  # the scheduler's way to the agents
        self._beside: dict[int, subprocess.Popen[bytes]] = {}  # its ways to those that were started again, by node
        self._watch = None if scheduler is None else StopWatch(scheduler, spec)
        self._roll = None if fleet is None else Roll(fleet)
        self._remains = None if fleet is None else Remains(fleet)
        self._quiet_by: float | None = None  # when (monotonic) every node must have brought its ranks down
        self._asked_here = False  # this process itself has received a stop signal
        self._say = say
        self._local = local
        self._listener = listener
        self._token = token
        self._own_session = own_session
        self._join_timeout_s = join_timeout_s
        self._where = where
        self._selector = selectors.DefaultSelector()
        self._crew = Crew(self._selector, cwd=spec.cwd, own_session=own_session, fleet=fleet)
        self._reception = Reception(
            run, self.gang, self._crew, say, local=local, token=token, fleet=fleet is not None, scheduler=scheduler
        )
        self._observer = Observer(run, self.gang, self._crew, say)
        self._spawned: set[int] = set()  # nodes whose agents are ours to start again
        self._meet_by = time.monotonic() + join_timeout_s
        self._call_by: float | None = None  # when a last call is over
        self._ran = False  # some attempt has begun, so agents have consoles to write out

    # -------------------------------------------------------------------------------------------- the loop

    def work(self) -> Outcome:
        """Bring the run to its end; the outcome is also in the run folder."""
        try:
            allow_files(_FILES_EACH * len(self.gang.nodes) + _FILES_OWN)
        except OSError as error:
            raise UsageError(
                f"{len(self.gang.nodes)} nodes: {error.strerror}; raise the limit, or start fewer"
            ) from error
        self._waking = Waking()
        self._relay = Relay(on_drained=self._waking.rouse)
        handled: set[int] = set(stop_signals(self.run.spec))
        if self._scheduler is not None:
            handled |= {signal.SIGUSR1, signal.SIGUSR2}  # what sbatch --signal is usually told to send
        for number in handled:
            self._waking.on(number)
        self._waking.on(signal.SIGCHLD, note=False)
        self._waking.on(SIGNAL, afterwards=signal.SIG_IGN)
        if not self._own_session:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # the rank on the terminal gets it from the terminal
        self._selector.register(self._waking, selectors.EVENT_READ, "wake")
        if self._listener is not None:
            self._listener.setblocking(False)
            self._selector.register(self._listener, selectors.EVENT_READ, "listener")
        self._crew.presence.begin()
        try:
            self.run.set_state(
                status="running",
                attempt=self.gang.attempt,
                pid=os.getpid(),
                pid_start=start_ticks(os.getpid()),
                host=socket.gethostname(),
            )
            if self._roll is not None:
                self._roll.call(node for node in self._local if node is not None)
            else:
                for node_rank in self._local:
                    self._crew.spawn(node_rank)
            self._start_step()
            while self.gang.phase is not Phase.ENDED:
                self._turn()
            if self._ran:
                self._await_agents()
            assert self.gang.outcome is not None
            record.run_over(self.run, self.gang, self.gang.outcome, self.progress)
            return self.gang.outcome
        finally:
            self._observer.close()  # its note of the code has processes, too
            self._put_down()
            self._crew.presence.end()
            self._relay.close()
            self._waking.close()
            self._selector.close()

    @property
    def progress(self) -> Progress | None:
        """Of the last attempt's ranks that have ended; of rank 0 as it ran, if all were lost with their agents."""
        return self._observer.progress

    @property
    def lost(self) -> dict[str, str]:
        """Hosts whose agents went away unasked, and how, where that is why the run ended."""
        outcome = self.gang.outcome
        if outcome is None or outcome.status != "failed" or outcome.root is not None:
            return {}
        hosts = self._crew.hosts(self.gang.gone)
        return {host or f"node {i}": how for host, (i, how) in zip(hosts, self.gang.gone.items(), strict=True)}

    def _turn(self) -> None:
        self._crew.presence.turned(time.monotonic())
        for key, _ in self._selector.select(self._until_next()):
            if key.data == "wake":
                self._waking.heard()
            elif key.data == "listener":
                assert self._listener is not None
                self._crew.accept(self._listener)
            else:
                self._hear(key.data)
        while self._waking.signals:
            number = self._waking.signals.pop(0)
            if number == SIGNAL:
                self._observer.called()
                continue
            if self._watch is not None and number != signal.SIGINT:
                self._heed(self._watch.inquire(number))
                continue
            again, self._asked_here = self._asked_here, True
            if self.gang.stop_cause is not None and not again:
                continue  # an agent had it first
            if again:
                self._say(f"{signal_name(number)} again: the ranks are killed now")
            self._stop(signal_name(number))
        steps = [] if self._step is None else [self._step, *self._beside.values()]
        if self._step is not None and self.gang.phase is Phase.MEETING and all(s.poll() is not None for s in steps):
            raise ClusterError(
                f"srun ended with code {self._step.returncode} before all nodes were there; what it said stands above"
            )
        if self._watch is not None:
            self._heed(self._watch.look(running=self.gang.phase is Phase.RUNNING))
        self._relay.settle()
        self._end_hung(self._observer.look())
        if self.gang.phase is not Phase.STOPPING:
            self._quiet_by = None
        elif self._quiet_by is not None and time.monotonic() >= self._quiet_by:
            self._give_up_the_silent()
        if self._roll is not None:
            self._call_the(self._roll)
        self._call()
        self._feel_pulse()
        if self.gang.phase is Phase.MEETING and not self.gang.calling and time.monotonic() >= self._meet_by:
            # An agent of our own is only slow: it has the machine's load to thank for that, not a missing node.
            missing = [i for i in self.gang.missing if i not in self._local] or self.gang.missing
            raise MeetingError(
                f"node{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))} of "
                f"{len(self.gang.nodes)} did not come within {self._join_timeout_s:g} s"
                + (f", and {self.gang.least} are needed" if self.run.spec.elastic else "")
                + (f"; awaited at {self._where}" if self._where else "")
                + (f"; {self._roll.story(missing)}" if self._roll is not None else "")
            )

    def _until_next(self) -> float:
        """Seconds until something is due that no event announces."""
        due = [self._crew.pulse.wait_s(time.monotonic())]
        if self._call_by is not None:
            due.append(self._call_by - time.monotonic())
        elif self.gang.phase is Phase.MEETING:
            due.append(self._meet_by - time.monotonic())
        if self._watch is not None and (wait_s := self._watch.wait_s()) is not None:
            due.append(wait_s)
        if self._quiet_by is not None:
            due.append(self._quiet_by - time.monotonic())
        due += [at - time.monotonic() for at in self._observer.due()]
        if self._roll is not None and (wait_s := self._roll.wait_s()) is not None:
            due.append(wait_s)
        return max(0.0, min(due))

    def _call(self) -> None:
        """Let a last call begin or end."""
        now = time.monotonic()
        if not self.gang.calling:
            self._call_by = None
        elif self._call_by is None:
            self._call_by = now + self.run.spec.last_call_s
        elif now >= self._call_by:
            self._call_by = None
            self._do(self.gang.call_over())

    def _stop(self, cause: str, grace_s: float | None = None) -> None:
        if self._watch is not None:
            self._watch.stopping = True
        if self.gang.stop_cause is None and self.gang.phase in (Phase.RUNNING, Phase.STOPPING):
            seconds = self.run.spec.grace if grace_s is None else grace_s
            self.run.write_stop(self.gang.attempt, cause, time.time() + seconds)
            self.run.event("stop", cause=cause, attempt=self.gang.attempt, grace_s=round(seconds, 3))
            if self._own_session:
                self._say(f"{cause}: asking the ranks to save and leave, {seconds:.3g} s from now they are killed")
        self._do(self.gang.stop(cause, grace_s))

    # -------------------------------------------------------------------------------------------- the scheduler

    def _start_step(self) -> None:
        if self._scheduler is not None:
            self._step = self._scheduler.start_agents(*self._way_here)

    def _start_beside(self, node: int) -> None:
        """Start the agent of a node again, while those of the others stay."""
        assert self._scheduler is not None
        if (old := self._beside.pop(node, None)) is not None:
            reap(old, 0.1)
        self._beside[node] = self._scheduler.start_agent(node, *self._way_here)

    @property
    def _way_here(self) -> tuple[int, dict[str, str]]:
        """The port, and the environment of agents that are to come there."""
        assert self._listener is not None
        return self._listener.getsockname()[1], self._crew.environment | {"LAUNCH_TOKEN": self._token}

    def _heed(self, word: Word | None) -> None:
        """Tell the ranks what the scheduler wants, if it wants anything new."""
        if word is None:
            return
        if not word.sooner:
            self._stop(word.cause, word.grace_s)
            return
        self.run.event("stop", cause=word.cause, attempt=self.gang.attempt)
        self._say(f"{word.cause}: less time is left")
        self._do(self.gang.sooner(word.cause, word.grace_s))

    def _stopped_by_scheduler(self) -> bool:
        """Whether what went wrong just now is the scheduler's doing, which this process may not have heard of yet."""
        if self._watch is None:
            return False
        self._heed(self._watch.inquire())
        return self._watch.stopping

    # -------------------------------------------------------------------------------------------- agents

    def _call_the(self, roll: Roll) -> None:
        if self.gang.phase is Phase.MEETING or (self.run.spec.elastic and self.gang.phase is not Phase.ENDED):
            for node in roll.due():
                self._crew.spawn(node)
        if self.gang.phase is Phase.MEETING and not self.gang.calling:
            roll.check(self.gang.missing)

    def _feel_pulse(self) -> None:
        """Look who no longer says that it is there."""
        late, silent = self._crew.pulse.look(time.monotonic())
        for node, seconds in late.items():
            self.run.event("late", node=node, host=self._crew.hosts([node])[0], seconds=round(seconds, 2))
        for node, seconds in silent.items():
            if (agent := self._crew.of(node)) is not None:  # giving another up may have ended all of a step
                who = f"{agent.host} " if agent.process is None else ""
                self._give_up(agent, f"{who}no longer answers, nothing was heard for {seconds:.1f} s")

    def _hear(self, agent: Agent) -> None:
        try:
            for message in self._crew.receive(agent):
                self._heard(agent, message)
        except (KeyError, TypeError, ValueError) as error:
            self._say(f"a peer sent something that is no message of ours ({error!r}); disconnected")
            agent.link.closed = True
        if agent.link.closed and agent in self._crew:
            self._lost(agent)

    def _heard(self, agent: Agent, message: Message) -> None:
        if "hello" in message:
            self._greet(agent, message["hello"])
        elif "leaving" in message:
            agent.why = str(message["leaving"]["why"])
            agent.hopeless = 2 if message["leaving"]["code"] == UsageError.exit_code else None
        elif not agent.joined or agent.index is None:
            raise ValueError("no hello")
        elif "store" in message:
            self._do(self.gang.store_ready(message["attempt"], message["store"]["addr"], message["store"]["port"]))
        elif "exited" in message:
            ended = RankExit.from_json(message["exited"]).on_clock(agent.clock.shift_ns)
            if ended.failed and self.gang.phase is Phase.RUNNING and self._stopped_by_scheduler():
                ended = replace(ended, asked=True)  # of the scheduler's signal, which came before our own word
            progress = None if message["progress"] is None else Progress(**message["progress"])
            self._observer.rank_ended(message["attempt"], progress)
            self._do(self.gang.rank_exited(message["attempt"], ended, progress))
        elif "console" in message:
            self._relay.take(agent.link, message["console"], message["text"])
        elif "drained" in message:
            if self._watch is not None:  # the ranks may have died of it
                self._heed(self._watch.explain(running=self.gang.phase is Phase.RUNNING))
            self._do(self.gang.node_drained(agent.index, message["attempt"]))
        elif "signalled" in message and self._watch is not None:
            self._heed(self._watch.inquire(message["signalled"]))
        elif "signalled" in message and self.gang.stop_cause is None:
            # Once: whoever signals every process of a node or of a job means one stop.
            self._stop(f"{signal_name(message['signalled'])} to the agent of node {agent.index}")
        else:
            self._end_hung(self._observer.heard(agent, agent.index, message))
            if self._watch is not None and self._observer.live is not None:
                self._watch.save_s = self._observer.live.save_s  # what the time before its limit is learned from

    def _end_hung(self, why: str | None) -> None:
        if why is not None:
            self._do(self.gang.hung(why))

    def _greet(self, agent: Agent, hello: dict[str, Any]) -> None:
        actions = self._reception.greet(agent, hello)
        if actions is None:
            return
        assert agent.index is not None
        index = agent.index
        if agent.process is not None:
            self._spawned.add(index)
        if self._roll is not None and self._remains is not None:
            self._roll.came(index)
            self._remains.end(index)
        self._do(actions)
        if self.gang.phase in (Phase.RUNNING, Phase.STOPPING):
            self.run.event("node-here", node=index, host=agent.host)
            self.run.set_state(spares=self._crew.hosts(self.gang.standing_by))
            if self.gang.calling:
                self._say(f"node {index} ({agent.host}) is here: it is taken in in {self.run.spec.last_call_s:g} s")

    def _give_up_the_silent(self) -> None:
        for agent in self._crew:
            if agent.index in self.gang.busy:
                self._give_up(agent, f"it has not brought its ranks down {_PATIENCE_S:g} s after it should have")

    def _give_up(self, agent: Agent, why: str) -> None:
        """Its node counts as lost from here on, and nothing that it still has may go on."""
        agent.why, agent.given_up = why, True
        self._crew.tell(agent, {"given up": f"the supervisor has given this node up: {why}"})
        if agent.process is not None and self._roll is None:
            kill_tree(agent.process.pid)
        if self._step is not None:
            self.unreachable.add(agent.host)
        self._lost(agent)

    def _lost(self, agent: Agent) -> None:
        self._crew.drop(agent)
        how = "its connection was lost"
        if self._remains is not None and agent.index is not None:
            given_up = agent.process if agent.given_up else None
            self._remains.lost(agent.index, agent.pid, agent.started, given_up=given_up)
        if self._roll is not None and agent.process is not None and agent.node is not None and not agent.given_up:
            code = reap(agent.process, 4.0)
            how = self._roll.fleet.why(agent.node, code)
            if agent.index is None:
                self._roll.stayed_away(agent.node, code, hopeless=None if agent.hopeless is None else agent.why)
                self._do(self.gang.node_absent(agent.node))
                return
        elif agent.process is not None and not agent.given_up:
            code = agent.process.wait()
            how = f"its agent was killed by {signal_name(-code)}" if code < 0 else f"its agent left with code {code}"
        elif agent.link.unreachable:
            how = f"{agent.host} no longer answers"
            self.unreachable.add(agent.host)
        elif agent.host and self._step is not None:
            how = f"the agent on {agent.host} was killed, or cut off"
        how = agent.why or how
        if agent.index is None:
            if agent.process is not None:
                if agent.hopeless is not None:
                    raise UsageError(how)
                raise LaunchError(f"an agent on this machine ended before it began: {how}")
            return
        if self.gang.phase is Phase.RUNNING:
            self._stopped_by_scheduler()
        silent = agent.link.unreachable or agent.given_up
        self._do(self.gang.node_gone(agent.index, how, hopeless=agent.hopeless, unreachable=silent))

    # -------------------------------------------------------------------------------------------- actions

    def _do(self, actions: list[Action]) -> None:
        for action in actions:
            if action.kind == "send":
                self._crew.send(action.node, action.message)
                if self.gang.phase is Phase.STOPPING:
                    grace_s = action.message.get("stop", {}).get("grace_s", 0.0)
                    self._quiet_by = time.monotonic() + grace_s + _PATIENCE_S
            elif action.kind == "started":
                self._started(action.message["world_size"])
            elif action.kind == "joining":
                self._joining(**action.message)
            elif action.kind == "again":
                self._again(action)
            elif action.kind == "lost":
                self._node_lost(action.node, action.message["how"])
            elif action.kind == "respawn":
                self._meet_by = time.monotonic() + self._join_timeout_s
                if self._step is not None and action.node < 0:
                    self._end_step()
                    self._start_step()
                elif self._step is not None:
                    self._start_beside(action.node)
                elif action.node in self._spawned:
                    self._crew.spawn(action.node)
            elif action.kind == "end":
                assert action.outcome is not None
                self._dismiss(action.outcome.code)

    def _dismiss(self, code: int) -> None:
        """Tell every agent to leave."""
        for agent in self._crew:
            # srun kills the others when one leaves with another code, and with them what they still have to say.
            self._crew.tell(agent, {"end": {"code": code if self._step is None else 0}})

    def _end_step(self, timeout_s: float = 10.0) -> None:
        """Have all agents of the step leave; its process is gone when this returns."""
        assert self._step is not None
        self._dismiss(0)
        for agent in self._crew:
            self._crew.drop(agent)
        # Longer it would take if one of its nodes no longer answered.
        deadline = time.monotonic() + timeout_s
        for step in (self._step, *self._beside.values()):
            reap(step, max(0.01, deadline - time.monotonic()))
        self._beside.clear()

    def _started(self, world_size: int) -> None:
        gang = self.gang
        self._ran = True
        self._observer.attempt_begins()
        members, spares = self._crew.hosts(gang.members), self._crew.hosts(gang.standing_by)
        record.attempt_begins(self.run, gang.attempt, world_size, members, spares)
        if gang.missing and self._roll is not None:
            self._roll.go_on_without(gang.missing)
        if self.run.spec.elastic:
            waits = f"; standing by: {', '.join(spares)}" if spares else ""
            self._say(f"attempt {gang.attempt}: {world_size} rank(s) on {', '.join(members)}{waits}")

    def _again(self, action: Action) -> None:
        """An attempt is over, and another one comes."""
        self._observer.attempt_over()
        said = action.message
        record.attempt_over(self.run, self.gang.attempt - 1, said, action.outcome, self.progress)
        if said["restart"] is not None:
            self._say(f"{said['cause']}; restarting ({said['restart']} of {self.run.spec.max_restarts})")
        elif action.outcome is not None:
            self._say(f"{said['cause']}; going on with {len(self.gang.here)} node(s)")

    def _joining(self, cause: str, grace_s: float) -> None:
        self.run.write_stop(self.gang.attempt, cause, time.time() + grace_s)
        self.run.event("stop", cause=cause, attempt=self.gang.attempt, grace_s=round(grace_s, 3))
        self._say(f"{cause}: asking the ranks to save and leave, to go on with {len(self.gang.here)} nodes")

    def _node_lost(self, index: int, how: str) -> None:
        """One that nothing runs on."""
        self.run.event("node-lost", node=index, host=self._crew.hosts([index])[0], how=how)
        self._say(f"node {index}: {how}; it is not needed")
        self.run.set_state(spares=self._crew.hosts(self.gang.standing_by))

    # -------------------------------------------------------------------------------------------- the end

    def _await_agents(self) -> None:
        """Let the agents write their consoles out; a paused terminal does not hold up the end.

        srun waits for a node that no longer answers, and for its sake nobody else needs to.
        """
        deadline = time.monotonic() + (2.0 if self.unreachable else _CONSOLES_WITHIN_S)
        for agent in self._crew:
            if not agent.joined and agent.process is not None:  # it has nothing to say, and its host may be dead
                self._crew.drop(agent)
                agent.process.kill()
                agent.process.wait()
        while self._roll is not None and self._crew and time.monotonic() < deadline:
            self._turn()  # their consoles come by the same way
        for agent in self._crew:
            if agent.process is not None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    agent.process.wait(max(0.01, deadline - time.monotonic()))
        for node, step in self._beside.items():
            if self._crew.of(node) is None:  # it never came
                step.kill()
        for step in filter(None, (self._step, *self._beside.values())):
            with contextlib.suppress(subprocess.TimeoutExpired):
                step.wait(max(0.01, deadline - time.monotonic()))

    def _put_down(self) -> None:
        """Nothing that was started here is left, however this ends."""
        if self._step is not None:
            self._end_step(4 if self._ran and not self.unreachable else 0.1)
        left = [agent.process for agent in self._crew if agent.process is not None]
        for agent in self._crew:
            self._crew.drop(agent)  # an agent without its supervisor stops its ranks and leaves
        deadline = time.monotonic() + (4 if self._ran else 0.1)
        for process in left:
            reap(process, max(0.01, deadline - time.monotonic()))
        if self._remains is not None:
            self._remains.close(_FENCED_WITHIN_S)
        end_descendants(spared=self.run.notices.pids)
