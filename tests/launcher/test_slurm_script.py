from __future__ import annotations

import os
import subprocess
import sys

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from launcher.backends.slurm_script import batch_script, directive, quote, submission_environment
from launcher.errors import UsageError

# Any bytes a program can be given, as Python holds them.
WORD = st.binary(max_size=30).filter(lambda b: b"\0" not in b).map(os.fsdecode)


@given(st.lists(st.lists(WORD | st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])), max_size=6),
                min_size=40, max_size=40))  # fmt: skip
@example(
    [["a b", "it's", 'x"y"', "$HOME `id` ;", "a\nb", "cr\r\n", "\\", "'\\''", "é\udcff1", "\x017", "", "-n", "!x"]]
)
@settings(max_examples=10, deadline=None)
def test_bash_gets_every_word_byte_for_byte(lists):
    words = [word for one in lists for word in one]
    text = batch_script(
        {},
        [sys.executable, "-S", "-c", "import sys,os\nos.write(1,b'\\0'.join(map(os.fsencode,sys.argv[1:])))", *words],
    )
    assert "\r" not in text
    done = subprocess.run(["bash"], input=text.encode(), capture_output=True, check=True)
    assert done.stdout == b"\0".join(map(os.fsencode, words))


@given(WORD)
def test_a_word_stays_on_one_line(word):
    assert quote(word).isprintable()


def test_the_whole_script():
    text = batch_script(
        {"job-name": "a b", "nodes": 2, "requeue": True, "exclusive": False, "time": "1-02:03:00"},
        ["/usr/bin/python3", "-c", "print('x')\n"],
        environment={"LAUNCH_RUN_ID": "r 1"},
        setup=["module load cuda\nmodule load nccl"],
    )
    assert text == (
        "#!/bin/bash\n"
        '#SBATCH --job-name="a b"\n'
        "#SBATCH --nodes=2\n"
        "#SBATCH --requeue\n"
        "#SBATCH --time=1-02:03:00\n"
        "export LAUNCH_RUN_ID='r 1'\n"
        "{\nmodule load cuda\nmodule load nccl\n"
        "} || { code=$?; echo $'launch: --setup failed: module load cuda\\012module load nccl' >&2; exit $code; }\n"
        "exec /usr/bin/python3 -c $'print(\\047x\\047)\\012'\n"
    )


def run_script(text: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash"], input=text, capture_output=True, text=True, check=False)


def test_the_command_takes_the_place_of_bash_and_sees_what_setup_did():
    done = run_script(
        batch_script({}, ["bash", "-c", "echo $1 $A $B $PPID", "x", "$word"], environment={"A": "from us"},
                     setup=["export B=$A,setup"])
    )  # fmt: skip
    assert done.stdout.split() == ["$word", "from", "us", "from", "us,setup", str(os.getpid())]


def test_a_failed_setup_starts_nothing():
    done = run_script(batch_script({}, ["echo", "started"], setup=["true", "ls /nowhere", "echo next"]))
    assert (done.returncode, done.stdout) == (2, "")
    assert "launch: --setup failed: ls /nowhere" in done.stderr


@pytest.mark.parametrize(
    ("option", "value", "line"),
    [
        ("nodes", 2, "--nodes=2"),
        ("requeue", True, "--requeue"),
        ("output", "/r/%A_%a.log", "--output=/r/%A_%a.log"),
        ("signal", "B:USR1@60", "--signal=B:USR1@60"),
        ("comment", "it's $HOME # no", '--comment="it\'s $HOME # no"'),
        ("comment", 'a "b" \\', r'--comment="a \"b\" \\"'),
        ("comment", "", '--comment=""'),
        ("constraint", "a100&nvlink", '--constraint="a100&nvlink"'),
    ],
)
def test_directives(option, value, line):
    # That sbatch reads them back as given is tested on a real cluster.
    assert directive(option, value) == "#SBATCH " + line


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("comment", "a\nb", "line ends"),
        ("comment", "a\rb", "line ends"),
        ("comment", "a\0b", "control"),
        ("--gres", "gpu:1", "long name"),
        ("N", "2", "long name"),
        ("gres=gpu:1 --time", "2", "long name"),
    ],
)
def test_what_no_directive_can_hold_is_refused(option, value, says):
    with pytest.raises(UsageError, match=says):
        directive(option, value)


@pytest.mark.parametrize(
    "wrong", [{"command": ["a\0b"]}, {"environment": {"A": "\0"}}, {"environment": {"A B": ""}}, {"setup": ["\0"]}]
)
def test_what_no_script_can_hold_is_refused(wrong):
    with pytest.raises(UsageError):
        batch_script({}, **({"command": ["true"]} | wrong))


PERSON = {"PATH": "/bin", "SLURM_CONF": "/c", "SBATCH_ACCOUNT": "mine", "SBATCH_PARTITION": "slow"}
JOB = {"SLURM_JOB_ID": "7", "SLURM_CPU_BIND": "quiet,mask_cpu:0x1", "SRUN_CPUS_PER_TASK": "3", "SLURM_NTASKS": "9"}


@pytest.mark.parametrize(
    ("environ", "options", "kept"),
    [
        (PERSON, {}, set(PERSON)),
        (PERSON, {"partition": "fast"}, set(PERSON) - {"SBATCH_PARTITION"}),
        (PERSON, {"partition": False}, set(PERSON)),
        (PERSON | JOB, {}, {"PATH", "SLURM_CONF"}),
        ({"SLURM_CPU_BIND": "x"}, {}, set()),  # left behind by a shell that is no job any more
        ({"SBATCH_TIMELIMIT": "5", "SBATCH_ARRAY_INX": "0-3"}, {"time": "9", "array": "0-1"}, set()),
        ({"SBATCH_MEM_PER_CPU": "5"}, {"mem": "9G"}, set()),
        ({"SBATCH_NO_REQUEUE": "1", "SBATCH_GRES": "gpu:8"}, {"requeue": True, "gpus-per-node": 2}, set()),
    ],
)
def test_submission_environment(environ, options, kept):
    assert submission_environment(environ, options) == {name: environ[name] for name in kept}
