"""What an agent does with orders that come close together."""

from __future__ import annotations

import subprocess
import sys

# An agent's loop between a supervisor and a zygote that both are this program: what it does is what it sends.
AGENT = """
import os, socket, sys
from pathlib import Path
from launcher.agent import Node
from launcher.channel import Channel
from launcher.spec import LaunchSpec, Program
from launcher.topology import World

ours, its_link = socket.socketpair()
zygote, its_zygote = socket.socketpair()
supervisor, zygote = Channel(ours), Channel(zygote)
spec = LaunchSpec(program=Program("script", sys.argv[1]), cwd=sys.argv[2], procs=2)
node = Node(spec, "run", Path(sys.argv[2]), dict(os.environ), Channel(its_link),
            Channel(its_zygote), 1, [], scheduled=False, silent_s=None, orphan_grace_s=1.0)
supervisor.send({"world": {}})
supervisor.send({"abort": {}})
while not node.orders:
    node.turn(10)
for local in "01":
    zygote.send({"started": local, "pid": os.getpid()})
node.start(World(0, 0, (2,), "127.0.0.1", 1), 0)
orders = []
while len(orders) < 4:
    orders += zygote.receive()
print([(o["order"], o["key"], o.get("number")) for o in orders], flush=True)
os._exit(0)
"""


def test_a_stop_that_comes_with_the_start_is_no_less_one(tmp_path):
    program = tmp_path / "job.py"
    program.write_text("")
    done = subprocess.run([sys.executable, "-c", AGENT, program, tmp_path], capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    assert done.stdout.strip() == str(
        [("start", "0", None), ("start", "1", None), ("signal", "0", 15), ("signal", "1", 15)]
    )
