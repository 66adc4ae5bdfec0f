"""`launch doctor`: what each finding says of what was seen, and the whole of it on this machine."""

from __future__ import annotations

import copy
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.doctor.cluster import settings
from launcher.doctor.examination import ALL_PAIRS_UP_TO, Machine, Place, Report, pairings
from launcher.doctor.facts import gather, read_nvidia_smi, required
from launcher.doctor.verdicts import judge, table
from launcher.errors import ClusterError

LAUNCH = Path(sys.executable).with_name("launch")
GIB = 1 << 30
GPU = {"index": 0, "name": "H100", "driver": "570.1", "memory": 81559, "used": 3, "temperature": 40,
       "ecc": 0, "mode": "Default", "mig": False, "throttle": 1}  # fmt: skip
FACTS = {
    "host": "x", "python": "3.11.2", "executable": "/venv/bin/python", "machine": "x86_64",
    "packages": {"muster": "0.1", "torch": "2.15"}, "files": {"soft": 1024, "hard": 65536}, "locked": None,
    "rdma": False, "shm": {"total": 8 * GIB, "free": 8 * GIB}, "tmp": {"path": "/tmp", "free": GIB},
    "gpus": None, "visible": 0, "opened": {"port": 1234},
}  # fmt: skip


def healthy(*names: str) -> Report:
    machines = [
        Machine(name, facts={**copy.deepcopy(FACTS), "host": name}, address=f"10.0.0.{i}", clock_s=(0.0, 0.001),
                written={"error": None, "text": "t"}, read={"error": None, "seconds": 0.0})
        for i, name in enumerate(names)
    ]  # fmt: skip
    pairs = [(a, b) for a in range(len(names)) for b in range(len(names)) if a != b]
    reduced = {"failed": {}, "backend": "gloo", "size": len(names), "latency_s": 1e-4, "rate": 1e9, "bytes": 1 << 24}
    return Report({**FACTS, "host": "head"}, machines, dict.fromkeys(pairs, 1e9), reduced)


def finding(report: Report, check: str, **place):
    (found,) = [f for f in judge(report, Place(Path("/shared"), **place)) if f.check == check]
    return found


def test_healthy_machines_are_healthy():
    found = judge(healthy("ada", "bob", "cyd"), Place(Path("/shared")))
    assert {f.status for f in found} == {"ok", "none"}
    assert [f.check for f in found if f.status == "none"] == ["GPUs"]


def _set(check, **values):
    def change(report):
        (report.machines[1].facts if check is None else getattr(report.machines[1], check)).update(values)

    return change


@pytest.mark.parametrize(
    ("check", "harm", "told"),
    [
        ("machines", lambda r: setattr(r.machines[1], "gone", "Permission denied"), "bob: Permission denied"),
        ("interpreter", _set(None, python="3.10.1"), "bob: Python 3.10.1"),
        ("packages", _set(None, packages={"muster": "0.1", "torch": "2.11"}), "torch 2.15; bob: 2.11"),
        ("packages", _set(None, packages={"muster": "0.1", "torch": None}), "bob: absent"),
        ("shared folder", _set("written", error="Read-only file system", text=None), "bob: Read-only file system"),
        ("shared folder", _set("read", error="No such file", seconds=None), "does not see (bob)"),
        ("clocks", lambda r: setattr(r.machines[1], "clock_s", (2.0, 0.01)), "bob is 2.000 s ahead of"),
        ("clocks", lambda r: setattr(r.machines[1], "clock_s", (-2.0, 0.01)), "bob is 2.000 s behind"),
        ("/dev/shm", _set(None, shm={"total": 1 << 26, "free": 1 << 26}), "bob: 64 MiB of 64 MiB free"),
        ("open files", _set(None, files={"soft": 1024, "hard": 1024}), "bob: 1024 (up to 1024)"),
        ("TMPDIR", _set(None, tmp={"path": "/" + 80 * "t", "free": GIB}), "has 81 characters"),
        ("GPUs", _set(None, gpus="nvidia-smi: no devices"), "bob: nvidia-smi: no devices"),
        ("GPUs", _set(None, gpus=[GPU | {"ecc": 2}], visible=1), "bob GPU 0: 2 uncorrected memory errors"),
        ("GPUs", _set(None, gpus=[GPU | {"throttle": 0x28}], visible=1), "slowed down by hardware slowdown, heat"),
        ("GPUs", _set(None, gpus=[GPU | {"mode": "Prohibited"}], visible=1), "compute mode Prohibited"),
        ("GPUs", _set(None, gpus=[GPU], visible=1), "bob: 1 x H100"),
        ("locked memory", _set(None, rdma=True, locked=65536), "bob"),
        (
            "ports",
            lambda r: r.machines[0].unreached.update({1: "10.0.0.1 port 1234: timed out"}),
            "ada does not reach bob (10.0.0.1 port 1234: timed out)",
        ),
        ("bandwidth", lambda r: r.rates.update({(0, 1): 1e7}), "ada to bob: 10.0 MB/s"),
        ("all-reduce", lambda r: r.reduced.update(failed={1: "Connection refused"}), "bob: Connection refused"),
    ],
)
def test_each_fault_is_told_with_its_machine_and_what_to_do(check, harm, told):
    report = healthy("ada", "bob", "cyd")
    harm(report)
    found = finding(report, check)
    assert (found.status, bool(found.fix)) == ("bad", True)
    assert told in found.found


@pytest.mark.parametrize("known", [True, False])
def test_machines_that_are_lost_on_the_way_are_told_as_such(known):
    report = healthy("ada", "bob")
    report.rates, report.reduced = {}, None
    for machine in report.machines:
        machine.gone = "its connection was lost"
        machine.facts = machine.facts if known else None
    found = finding(report, "machines")
    assert (found.status, found.found.count("its connection was lost")) == ("bad", 2)
    assert finding(report, "all-reduce").status == "none"


def test_a_clock_that_may_be_right_is_not_called_wrong():
    report = healthy("ada", "bob")
    report.machines[1].clock_s = (0.3, 0.25)  # half a second there and back
    assert finding(report, "clocks").status == "ok"
    report.machines[1].clock_s = (0.4, 0.001)
    assert finding(report, "clocks").status == "poor"


def test_gpus_that_a_run_will_ask_for():
    report = healthy("ada", "bob")
    assert finding(report, "GPUs", gpus=4).status == "bad"
    for machine in report.machines:
        machine.facts.update(gpus=[GPU, GPU | {"index": 1}], visible=2)
    assert finding(report, "GPUs", gpus=2).found == "2 x H100, driver 570.1"
    assert "fewer than the 4" in finding(report, "GPUs", gpus=4).found
    report.machines[0].facts["gpus"][0] = GPU | {"used": 40_000}
    assert finding(report, "GPUs").status == "poor"
    assert finding(report, "GPUs").found == "memory in use already: ada GPU 0 (39.1 of 79.6 GiB)"
    report.machines[0].facts["gpus"][0] = GPU | {"used": None, "memory": None, "mode": None, "temperature": None}
    assert finding(report, "GPUs").status == "ok"  # a container that may not be told
    report.machines[1].facts["gpus"][1] = GPU | {"index": 1, "mig": True}
    assert finding(report, "GPUs").found == "cut into MIG instances: bob GPU 1"


def test_nvidia_smi_is_read():
    """The words that it uses where a GPU cannot or may not tell stand in bug reports of several drivers."""
    text = (
        "0, NVIDIA H100 80GB HBM3, 570.124.06, 81559, 4, 31, 0, Default, Disabled, 0x0000000000000001\n"
        "1, NVIDIA GeForce RTX 4090, 550.90.12, 24564, 18000, 84, [N/A], Exclusive_Process, [N/A], 0x0000000000000020\n"
        "2, NVIDIA A100-SXM4-80GB, 535.161.08, [Insufficient Permissions], [Insufficient Permissions], 47, 0, Default, "
        "Enabled, [N/A]\n"
        "3, GRID T4-16Q, 470.42.01, 16384, 0, [N/A], [Not Supported], Prohibited, [N/A], [Not Supported]\n"
    )
    whole, desktop, cut, virtual = read_nvidia_smi(text)
    assert whole == {
        "index": 0, "name": "NVIDIA H100 80GB HBM3", "driver": "570.124.06", "memory": 81559, "used": 4,
        "temperature": 31, "ecc": 0, "mode": "Default", "mig": False, "throttle": 1,
    }  # fmt: skip
    assert (desktop["ecc"], desktop["mode"], desktop["mig"], desktop["throttle"]) == (
        None, "Exclusive_Process", False, 0x20,
    )  # fmt: skip
    assert (cut["memory"], cut["used"], cut["mig"], cut["throttle"]) == (None, None, True, None)
    assert (virtual["temperature"], virtual["ecc"], virtual["mode"]) == (None, None, "Prohibited")
    assert read_nvidia_smi("something else\n") == "nvidia-smi answered 'something else'"


@pytest.mark.parametrize("field", ["clocks_event_reasons.active", "clocks_throttle_reasons.active", "none"])
def test_drivers_old_and_new_are_asked_and_one_that_is_ill_is_quoted(field, tmp_path, monkeypatch):
    (tmp_path / "nvidia-smi").write_text(
        f'#!/bin/sh\ncase "$1" in *,{field}) echo 0, H100, 570, 81559, 4, 31, 0, Default, Disabled, 0x4;; '
        '*) echo "Unable to determine the device handle" >&2; exit 6;; esac\n'
    )
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    found = gather([])["gpus"]
    if field == "none":
        assert found == "nvidia-smi: Unable to determine the device handle"
    else:
        assert (found[0]["name"], found[0]["throttle"]) == ("H100", 4)


def test_requirements_are_read(tmp_path):
    (tmp_path / "requirements.txt").write_text(
        "torch>=2\n# no\n-r more.txt\nScikit-Learn[all]==1.4 ; python_version > '3'\nhttps://x/y.whl\nown @ https://x\n"
    )
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "mine"\ndependencies = ["click>8", "torch"]\n')
    wanted = {"torch": True, "Scikit-Learn": False, "own": True, "mine": False, "click": True}
    assert required(tmp_path) == wanted
    (tmp_path / "pyproject.toml").write_text("not [toml")
    assert "torch" in required(tmp_path)


@pytest.mark.parametrize("count", [2, 3, 33, 34, 1000, 4000])
def test_pairs_change_in_rounds_and_all_are_met_where_there_are_few(count):
    rounds = pairings(count)
    assert len(set(rounds)) == len(rounds)
    assert all(0 < distance < count for distance in rounds)
    if count <= ALL_PAIRS_UP_TO:
        assert len(rounds) == count - 1
    else:
        assert {1, 2, count - 1} <= set(rounds)
        assert len(rounds) < 50


CONFIG = """\
JobRequeue              = 1
KillWait                = 30 sec
PreemptMode             = {mode}
PreemptType             = {kind}
PreemptExemptTime       = {exempt}
"""
PARTITION = """\
PartitionName={name}
   AllowGroups=ALL Default={default}
   MaxTime={limit} DefaultTime=NONE GraceTime={grace} PriorityTier={tier} PreemptMode={mode}
   State={state} TotalNodes=3
"""


def slurm(mode="REQUEUE", kind="preempt/partition_prio", exempt="00:00:00", grace=20, above=True, state="UP"):
    main = PARTITION.format(name="main", default="YES", limit="2-00:00:00", grace=grace, tier=1, mode=mode, state=state)
    other = PARTITION.format(name="urgent", default="NO", limit="UNLIMITED", grace=0, tier=9 if above else 1,
                             mode="OFF", state="UP")  # fmt: skip
    found = settings(CONFIG.format(mode=mode, kind=kind, exempt=exempt), f"{main}\n{other}", None)
    return {f.check: f for f in found}


def test_what_preemption_means_is_said_in_words():
    told = slurm()["preemption"]
    assert told.status == "ok"
    assert "a job in urgent may preempt it: SIGTERM, then 20 s to save; it goes back into the queue" in told.found
    assert slurm(grace=0)["preemption"].status == "poor"
    assert "save often" in slurm(grace=0)["preemption"].fix
    assert "once it has run for 01:00:00" in slurm(exempt="01:00:00")["preemption"].found
    assert "--requeue resubmit" in slurm(mode="CANCEL")["preemption"].fix
    assert "SIGSTOP" in slurm(mode="GANG,SUSPEND")["preemption"].found
    assert "not preempted" in slurm(kind="preempt/none")["preemption"].found
    assert "no partition stands above" in slurm(above=False)["preemption"].found
    assert slurm(state="DRAIN")["partition"].status == "bad"
    limits = slurm()["time limits"].found
    assert "at most 2-00:00:00" in limits
    assert "30 s (KillWait)" in limits
    with pytest.raises(ClusterError, match="no partition 'x'; it has main"):
        settings(
            CONFIG, PARTITION.format(name="main", default="NO", limit="1", grace=0, tier=1, mode="", state="UP"), "x"
        )


def test_a_table_fits_its_columns_and_shows_what_to_do():
    report = healthy("ada", "bob")
    report.machines[1].clock_s = (2.0, 0.01)
    lines = table(judge(report, Place(Path("/shared"))), 60)
    assert max(map(len, lines)) <= 60
    assert any(line.startswith("BAD  clocks") for line in lines)
    assert any(line.strip().startswith("-> start a time service") for line in lines)


@pytest.mark.slow
def test_this_machine_is_examined_and_a_port_that_is_taken_is_bad(tmp_path):
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        words = [LAUNCH, "doctor", "--json", "--master-port", str(port)]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False)
    found = {f["check"]: f for f in json.loads(done.stdout)}
    assert done.returncode == 1, done.stderr
    assert found["ports"]["status"] == "bad"
    assert str(port) in found["ports"]["found"]
    for check in ("machines", "interpreter", "packages", "shared folder", "clocks", "all-reduce"):
        assert found[check]["status"] == "ok", found
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_gpus_of_this_machine_are_told(tmp_path):
    """With a stand-in for nvidia-smi, which answers only what it is to be asked."""
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    tool.write_text(
        '#!/bin/sh\n[ "$1 $2" = "--query-gpu=index,name,driver_version,memory.total,memory.used,temperature.gpu,'
        "ecc.errors.uncorrected.volatile.total,compute_mode,mig.mode.current,clocks_event_reasons.active "
        '--format=csv,noheader,nounits" ] || { echo "Field is not a valid field to query." >&2; exit 2; }\n'
        'echo "0, NVIDIA H100 80GB HBM3, 570.124.06, 81559, 4, 31, 0, Default, Disabled, 0x0000000000000001"\n'
        'echo "1, NVIDIA H100 80GB HBM3, 570.124.06, 81559, 4, 93, 3, Default, Disabled, 0x0000000000000048"\n'
    )
    tool.chmod(0o755)
    env = os.environ | {"PATH": f"{tool.parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        [LAUNCH, "doctor", "--json"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 1, done.stderr
    found = {f["check"]: f for f in json.loads(done.stdout)}["GPUs"]
    assert found["status"] == "bad"
    for why in (
        "3 uncorrected memory errors",
        "slowed down by hardware slowdown, heat (hardware)",
        "93 degrees Celsius",
    ):
        assert f"GPU 1: {why}" in found["found"]
    assert "GPU 0" not in found["found"]


@pytest.mark.slow
def test_nothing_starts_where_the_preflight_is_bad(tmp_path):
    (tmp_path / "job.py").write_text("print('it ran')\n")
    (tmp_path / "requirements.txt").write_text("no-such-package\n")
    words = [LAUNCH, "--procs", "1", "--preflight", "--run", "job", "job.py"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    assert "BAD  packages" in done.stderr
    assert "error: preflight: packages: bad, as told above; nothing was started" in done.stderr
    (tmp_path / "requirements.txt").unlink()
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, done.stdout) == (0, "[0] it ran\n"), done.stderr


def test_wrong_requests_are_refused():
    for words, told in [
        (["doctor", "--hosts", "a", "--partition", "p"], "--hosts looks at machines by ssh, --partition asks Slurm"),
        (["doctor", "--hosts", "a,b", "--nodes", "3"], "--hosts names 2"),
        (["doctor", "--nodes", "0"], "give a whole number >= 1"),
        (["--preflight", "--nnodes", "2", "--rdzv-endpoint", "x:1", str(Path(__file__))], "--preflight looks at"),
    ]:
        done = subprocess.run([LAUNCH, *words], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 2
        assert told in done.stderr
