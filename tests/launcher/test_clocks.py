"""Times of one machine on another's clock, and who failed first by them."""

from __future__ import annotations

from launcher.clocks import Offset
from launcher.failure import RankExit, find_root

MS, S = 10**6, 10**9


def test_the_quickest_exchange_counts() -> None:
    offset = Offset()
    offset.told(theirs=5 * S, now=107 * S)  # the true shift is 100 s: this word was under way for 2 s
    assert offset.shift_ns == 102 * S
    offset.answered(asked=110 * S, theirs=10 * S + 50 * MS, now=110 * S + 100 * MS)
    assert offset.shift_ns == 100 * S
    offset.answered(asked=111 * S, theirs=11 * S + 1 * MS, now=111 * S + 400 * MS)  # its answer was held up
    assert offset.shift_ns == 100 * S
    offset.answered(asked=112 * S, theirs=12 * S - 9 * MS, now=112 * S + 2 * MS)
    assert offset.shift_ns == 100 * S + 10 * MS


def test_what_is_old_gives_way() -> None:
    """A day later two clocks may differ by seconds, and no exchange is as quick as the quickest of all was."""
    offset = Offset()
    offset.answered(asked=0, theirs=0, now=100)
    day = 86400 * S
    offset.answered(asked=day, theirs=day + 2 * S, now=day + 20 * MS)
    assert offset.shift_ns == -2 * S + 10 * MS


def test_it_is_asked_a_few_times_and_then_rarely() -> None:
    offset = Offset()
    assert [offset.wants(i * MS) for i in range(5)] == [True, True, True, False, False]
    assert not offset.wants(59 * S)
    assert [offset.wants(61 * S), offset.wants(61 * S)] == [True, True]


def test_who_failed_first_with_clocks_apart() -> None:
    """Rank 1's host counts 2 s more: by the bare numbers rank 0 would be first."""

    def ended(rank: int, raised: int) -> RankExit:
        error = {"type": "ValueError", "message": str(rank), "traceback": "", "monotonic_ns": raised}
        return RankExit(rank, 0, rank, f"host{rank}", 1, 1, raised + S, False, "", error)

    offset = Offset()
    offset.answered(asked=50 * S, theirs=52 * S + 5 * MS, now=50 * S + 10 * MS)
    exits = [ended(0, 100 * S + 500 * MS), ended(1, 102 * S)]
    bare = find_root(exits)
    assert bare is not None
    assert bare.exit.rank == 0
    root = find_root([exits[0], exits[1].on_clock(offset.shift_ns)])
    assert root is not None
    assert root.exit.rank == 1
