"""The store on an object store: moto's S3 server as a process on loopback."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
import urllib.request

import pytest

from tests.soak.table import keep

pytestmark = pytest.mark.s3

SERVER = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 0)
server.start()
print("PORT", server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


@pytest.fixture
def bucket(monkeypatch):
    """A URL of a fresh bucket; s3fs finds the server through the environment."""
    for module in ("moto", "s3fs"):
        if importlib.util.find_spec(module) is None:
            # Where S3 must be tested, a skip would pass for a success.
            missing = pytest.fail if "s3" in os.environ.get("MUSTER_REQUIRE", "").split(",") else pytest.skip
            missing(f"{module} is not installed")
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", SERVER],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    try:
        said = next(line for line in process.stdout if line.startswith("PORT"))
        address = f"http://127.0.0.1:{said.split()[1]}"
        for name, value in {
            "AWS_ENDPOINT_URL": address, "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():  # fmt: skip
            monkeypatch.setenv(name, value)
        urllib.request.urlopen(urllib.request.Request(f"{address}/bucket", method="PUT"), timeout=20).close()
        yield "s3://bucket/runs/one"
    finally:
        process.stdin.close()
        process.stdout.close()
        process.terminate()
        process.wait(20)


def test_a_store_on_s3(bucket, gang):
    gang.ok(1, "checkpoint_s3.py", bucket, timeout=100)


@pytest.mark.slow
def test_a_fault_of_each_kind_at_a_request_to_s3(bucket, gang):
    assert "TRIED 11" in gang.ok(1, "checkpoint_s3_faults.py", bucket, "one", timeout=100)[0].stdout


@pytest.mark.soak
@pytest.mark.timeout(3000)
@pytest.mark.parametrize(("name", "what", "least"), [("", "a save", 200), ("/one.ckpt", "a file's save", 40)])
def test_a_fault_at_every_request_to_s3(bucket, gang, name, what, least):
    began = time.monotonic()
    result = gang.ok(1, "checkpoint_s3_faults.py", bucket + name, "all", timeout=2900)[0]
    tried = int(result.stdout.split("TRIED")[1])
    assert tried > least
    keep("faults of the store", f"S3: each kind at every request of {what}", time.monotonic() - began, tried=tried)


@pytest.mark.soak
def test_ranks_share_a_store_on_s3(bucket, gang):
    saved = gang.ok(2, "checkpoint_ranks.py", "save", bucket)
    loaded = gang.ok(3, "checkpoint_ranks.py", "load", bucket)
    assert {r.stdout for r in saved} == {r.stdout for r in loaded}
