"""MLFlowLogger against MLflow's own server and store."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.conftest import free_port, poll_until

if find_spec("mlflow") is None:
    pytest.skip("needs mlflow", allow_module_level=True)

PROGRAM = Path(__file__).parents[1] / "programs" / "mlflow_run.py"
READ = """
import json, sys
from mlflow.tracking import MlflowClient
client = MlflowClient(sys.argv[1])
run = client.get_run(sys.argv[2])
metrics = {m: [[p.step, p.value] for p in client.get_metric_history(sys.argv[2], m)] for m in run.data.metrics}
files = [f.path for f in client.list_artifacts(sys.argv[2], "model/checkpoints/best")]
print(json.dumps([run.info.status, run.info.run_name, run.data.params, run.data.tags, metrics, files]))
"""


def run(*command, **env):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *map(str, command)], capture_output=True, text=True, timeout=110, check=False,
        env=os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true"} | env,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def check(uri, printed, steps):
    status, name, params, tags, metrics, files = json.loads(run("-c", READ, uri, printed.split("ID ")[1].strip()))
    assert (status, name) == ("FINISHED", "first")
    assert params["lr"] == "0.1"
    assert tags["team"] == "a"
    assert [step for step, _ in metrics["p-loss"]] == steps
    assert files == ["model/checkpoints/best/best.ckpt"]


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


def test_a_server_gets_metrics_parameters_and_checkpoints_and_a_restart_goes_on(server, tmp_path):
    uri, healthy = server

    def ready():
        try:
            return healthy()
        except OSError:
            return False

    poll_until(ready, timeout=90, what="MLflow's server")
    first = run(PROGRAM, uri, tmp_path, LAUNCH_RUN_DIR=str(tmp_path))
    check(uri, first, [1, 3])
    # A restart in the same run folder goes on in the same MLflow run.
    assert run(PROGRAM, uri, tmp_path, LAUNCH_RUN_DIR=str(tmp_path)) == first


def test_without_a_server_everything_is_on_disk(tmp_path):
    printed = run(PROGRAM, "", tmp_path)
    check(f"sqlite:///{tmp_path}/mlruns/mlflow.db", printed, [1, 3])
