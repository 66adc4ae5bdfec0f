"""A large object of S3 from an open file: in parts, a few of them on their way at any time.

s3fs's own way waits for all parts of a batch before it begins the next one, so that client and store take turns.

Torch-free: the writer's process imports it.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress
from typing import Any

from fsspec.asyn import sync

# Bytes per part, how many at once, and how many S3 allows. A file of less than two parts goes in one piece.
_PART = 16 << 20
_AT_ONCE = 4
_MOST_PARTS = 10_000


def upload(fs: Any, path: str, descriptor: int) -> None:
    """Write the object at a path of an s3fs file system. It appears when it is whole.

    Raises:
        OSError, or what the file system raises: there is no such object, or the one before it still.
    """
    sync(fs.loop, _upload, fs, path, descriptor)
    fs.invalidate_cache(path)


async def _upload(fs: Any, path: str, descriptor: int) -> None:
    bucket, key, _ = fs.split_path(path)
    place = {"Bucket": bucket, "Key": key}
    size = os.fstat(descriptor).st_size
    if size < 2 * _PART:
        await fs._call_s3("put_object", **place, Body=os.pread(descriptor, size, 0))
        return
    part = max(_PART, -(-size // _MOST_PARTS))
    begun = place | {"UploadId": (await fs._call_s3("create_multipart_upload", **place))["UploadId"]}
    numbers = iter(range(1, -(-size // part) + 1))
    parts: list[dict[str, Any]] = []

    async def send() -> None:
        buffer = bytearray(part)
        for number in numbers:
            count = os.preadv(descriptor, [buffer], (number - 1) * part)
            body = buffer if count == part else buffer[:count]
            sent = await fs._call_s3("upload_part", **begun, PartNumber=number, Body=body)
            parts.append({"PartNumber": number, "ETag": sent["ETag"]})

    senders = [asyncio.ensure_future(send()) for _ in range(_AT_ONCE)]
    try:
        await asyncio.gather(*senders)
        parts.sort(key=lambda p: p["PartNumber"])
        await fs._call_s3("complete_multipart_upload", **begun, MultipartUpload={"Parts": parts})
    except BaseException:
        for sender in senders:
            sender.cancel()
        await asyncio.gather(*senders, return_exceptions=True)
        with suppress(Exception):  # what went wrong first says more
            # Else its parts stay, unseen and paid for.
            await fs._call_s3("abort_multipart_upload", **begun)
        raise
