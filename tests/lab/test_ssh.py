"""`launch --hosts` on machines with a real sshd."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from pathlib import Path

import pytest
from job import LAUNCH
from netns import wait_for

pytestmark = [pytest.mark.lab, pytest.mark.ssh, pytest.mark.timeout(180)]

WHO = """
import json, os, socket, sys
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "SECRET", "PLAIN", "OTHER")
facts = {n: os.environ.get(n) for n in names} | {"host": socket.gethostname(), "args": sys.argv[1:], "cwd": os.getcwd()}
print(json.dumps(facts), flush=True)
"""

# Says that it is there; saves when it is asked to leave, and is done when it is started again after that.
STAY = """
import os, signal, sys, time
from pathlib import Path
saved = Path(os.environ["LAUNCH_RUN_DIR"], "saved-" + os.environ["RANK"])
def leave(*_):
    saved.touch()
    sys.exit(75)
signal.signal(signal.SIGTERM, leave)
print("up", flush=True)
while not saved.exists():
    time.sleep(0.05)
"""


@pytest.fixture
def call(launched, tmp_path):
    """`call(*words)`, in tmp_path, which all machines see."""
    (tmp_path / "who.py").write_text(WHO)
    (tmp_path / "stay.py").write_text(STAY)
    return launched


def facts(out: str) -> list[dict]:
    found = [json.loads(line.partition("] ")[2]) for line in out.splitlines()]
    return sorted(found, key=lambda f: int(f["RANK"]))


def test_ranks_stand_in_the_order_of_the_hosts_and_get_their_words_and_variables(call, tmp_path):
    hostfile = tmp_path / "hosts"
    hostfile.write_text("bob slots=2  # the larger one\nada\n")
    words = ["a b", "it's", '"q"', "$HOME", "`id`", "a\nb", "é", "*", "\\", ";", "--nodes", ""]
    one = call(
        "--hosts", "@hosts", "--preload", "json", "--env", "SECRET", "--env", "PLAIN=x y", "who.py", *words,
        SECRET="hush-4711", OTHER="stays",
    )  # fmt: skip
    code, out, err = one.end()
    assert code == 0, err
    found = facts(out)
    assert [(f["LOCAL_RANK"], f["GROUP_RANK"], f["host"]) for f in found] == [
        ("0", "0", "bob"), ("1", "0", "bob"), ("0", "1", "ada"),
    ]  # fmt: skip
    assert all(f["args"] == words and f["cwd"] == str(tmp_path) and f["WORLD_SIZE"] == "3" for f in found)
    assert {(f["SECRET"], f["PLAIN"], f["OTHER"]) for f in found} == {("hush-4711", "x y", None)}
    written = [p for p in one.folder.rglob("*") if p.is_file() and b"hush-4711" in p.read_bytes()]
    assert all(p.suffix == ".log" and "rank-" in p.name for p in written)  # where the program printed it


def test_ranks_meet_across_a_jump_host_and_by_an_address_of_the_head_that_all_reach(call, tmp_path):
    program = tmp_path / "meet.py"
    program.write_text(
        "import torch, torch.distributed as dist\ndist.init_process_group('gloo')\n"
        "x = torch.ones(1)\ndist.all_reduce(x)\nprint(x.item())\ndist.destroy_process_group()\n"
    )
    code, out, err = call("--hosts", "localhost,far", program).end()
    assert code == 0, err
    assert sorted(out.split()) == ["2.0", "2.0", "[0]", "[1]"]


def test_whoever_does_not_come_is_named_with_the_reason(call, machines):
    one = call("--hosts", "ada,stranger,nowhere,10.77.0.99", "--preload", "json", "who.py")
    code, out, err = one.end()
    assert (code, out) == (1, "")
    assert "3 of 4 hosts did not come" in err
    assert "stranger: nobody@bob: Permission denied" in err
    assert "nowhere: ssh: Could not resolve hostname" in err
    assert "10.77.0.99: ssh: connect to host" in err
    assert "ada:" not in err


def test_a_folder_that_is_not_shared_needs_sync(call, machines):
    project = Path("/srv/project")
    # The head's /srv: as on the other machines, this machine's own is covered.
    disk = machines.folder / "disk-head" / "project"
    disk.mkdir()
    (disk / "main.py").write_text("import helper\nprint(helper.where())\n")
    (disk / "helper.py").write_text("import socket\ndef where(): return socket.gethostname() + ' ' + __file__\n")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(disk)]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *words], check=True)
    code, _, err = call("--hosts", "ada", "--preload", "json", "main.py", cwd=project).end()
    assert code != 0
    assert "ada: " in err
    assert "/srv/project: No such file" in err
    code, out, err = call("--hosts", "ada,head", "--preload", "json", "--sync", "main.py", cwd=project).end()
    assert code == 0, err
    assert sorted(out.splitlines()) == [
        f"[{i}] {n} /srv/project/runs/job/code/helper.py" for i, n in enumerate(("ada", "head"))
    ]
    (log,) = disk.glob("runs/job/logs/*/rank-0.log")  # brought here
    assert log.read_text().startswith("ada ")


def test_ctrl_c_stops_and_resume_goes_on(call, tmp_path):
    one = call("--hosts", "ada,bob", "--preload", "json", "stay.py")
    one.ups(2)
    one.signal(signal.SIGINT)
    code, _, err = one.end()
    assert code == 75, err
    assert len(list(one.folder.glob("saved-*"))) == 2
    assert call("--hosts", "ada,bob", "--preload", "json", "stay.py").end()[0] == 0


def test_detached_it_is_seen_to_by_its_name(call, tmp_path, machines):
    one = call("--hosts", "ada,bob", "--preload", "json", "-d", "stay.py")
    assert one.end()[:2] == (0, "job\n")
    own = {"XDG_STATE_HOME": str(tmp_path / "state")}

    def launch(*words):
        done = machines.popen(LAUNCH, *words, cwd=tmp_path, environment=own, stdout=subprocess.PIPE, text=True)
        return done.communicate(timeout=60)[0]

    wait_for(lambda: launch("logs", "job", "--rank", "1") == "up\n", 60, "the ranks")
    assert "running" in launch("ls", "job")
    launch("cancel", "job")
    wait_for(lambda: "stopped" in launch("ls", "job"), 60, "the end")
    assert len(list(one.folder.glob("saved-*"))) == 2


def test_a_cut_cable_is_noticed_and_the_run_begins_again_when_it_is_mended(call, machines):
    one = call("--hosts", "ada,bob", "--preload", "json", "--max-failures", "1", "stay.py")
    one.ups(2)
    machines.network.link_down("bob")
    wait_for(lambda: "attempt-failed" in (one.folder / "events.jsonl").read_text(), 30, "the failure")
    # Nobody can reach it, and still nothing of the run goes on there.
    machines.wait_empty("agent", 60, "the end of bob's agent", at=("bob",))
    for saved in one.folder.glob("saved-*"):
        saved.unlink()
    machines.network.link_up("bob")
    one.ups(2)
    one.signal(signal.SIGTERM)
    code, _, err = one.end()
    assert code == 75, err
    assert re.search(r"node 1: no longer answers.*; restarting \(1 of 1\)", err)


def test_a_killed_supervisor_leaves_time_to_save_and_nothing_behind(call, machines):
    one = call("--hosts", "ada,bob", "--preload", "json", "stay.py")
    one.ups(2)
    one.signal(signal.SIGKILL)
    one.process.communicate(timeout=60)
    machines.wait_empty("launcher", 60, "the end of all agents")
    assert len(list(one.folder.glob("saved-*"))) == 2


def test_a_flood_loses_no_line_and_holds_no_message_up(call, tmp_path):
    program = tmp_path / "flood.py"
    program.write_text("for i in range(100000): print('x' * 60, i)\n")
    one = call("--hosts", "ada,bob", "--preload", "json", program)
    # Nobody reads what launch prints; the ranks that wait for the console are still reached.
    wait_for(lambda: (one.folder / "logs" / "attempt-0" / "rank-1.log").is_file(), 60, "output")
    code, out, err = one.end()
    assert code == 0, err
    lines = out.splitlines()
    for rank in (0, 1):
        mine = [line for line in lines if line.startswith(f"[{rank}] ")]
        assert mine == [f"[{rank}] {'x' * 60} {i}" for i in range(100000)]
