"""Training batches that are on the GPU before they are wanted: copied on a stream of their own, one step ahead.

What a checkpoint holds does not see it: position, weight and indices are those of the batch in hand, and a batch that
was drawn ahead counts when it is trained. So it is done only where drawing a batch changes no state of this process:
for loaders with workers, which draw what is random by the sample's place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trainer.loading import Feed, draws_apart, map_tensors, to_device

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from trainer.loop import Fit

__all__ = ["Prefetched", "SideStream", "prefetch"]


def prefetch(run: Fit) -> None:
    """Let the training batches of a run come ahead, if it is on a GPU and nothing stands against it.

    A transfer hook of the user's runs when the batch is wanted, as ever: on_after_batch_transfer behind the copy; with
    one of the others batches are not copied ahead.
    """
    hooks, trainer = run.hooks, run.trainer
    if trainer.device.type != "cuda" or not draws_apart(run.feed):
        return
    if hooks.on_before_batch_transfer is not None or hooks.transfer_batch_to_device is not None:
        return
    run.feed.pin_memory()
    lane = SideStream(trainer.device, None if run.precision.keeps_batches else run.precision.convert_batch)
    run.feed, run.move = Prefetched(run.feed, lane.begin, lane.finish), hooks.on_after_batch_transfer


class SideStream:
    """Copies to a GPU beside what it computes. convert: what is done there to a batch first, if anything is.

    Dense tensors come this way; what else has a `.to` (a PackedSequence, a graph, a sparse tensor) is moved when it is
    wanted, since nobody can say from outside which memory it holds.
    """

    def __init__(self, device: torch.device, convert: Callable[[Any], Any] | None) -> None:
        self._device, self._convert = device, convert
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def begin(self, batch: Any) -> tuple[Any, torch.cuda.Event]:
        """Start to copy. Pinned memory is not given away before the copy is made: torch's allocator sees to that."""
        with torch.cuda.stream(self._stream):
            batch = map_tensors(batch, self._copy)
            if self._convert is not None:
                batch = self._convert(batch)
            return batch, self._stream.record_event()

    def _copy(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device, non_blocking=True) if tensor.layout is torch.strided else tensor

    def finish(self, begun: tuple[Any, torch.cuda.Event]) -> Any:
        """The batch, for the stream that computes: its kernels wait for the copy, this process does not."""
        batch, copied = begun
        computing = torch.cuda.current_stream(self._device)
        computing.wait_event(copied)

        def used(tensor: Tensor) -> Tensor:
            # It is memory of the other stream, which may have it back only when this one is done with it.
            if tensor.is_cuda and tensor.layout is torch.strided:
                tensor.record_stream(computing)
            return tensor

        return to_device(map_tensors(batch, used), self._device)


class Prefetched(Feed):
    """A Feed, of which the next batch is begun before the present one is handed out.

    begin: starts to bring a batch to the device, finish: waits for it. An error that comes with a batch is raised when
    that batch is wanted.
    """

    def __init__(self, feed: Feed, begin: Callable[[Any], Any], finish: Callable[[Any], Any]) -> None:
        self._feed, self._begin, self._finish = feed, begin, finish
        self._indices: list[Any] | None = None
        super().__init__()
        self.sized = feed.sized

    @property
    def waited_ns(self) -> int:
        return self._feed.waited_ns

    @waited_ns.setter
    def waited_ns(self, value: int) -> None:
        self._feed.waited_ns = value

    @property
    def indices(self) -> list[Any] | None:
        return self._indices

    def __len__(self) -> int:
        return len(self._feed)

    def batches_done(self, position: int | None) -> int:
        return self._feed.batches_done(position)

    def batches(self, epoch: int, consumed: int | None) -> Iterator[Any]:
        self.position = consumed or 0
        batches: Any = self._feed.batches(epoch, consumed)
        try:
            coming = self._draw(batches)
            while coming is not None:
                begun, position, weight, indices = coming
                if isinstance(begun, Exception):
                    raise begun
                batch = self._finish(begun)
                del begun
                # Before the present batch is handed out: its copy goes on while that is computed.
                coming = self._draw(batches)
                self.position, self.weight, self._indices = position, weight, indices
                yield batch
        finally:
            batches.close()  # its workers end with it

    def _draw(self, batches: Iterator[Any]) -> tuple[Any, int, float, list[Any] | None] | None:
        """The next batch, begun, or the error in its place; and where the feed is with it. None: there is none."""
        begun: Any
        try:
            begun = self._begin(next(batches))
        except StopIteration:
            return None
        except Exception as error:
            begun = error
        return begun, self._feed.position, self._feed.weight, self._feed.indices

    def state_dict(self) -> dict[str, Any]:
        return self._feed.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._feed.load_state_dict(state)

    def close(self) -> None:
        self._feed.close()
