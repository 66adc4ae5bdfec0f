"""How the ranks agree on the batch after which all of them stop, without adding a collective to any step.

A rank that received a signal, or whose writer has something to say about a checkpoint, writes one key into the job's
store. On every rank a thread waits for that key (in the
store's own wait, with the interpreter lock released). It then fixes a place that its rank has not reached yet,
promises not to pass it, publishes it, and reads the other ranks' promises: all halt at the latest of them. If one
of them had a signal they stop; else they settle what came of the checkpoint, and go on into the next round. No rank
waits for another rank's training to move on, only for the threads, so there is nothing to deadlock on; ranks may be
any number of batches apart.

A place is an integer that grows in the same order on all ranks. After training batch n come `n << 32` (before a
validation that is due), `(n << 32) + i` after its i-th batch, and `(n << 32) + LAST` when everything that follows
batch n is done; so ranks whose evaluations differ in length still meet.
"""

from __future__ import annotations

import threading
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from trainer.errors import DistributedError

if TYPE_CHECKING:
    from collections.abc import Callable

    from trainer.distributed import World
    from trainer.signals import StopSignals
    from trainer.state import TrainState

NEVER = 1 << 62
LAST = (1 << 32) - 1
# A promise that no rank answers within this time means that a rank is gone or hangs.
_ANSWER_S = 600.0
# The number of agreements this process has begun: every rank counts the same, so keys are never reused.
_sessions = 0


class StopAgreement:
    """Watches for a stop while a loop runs. Use as a context manager around the loop.

    settle: called by all ranks at the same place, after one of them asked for it by `call`.

    The loop asks `signals.requested or state.batches >= agreement.limit_batches` after each training batch, and if so
    calls `stop_here(place)`; an evaluation calls it after each batch and says when it is `evaluating`.
    """

    def __init__(
        self, world: World, signals: StopSignals, state: TrainState, settle: Callable[[], object] = lambda: None
    ) -> None:
        self.limit: int = NEVER
        self.limit_batches: int = NEVER
        self.evaluating = False
        self.place = 0
        self._requested = False
        self._called = False
        self._stops = False
        self._lock = threading.Lock()
        self._settle = settle
        self._world = world
        self._signals = signals
        self._state = state
        self._decided = threading.Event()
        self._failure: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._store: Any = None
        self._prefix = ""

    def __enter__(self) -> StopAgreement:
        if self._world.size > 1:
            # A connection of its own: a wait on the shared one would lock the collectives out.
            self._store = dist.distributed_c10d._get_default_store().clone()
            self._store.set_timeout(timedelta(days=365))
            self._begin()
        return self

    def _begin(self) -> None:
        global _sessions
        _sessions += 1
        self._prefix = f"trainer/stop/{_sessions}"
        self._thread = threading.Thread(target=self._watch, name="trainer-stop", daemon=True)
        self._thread.start()

    def __exit__(self, *exc: object) -> None:
        if self._thread is None:
            return
        try:
            # Wakes all threads; the other ranks are past the loop or about to fail as well. If the word is "stop"
            # already it stays: every thread still answers it, so none waits for an answer in vain.
            self._client().compare_set(f"{self._prefix}/word", "", "end")
        except RuntimeError:
            pass  # the store went away with rank 0, and the thread with it
        self._thread.join(timeout=10.0)
        self._thread = self._store = None

    def _client(self) -> Any:
        return dist.distributed_c10d._get_default_store()

    def call(self) -> None:
        """Have all ranks call `settle` at a place on which they agree. May be called in any thread."""
        with self._lock:
            self._called = True
            self.limit_batches = 0  # the loop asks after its next batch

    def answered(self) -> None:
        """What `call` was for has been settled on the way, at one place on all ranks."""
        with self._lock:
            self._called = False
            self._set_limit(self.limit)

    def stop_here(self, place: int) -> bool:
        """Whether all ranks stop at this place; called from the loop when it is there.

        Raises:
            DistributedError: a rank did not answer.
            What `settle` raises.
        """
        self.place = place
        if (self._signals.requested or self._called) and not self._requested:
            self._request()
        if place < self.limit:
            return False
        if not self._decided.wait(_ANSWER_S) or self._failure is not None:
            raise DistributedError(
                f"rank {self._world.rank} was told to stop, but not all ranks answered within {_ANSWER_S:.0f} s: "
                "one of them is gone or hangs. Look at the other ranks' logs."
            ) from self._failure
        if place < self.limit:
            return False
        if not self._stops:
            self._go_on()
        return self._stops

    def _go_on(self) -> None:
        """All ranks are at the same place, and none had a signal when it promised."""
        with self._lock:
            self._set_limit(NEVER)
            self._requested = self._called = False
        self._decided.clear()
        if self._thread is not None:
            self._thread.join()
            self._begin()
        self._settle()

    def _request(self) -> None:
        """Tell all ranks that this one received a signal, or is called."""
        self._requested = True
        if self._world.size == 1:
            self._stops = self._signals.requested
            self._set_limit(0)
            self._decided.set()
        else:
            self._client().compare_set(f"{self._prefix}/word", "", "stop")

    def _set_limit(self, limit: int) -> None:
        self.limit = limit
        self.limit_batches = limit >> 32

    def _where(self) -> int:
        """The newest place that the loop has surely looked at, or may be looking at now."""
        return self.place if self.evaluating else (self._state.batches << 32) + LAST

    def _watch(self) -> None:
        try:
            store, size = self._store, self._world.size
            store.wait([f"{self._prefix}/word"])
            if store.get(f"{self._prefix}/word") != b"stop":
                return
            # The loop may move on between two lines of this: fix the promise only once it lies ahead for sure. A
            # loop that looked just before the limit was set is in the batch that leads to the promise at most.
            while True:
                promise = self.place + 2 if self.evaluating else (self._state.batches + 1) << 32
                self._set_limit(promise)
                if self._where() < promise:
                    break
            store.set(f"{self._prefix}/{self._world.rank}", f"{promise} {int(self._signals.requested)}")
            keys = [f"{self._prefix}/{rank}" for rank in range(size)]
            store.wait(keys, timedelta(seconds=_ANSWER_S))
            promises = [value.split() for value in store.multi_get(keys)]
            self._stops = any(int(signalled) for _, signalled in promises)
            self._set_limit(max(int(place) for place, _ in promises))
        except BaseException as failure:  # handed to the loop, or void if the run is over
            self._failure = failure
        finally:
            self._decided.set()
