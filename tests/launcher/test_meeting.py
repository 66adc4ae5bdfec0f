"""Nodes that somebody else starts, one `launch` each, as with torchrun: they meet, or say who is missing and where."""

from __future__ import annotations

import socket

import pytest

NODE = ("--nnodes", "2", "--nproc-per-node", "1")


@pytest.fixture
def endpoint() -> str:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{sock.getsockname()[1]}"


def _say_where(launch):
    return launch.script(
        "import os\n"
        "print('RANK {RANK} of {WORLD_SIZE} GROUP_RANK {GROUP_RANK} LOCAL {LOCAL_RANK} store {MASTER_ADDR} "
        "attempt {LAUNCH_ATTEMPT} in {LAUNCH_RUN_ID}'.format(**os.environ), flush=True)\n"
    )


@pytest.mark.parametrize("backend", ["static", pytest.param("c10d", marks=pytest.mark.soak)])
def test_two_nodes_meet_and_reduce(launch, programs, endpoint: str, backend: str) -> None:
    """The host comes second under static: the first node waits for it. Node ranks are kept, also under c10d."""
    how = (*NODE, "--rdzv-backend", backend, "--rdzv-endpoint", endpoint, "--rdzv-id", "both", programs / "hello.py")
    one = launch.start("--node-rank", "1", *how)
    one.says("node of run 'both', meeting at" if backend == "static" else "both")
    zero = launch.start("--node-rank", "0", *how)
    assert zero.wait().returncode == 0, zero.output
    assert one.wait().returncode == 0, one.output
    hosts = [job for job in (zero, one) if "run both:" in job.stderr]
    assert len(hosts) == 1
    assert "rank 0 of 2 in attempt 0" in zero.stdout
    assert one.stdout == ""  # global rank 0 is on the other node
    assert "rank 1 of 2" in hosts[0].run.log(1)


def test_nodes_without_ranks_are_taken_as_they_come(launch, endpoint: str) -> None:
    """PET_ variables alone, as Kubernetes' training operator gives them; a third node is refused."""
    script = _say_where(launch)
    pet = {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "1", "PET_RDZV_BACKEND": "c10d", "PET_RDZV_ENDPOINT": endpoint}
    jobs = [launch.start("--show-ranks", "all", script, env=pet) for _ in range(2)]
    for job in jobs:
        assert job.wait().returncode == 0, job.output
    lines = sorted(line for job in jobs for line in job.stdout.splitlines())
    assert [line.split(" LOCAL")[0] for line in lines] == [
        "[0] RANK 0 of 2 GROUP_RANK 0",
        "[1] RANK 1 of 2 GROUP_RANK 1",
    ]
    assert all("PET_" not in line for line in lines)


def test_who_does_not_belong_is_refused_and_does_no_harm(launch, endpoint: str) -> None:
    """And the host, whose own agent has long come, tells of itself as where the other node reached it."""
    script = _say_where(launch)
    endpoint = endpoint.replace("127.0.0.1", "127.0.0.2")
    how = (*NODE, "--rdzv-endpoint", endpoint, "--rdzv-conf", "join_timeout=30")
    zero = launch.start("--node-rank", "0", *how, "--rdzv-id", "mine", script)
    zero.says("run mine:")
    host, port = endpoint.split(":")
    with socket.create_connection((host, int(port))) as a, socket.create_connection((host, int(port))) as b:
        a.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        b.sendall(b'\0\0\0\x02{}\0\0\0\x12{"exited":{},"x":1}')
        for sock in (a, b):
            sock.settimeout(10)
            assert sock.recv(100) == b""  # turned away
    with socket.create_connection((host, int(port))) as silent:
        stranger = launch("--node-rank", "1", *how, "--rdzv-id", "yours", script)
        assert stranger.returncode == 1
        assert "refused by the supervisor: the run's token differs" in stranger.stderr
        assert "compare --rdzv-id" in stranger.stderr
        zero.says("refused a node")
        again = launch("--node-rank", "0", *how[:-2], "--rdzv-conf", "is_host=0", "--rdzv-id", "mine", script)
        assert again.returncode == 1
        assert "node rank 0 is taken by another node" in again.stderr
        silent.shutdown(socket.SHUT_WR)
        one = launch.start("--node-rank", "1", *how, "--rdzv-id", "mine", script)
        assert one.wait().returncode == 0, one.output
        assert zero.wait().returncode == 0, zero.output
    assert "store 127.0.0.2 attempt 0" in zero.stdout


def test_a_missing_node_is_named(launch, endpoint: str) -> None:
    script = _say_where(launch)
    how = (*NODE, "--rdzv-endpoint", endpoint, "--rdzv-conf", "join_timeout=0.5", script)
    zero = launch.start("--node-rank", "0", *how)
    assert zero.wait(20).returncode == 1
    assert f"node 1 of 2 did not come within 0.5 s; awaited at {endpoint}" in zero.stderr
    zero.gone()
    one = launch.start("--node-rank", "1", *how)
    assert one.wait(20).returncode == 1
    host, port = endpoint.split(":")
    assert f"nobody answers at {host} port {port} for 0.5 s" in one.stderr
    assert "Is node 0 started" in one.stderr


def test_a_failure_on_one_node_ends_all_with_its_code(launch, endpoint: str) -> None:
    script = launch.script(
        "import os, signal, sys\n"
        "print('ready', flush=True)\n"
        "sys.exit(9) if os.environ['RANK'] == '1' else signal.pause()\n"
    )
    how = (*NODE, "--rdzv-endpoint", endpoint, script)
    zero, one = (launch.start("--node-rank", str(rank), *how) for rank in (0, 1))
    assert zero.wait().returncode == 9, zero.output
    assert one.wait().returncode == 9, one.output
    assert "rank 1 of 2" in zero.stderr


def test_a_stop_of_any_node_stops_all(launch, programs, endpoint: str) -> None:
    how = (*NODE, "--show-ranks", "all", "--rdzv-endpoint", endpoint, programs / "patient.py", "leave75")
    zero, one = (launch.start("--node-rank", str(rank), *how) for rank in (0, 1))
    zero.says("rank 0 is ready")
    one.says("rank 1 is ready")
    one.signal(15)
    assert zero.wait().returncode == 75, zero.output
    assert one.wait().returncode == 75, one.output
    assert "SIGTERM to the agent of node 1" in zero.run.json("stop-0.json")["cause"]


@pytest.mark.parametrize("victim", ["host", "other"])
def test_a_killed_node_takes_nobody_hostage(launch, programs, endpoint: str, victim: str) -> None:
    how = (*NODE, "--show-ranks", "all", "--rdzv-endpoint", endpoint, programs / "patient.py", "ignore")
    zero, one = (launch.start("--node-rank", str(rank), *how) for rank in (0, 1))
    zero.says("rank 0 is ready")
    one.says("rank 1 is ready")
    dead, alive = (zero, one) if victim == "host" else (one, zero)
    dead.signal(9)
    dead.wait()
    assert alive.wait(10).returncode == 1, alive.output
    dead.gone()
    alive.gone()
    if victim == "other":
        assert "node 1: " in alive.stderr
    else:
        assert "supervisor" in alive.stderr


def test_two_nodes_rehearsed_here(launch, programs) -> None:
    """Two agents, GROUP_RANK 0 and 1, ranks counted through, and a crash on the second one restarts both."""
    job = launch.ok("--backend", "local", "--nodes", "2", "--procs", "2", "--show-ranks", "all", "--max-restarts", "1",
                    programs / "crash.py", "kill", "--rank", "3")  # fmt: skip
    for rank in range(4):
        assert f"rank {rank} is done" in job.run.log(rank, attempt=1)
    assert "rank 3 was killed by SIGKILL; restarting (1 of 1)" in job.stderr
