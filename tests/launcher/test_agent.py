"""What an agent does with orders that come close together, or while it waits for something else."""

from __future__ import annotations

import subprocess
import sys

import pytest

# An agent's loop between a supervisor and a zygote that both are this program: what it does is what it sends.
AGENT = """
import os, socket, sys
from pathlib import Path
from launcher.node import Node
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


# Node 1 in two attempts: node 0's host is dead (a connection to it comes to nothing), then its agent stands still (the
# kernel takes the connection, and nobody answers). What it tells, and whether the run ends for it as the last word was.
MEETS = """
import os, socket, sys, threading
from pathlib import Path
from launcher.node import Node
from launcher.channel import Channel
from launcher import elastic
from launcher.elastic import GangRendezvous
from launcher.spec import LaunchSpec, Program
from torch.distributed.elastic.rendezvous.api import RendezvousClosedError

ours, its_link = socket.socketpair()
zygote, its_zygote = socket.socketpair()
supervisor = Channel(ours)
spec = LaunchSpec(program=Program("script", sys.argv[1]), cwd=sys.argv[2], procs=1)
node = Node(spec, "run", Path(sys.argv[2]), dict(os.environ), Channel(its_link),
            Channel(its_zygote), 1, [], scheduled=False, silent_s=None, orphan_grace_s=1.0)
dead, still = socket.create_server(("127.0.0.1", 0), backlog=0), socket.create_server(("127.0.0.1", 0))
fill = [socket.socket() for _ in range(4)]
for one in fill:
    one.setblocking(False)
    one.connect_ex(dead.getsockname())

def world(attempt, store):
    address, port = store.getsockname()
    return {"world": {"attempt": attempt, "restarts": attempt, "slots": [[1, 2]], "addr": address, "port": port,
                      "node": 1}}

def supervise():
    supervisor.send(world(0, dead))
    supervisor.send({"abort": {}})
    supervisor.sock.settimeout(60)
    told.append(supervisor.sock.recv(1000)[4:])
    supervisor.send(world(1, still))
    connections = [still.accept() for _ in range(2)]  # to see whether it can be reached, and the store's own
    supervisor.send({"abort": {}})
    told.append(supervisor.sock.recv(1000)[4:])
    supervisor.send({"end": {"code": 7}})

told = []
elastic._REACH_S = 3600  # only the abort ends the waiting
threading.Thread(target=supervise, daemon=True).start()
meeting = GangRendezvous(node)
try:
    meeting.next_rendezvous()
except RendezvousClosedError:
    print(*(t.decode() for t in told), meeting.end, flush=True)
os._exit(0)
"""


@pytest.mark.slow
def test_an_agent_that_cannot_reach_the_store_leaves_the_attempt_when_it_is_told_to(tmp_path):
    done = subprocess.run([sys.executable, "-c", MEETS, tmp_path / "job.py", tmp_path],
                          capture_output=True, text=True, timeout=120)  # fmt: skip
    assert done.stdout.strip() == '{"drained":true,"attempt":0} {"drained":true,"attempt":1} {\'code\': 7}', done.stderr


# Something else than a store answers there, with an error that nobody thought of.
ODD = (
    MEETS[: MEETS.index("dead, still")]
    + """
def connected(address, port):
    raise RuntimeError("no store at all")

elastic._connected = connected
supervisor.send({"world": {"attempt": 0, "restarts": 0, "slots": [[1, 2]], "addr": "127.0.0.1", "port": 1, "node": 1}})
try:
    GangRendezvous(node).next_rendezvous()
except RuntimeError as error:
    print(error, flush=True)
os._exit(0)
"""
)


def test_whatever_goes_wrong_with_the_store_ends_the_waiting(tmp_path):
    done = subprocess.run([sys.executable, "-c", ODD, tmp_path / "job.py", tmp_path],
                          capture_output=True, text=True, timeout=60)  # fmt: skip
    assert done.stdout.strip() == "no store at all", done.stderr


# A loop that a file system holds up for longer than a supervisor may be silent, while that says that it is there.
HELD_UP = (
    AGENT[: AGENT.index("supervisor.send")].replace("silent_s=None", "silent_s=0.5")
    + """
import threading
over, said = threading.Event(), threading.Semaphore(0)

def supervise():
    while not over.wait(0.05):
        supervisor.send({"here": True})
        said.release()

def held_up():
    for _ in range(20):
        assert said.acquire(timeout=30)

look, node._telling.look = node._telling.look, held_up
threading.Thread(target=supervise, daemon=True).start()
node.turn(10)
node._telling.look = look
node.turn(10)
over.set()
print(node.link.closed, flush=True)
os._exit(0)
"""
)


def test_an_agent_that_was_held_up_itself_hears_the_supervisor_before_it_gives_it_up(tmp_path):
    done = subprocess.run([sys.executable, "-c", HELD_UP, tmp_path / "job.py", tmp_path],
                          capture_output=True, text=True, timeout=60)  # fmt: skip
    assert done.stdout.strip() == "False", done.stderr
