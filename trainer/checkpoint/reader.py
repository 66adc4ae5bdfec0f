"""Reading just the needed parts of a checkpoint, every byte verified on the way."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

import torch

from trainer.checkpoint.contents import RUN, THREADS, Contents, Request, files_of
from trainer.checkpoint.manifest import BLOCK, Piece
from trainer.checkpoint.shards import bytes_of, dtype_of
from trainer.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable

    from trainer.checkpoint.contents import ShardFile


class Reading:
    """Collects what is wanted of a checkpoint, then reads all of it at once, verified, in parallel."""

    def __init__(self, contents: Contents) -> None:
        self._contents = contents
        self._requests: dict[int, list[Request]] = {}
        self._afterwards: list[Callable[[], object]] = []

    def tensor(self, key: str) -> torch.Tensor:
        """The whole tensor of a key, on the CPU; its content is there after `run`."""
        first = self._pieces(key)[0][1]
        return self.box(key, (0,) * len(first.shape), first.shape)

    def box(self, key: str, offset: tuple[int, ...], size: tuple[int, ...]) -> torch.Tensor:
        """The box of a tensor, on the CPU; its content is there after `run`."""
        pieces = self._pieces(key)
        result = torch.empty(size, dtype=dtype_of(pieces[0][1]))
        first, last = (offset[0], offset[0] + size[0]) if size else (0, 1)
        for rank, piece in pieces:
            # Most pieces of a tensor that many ranks wrote are of other rows.
            if not size or (piece.offset[0] < last and first < piece.offset[0] + piece.size[0]):
                self._want(rank, piece, offset, result)
        return result

    def own(self, rank: int) -> dict[str, torch.Tensor]:
        """The tensors of a rank's own state; their content is there after `run`."""
        found = {}
        for piece in self._contents.records[rank].rank_pieces:
            found[piece.key] = torch.empty(piece.size, dtype=dtype_of(piece))
            self._request(rank, piece.begin, piece.end, found[piece.key])
        return found

    def run(self) -> None:
        """Read what was asked for.

        Raises:
            CheckpointDamagedError: a shard is missing, cut off or changed; names the file and the place.
        """
        tasks: list[Callable[[], None]] = []
        opened: list[ShardFile] = []
        for rank, requests in sorted(self._requests.items()):
            runs = _runs(requests)
            for shard in files_of(self._contents.checkpoint.folder, self._contents.records[rank]):
                opened.append(shard)
                tasks += [partial(shard.read, *run) for run in runs if shard.first < run[1] and run[0] < shard.last]
        try:
            with ThreadPoolExecutor(THREADS) as pool:
                futures = [pool.submit(task) for task in tasks]
                try:
                    for future in futures:
                        future.result()
                except BaseException:
                    pool.shutdown(cancel_futures=True)
                    raise
        finally:
            for shard in opened:
                shard.close()
        for place in self._afterwards:
            place()

    def _pieces(self, key: str) -> list[tuple[int, Piece]]:
        try:
            return self._contents.pieces[key]
        except KeyError:
            raise CheckpointError(f"{self._contents.checkpoint.path} holds no tensor {key}.") from None

    def _want(self, rank: int, piece: Piece, offset: tuple[int, ...], result: torch.Tensor) -> None:
        """Ask for what a piece and a box have in common."""
        starts = [max(a, b) for a, b in zip(piece.offset, offset, strict=True)]
        ends = [min(a + n, b + m) for a, n, b, m in zip(piece.offset, piece.size, offset, result.shape, strict=True)]
        if any(start >= end for start, end in zip(starts, ends, strict=True)):
            return
        source = tuple(slice(s - o, e - o) for s, e, o in zip(starts, ends, piece.offset, strict=True))
        target = result[tuple(slice(s - o, e - o) for s, e, o in zip(starts, ends, offset, strict=True))]
        if not piece.size:
            self._request(rank, piece.begin, piece.end, result)
            return
        # Whole rows of the piece are contiguous in the file.
        row = (piece.end - piece.begin) // piece.size[0]
        begin, end = piece.begin + source[0].start * row, piece.begin + source[0].stop * row
        full_rows = all(s.stop - s.start == n for s, n in zip(source[1:], piece.size[1:], strict=True))
        if full_rows and target.is_contiguous():
            self._request(rank, begin, end, target)
            return
        staged = torch.empty((source[0].stop - source[0].start, *piece.size[1:]), dtype=result.dtype)
        self._request(rank, begin, end, staged)
        columns = (slice(None), *source[1:])
        self._afterwards.append(lambda: target.copy_(staged[columns]))

    def _request(self, rank: int, begin: int, end: int, target: torch.Tensor) -> None:
        if begin < end:
            into = memoryview(bytes_of(target).numpy())  # type: ignore[arg-type]
            self._requests.setdefault(rank, []).append(Request(begin, end, into))


def _runs(requests: list[Request]) -> list[tuple[int, int, list[Request]]]:
    """Ranges of blocks to read, [first, last), with what each is for. No block is read twice."""
    wanted: dict[int, list[Request]] = {}
    for request in requests:
        for block in range(request.begin // BLOCK, (request.end - 1) // BLOCK + 1):
            wanted.setdefault(block, []).append(request)
    runs: list[tuple[int, int, list[Request]]] = []
    for block in sorted(wanted):
        if runs and runs[-1][1] == block and block - runs[-1][0] < RUN:
            first, _, known = runs[-1]
            runs[-1] = (first, block + 1, known + [r for r in wanted[block] if r.begin // BLOCK == block])
        else:
            runs.append((block, block + 1, list(wanted[block])))
    return runs
