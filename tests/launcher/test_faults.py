"""Of which class a failure is: a table of what was seen and what it is held to be."""

from __future__ import annotations

from dataclasses import replace

import pytest

from launcher.failure import RankExit, RootCause
from launcher.faults import classify

HEAD = "Traceback (most recent call last):"


def root(code: int, said: str = "", *, tail: tuple[str, ...] = (), left_early: bool = False) -> RootCause:
    """said: the last line of a traceback."""
    kind, _, message = said.partition(": ")
    trace = f'{HEAD}\n  File "job.py", line 1, in <module>\n    import job\n{said}\n'
    error = {"type": kind.rpartition(".")[2], "message": message, "traceback": trace} if said else None
    ended = RankExit(1, 1, 0, "a", 100, code, 5, False, "/logs/1", error, tail)
    return RootCause(ended, (0,), left_early)


TABLE = [
    (root(1, "ValueError: no such label: 17"), "user code"),
    (root(3), "user code"),
    (root(-11), "user code"),
    (root(0, left_early=True), "user code"),
    (root(1, "MemoryError"), "out of memory"),
    (root(1, "RuntimeError: [enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"),
     "out of memory"),
    (root(1, "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20 MiB"), "out of memory"),
    (root(1, "RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), "out of memory"),
    (root(1, "OSError: [Errno 28] No space left on device: '/data/x'"), "storage"),
    (root(1, "OSError: [Errno 5] Input/output error"), "storage"),
    (root(1, "botocore.exceptions.ClientError: An error occurred (SlowDown) when calling the UploadPart operation"),
     "storage"),
    (root(1, 'botocore.exceptions.ReadTimeoutError: Read timeout on endpoint URL: "http://s3/b"'), "storage"),
    (root(1, "RuntimeError: DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's "
             "workers are out of shared memory."), "storage"),
    (root(-7), "storage"),
    (root(1, "torch.AcceleratorError: CUDA error: uncorrectable ECC error encountered"), "gpu"),
    (root(1, "torch.AcceleratorError: CUDA error: device-side assert triggered"), "user code"),
    (root(-9), "killed"),
    (root(-15), "killed"),
    (root(-2, "KeyboardInterrupt"), "killed"),
    (root(1, "RuntimeError: [..] Connection closed by peer [127.0.0.1]:1"), "lost peer"),
    (root(-6, tail=("terminate called", "[..] Watchdog caught collective operation timeout")), "lost peer"),
    (root(134, tail=("malloc(): std::bad_alloc",)), "out of memory"),
    (root(-15, "AssertionError: boom"), "user code"),  # on its way out when it was stopped
]  # fmt: skip


@pytest.mark.parametrize(("cause", "kind"), TABLE)
def test_classes(cause: RootCause, kind: str) -> None:
    fault = classify(cause, early=True)
    assert fault.kind == kind
    assert fault.again
    assert fault.evidence


def test_what_is_no_ranks_own_failure() -> None:
    lost = root(1, "RuntimeError: Connection reset by peer")
    assert classify(None, gone="node 1: b no longer answers").kind == "lost node"
    assert classify(lost, gone="node 1: b no longer answers").evidence == "node 1: b no longer answers"
    assert classify(root(3), gone="node 1: b no longer answers").kind == "user code"
    assert classify(None, hung="rank 0 has made no step for 600 s").kind == "hang"
    killed = root(-9)
    oom = classify(RootCause(replace(killed.exit, killed_for_memory=True), ()))
    assert (oom.kind, oom.advice != "") == ("out of memory", True)


@pytest.mark.parametrize(
    ("cause", "again"),
    [
        (root(1, "SyntaxError: invalid syntax"), False),
        (root(1, "ModuleNotFoundError: No module named 'einops'"), False),
        (root(1, "ImportError: cannot import name 'x' from 'y' (/y.py)"), False),
        (root(1, "trainer.errors.ConfigError: max_epochs=-3"), False),
        (root(2, tail=("usage: job.py [-h] [--lr LR]", "job.py: error: unrecognized arguments: --lrr")), False),
        # On one host only, or by chance.
        (root(1, "ImportError: libcudart.so.13: cannot open shared object file: No such file or directory"), True),
        (root(1, "mine.ConfigError: max_epochs=-3"), True),
        (root(2, tail=("usage: none",)), True),
        (root(1, "FileNotFoundError: [Errno 2] No such file or directory: 'data'"), True),
        (root(1, "RuntimeError: the text\nSyntaxError: is not the exception"), True),
    ],
)
def test_what_is_not_worth_another_try(cause: RootCause, *, again: bool) -> None:
    assert classify(cause, early=True).again == again
    assert classify(cause, early=False).again
