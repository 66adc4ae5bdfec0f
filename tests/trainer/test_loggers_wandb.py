"""WandbLogger, offline, with the real package."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec

import pytest

# Looked for, not imported: importing wandb leaves threads and environment variables behind.

if find_spec("wandb") is None:
    pytest.skip("needs wandb", allow_module_level=True)

READ = """
import json, struct, sys
from wandb.proto.wandb_internal_pb2 import Record

def records(data, block=32768):
    # W&B's file is a LevelDB log behind 7 bytes of its own: blocks of records with checksum, length and type.
    place, whole = 7, b""
    while place + 7 <= len(data):
        if block - place % block < 7:
            place += block - place % block
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a full record, or the last piece of one
            yield whole
            whole = b""

rows, config, artifacts = [], {}, []
for data in records(open(sys.argv[1], "rb").read()):
    record = Record()
    record.ParseFromString(data)
    if record.WhichOneof("record_type") == "history":
        rows.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item})
    if record.WhichOneof("record_type") == "artifact" and record.artifact.type == "model":
        found = record.artifact
        artifacts.append([found.name, sorted(found.aliases), [e.path for e in found.manifest.contents]])
    for part in (record.config, record.run.config):
        config |= {u.key: json.loads(u.value_json) for u in part.update if u.key}
print(json.dumps([rows, config, artifacts]))
"""


def fit(gang, folder):
    """The id of the W&B run of a short fit."""
    environment = {"LAUNCH_RUN_DIR": str(folder), "WANDB_SILENT": "true"}
    [rank] = gang.ok(1, "wandb_offline.py", str(folder), env=environment, timeout=100)
    return rank.stdout.split("ID ")[1].strip()


@pytest.mark.slow
@pytest.mark.timeout(300)  # W&B's own service begins three times
def test_offline_run_and_its_restart(gang, tmp_path):
    first = fit(gang, tmp_path)
    [file] = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    read = subprocess.run([sys.executable, "-c", READ, file], capture_output=True, text=True, timeout=100, check=True)
    rows, config, artifacts = json.loads(read.stdout)
    assert config["lr"] == 0.1
    logged = [row for row in rows if "p-loss" in row]
    assert [row["trainer/global_step"] for row in logged] == [1, 3]
    assert all(any(f"p-{kind}" in key for row in rows for key in row) for kind in ("table", "clip"))
    assert artifacts == [[f"model-{first}", ["best", "latest"], ["model.ckpt"]]]
    # A restart in the same run folder goes on in the same W&B run.
    assert fit(gang, tmp_path) == first
