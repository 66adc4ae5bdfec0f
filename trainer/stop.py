"""How the ranks agree on the batch after which all of them stop, without adding a collective to any step.

A rank that received a signal writes one key into the job's store. On every rank a thread waits for that key (in the
store's own wait, with the interpreter lock released). It then fixes a place that its rank has not reached yet,
promises not to pass it, publishes it, and reads the other ranks' promises: all stop at the latest of them. No rank
waits for another rank's training to move on, only for the threads, so there is nothing to deadlock on; ranks may be
any number of batches apart.

A place is an integer that grows in the same order on all ranks: the number of training batches done, shifted left by
32, plus the number of batches done in an evaluation that follows it. The end of an evaluation is a place too, so that
ranks whose evaluations differ in length still meet.
"""

from __future__ import annotations

import threading
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from trainer.errors import DistributedError

if TYPE_CHECKING:
    from trainer.distributed import World
    from trainer.signals import StopSignals

NEVER = 1 << 62
END_OF_EVALUATION = (1 << 32) - 1
# How far a promise lies ahead of where its rank is: the batch in progress and one more.
_AHEAD = 2
# A promise that no rank answers within this time means that a rank is gone or hangs.
_ANSWER_S = 600.0
# The number of agreements this process has begun: every rank counts the same, so keys are never reused.
_sessions = 0


class StopAgreement:
    """Watches for a stop while a loop runs. Use as a context manager around the loop.

    The loop keeps `place` up to date and, after each batch, does
    `if signals.requested: agreement.request()` and `if place >= agreement.limit and agreement.reached(place): stop`.
    """

    def __init__(self, world: World, signals: StopSignals) -> None:
        self.limit: int = NEVER
        self.place = 0
        self.requested = False
        self._world = world
        self._signals = signals
        self._decided = threading.Event()
        self._failure: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._store: Any = None
        self._prefix = ""

    def __enter__(self) -> StopAgreement:
        global _sessions  # noqa: PLW0603
        if self._world.size > 1:
            _sessions += 1
            self._prefix = f"trainer/stop/{_sessions}"
            # A connection of its own: a wait on the shared one would lock the collectives out.
            self._store = dist.distributed_c10d._get_default_store().clone()
            self._store.set_timeout(timedelta(days=365))
            self._thread = threading.Thread(target=self._watch, name="trainer-stop", daemon=True)
            self._thread.start()
        return self

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

    def request(self) -> None:
        """This rank received a signal: tell all. Called from the loop, never from a signal handler."""
        if self.requested:
            return
        self.requested = True
        if self._world.size == 1:
            self.limit = 0
            self._decided.set()
        else:
            self._client().compare_set(f"{self._prefix}/word", "", "stop")

    def _watch(self) -> None:
        try:
            store, size = self._store, self._world.size
            store.wait([f"{self._prefix}/word"])
            if store.get(f"{self._prefix}/word") != b"stop":
                return
            # The loop may move on between two lines of this: fix the promise only once it lies ahead for sure.
            while True:
                self.limit = promise = ((self.place >> 32) + _AHEAD) << 32
                if self.place <= promise:
                    break
            store.set(f"{self._prefix}/{self._world.rank}", str(promise))
            keys = [f"{self._prefix}/{rank}" for rank in range(size)]
            store.wait(keys, timedelta(seconds=_ANSWER_S))
            self.limit = max(int(value) for value in store.multi_get(keys))
            self.requested = True
        except BaseException as failure:  # noqa: BLE001 - handed to the loop, or void if the run is over
            self._failure = failure
        finally:
            self._decided.set()

    def reached(self, place: int) -> bool:
        """Whether all ranks stop here. Waits for the other ranks' promises if they are not all known yet.

        Raises:
            DistributedError: a rank did not answer.
        """
        if not self._decided.wait(_ANSWER_S) or self._failure is not None:
            raise DistributedError(
                f"rank {self._world.rank} was told to stop, but not all ranks answered within {_ANSWER_S:.0f} s: "
                "one of them is gone or hangs. Look at the other ranks' logs."
            ) from self._failure
        return place >= self.limit
