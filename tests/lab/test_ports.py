"""Many launches at once over the same hosts, where most ports are somebody else's."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = [pytest.mark.lab, pytest.mark.ssh, pytest.mark.timeout(300)]

MEET = """
import torch, torch.distributed as dist
dist.init_process_group("gloo")
x = torch.ones(1)
dist.all_reduce(x)
print("met", int(x), flush=True)
dist.destroy_process_group()
"""
# 400 ports in all for whoever asks for a free one, and 300 of them are taken, as are those that torchrun asks for.
THIEF = """
import socket, sys
taken = []
for port in (29400, 29500, *range(40000, 40300)):
    sock = socket.socket()
    sock.bind(("0.0.0.0", port))
    sock.listen()
    taken.append(sock)
print("taken", flush=True)
sys.stdin.read()
"""


@pytest.mark.soak
def test_eight_launches_at_once_over_hosts_whose_ports_were_taken(machines, launched, tmp_path):
    thieves = []
    for name in ("ada", "bob"):
        machines.host(name).run("sh", "-c", "echo 40000 40399 > /proc/sys/net/ipv4/ip_local_port_range")
        words = (sys.executable, "-c", THIEF)
        thief = machines.popen(*words, cwd=tmp_path, at=name, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        thieves.append(thief)
        assert thief.stdout.readline() == "taken\n"
    try:
        calls = []
        for number in range(8):
            cwd = tmp_path / f"launch-{number}"
            cwd.mkdir()
            (cwd / "meet.py").write_text(MEET)
            calls.append(launched("--hosts", "ada,bob", "--procs", "1", "meet.py", cwd=cwd))
        for call in calls:
            code, out, err = call.end(timeout=280)
            assert code == 0, err
            assert sorted(out.split("\n")) == ["", "[0] met 2", "[1] met 2"]
    finally:
        for thief in thieves:
            thief.communicate()
