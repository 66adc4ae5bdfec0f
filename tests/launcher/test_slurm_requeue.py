"""Whether a run goes on after a life of its job: every cause, with every budget."""

from __future__ import annotations

import pytest

from launcher.backends.slurm_requeue import Ledger, decide
from launcher.backends.slurm_stop import Stop
from launcher.gang import Outcome
from launcher.progress import Progress
from launcher.spec import Slurm

FINISHED = Outcome("finished", 0, "all ranks exited 0")
LEFT = Outcome("stopped", 75, "preempted")
KILLED = Outcome("stopped", 137, "preempted; ranks were killed")
FAILED = Outcome("failed", 3, "rank 1 exited with code 3")
LOST = Outcome("failed", 1, "node 1: node2 no longer answers")
SAVED = Progress(step=9, began=0, saved=8, save_s=0.5)


def verdict(outcome, cause=None, ledger=None, slurm=None, *, progress=SAVED, lost=None, requeued=False, **more):
    stop = None if cause is None else Stop(cause, 0.0, requeued)
    return decide(
        outcome, stop, ledger or Ledger(), slurm or Slurm(), failures=0, progress=progress, lost=lost or {}, **more
    )


@pytest.mark.parametrize("cause", ["preempted", "time limit", "cancelled", "requeued", None])
def test_what_is_finished_is_finished(cause):
    assert not verdict(FINISHED, cause).again


@pytest.mark.parametrize("outcome", [LEFT, KILLED, FAILED])
@pytest.mark.parametrize("cause", ["preempted", "time limit", "requeued"])
def test_a_stop_from_outside_goes_on_whatever_the_ranks_exit_with(outcome, cause):
    assert verdict(outcome, cause).again


@pytest.mark.parametrize(
    ("outcome", "cause"), [(LEFT, "cancelled"), (KILLED, "cancelled"), (FAILED, None), (KILLED, "signalled")]
)
def test_what_does_not_go_on(outcome, cause):
    assert not verdict(outcome, cause).again


def test_what_slurm_has_requeued_is_left_to_it():
    for cause in ("requeued", "node failure", "preempted"):
        said = verdict(LEFT, cause, requeued=True)
        assert (said.again, said.by_slurm) == (True, True)
    assert not verdict(LEFT, "cancelled", requeued=False).by_slurm


def test_no_requeue_is_asked_for():
    assert not verdict(LEFT, "preempted", slurm=Slurm(requeue="no")).again


def test_time_limits_have_a_budget_of_their_own():
    ledger = Ledger()
    for expected in (True, True, False):
        said = verdict(LEFT, "time limit", ledger, Slurm(max_timeouts=2), progress=None)
        assert said.again is expected
        ledger = verdict(LEFT, "preempted", said.ledger, Slurm(max_timeouts=2)).ledger  # costs nothing
    assert ledger.timeouts == 3


def test_time_limits_without_a_budget_go_on_while_there_is_progress():
    ledger, saved = Ledger(), 0
    for _ in range(9):
        saved += 5
        said = verdict(KILLED, "time limit", ledger, progress=Progress(step=saved + 2, saved=saved, save_s=1.0))
        assert said.again
        ledger = said.ledger
    for expected in (True, True, False):
        said = verdict(KILLED, "time limit", ledger, progress=Progress(step=saved + 2, began=saved))
        assert said.again is expected
        ledger = said.ledger
    assert "without a newer checkpoint" in said.why


def test_what_a_life_began_at_was_saved_by_the_one_before():
    began = Progress(step=9, began=7)
    assert verdict(KILLED, "time limit", progress=began).ledger.saved == 7
    assert verdict(KILLED, "time limit", progress=Progress(step=9, began=0)).ledger.saved is None


def test_a_plain_programs_75_is_its_word_that_it_can_go_on():
    ledger = Ledger(fruitless=9)
    assert verdict(LEFT, "time limit", ledger, progress=None).again
    assert not verdict(KILLED, "time limit", ledger, progress=None).again
    assert verdict(LEFT, None, ledger, progress=None).again


def test_a_lost_node_is_no_failure_of_the_program_until_nothing_comes_of_it():
    lost = {"node2": "node2 no longer answers"}
    ledger = Ledger()
    for expected in (True, True, False):
        said = verdict(LOST, None, ledger, progress=None, lost=lost)
        assert said.again is expected
        ledger = said.ledger
    assert "node2" in said.why


@pytest.mark.parametrize("outcome", [LEFT, KILLED])
def test_a_stop_that_slurm_has_forgotten_goes_on_while_something_comes_of_it(outcome):
    said = verdict(outcome, "unknown")
    assert said.again
    for expected in (True, True, False):
        said = verdict(outcome, "unknown", said.ledger)
        assert said.again is expected


def test_a_users_signal_asks_to_go_on_later():
    assert verdict(LEFT, "signalled", by_user_signal=True).again
    assert not verdict(LEFT, "signalled").again


def test_what_was_learned_stays():
    ledger = verdict(LEFT, "preempted").ledger
    assert (ledger.saved, ledger.save_s) == (9, 0.5)
    assert verdict(LEFT, "preempted", ledger, progress=None).ledger == ledger
