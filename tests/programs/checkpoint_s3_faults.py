"""Saves to S3 through a proxy that misbehaves: `checkpoint_s3_faults.py URL one|all`; of a file if the URL ends .ckpt.

At one request of a save, or at it and all after it, the proxy answers 500 or 503 (slow down), drops the connection
before or after the request took effect, cuts its content in half, is slow, or kills all processes of the rank before or
after the request took effect. Whatever comes of the save: the newest loadable checkpoint is bit-correct, never older
than the last acknowledged one, and the next save works. "one" tries a request of each kind, "all" every request.

Then botocore's checksums are switched off, as a user can, and a bit of what is written changes on the way: in a folder
of shards, never to be acknowledged. With them it is S3 that refuses what was changed or cut, and here the proxy.
"""

from __future__ import annotations

import base64
import http.client
import itertools
import os
import signal
import sys
import threading
import time
import warnings
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TextIO
from urllib.parse import urlsplit

import s3fs  # noqa: F401 - before the nursery, whose children need not import it again then
import torch

from trainer.checkpoint import Retention, Store, load_file, save_file
from trainer.checkpoint.background import Alone, Background
from trainer.errors import CheckpointError

SERVER = urlsplit(os.environ["AWS_ENDPOINT_URL"])
KINDS = ("500", "503", "drop", "lost", "cut", "slow")
KILLS = ("kill", "kill after")
LARGE = 4_300_000  # int64: a shard in 2 objects, a file in 3 parts
SMALL = 50_000
RETENTION = Retention(last=2)


class Faults:
    """Which request goes wrong, and how; `forever`: all after it too."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.arm(-1, "", forever=False)

    def arm(self, at: int, kind: str, *, forever: bool) -> None:
        self.at, self.kind, self.forever, self.count = at, kind, forever, -1
        self.reached = False

    def disarm(self) -> None:
        self.at = -1

    def now(self, command: str) -> str:
        with self.lock:
            if self.kind == "flip" and command != "PUT":
                return ""
            self.count += 1
            hit = self.count == self.at or (self.forever and 0 <= self.at <= self.count)
            self.reached |= hit
            return self.kind if hit else ""


FAULTS = Faults()


class Proxy(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Else each answer waits 40 ms for an acknowledgement that is delayed.
    disable_nagle_algorithm = True

    def log_message(self, *args: object) -> None:
        """Says nothing."""

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = FAULTS.now(self.command)
        if fault in ("500", "503"):
            self._answer(int(fault), {}, b"<Error><Code>SlowDown</Code></Error>")
            return
        if fault == "kill":
            NURSERY.kill()
        if fault in ("drop", "kill"):
            self.close_connection = True
            return
        if fault == "slow":
            time.sleep(0.1)
        headers = {k: v for k, v in self.headers.items() if k.lower() != "expect"}
        if fault == "cut" and self.command == "PUT" and body:
            body = body[: len(body) // 2]
            headers["Content-Length"] = str(len(body))
        if fault == "flip":
            body = body[:-1] + bytes([body[-1] ^ 1])
        sent = self.headers.get("x-amz-checksum-crc32")
        if sent is not None and sent != base64.b64encode(zlib.crc32(body).to_bytes(4, "big")).decode():
            # As S3 does; moto's server compares nothing.
            self._answer(400, {}, b"<Error><Code>BadDigest</Code></Error>")
            return
        connection = http.client.HTTPConnection(SERVER.hostname, SERVER.port, timeout=60)
        connection.request(self.command, self.path, body or None, headers)
        response = connection.getresponse()
        content = response.read()
        connection.close()
        if fault == "kill after":
            NURSERY.kill()
        if fault in ("lost", "kill after"):
            self.close_connection = True
            return
        if fault == "cut" and self.command == "GET":
            content = content[: len(content) // 2]
        self._answer(response.status, dict(response.getheaders()), content)

    def _answer(self, status: int, headers: dict[str, str], content: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in ("content-length", "transfer-encoding", "connection", "date", "server"):
                self.send_header(name, value)
        length = headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(content))
        self.send_header("Content-Length", length)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _handle


class Server(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """Says nothing of clients that were killed."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


def state(step: int) -> dict:
    return {"w": torch.arange(LARGE) * step, "step": step}


def save(url: str, step: int, background: Background) -> None:
    if url.endswith(".ckpt"):
        save_file(state(step), url, step=step, background=background)
    else:
        Store(url, background=background, retention=RETENTION).save(state(step), step=step)


def check(url: str) -> int:
    found = load_file(url) if url.endswith(".ckpt") else Store(url).load_newest().state
    assert torch.equal(found["w"], state(found["step"])["w"])
    return found["step"]


class Nursery:
    """A process from before the first thread; it forks one for each save that is to be killed."""

    def __init__(self) -> None:
        orders, self._orders = os.pipe()
        self._answers, answers = os.pipe()
        self._victim = 0
        self._pid = os.fork()
        if self._pid == 0:
            os.close(self._orders)
            self._serve(os.fdopen(orders), answers)
            os._exit(0)
        os.close(orders)
        os.close(answers)

    def _serve(self, orders: TextIO, answers: int) -> None:
        for order in orders:
            url, step, large, endpoint = order.split()
            pid = os.fork()
            if pid == 0:
                global LARGE
                os.setpgid(0, 0)
                os.write(answers, f"{os.getpid()}\n".encode())
                os.environ["AWS_ENDPOINT_URL"], LARGE = endpoint, int(large)
                code = 1
                try:
                    background = Background(Alone())
                    save(url, int(step), background)
                    background.close()
                    code = 0
                finally:
                    os._exit(code)
            status = os.waitpid(pid, 0)[1]
            os.write(answers, f"{os.waitstatus_to_exitcode(status)}\n".encode())

    def save(self, url: str, step: int) -> bool:
        """Whether a save in a process of its own, with a writer of its own, was acknowledged."""
        os.write(self._orders, f"{url} {step} {LARGE} {os.environ['AWS_ENDPOINT_URL']}\n".encode())
        with os.fdopen(os.dup(self._answers)) as answers:
            self._victim = int(answers.readline())
            return int(answers.readline()) == 0

    def kill(self) -> None:
        """End the process that saves, and its writer."""
        os.killpg(self._victim, signal.SIGKILL)

    def close(self) -> None:
        os.close(self._orders)
        os.waitpid(self._pid, 0)


def flip_every_object(url: str, step: int) -> int:
    """Saves whose writer gives no checksums to the store; returns how many objects were damaged on their way."""
    os.environ["AWS_REQUEST_CHECKSUM_CALCULATION"] = "when_required"
    background = Background(Alone())
    for at in itertools.count():
        failed = attempt(url, background, at, "flip", step) == step + 2
        assert failed == FAULTS.reached, at
        step += 1 + failed
        if not failed:
            background.close()
            return at
    raise AssertionError("not reached")


def attempt(url: str, background: Background, at: int, kind: str, before: int, *, forever: bool = False) -> int:
    """A save with a fault, after one of the step `before`; returns the step that is the newest then."""
    step = before + 1
    FAULTS.arm(at, kind, forever=forever)
    try:
        if kind in KILLS:
            acknowledged = NURSERY.save(url, step)
        else:
            save(url, step, background)
            acknowledged = True
    except CheckpointError:
        acknowledged = False
    FAULTS.disarm()
    newest = check(url)
    assert newest == step if acknowledged else newest in (before, step), (kind, at, newest, acknowledged)
    if not acknowledged:
        step += 1
        save(url, step, background)
        assert check(url) == step
    return step


def main(url: str, which: str) -> None:
    global LARGE, NURSERY
    warnings.simplefilter("ignore")
    NURSERY = Nursery()
    proxy = Server(("127.0.0.1", 0), Proxy)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{proxy.server_port}"
    # By default botocore tries an outage out for a minute, and s3fs that five times, or 25 where it reads: s3fs's alone
    # take 1 s, and 5 s.
    os.environ["AWS_MAX_ATTEMPTS"] = "1"
    LARGE = SMALL if which == "one" else LARGE
    background = Background(Alone())
    save(url, 1, background)
    step, tried = 1, 0
    if which == "one":
        for at, kind in enumerate((*KINDS, *KILLS), 2):
            step = attempt(url, background, at, kind, step)
            assert FAULTS.reached, kind
            tried += 1
    else:
        # Retries make an outage long, so one begins at every fifth request only.
        for kind, forever in [*((k, False) for k in (*KINDS, *KILLS)), *((k, True) for k in KINDS)]:
            for at in itertools.count(0, 5 if forever else 1):
                step = attempt(url, background, at, kind, step, forever=forever)
                if not FAULTS.reached:
                    assert at >= 5, (kind, at)  # a file takes 5 requests, a folder of shards more
                    break
                tried += 1
            print(kind, "forever" if forever else "once", at, "requests", flush=True)
    background.close()
    if not url.endswith(".ckpt"):
        flipped = flip_every_object(url, step)
        assert flipped >= 3, flipped  # shard, record, manifest
        tried += flipped
    NURSERY.close()
    print("TRIED", tried)


if __name__ == "__main__":
    main(*sys.argv[1:])
