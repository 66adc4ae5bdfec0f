"""Objects of S3 from an open file: several requests on their way at any time, none of which copies what it sends.

s3fs's own way copies each part three times on its way to the socket, and waits for all parts of a batch before it
begins the next one.

Torch-free: the writer's process imports it.
"""

from __future__ import annotations

import asyncio
import mmap
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from fsspec.asyn import sync

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

    from trainer.checkpoint.manifest import Stretch

# Requests at once.
_AT_ONCE = 4
# Bytes per request. A single object is cut into parts, so that there are several requests to make at once; of several
# objects each goes in one piece if it can: a store has more work with parts, which it must join at the end (moto's
# server takes 1.7 x as long). A failed request is sent again, so that it should not be large without limit either.
_PART = 16 << 20
_PART_OF_SEVERAL = 256 << 20
# As many parts S3 allows.
_MOST_PARTS = 10_000
# What is handed to the socket at once.
_CHUNK = 1 << 20


def upload(fs: Any, folder: str, stretches: Sequence[Stretch], descriptor: int) -> bool:
    """Write objects into a folder of an s3fs file system, each from a stretch of an open file.

    Each appears when it is whole. Returns whether the store has compared each request's content with its CRC32, which
    botocore adds unless it is told otherwise (`request_checksum_calculation`, in its three places) or too old, and
    which such a store names in its answer: S3 itself names another, its own, where it got none.

    Raises:
        OSError, or what the file system raises: some of the objects may be there, whole.
    """
    # Not closed by hand: a request that was given up may hold a view of it a moment longer.
    content = memoryview(mmap.mmap(descriptor, 0, prot=mmap.PROT_READ))
    checked: bool = sync(fs.loop, _upload, fs, folder, stretches, content)
    fs.invalidate_cache(folder)
    return checked


async def _upload(fs: Any, folder: str, stretches: Sequence[Stretch], content: memoryview) -> bool:
    part = _PART if len(stretches) == 1 else _PART_OF_SEVERAL
    free = asyncio.Semaphore(_AT_ONCE)
    checked = True

    async def send(method: str, body: memoryview, **place: Any) -> Any:
        nonlocal checked
        async with free:
            answer = await fs._call_s3(method, **place, Body=_Body(body))
        checked = checked and "ChecksumCRC32" in answer
        return answer

    await _all(
        _upload_one(fs, f"{folder}/{s.name}", content[s.begin : s.begin + s.size], part, send) for s in stretches
    )
    return checked


async def _upload_one(fs: Any, path: str, content: memoryview, part: int, send: Callable[..., Awaitable[Any]]) -> None:
    bucket, key, _ = fs.split_path(path)
    place = {"Bucket": bucket, "Key": key}
    if len(content) < 2 * part:
        await send("put_object", content, **place)
        return
    part = max(part, -(-len(content) // _MOST_PARTS))
    begun = place | {"UploadId": (await fs._call_s3("create_multipart_upload", **place))["UploadId"]}
    try:
        sent = await _all(
            send("upload_part", content[begin : begin + part], **begun, PartNumber=1 + begin // part)
            for begin in range(0, len(content), part)
        )
        parts = [{"PartNumber": number, "ETag": answer["ETag"]} for number, answer in enumerate(sent, 1)]
        await fs._call_s3("complete_multipart_upload", **begun, MultipartUpload={"Parts": parts})
    except BaseException:
        with suppress(Exception):  # what went wrong first says more
            # Else its parts stay, unseen and paid for.
            await fs._call_s3("abort_multipart_upload", **begun)
        raise


async def _all(acts: Any) -> list[Any]:
    """The results of all, or the first error: then the others are over as well."""
    tasks = [asyncio.ensure_future(act) for act in acts]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


class _Body:
    """Memory as the body of a request: botocore reads it as a file, for its checksums; aiohttp sends it by chunks.

    Bytes would be joined with the headers, and what the socket does not take at once copied again.
    """

    def __init__(self, content: memoryview) -> None:
        self._content = content
        self._position = 0

    def __len__(self) -> int:
        return len(self._content)

    def read(self, count: int | None = -1) -> memoryview:
        """The next bytes."""
        begin = self._position
        end = len(self._content) if count is None or count < 0 else begin + count
        found = self._content[begin:end]
        self._position += len(found)
        return found

    def tell(self) -> int:
        """Where reading goes on."""
        return self._position

    def seek(self, offset: int, whence: int = 0) -> int:
        """Go on reading elsewhere."""
        self._position = offset + (0, self._position, len(self._content))[whence]
        return self._position

    async def __aiter__(self) -> AsyncIterator[memoryview]:
        for begin in range(0, len(self._content), _CHUNK):
            yield self._content[begin : begin + _CHUNK]
