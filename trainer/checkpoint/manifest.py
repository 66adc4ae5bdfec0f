"""What a checkpoint consists of, as JSON: one record per rank, and the manifest that commits them all.

    <store>/<name>/<attempt>/rank-00000.safetensors   the shard: tensors that this rank wrote
                             rank-00000.jsonl         its Record: where each tensor lies, checksums, plain values
                             ...
                             manifest.json            written last. Without it the rest is not a checkpoint

The manifest holds the checksum of every record, a record those of its shard's blocks, and the manifest its own: a
changed bit anywhere is noticed. On an object store a large shard is several files (rank-00000-1.safetensors, ...),
which are written side by side: each is a stretch of the shard, and begins at a multiple of BLOCK. `attempt` begins
with the time of the save and is never used twice, so no file is ever written over.

Torch-free: the writer's process imports it.
"""

from __future__ import annotations

import json
import secrets
import time
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import xxhash

from trainer.errors import CheckpointDamagedError, CheckpointError

FORMAT = 1
MANIFEST = "manifest.json"
DAMAGED = "damaged.json"
# One checksum per so many bytes: small enough to read a part of a shard, large enough that 1 TiB has 16 MB of them.
BLOCK = 1 << 20
# The first line of a record is shorter than this: one small read per rank is all that a commit needs.
FIRST_LINE = 256


class Stretch(NamedTuple):
    """One file of a shard: its bytes [begin, begin + size)."""

    name: str
    begin: int
    size: int


class Piece(NamedTuple):
    """A box of a tensor that lies in one shard: `offset` and `size` per dimension, and its bytes in the shard.

    A tuple, since a checkpoint of 1,024 ranks has a million of them: a frozen dataclass takes 4 x as long to make.
    """

    key: str
    dtype: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    size: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Record:
    """One rank's part of a checkpoint. `blocks` are the checksums of the shard's blocks of BLOCK bytes.

    cuts: sizes of the shard's files, where there are several.
    state: the skeleton (see `values`) of what all ranks share, from rank 0 only. rank_state: that of the rank's own.
    """

    rank: int
    pieces: tuple[Piece, ...]
    rank_pieces: tuple[Piece, ...]
    shard_bytes: int
    blocks: tuple[str, ...]
    state: Any
    rank_state: Any
    cuts: tuple[int, ...] = ()

    @property
    def stretches(self) -> tuple[Stretch, ...]:
        """The files of the shard."""
        return _stretches(self.rank, self.shard_bytes, self.cuts)

    def dump(self) -> bytes:
        """The record as a file: a first line that confirms the second."""
        described = {
            "format": FORMAT, "rank": self.rank, "block_bytes": BLOCK, "pieces": _table(self.pieces),
            "rank_pieces": _table(self.rank_pieces), "blocks": list(self.blocks), "state": self.state,
            "rank_state": self.rank_state,
        }  # fmt: skip
        # Not sorted: the order of a dict is part of the state.
        body = json.dumps(described, separators=(",", ":"), allow_nan=False).encode()
        first: dict[str, Any] = {"checksum": checksum(body), "bytes": len(body), "shard_bytes": self.shard_bytes}
        if self.cuts:
            first["cuts"] = self.cuts
        return json.dumps(first).encode() + b"\n" + body

    @classmethod
    def parse(cls, content: bytes, where: str) -> Record:
        """The record in a file; `where` names it in errors. Raises CheckpointDamagedError."""
        first, _, body = content.partition(b"\n")
        file = File.parse(first, 0, where)
        if checksum(body) != file.record_checksum:
            raise CheckpointDamagedError(f"{where} is damaged: its checksum does not fit its content.")
        read = json.loads(body)
        return cls(read["rank"], _pieces(read["pieces"]), _pieces(read["rank_pieces"]), file.shard_bytes,
                   tuple(read["blocks"]), read["state"], read["rank_state"], file.cuts)  # fmt: skip


@dataclass(frozen=True)
class File:
    """One rank's files, as the manifest confirms them. A rank without tensors has a shard of 0 bytes: none.

    cuts: sizes of the shard's files, where there are several.
    """

    rank: int
    record_bytes: int
    record_checksum: str
    shard_bytes: int
    cuts: tuple[int, ...] = ()

    @classmethod
    def parse(cls, beginning: bytes, rank: int, where: str) -> File:
        """What the first line of a record says (a record begins with at most FIRST_LINE bytes of it)."""
        line = beginning.partition(b"\n")[0]
        try:
            read = json.loads(line)
            cuts = tuple(read.get("cuts", ()))
            return cls(rank, len(line) + 1 + read["bytes"], read["checksum"], read["shard_bytes"], cuts)
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointDamagedError(f"{where} is damaged: its first line is not whole.") from error

    @property
    def record(self) -> str:
        """Name of the record."""
        return record_name(self.rank)

    @property
    def sizes(self) -> dict[str, int]:
        """All its files by name, with their sizes."""
        return {self.record: self.record_bytes} | {s.name: s.size for s in self.stretches}

    @property
    def stretches(self) -> tuple[Stretch, ...]:
        """The files of the shard."""
        return _stretches(self.rank, self.shard_bytes, self.cuts)


@dataclass(frozen=True)
class Manifest:
    """A committed checkpoint. created: seconds since 1970. extra: the caller's own JSON, such as metrics."""

    name: str
    attempt: str
    step: int
    world_size: int
    files: tuple[File, ...]
    created: float
    extra: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def shard_bytes(self) -> int:
        """Size of the shards together."""
        return sum(f.shard_bytes for f in self.files)

    def dump(self) -> bytes:
        """The manifest as a file, with its own checksum."""
        body: dict[str, Any] = {"format": FORMAT, "checksums": "xxh3_64 per block, xxh3_128 per record"} | asdict(self)
        for file in body["files"]:
            if not file["cuts"]:
                del file["cuts"]  # as before shards of several files were known, for those that know none
        return json.dumps({"manifest": body, "checksum": checksum(_canonical(body))}, indent=1).encode()

    @classmethod
    def parse(cls, content: bytes, where: str) -> Manifest:
        """The manifest in a file; `where` names it in errors.

        Raises:
            CheckpointDamagedError: it is cut off or changed.
            CheckpointError: a newer version wrote it.
        """
        try:
            read = json.loads(content)
            body, stated = read["manifest"], read["checksum"]
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointDamagedError(f"{where} is damaged: it is not a whole manifest.") from error
        if checksum(_canonical(body)) != stated:
            raise CheckpointDamagedError(f"{where} is damaged: its checksum does not fit its content.")
        if body["format"] != FORMAT:
            raise CheckpointError(
                f"{where} has checkpoint format {body['format']}; this version reads {FORMAT}. Update the package."
            )
        files = tuple(File(**f | {"cuts": tuple(f.get("cuts", ()))}) for f in body["files"])
        return cls(files=files, **{k: body[k] for k in
                   ("name", "attempt", "step", "world_size", "created", "extra", "versions")})  # fmt: skip


def record_name(rank: int) -> str:
    """File name of a rank's record."""
    return f"rank-{rank:05d}.jsonl"


def next_block(position: int) -> int:
    """The next place in a shard, or this one, where a block begins."""
    return -(-position // BLOCK) * BLOCK


def _stretches(rank: int, shard_bytes: int, cuts: tuple[int, ...]) -> tuple[Stretch, ...]:
    stretches, begin = [], 0
    for number, size in enumerate(cuts or ((shard_bytes,) if shard_bytes else ())):
        suffix = f"-{number}" if number else ""
        stretches.append(Stretch(f"rank-{rank:05d}{suffix}.safetensors", begin, size))
        begin = next_block(begin + size)
    return tuple(stretches)


def new_attempt() -> str:
    """A name that no other save has: 20 hexadecimal digits, 14 of them the time in microseconds since 1970.

    So the names of attempts sort by time.
    """
    return f"{time.time_ns() // 1000:014x}{secrets.token_hex(3)}"


def attempt_time(name: str) -> float | None:
    """When an attempt began, in seconds since 1970; None if the name is not one of ours."""
    if len(name) != 20 or not set(name) <= set("0123456789abcdef"):
        return None
    return int(name[:14], 16) / 1e6


def checksum(content: bytes) -> str:
    """XXH3-128 of a small file."""
    return xxhash.xxh3_128_hexdigest(content)


def block_checksum(block: Any) -> str:
    """XXH3-64 of one block of a shard."""
    return xxhash.xxh3_64_hexdigest(block)


def _canonical(value: Any) -> bytes:
    # NaN is a loss that a user may well want to see in `extra`; Python reads its own spelling of it.
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _table(pieces: tuple[Piece, ...]) -> list[list[Any]]:
    return [[p.key, p.dtype, p.shape, p.offset, p.size, p.begin, p.end] for p in pieces]


def _pieces(table: list[list[Any]]) -> tuple[Piece, ...]:
    return tuple(Piece(k, d, tuple(s), tuple(o), tuple(z), b, e) for k, d, s, o, z, b, e in table)
