"""MLFlowLogger against MLflow's own server and store."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import urllib.parse
import urllib.request
from importlib.util import find_spec

import pytest

from tests.conftest import free_port, poll_until

if find_spec("mlflow") is None:
    pytest.skip("needs mlflow", allow_module_level=True)


def ask(uri, path, /, **query):
    """What the server's own HTTP interface answers."""
    with urllib.request.urlopen(f"{uri}/api/2.0/mlflow/{path}?{urllib.parse.urlencode(query)}", timeout=30) as answer:
        return json.load(answer)


def fit(gang, uri, folder, **environment):
    """The id of the MLflow run of a short fit."""
    [rank] = gang.ok(
        1, "mlflow_run.py", uri, str(folder), env=environment | {"MLFLOW_DISABLE_TELEMETRY": "true"}, timeout=100
    )
    return rank.stdout.split("ID ")[1].strip()


@pytest.fixture
def server(tmp_path):
    """A real MLflow server on a SQLite file."""
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    with open(tmp_path / "server.log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
             "--backend-store-uri", f"sqlite:///{tmp_path}/server.db", "--artifacts-destination", f"{tmp_path}/files"],
            stdout=log, stderr=log, start_new_session=True, env=os.environ | {"TMPDIR": str(tmp_path)},
        )  # fmt: skip
    try:
        yield uri, lambda: urllib.request.urlopen(f"{uri}/health", timeout=5).status == 200
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.slow
@pytest.mark.timeout(300)  # a server and three interpreters begin
def test_a_server_gets_metrics_parameters_and_checkpoints_and_a_restart_goes_on(server, gang, tmp_path):
    uri, healthy = server

    def ready():
        try:
            return healthy()
        except OSError:
            return False

    poll_until(ready, timeout=90, what="MLflow's server")
    first = fit(gang, uri, tmp_path, LAUNCH_RUN_DIR=str(tmp_path))
    run = ask(uri, "runs/get", run_id=first)["run"]
    assert (run["info"]["status"], run["info"]["run_name"]) == ("FINISHED", "first")
    assert {"key": "lr", "value": "0.1"} in run["data"]["params"]
    assert {"key": "team", "value": "a"} in run["data"]["tags"]
    history = ask(uri, "metrics/get-history", run_id=first, metric_key="p-loss")["metrics"]
    assert [metric["step"] for metric in history] == [1, 3]
    files = ask(uri, "artifacts/list", run_id=first, path="model/checkpoints/best")["files"]
    assert [file["path"] for file in files] == ["model/checkpoints/best/best.ckpt"]
    # A restart in the same run folder goes on in the same MLflow run.
    assert fit(gang, uri, tmp_path, LAUNCH_RUN_DIR=str(tmp_path)) == first


@pytest.mark.slow
def test_without_a_server_everything_is_on_disk(gang, tmp_path):
    run = fit(gang, "", tmp_path)
    with contextlib.closing(sqlite3.connect(tmp_path / "mlruns" / "mlflow.db")) as store:
        steps = store.execute("SELECT step FROM metrics WHERE run_uuid = ? AND key = 'p-loss' ORDER BY step", (run,))
        assert [step for (step,) in steps] == [1, 3]
    assert len(list((tmp_path / "mlruns" / "artifacts").rglob("best.ckpt"))) == 1
