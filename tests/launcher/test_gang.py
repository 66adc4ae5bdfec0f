"""Every transition of the gang: events in, actions out; no process, no clock."""

from __future__ import annotations

import pytest

from launcher.failure import RankExit
from launcher.gang import Gang, Phase
from launcher.progress import Progress
from launcher.record import report
from launcher.topology import unpacked


def gang(nodes: int = 2, procs: int = 1, **settings) -> Gang:
    return Gang([procs] * nodes, **{"first_attempt": 0, "max_restarts": 0, "grace_s": 30.0, **settings})


def brief(actions) -> list[str]:
    """`send 0 host`, `end stopped 75`, ..."""
    return [
        f"send {a.node} {next(iter(a.message))}" if a.kind == "send"
        else f"end {a.outcome.status} {a.outcome.code}" if a.kind == "end"
        else f"{a.kind} {a.node}" if a.kind in ("respawn", "lost")
        else "restarting" if a.kind == "again" and a.message["restart"] is not None else a.kind
        for a in actions
    ]  # fmt: skip


def ended(rank: int, code: int, *, at: int = 0, asked: bool = False, says: str | None = None, node: int | None = None):
    error = None if says is None else {"type": "RuntimeError", "message": says, "traceback": says, "monotonic_ns": at}
    return RankExit(rank, 0, rank if node is None else node, "host", 1, code, at, asked, "/log", error)


def running(g: Gang) -> Gang:
    """Bring the current attempt to RUNNING."""
    for index in g.missing:
        g.node_here(index, g.nodes[index].procs, None)
    assert g.phase is Phase.HOSTING
    g.store_ready(g.attempt, "127.0.0.1", 1)
    assert g.phase is Phase.RUNNING
    return g


def out(g: Gang, *exits: RankExit) -> list[str]:
    """Ranks end and their nodes are drained, in this order."""
    actions = []
    for e in exits:
        actions += g.rank_exited(g.attempt, e)
    for e in exits:
        actions += g.node_drained(e.node, g.attempt)
    return brief(actions)


def test_a_plain_run() -> None:
    g = gang(master_port=1234)
    assert g.missing == [0, 1]
    assert g.node_here(1, 1, "b") == []
    (host,) = g.node_here(0, 1, "a")
    assert host.node == 0
    assert host.message == {"host": {"attempt": 0, "nodes": 2, "addr": "a", "port": 1234}}
    started, *worlds = g.store_ready(0, "a", 99)
    assert started.message == {"world_size": 2}
    assert [w.message["world"]["node"] for w in worlds] == [0, 1]
    assert worlds[0].message["world"] | {"node": 1} == worlds[1].message["world"]
    assert worlds[1].message["world"]["slots"] == [(1, 2)]
    assert (worlds[1].message["world"]["addr"], worlds[1].message["world"]["port"]) == ("a", 99)
    assert out(g, ended(0, 0), ended(1, 0)) == ["end finished 0"]
    assert g.phase is Phase.ENDED
    assert brief(g.stop("SIGTERM")) == []
    assert brief(g.node_gone(0, "left")) == []


def test_nodes_may_bring_different_numbers_of_ranks() -> None:
    g = gang(3)
    g.node_here(0, 2, None), g.node_here(2, 1, None), g.node_here(1, 4, None)
    _, *worlds = g.store_ready(0, "a", 1)
    assert worlds[0].message["world"]["slots"] == [(2, 1), (4, 1), (1, 1)]


@pytest.mark.parametrize(
    ("codes", "end"),
    [((0, 0), "finished 0"), ((75, 75), "stopped 75"), ((75, 0), "stopped 75"), ((0, 3), "failed 3"),
     ((-9, 0), "failed 137"), ((75, 1), "failed 1"), ((-15, 0), "failed 143")],
)  # fmt: skip
def test_how_a_run_ends_by_itself(codes: tuple[int, int], end: str) -> None:
    g = running(gang())
    actions = out(g, *(ended(r, c, at=r) for r, c in enumerate(codes)))
    assert actions[-1] == f"end {end}"


def test_a_failure_aborts_the_others_once() -> None:
    g = running(gang(3))
    assert brief(g.rank_exited(0, ended(1, 1))) == ["send 0 abort", "send 1 abort", "send 2 abort"]
    assert g.rank_exited(0, ended(0, 1, at=5)) == []
    assert g.phase is Phase.STOPPING
    assert g.node_drained(1, 0) == []
    assert g.node_drained(0, 0) == []
    assert g.rank_exited(0, ended(2, -15, at=9, asked=True)) == []
    (end,) = g.node_drained(2, 0)
    assert end.outcome.root.exit.rank == 1
    assert end.outcome.cause == "rank 1 exited with code 1"


def test_a_success_aborts_nobody() -> None:
    g = running(gang())
    assert g.rank_exited(0, ended(1, 0)) == []
    assert g.node_drained(1, 0) == []
    assert g.phase is Phase.RUNNING


def test_restarts_have_a_budget_and_fresh_attempts() -> None:
    g = running(gang(first_attempt=5, max_restarts=2))
    for restart in (1, 2):
        assert out(g, ended(0, 1), ended(1, -15, asked=True))[-2:] == ["restarting", "send 0 host"]
        assert (g.attempt, g.restarts, g.phase) == (5 + restart, restart, Phase.HOSTING)
        assert g.exits == {}
        _, first, _ = g.store_ready(g.attempt, "a", restart)
        assert (first.message["world"]["attempt"], first.message["world"]["restarts"]) == (5 + restart, restart)
    assert out(g, ended(0, 1), ended(1, -15, asked=True))[-1] == "end failed 1"


def test_late_reports_of_an_earlier_attempt_are_nothing() -> None:
    g = running(gang(max_restarts=1))
    out(g, ended(0, 1), ended(1, -15, asked=True))
    assert g.store_ready(0, "a", 1) == []
    running_now = g.store_ready(1, "a", 1)
    assert running_now
    assert g.rank_exited(0, ended(1, 1)) == []
    assert g.node_drained(0, 0) == []
    assert g.node_drained(1, 0) == []
    assert g.phase is Phase.RUNNING
    assert g.store_ready(1, "a", 2) == []  # said twice


# ------------------------------------------------------------------------------------------------- stops


def test_stop_before_all_are_here() -> None:
    g = gang()
    g.node_here(0, 1, None)
    assert brief(g.stop("SIGTERM")) == ["end stopped 75"]


def test_stop_while_the_store_is_made() -> None:
    g = gang(1)
    g.node_here(0, 1, None)
    assert brief(g.stop("SIGTERM")) == ["end stopped 75"]


def test_stop_between_attempts_is_not_blamed_on_the_last_one() -> None:
    g = running(gang(1, max_restarts=1))
    assert out(g, ended(0, 3))[-1] == "send 0 host"
    (end,) = g.stop("SIGTERM")
    assert (end.outcome.status, end.outcome.code, end.outcome.root) == ("stopped", 75, None)


@pytest.mark.parametrize(
    ("codes", "end"),
    [((75, 75), "stopped 75"), ((0, 0), "finished 0"), ((0, 75), "stopped 75"), ((-15, -15), "stopped 143"),
     ((75, -9), "stopped 137"), ((-15, -9), "stopped 137"), ((143, 143), "stopped 143"), ((75, 1), "stopped 1")],
)  # fmt: skip
def test_a_stop_ends_as_the_ranks_do(codes: tuple[int, int], end: str) -> None:
    g = running(gang())
    assert brief(g.stop("SIGTERM")) == ["send 0 stop", "send 1 stop"]
    assert out(g, *(ended(r, c, asked=True) for r, c in enumerate(codes))) == [f"end {end}"]
    assert g.outcome is not None
    assert end == "finished 0" or g.outcome.cause.startswith("SIGTERM")


def test_a_rank_that_fails_to_save_is_named() -> None:
    g = running(gang(max_restarts=3))
    g.stop("SIGTERM")
    assert out(g, ended(0, 75, asked=True), ended(1, 1, asked=True, says="disk full")) == ["end failed 1"]
    assert g.outcome is not None
    assert g.outcome.root is not None
    assert g.outcome.root.exit.rank == 1
    assert "while stopping rank 1 failed" in g.outcome.cause


def test_the_second_stop_ends_the_grace_and_the_third_is_nothing() -> None:
    g = running(gang(3))
    (stop, *_) = g.stop("SIGINT")
    assert stop.message == {"stop": {"grace_s": 30.0}}
    g.rank_exited(0, ended(2, 75, asked=True))
    g.node_drained(2, 0)
    assert brief(g.stop("SIGINT")) == ["send 0 kill", "send 1 kill"]
    assert g.stop("SIGINT") == []
    assert out(g, ended(0, -9, asked=True), ended(1, -9, asked=True)) == ["end stopped 137"]
    assert g.outcome is not None
    assert g.outcome.cause == "SIGINT; ranks were killed at once"


def test_a_stop_during_an_abort_ends_the_run_with_its_failure() -> None:
    g = running(gang(max_restarts=5))
    g.rank_exited(0, ended(0, 4))
    assert g.stop("SIGTERM") == []
    assert out(g, ended(1, -15, asked=True), ended(0, 4)) == ["end failed 4"]


# ----------------------------------------------------------------------------------------- nodes that go


def test_a_node_gone_before_the_meeting_is_a_failure() -> None:
    g = gang()
    g.node_here(0, 1, None)
    assert g.node_gone(1, "never came") == []  # it was never here
    assert brief(g.node_gone(0, "its agent was killed by SIGKILL")) == ["end failed 1"]
    assert g.outcome is not None
    assert g.outcome.cause == "node 0: its agent was killed by SIGKILL"


@pytest.mark.parametrize("phase", [Phase.MEETING, Phase.HOSTING, Phase.RUNNING, Phase.STOPPING])
def test_a_node_gone_is_started_again_within_the_budget(phase: Phase) -> None:
    g = gang(max_restarts=1)
    for index in range(1 if phase is Phase.MEETING else 2):
        g.node_here(index, 1, None)
    if phase in (Phase.RUNNING, Phase.STOPPING):
        g.store_ready(0, "a", 1)
    if phase is Phase.STOPPING:
        g.rank_exited(0, ended(1, 1, says="my own fault"))
    assert g.phase is phase
    actions = brief(g.node_gone(0, "lost"))
    if phase in (Phase.RUNNING, Phase.STOPPING):
        assert actions == (["send 1 abort"] if phase is Phase.RUNNING else [])
        actions = out(g, ended(1, -15, asked=True) if phase is Phase.RUNNING else ended(1, 1, says="my own fault"))
    assert actions == ["restarting", "respawn 0"]
    assert g.phase is Phase.MEETING
    assert 0 in g.missing
    g.node_here(0, 1, None)
    if phase is Phase.MEETING:
        g.node_here(1, 1, None)
    assert g.phase is Phase.HOSTING
    g.store_ready(1, "a", 1)
    assert out(g, ended(0, 0), ended(1, 0)) == ["end finished 0"]


def test_a_lost_node_explains_lost_peers_and_not_a_fault_of_its_own() -> None:
    g = running(gang())
    g.node_gone(0, "its connection was lost")
    assert out(g, ended(1, 1, says="Connection closed by peer [10.0.0.1]:1")) == ["end failed 1"]
    assert g.outcome is not None
    assert (g.outcome.root, g.outcome.cause) == (None, "node 0: its connection was lost")
    g = running(gang())
    g.rank_exited(0, ended(1, 5, says="no such label"))
    g.node_gone(0, "its connection was lost")
    assert out(g, ended(1, 5, says="no such label")) == ["end failed 5"]


def test_all_nodes_gone() -> None:
    g = running(gang())
    assert brief(g.node_gone(0, "a")) == ["send 1 abort"]
    assert brief(g.node_gone(1, "b")) == ["end failed 1"]
    assert g.outcome is not None
    assert g.outcome.cause == "node 0: a; node 1: b"


def test_a_node_that_starting_again_cannot_help() -> None:
    g = gang(1, max_restarts=3)
    g.node_here(0, 1, None)
    assert brief(g.node_gone(0, "--preload nothing: no such module", hopeless=2)) == ["end failed 2"]


def test_a_node_gone_during_a_stop() -> None:
    g = running(gang(max_restarts=3))
    g.stop("SIGTERM")
    assert brief(g.node_gone(0, "lost")) == []
    assert out(g, ended(1, 75, asked=True)) == ["end stopped 75"]


def test_agents_of_one_srun_are_all_started_again() -> None:
    g = running(gang(max_restarts=1, together=True))
    assert brief(g.node_gone(0, "its connection was lost")) == ["send 1 abort"]
    assert out(g, ended(1, -15, asked=True)) == ["restarting", "respawn -1"]
    assert g.missing == [0, 1]
    assert g.node_gone(1, "told to leave") == []
    running(g)
    assert out(g, ended(0, 0), ended(1, 0)) == ["end finished 0"]


def test_an_srun_is_not_started_again_on_a_node_that_does_not_answer() -> None:
    g = running(gang(max_restarts=1, together=True))
    assert brief(g.node_gone(1, "node2 no longer answers", unreachable=True)) == ["send 0 abort"]
    assert out(g, ended(0, -15, asked=True)) == ["end failed 1"]


def test_less_time_than_was_said() -> None:
    g = running(gang())
    assert g.stop("preempted", 20.0)[0].message == {"stop": {"grace_s": 20.0}}
    assert [a.message for a in g.sooner("cancelled", 3.0)] == [{"stop": {"grace_s": 3.0}}] * 2
    assert out(g, ended(0, -9, asked=True), ended(1, -9, asked=True)) == ["end stopped 137"]
    assert g.outcome is not None
    assert g.outcome.cause == "cancelled; ranks were killed, 3 s of grace were over"


def fails(g: Gang, says: str, **progress) -> str:
    e = ended(1, 1, says=says)
    actions = g.rank_exited(g.attempt, e, Progress(**progress) if progress else None)
    actions += g.rank_exited(g.attempt, ended(0, -15, asked=True))
    for node in (0, 1):
        actions += g.node_drained(node, g.attempt)
    return brief(actions)[-1]


def test_the_same_failure_at_the_same_step_is_not_tried_again() -> None:
    g = running(gang(max_restarts=9))
    assert fails(g, "bad sample at 0x1234", step=7, saved=5) == "send 0 host"
    running(g)
    assert fails(g, "bad sample at 0x9999", step=7, began=5) == "end failed 1"
    assert g.outcome is not None
    assert "same exception at the same step" in g.outcome.cause


@pytest.mark.parametrize(
    "second",
    [{"step": 8, "began": 5}, {"step": 7, "began": 5, "saved": 6}, {}],
    ids=["a later step", "a newer checkpoint", "nobody tells"],
)
def test_another_failure_is_tried_again(second: dict) -> None:
    g = running(gang(max_restarts=9))
    fails(g, "bad sample", **({"step": 7, "saved": 5} if second else {}))
    running(g)
    assert fails(g, "bad sample", **second) == "send 0 host"


def test_a_failure_of_an_earlier_life_counts() -> None:
    first = running(gang())
    fails(first, "bad sample", step=7, saved=5)
    g = running(gang(max_restarts=9, restarts=1, failure=first.failure))
    assert fails(g, "bad sample", step=7, began=5) == "end failed 1"


# ------------------------------------------------------------------------------------- nodes that come and go


def come(g: Gang, *nodes: int) -> list[str]:
    return brief([action for i in nodes for action in g.node_here(i, 1, f"addr{i}", f"host{i}")])


def begin(g: Gang) -> tuple[int, ...]:
    """The store is there: the members of the attempt, each with its place in the world."""
    assert g.phase is Phase.HOSTING
    _, *worlds = g.store_ready(g.attempt, "a", 1)
    assert [w.message["world"]["node"] for w in worlds] == list(range(len(worlds)))
    assert all(len(unpacked(w.message["world"]["slots"])) == len(worlds) for w in worlds)
    assert tuple(w.node for w in worlds) == g.members
    return g.members


def elastic(least: int = 2, most: int = 4, spares: int = 0, come_first: tuple[int, ...] = (), **settings) -> Gang:
    g = gang(most + spares, least=least, most=most, **settings)
    come(g, *come_first)
    if g.calling:
        g.call_over()
    return g


def leave(g: Gang, code: int = 75) -> list[str]:
    """All nodes that have ranks bring them down, as they were asked to."""
    return out(g, *(ended(g.members.index(i), code, asked=True, node=i) for i in sorted(g.busy)))


def test_the_least_wait_for_a_last_call_and_all_for_none() -> None:
    g = gang(4, least=2)
    assert come(g, 3) == []
    assert not g.calling
    assert come(g, 1) == []
    assert g.calling
    assert brief(g.call_over()) == ["send 1 host"]
    assert begin(g) == (1, 3)
    assert not g.calling
    g = gang(4, least=2)
    assert come(g, 3, 2, 1, 0) == ["send 0 host"]
    assert begin(g) == (0, 1, 2, 3)


def test_a_last_call_ends_when_the_others_are_known_not_to_come() -> None:
    g = gang(4, least=2)
    come(g, 0, 2)
    assert g.node_absent(1) == []
    assert brief(g.node_absent(3)) == ["send 0 host"]
    assert begin(g) == (0, 2)


def test_a_call_that_is_over_starts_nothing_below_the_least() -> None:
    g = gang(4, least=2)
    come(g, 0)
    for absent in (1, 2, 3):
        assert g.node_absent(absent) == []
    assert g.call_over() == []
    assert come(g, 2) == ["send 0 host"]


def test_late_nodes_are_taken_in_together_and_for_nothing() -> None:
    g = elastic(come_first=(1, 2))
    assert begin(g) == (1, 2)
    assert come(g, 0) == []
    assert g.calling
    assert come(g, 3) == []
    joining, *told = g.call_over()
    assert joining.message == {"cause": "nodes joined: host0, host3", "grace_s": 30.0}
    assert brief(told) == ["send 1 stop", "send 2 stop"]
    assert g.call_over() == []
    actions = leave(g)
    assert actions == ["again", "send 0 host"]
    assert (g.attempt, g.restarts) == (1, 0)
    assert begin(g) == (0, 1, 2, 3)
    assert leave(g, 0) == ["end finished 0"]


@pytest.mark.parametrize(("code", "end"), [(-15, "send 0 host"), (143, "send 0 host"), (0, "end finished 0")])
def test_ranks_that_know_nothing_of_stops_are_started_again_for_a_late_node(code: int, end: str) -> None:
    g = elastic(come_first=(0, 1))
    begin(g)
    come(g, 2)
    g.call_over()
    assert leave(g, code)[-1] == end


def test_a_rank_that_fails_as_a_node_joins_counts() -> None:
    g = elastic(come_first=(0, 1))
    begin(g)
    come(g, 2)
    g.call_over()
    assert out(g, ended(0, 75, asked=True), ended(1, 1, asked=True, says="disk full")) == ["end failed 1"]


def test_a_stop_while_a_node_joins_stops() -> None:
    g = elastic(come_first=(0, 1))
    begin(g)
    come(g, 2)
    g.call_over()
    assert [a.message for a in g.stop("SIGTERM", 3.0)] == [{"stop": {"grace_s": 3.0}}] * 2
    assert leave(g) == ["end stopped 75"]
    assert g.outcome is not None
    assert g.outcome.cause == "SIGTERM"


def test_a_lost_node_is_gone_on_without_for_nothing_and_asked_again() -> None:
    g = elastic(come_first=(0, 1, 2))
    begin(g)
    assert brief(g.node_gone(1, "no longer answers")) == ["send 0 abort", "send 2 abort"]
    assert out(g, ended(0, 1, says="Connection closed by peer", node=0), ended(2, -15, asked=True, node=2)) == [
        "again", "respawn 1", "send 0 host",
    ]  # fmt: skip
    assert (g.attempt, g.restarts) == (1, 0)
    assert begin(g) == (0, 2)
    assert come(g, 1) == []
    assert brief(g.call_over()) == ["joining", "send 0 stop", "send 2 stop"]
    assert leave(g)[-1] == "send 0 host"
    assert begin(g) == (0, 1, 2)


def test_below_the_least_a_loss_counts_and_the_node_is_waited_for() -> None:
    g = elastic(come_first=(0, 1), max_restarts=1)
    begin(g)
    assert brief(g.node_gone(1, "lost")) == ["send 0 abort"]
    assert leave(g, -15) == ["restarting", "respawn 1"]
    assert (g.phase, g.calling) == (Phase.MEETING, False)
    assert come(g, 1) == ["send 0 host"]  # the two that never came are not waited for again
    begin(g)
    g.node_gone(0, "lost")
    assert leave(g, -15) == ["end failed 1"]


def test_a_rank_that_fails_by_itself_beside_a_lost_node_counts() -> None:
    g = elastic(come_first=(0, 1, 2))
    begin(g)
    g.rank_exited(0, ended(0, 5, says="no such label"))
    g.node_gone(1, "lost")
    assert out(g, ended(0, 5, says="no such label"), ended(2, -15, asked=True, node=2)) == ["end failed 5"]


def test_the_store_moves_when_its_node_is_lost() -> None:
    g = elastic(come_first=(0, 1, 2))
    begin(g)
    g.node_gone(0, "lost")
    leave(g, -15)
    assert begin(g) == (1, 2)
    g.node_gone(1, "lost")
    assert leave(g, -15)[-1] == "end failed 1"


def test_the_node_that_is_to_hold_the_store_is_lost_before_it_does() -> None:
    g = elastic(come_first=(0, 1, 2))
    assert brief(g.node_gone(0, "lost")) == ["again", "respawn 0", "send 1 host"]
    assert g.store_ready(0, "late", 1) == []
    assert begin(g) == (1, 2)


def test_a_node_that_goes_before_the_run_begins_is_not_missed() -> None:
    g = gang(3, least=1)
    come(g, 0, 1)
    assert brief(g.node_gone(1, "lost")) == ["lost 1", "respawn 1"]
    assert brief(g.call_over()) == ["send 0 host"]
    assert begin(g) == (0,)


def test_a_node_that_is_lost_again_and_again_is_taken_in_no_more() -> None:
    g = elastic(least=1, most=2, come_first=(0, 1))
    attempts = 0
    for _ in range(10):
        begin(g)
        attempts += 1
        if g.members == (0,):
            come(g, 1)
            if not g.calling:
                break
            g.call_over()
            leave(g)
            continue
        g.node_gone(1, "lost")
        actions = leave(g, -15)
        assert g.restarts == 0
    assert attempts == 6  # three with it, three without
    assert "respawn 1" not in actions
    assert g.standing_by == [1]
    assert leave(g, 0) == ["end finished 0"]


def test_who_was_lost_too_often_still_fills_the_minimum() -> None:
    g = elastic(least=2, most=3, come_first=(0, 1, 2), max_restarts=1)
    for _ in range(3):
        begin(g)
        g.node_gone(2, "lost")
        leave(g, -15)
        begin(g)
        come(g, 2)
        if g.calling:
            g.call_over()
            leave(g)
    assert g.members == (0, 1)
    g.node_gone(1, "lost")
    assert leave(g, -15) == ["again", "respawn 1", "send 0 host"]
    assert begin(g) == (0, 2)
    assert come(g, 1) == []  # and gives way to a better one
    g.call_over()
    leave(g)
    assert begin(g) == (0, 1)


def test_a_spare_takes_the_place_of_a_lost_node_and_the_lost_one_its() -> None:
    g = gang(4, least=3, most=3)
    assert come(g, 3, 0, 1) == []  # a spare is not taken in place of one that is only slower
    assert g.calling
    assert come(g, 2) == ["send 0 host"]
    assert begin(g) == (0, 1, 2)
    assert g.standing_by == [3]
    g.node_gone(1, "no longer answers")
    assert leave(g, -15) == ["again", "respawn 1", "send 0 host"]
    assert begin(g) == (0, 2, 3)
    assert come(g, 1) == []
    assert not g.calling  # nothing would be gained
    assert g.standing_by == [1]
    g.node_gone(0, "no longer answers")
    leave(g, -15)
    assert begin(g) == (1, 2, 3)
    assert g.restarts == 0


def test_a_spare_that_is_lost_disturbs_nobody() -> None:
    g = gang(3, least=2, most=2)
    come(g, 0, 1, 2)
    begin(g)
    assert brief(g.node_gone(2, "lost")) == ["lost 2", "respawn 2"]
    assert g.phase is Phase.RUNNING
    assert leave(g, 0) == ["end finished 0"]


def test_a_spare_does_for_a_node_that_does_not_come() -> None:
    g = gang(3, least=2, most=2)
    come(g, 0, 2)
    assert brief(g.call_over()) == ["send 0 host"]
    assert begin(g) == (0, 2)
    assert come(g, 1) == []
    assert not g.calling


def test_a_node_that_can_never_work_is_done_without() -> None:
    g = gang(3, least=2)
    come(g, 0, 1, 2)
    assert brief(g.node_gone(2, "no GPU here", hopeless=2)) == ["again", "send 0 host"]
    assert begin(g) == (0, 1)
    g = gang(3, least=3, max_restarts=5)
    come(g, 0, 1, 2)
    assert brief(g.node_gone(2, "no GPU here", hopeless=2)) == ["end failed 2"]


def test_no_schedule_of_losses_goes_on_for_ever() -> None:
    """Whatever is lost is back at once; every attempt loses its first member."""
    g = elastic(least=1, most=3, spares=2, come_first=(0, 1, 2, 3, 4))
    attempts = 0
    while g.phase is not Phase.ENDED:
        begin(g)
        attempts += 1
        assert attempts < 100
        lost = g.members[0]
        g.node_gone(lost, "lost")
        leave(g, -15)
        if g.phase is Phase.HOSTING:
            begin(g)
            come(g, lost)
            if g.calling:
                g.call_over()
                leave(g)
            else:
                g.node_gone(g.members[0], "lost")
                leave(g, -15)
    assert g.outcome is not None
    assert g.outcome.status == "failed"


def test_a_lost_node_explains_a_rank_that_was_merely_done() -> None:
    g = running(gang(3, least=2))
    g.rank_exited(0, ended(0, 0))
    g.node_drained(0, 0)
    g.node_gone(2, "lost")
    g.rank_exited(0, ended(1, 1, says="Connection closed by peer"))
    assert "again" in brief(g.node_drained(1, 0))


def test_an_agent_that_is_lost_after_all_ranks_were_done_does_not_matter() -> None:
    g = running(gang(2, max_restarts=3))
    for rank in (0, 1):
        g.rank_exited(0, ended(rank, 0))
    g.node_drained(0, 0)
    assert brief(g.node_gone(1, "killed"))[-1] == "end finished 0"


def test_the_last_words_count_the_ranks_that_there_were(tmp_path) -> None:
    g = gang(nodes=3, procs=2, least=2)
    g.node_here(0, 2, "a")
    g.node_here(1, 2, "b")
    g.call_over()
    g.store_ready(0, "a", 99)
    out(g, ended(1, 3, node=0), ended(2, -15, asked=True, node=1))
    assert g.outcome is not None
    assert report(g.outcome, None).startswith("rank 1 of 4 on host ")  # type: ignore[arg-type]  # it has a first rank


def test_a_node_of_a_job_is_started_again_beside_the_others_unless_its_host_is_silent() -> None:
    g = running(gang(nodes=3, least=1, together=True))
    assert brief(g.node_gone(1, "killed")) == ["send 0 abort", "send 2 abort"]
    assert brief(g.node_drained(0, 0) + g.node_drained(2, 0)) == ["again", "respawn 1", "send 0 host"]
    g = running(gang(nodes=3, least=1, together=True))
    g.node_gone(1, "silent", unreachable=True)
    assert brief(g.node_drained(0, 0) + g.node_drained(2, 0)) == ["again", "send 0 host"]
