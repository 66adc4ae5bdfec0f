"""The command line: torchrun's spellings and ours, what is refused and how, and what --help costs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launcher import options, request
from launcher.errors import UsageError
from launcher.where import Surroundings

COMMAND = str(Path(sys.executable).with_name("launch"))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a script, a machine without GPUs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (tmp_path / "job.py").write_text("print(1)\n")
    return tmp_path


def spec_of(*arguments: str):
    return request.parse([*arguments, "job.py"], Surroundings()).spec


CPUS = os.cpu_count()
ACCEPTED = [
    # torchrun's command line -> what it means here
    (["--nproc-per-node", "4"], {"procs": 4, "device": "any", "nodes": 1}),
    (["--nproc_per_node=4"], {"procs": 4, "device": "any"}),
    (["--nproc-per-node=cpu"], {"procs": CPUS}),
    (["--nproc_per_node", "auto"], {"procs": CPUS}),
    ([], {"procs": 1, "nodes": 1, "device": "any", "preload": ("torch",), "grace_s": None, "max_restarts": 0}),
    (["--standalone", "--nnodes=1", "--nproc-per-node=2"], {"procs": 2, "meeting": None}),
    (["--standalone", "--nnodes=1:1"], {"nodes": 1}),
    (["--nnodes", "1:1", "--max_restarts", "3"], {"max_restarts": 3}),
    (["--max-restarts=3", "--monitor-interval=5", "--monitor_interval", "1"], {"max_restarts": 3}),
    (["--start-method=spawn", "--event-log-handler", "null", "--run-path"], {"procs": 1}),
    (["--shutdown-timeout", "12.5"], {"grace_s": 12.5}),
    (["--grace", "0", "--hang-timeout", "off"], {"grace_s": 0.0, "hang_timeout_s": 0.0}),
    (["--role", "trainer"], {"role": "trainer"}),
    (["--master-port", "1234", "--master-addr", "localhost"], {"master_port": 1234, "meeting": None}),
    (["--rdzv-id=x", "--rdzv-backend=c10d"], {"meeting": None}),
    (["--local-addr", "10.0.0.1"], {"local_addr": "10.0.0.1"}),
    (["--signals-to-handle", "SIGTERM,SIGUSR2"], {"stop_signals": ("SIGTERM", "SIGUSR2")}),
    (["--procs", "3"], {"procs": 3, "device": "cpu"}),
    (["--no-preload", "--procs=1"], {"preload": ()}),
    (["--preload", "torch, torchvision"], {"preload": ("torch", "torchvision")}),
    (["--backend", "local", "--nodes", "3"], {"nodes": 3, "meeting": None}),
    (["--backend", "local", "--nodes", "2:4", "--spares", "1"], {"nodes": 4, "least": 2, "spares": 1, "places": 5}),
    (["--backend", "local", "--nodes", "2:2"], {"nodes": 2, "least": None, "elastic": False}),
    (["--hosts", "a,b,c,d,e", "--nodes", "2:3", "--spares", "1"], {"nodes": 3, "least": 2, "spares": 1, "places": 4}),
    (["--hosts", "a,b,c", "--spares", "1"], {"nodes": 2, "least": None, "world_size": 2, "elastic": True}),
    (["--nnodes", "1:2", "--rdzv-endpoint", "h", "--rdzv-conf", "last_call_timeout=3"], {"least": 1, "last_call_s": 3}),
    (["--virtual-local-rank"], {"virtual_local_rank": True}),
]


@pytest.mark.parametrize(("arguments", "wanted"), ACCEPTED, ids=[" ".join(a) or "nothing" for a, _ in ACCEPTED])
def test_accepted(here: Path, arguments: list[str], wanted: dict) -> None:
    spec = spec_of(*arguments)
    assert {name: getattr(spec, name) for name in wanted} == wanted
    assert spec.program.target == "job.py"


OUTPUTS = [
    (["-t", "3"], {"tee": {-1: 3}}),
    (["--tee", "0:1,1:2"], {"tee": {0: 1, 1: 2}}),
    (["-r3"], {"redirects": {-1: 3}}),
    (["--redirects=0"], {"redirects": {}}),
    (["--local-ranks-filter", "0,2"], {"local_ranks_filter": (0, 2)}),
    (["--local_ranks_filter=1"], {"local_ranks_filter": (1,)}),
    (["--show-ranks", "all"], {"show_ranks": None}),
    (["--show_ranks", "0,3"], {"show_ranks": (0, 3)}),
    (["--show-ranks", "none"], {"show_ranks": ()}),
    (["--log-line-prefix-template", "[${role_name}${rank}]:"], {"prefix": "[${role_name}${rank}]:"}),
]


@pytest.mark.parametrize(("arguments", "wanted"), OUTPUTS, ids=[" ".join(a) for a, _ in OUTPUTS])
def test_output_options(here: Path, arguments: list[str], wanted: dict) -> None:
    output = spec_of(*arguments).output
    assert {name: getattr(output, name) for name in wanted} == wanted


def test_log_dir_is_taken_from_here(here: Path) -> None:
    assert spec_of("--log-dir", "logs").output.log_dir == str(here / "logs")


MEETINGS = [
    # arguments, endpoint, node rank, run id, host (None: who can bind), join timeout
    (["--nnodes=2", "--node-rank=1", "--rdzv-endpoint=a:1", "--rdzv-id=7"], "a:1", 1, "7", False, 600),
    (["--nnodes=2", "--rdzv-backend=c10d", "--rdzv-endpoint=a:1"], "a:1", None, "none", None, 600),
    (["--nnodes=2", "--rdzv-backend=c10d", "--rdzv-endpoint=a", "--node_rank", "1"], "a", 1, "none", None, 600),
    (["--nnodes=2", "--master-addr=h", "--master-port=9"], "h:9", 0, "none", True, 600),
    (["--nnodes=2", "--master_addr=::1", "--node-rank=1"], "[::1]:29500", 1, "none", False, 600),
    (["--nnodes=2", "--rdzv-backend=c10d", "--rdzv-endpoint=a", "--rdzv-conf=is_host=1,join_timeout=5"], "a", None,
     "none", True, 5),
    (["--nnodes=2", "--rdzv-backend=c10d", "--rdzv-endpoint=a", "--rdzv-conf", "is_host=0", "--rdzv-conf", "timeout=9"],
     "a", None, "none", False, 9),
    (["--nnodes=1:1", "--rdzv-endpoint=a:5", "--rdzv-backend=c10d"], "a:5", None, "none", None, 600),
]  # fmt: skip


@pytest.mark.parametrize("case", MEETINGS, ids=[" ".join(m[0]) for m in MEETINGS])
def test_meetings(here: Path, case: tuple) -> None:
    arguments, endpoint, rank, run_id, is_host, timeout = case
    meeting = spec_of(*arguments).meeting
    assert meeting is not None
    assert (meeting.endpoint, meeting.node_rank, meeting.run_id, meeting.is_host, meeting.join_timeout_s) == (
        endpoint, rank, run_id, is_host, timeout
    )  # fmt: skip


def test_pet_variables_stand_for_flags(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "PET_NPROC_PER_NODE": "3", "PET_NNODES": "2", "PET_NODE_RANK": "1", "PET_RDZV_ENDPOINT": "h:1",
        "PET_MAX_RESTARTS": "4", "PET_RDZV_ID": "r", "PET_TEE": "3", "PET_RDZV_CONF": "join_timeout=7",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    spec = spec_of()
    assert (spec.procs, spec.nodes, spec.max_restarts, spec.output.tee) == (3, 2, 4, {-1: 3})
    assert spec.meeting is not None
    assert (spec.meeting.node_rank, spec.meeting.run_id, spec.meeting.join_timeout_s) == (1, "r", 7)
    assert spec_of("--nproc-per-node", "5").procs == 5  # a flag stands above its variable


def test_gpus_are_counted(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,7")
    assert (spec_of("--gpus", "2").procs, spec_of("--gpus", "2").device) == (2, "gpu")
    for wanted in (["--gpus", "all"], ["--nproc-per-node", "gpu"], ["--nproc-per-node", "auto"]):
        assert spec_of(*wanted).procs == 3
    with pytest.raises(UsageError, match=r"--gpus 4: found 3 GPUs on \S+ \(CUDA_VISIBLE_DEVICES='4,5,7'\)"):
        spec_of("--gpus", "4")
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "2")
    assert spec_of("--gpus", "all").procs == 2


REFUSED = [
    (["--gpus", "1"], "--gpus 1: found 0 GPUs on"),
    (["--gpus", "many"], "--gpus 'many': give a number, or all"),
    (["--nproc-per-node", "gpu"], "--nproc-per-node gpu: found 0 GPUs"),
    (["--nproc-per-node", "0"], "--nproc-per-node '0': give a number >= 1, gpu, cpu or auto"),
    (["--nproc-per-node", "tpu"], "give a number >= 1, gpu, cpu or auto"),
    (["--procs", "0"], "procs is 0; it must be a whole number >= 1"),
    (["--procs", "2", "--gpus", "1"], "--gpus and --procs both say how many ranks a node has"),
    (["--procs", "2", "--nproc-per-node", "1"], "both say how many"),
    (["--nodes", "2"], "Rehearse them on this machine with --backend local, or start one launch per node"),
    (["--nodes", "2", "--nnodes", "2"], "are the same thing"),
    (["--nnodes", "1:4"], "4 nodes, but no word on where"),
    (["--nnodes", "4:2"], "--nnodes 4:2: give N >= 1, or MIN:MAX with 1 <= MIN <= MAX"),
    (["--backend", "local", "--nodes", "0:2"], "--nodes 0:2: give N >= 1"),
    (["--backend", "local", "--nodes", "2:"], "--nodes '2:': give N or MIN:MAX"),
    (["--spares", "1"], "2 nodes, but no word on where"),
    (["--spares", "-1"], "--spares -1: give a whole number >= 0"),
    (["--hosts", "a,b", "--spares", "2"], "--spares 2: --hosts names 2, and at least one of them must work"),
    (["--hosts", "a,b", "--nodes", "2", "--spares", "1"], "--nodes 2 and --spares 1: --hosts names 2"),
    (["--hosts", "a,b", "--nodes", "2:3"], "--nodes 2:3: --hosts names 2"),
    (["--nnodes", "1:2", "--rdzv-endpoint", "h", "--rdzv-conf", "last_call_timeout=soon"], "give seconds"),
    (["--nnodes", "two"], "--nnodes 'two': give N or MIN:MAX"),
    (["--nnodes", "2", "--standalone"], "--standalone is one node"),
    (["--node-rank", "1"], "--node-rank 1 of 1 node: give --nnodes and --rdzv-endpoint as well"),
    (["--nnodes", "2", "--node-rank", "2"], "--node-rank 2: with 2 nodes it is 0 to 1"),
    (["--nnodes", "2", "--backend", "local", "--node-rank", "1"], "--backend local starts all nodes here"),
    (["--nnodes", "2", "--rdzv-backend", "etcd", "--rdzv-endpoint", "h"], "'etcd' is not supported: static and c10d"),
    (["--nnodes", "2", "--rdzv-endpoint", "h", "--rdzv-conf", "colour=red"], "--rdzv-conf colour: not supported"),
    (["--nnodes", "2", "--rdzv-endpoint", "h", "--rdzv-conf", "colour"], "give key=value pairs"),
    (["--nnodes", "2", "--rdzv-endpoint", "h", "--rdzv-conf", "timeout=soon"], "give seconds"),
    (["--nnodes", "2", "--rdzv-endpoint", "h", "--rdzv-conf", "rank=one"], "--rdzv-conf rank=one: give a number"),
    (["--max-restarts", "-1"], "max-restarts is -1; it must be a whole number >= 0"),
    (["--grace", "-1"], "--grace is -1.0; it must be a number of seconds >= 0"),
    (["--grace", "nan"], "--grace is nan"),
    (["--logs-specs", "x"], "--logs-specs is not supported: logs are files per rank in the run folder"),
    (["--numa-binding", "node"], "--numa-binding is not supported"),
    (["--duplicate-stdout-filters", "x"], "--duplicate-stdout-filters is not supported"),
    (["--duplicate_stderr_filters", "x"], "--duplicate-stderr-filters is not supported"),
    (["--event-log-handler", "console"], "events.jsonl in the run folder"),
    (["--start-method", "fork"], "--start-method fork: torchrun ignores it for scripts"),
    (["--tee", "4"], "--tee '4': give 0 to 3, or local ranks like 0:3,1:1"),
    (["-r", "a:1"], "--redirects 'a:1'"),
    (["--show-ranks", "first"], "--show-ranks 'first': give numbers like 0,3, all or none"),
    (["--local-ranks-filter", "0;1"], "--local-ranks-filter '0;1'"),
    (["--signals-to-handle", "SIGKILL"], "'SIGKILL' is no signal that can be handled"),
    (["--signals-to-handle", "SIGFOO"], "'SIGFOO' is no signal"),
    (["--preload", "torch", "--no-preload"], "contradict each other"),
    (["--preload", "a-b"], "--preload 'a-b' is no module name"),
    (["--virtual-local-rank", "--procs", "2"], "--virtual-local-rank numbers GPUs; with --procs there are none"),
    (["-m", "--no-python"], "give one of them"),
    (["--no-python"], "there is no program 'job.py' on PATH"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "says"), REFUSED, ids=[" ".join(r[0]) for r in REFUSED])
def test_refused(here: Path, arguments: list[str], says: str) -> None:
    with pytest.raises(UsageError) as caught:
        spec_of(*arguments)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--nproc-per-nod", "2"], "--nproc-per-node"),
        (["--max-restart", "2"], "--max-restarts"),
        (["--proc", "2"], "--procs"),
        (["--backend", "local", "--node", "2"], "--nodes"),
    ],
)
def test_the_nearest_option_is_named(here: Path, arguments: list[str], says: str) -> None:
    with pytest.raises(click.UsageError) as caught:
        spec_of(*arguments)
    assert arguments[-2] in caught.value.format_message()
    assert says in caught.value.format_message()


def test_programs_are_looked_at_before_anything_starts(here: Path) -> None:
    (here / "bad.py").write_text("def f(:\n")
    (here / "folder").mkdir()
    for arguments, says in (
        (["jop.py"], "there is no script 'jop.py' (looked for"),
        (["jop.py"], "Python files there: bad.py, job.py"),
        (["bad.py"], "bad.py does not compile"),
        (["folder"], "folder is a folder without __main__.py"),
        (["-m", "a b"], "is no module name"),
        ([], "no program given"),
    ):
        with pytest.raises(UsageError) as caught:
            request.parse(arguments)
        assert says in str(caught.value)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.text(st.characters(blacklist_characters="\0", blacklist_categories=("Cs",)), max_size=12), max_size=6)
)
def test_the_programs_arguments_are_its_own(here: Path, arguments: list[str]) -> None:
    assert request.parse(["--procs", "2", "job.py", *arguments]).spec.program.args == tuple(arguments)


def test_the_programs_arguments_arrive_byte_for_byte(launch) -> None:
    """Through spec, socket and exec, to a forked rank and one that is executed: also what looks like our options."""
    arguments = ["--procs", "5", "--help", "-m", "--", "a b", "", "it's",
                 '"q"', "$HOME", "`id`", "a\nb", "ä€🦊", "*", "\\", "\t",
                 "--nproc_per_node", b"\xff\xfe".decode(errors="surrogateescape")]  # fmt: skip
    script = launch.script("import json, sys\nprint(json.dumps(sys.argv[1:]))\n", "my job.py")
    job = launch.ok("--procs", "1", "--preload", "json", script.name, *arguments)
    (line,) = [line for line in job.stdout.splitlines() if line.startswith("[0] ")]
    assert json.loads(line[4:]) == arguments
    job = launch.ok("--procs", "1", "--no-python", "printf", r"%s|", *arguments)
    assert job.run.log(0).encode(errors="surrogateescape") == os.fsencode("|".join([*arguments, ""])) + b"\n"


@pytest.mark.parametrize("columns", [80, 100, 200])
def test_help_is_short_and_imports_no_torch(columns: int) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", COMMAND, "--help"], capture_output=True, text=True,
        env=os.environ | {"COLUMNS": str(columns)}, timeout=30,
    )  # fmt: skip
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert 24 <= len(lines) <= 80
    assert max(map(len, lines)) <= columns
    assert not any(line.endswith("-") for line in lines)
    words = done.stdout.split()
    for option in options.COMMAND.params:
        if isinstance(option, click.Option) and option.name not in options.REFUSED and option.name != "version":
            assert any(name.rstrip(",") in words for name in (f"{option.opts[-1]},", option.opts[-1])), option
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "click" in imported
    assert not imported & {"torch", "numpy", "trainer", "submitit", "rich"}


def test_wrong_usage_exits_2_and_leaves_nothing(launch) -> None:
    for arguments in (
        ["--procs", "2", "missing.py"],
        ["--colour", "red", "x.py"],
        [],
        ["resume"],
        ["resume", "nothing"],
    ):
        job = launch(*arguments)
        assert job.returncode == 2, job.output
        assert job.stderr.startswith("launch: error: ")
        assert "Traceback" not in job.stderr
        assert job.stdout == ""
    assert list(launch.cwd.iterdir()) == []


def test_version_and_flags_are_frozen() -> None:
    """Growth of the command line is a visible change."""
    found = {opt for p in options.PARAMETERS if isinstance(p, click.Option) for opt in p.opts}
    assert found - {"--version"} == {
        "--account", "--array", "--backend", "--comment", "--constraint", "--cpus-per-rank", "--dependency",
        "--detach", "--dry-run", "--duplicate-stderr-filters", "--duplicate-stdout-filters", "--env",
        "--event-log-handler", "--exclude", "--gpus", "--grace", "--hang-timeout", "--hosts",
        "--job-name", "--local-addr", "--local-ranks-filter", "--log-dir",
        "--log-line-prefix-template", "--logs-specs", "--master-addr", "--master-port", "--max-failures",
        "--max-restarts", "--max-timeouts", "--mem", "--module", "--monitor-interval", "--nnodes", "--no-preload",
        "--no-python", "--no-snapshot", "--node-rank", "--nodelist", "--nodes", "--notify", "--nproc-per-node",
        "--numa-binding",
        "--partition", "--preflight", "--preload", "--procs", "--qos", "--rdzv-backend", "--rdzv-conf",
        "--rdzv-endpoint", "--rdzv-id", "--redirects", "--requeue", "--reservation", "--role", "--run",
        "--run-path", "--sbatch",
        "--setup", "--show-ranks", "--shutdown-timeout", "--signals-to-handle", "--snapshot", "--spares",
        "--standalone", "--start-method", "--stop-lead", "--sweep", "--sweep-file", "--sync", "--tee",
        "--time", "--virtual-local-rank", "-d", "-m", "-r", "-t",
    }  # fmt: skip
