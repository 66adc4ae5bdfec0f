"""Saves to S3 through a proxy that misbehaves: `checkpoint_s3_faults.py BUCKET_URL one|all`.

At one request of a save, or at it and all after it, the proxy answers 500 or 503, drops the connection before or after
the request took effect, cuts its content in half, or is slow. Whatever comes of the save: the newest loadable
checkpoint is bit-correct, never older than the last acknowledged one, and the next save works. "one" tries a request of
each kind, "all" every request.
"""

from __future__ import annotations

import http.client
import itertools
import os
import sys
import threading
import time
import warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import torch

from trainer.checkpoint import Store
from trainer.checkpoint.background import Alone, Background
from trainer.errors import CheckpointError

SERVER = urlsplit(os.environ["AWS_ENDPOINT_URL"])
KINDS = ("500", "503", "drop", "lost", "cut", "slow")
LARGE = 5_000_000  # int64, so that the shard goes in 3 parts


class Faults:
    """Which request goes wrong, and how; `forever`: all after it too."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.arm(-1, "", forever=False)

    def arm(self, at: int, kind: str, *, forever: bool) -> None:
        self.at, self.kind, self.forever, self.count = at, kind, forever, -1

    def now(self) -> str:
        with self.lock:
            self.count += 1
            hit = self.count == self.at or (self.forever and 0 <= self.at <= self.count)
            return self.kind if hit else ""


FAULTS = Faults()


class Proxy(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        """Says nothing."""

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = FAULTS.now()
        if fault in ("500", "503"):
            self._answer(int(fault), {}, b"<Error><Code>SlowDown</Code></Error>")
            return
        if fault == "drop":
            self.close_connection = True
            return
        if fault == "slow":
            time.sleep(0.3)
        headers = {k: v for k, v in self.headers.items() if k.lower() != "expect"}
        if fault == "cut" and self.command == "PUT" and body:
            body = body[: len(body) // 2]
            headers["Content-Length"] = str(len(body))
        connection = http.client.HTTPConnection(SERVER.hostname, SERVER.port, timeout=60)
        connection.request(self.command, self.path, body or None, headers)
        response = connection.getresponse()
        content = response.read()
        connection.close()
        if fault == "lost":
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


def state(step: int) -> dict:
    return {"w": torch.arange(LARGE) * step, "step": step}


def check(store: Store) -> int:
    loaded = store.load_newest()
    assert loaded is not None
    step = loaded.state["step"]
    assert torch.equal(loaded.state["w"], state(step)["w"])
    return step


def attempt(url: str, background: Background, at: int, kind: str, *, forever: bool) -> bool:
    """One save with a fault; returns whether it came to that request."""
    FAULTS.arm(-1, "", forever=False)
    store = Store(url, background=background)
    store.save(state(1), step=1)
    FAULTS.arm(at, kind, forever=forever)
    try:
        store.save(state(2), step=2)
        acknowledged = True
    except CheckpointError:
        acknowledged = False
    reached = FAULTS.count >= at
    FAULTS.arm(-1, "", forever=False)
    newest = check(store)
    assert newest == 2 if acknowledged else newest in (1, 2), (kind, at, newest, acknowledged)
    store.save(state(3), step=3)
    assert check(store) == 3
    store.folder.fs.rm(store.folder.path, recursive=True)
    return reached


def main(bucket: str, which: str) -> None:
    global LARGE
    warnings.simplefilter("ignore")
    proxy = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{proxy.server_port}"
    # By default botocore tries an outage out for a minute, and s3fs that five times.
    os.environ["AWS_MAX_ATTEMPTS"] = "2"
    background = Background(Alone())
    tried = 0
    if which == "one":
        LARGE = 50_000
        for at, kind in enumerate(KINDS, 2):
            assert attempt(f"{bucket}/{kind}", background, at, kind, forever=False), kind
            tried += 1
    else:
        for kind, forever in itertools.product(KINDS, (False, True)):
            for at in itertools.count():
                tried += 1
                if not attempt(f"{bucket}/{kind}{forever}{at}", background, at, kind, forever=forever):
                    assert at > 6, (kind, at)
                    break
            print(kind, "forever" if forever else "once", at, "requests", flush=True)
    background.close()
    print("TRIED", tried)


if __name__ == "__main__":
    main(*sys.argv[1:])
