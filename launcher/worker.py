"""One rank, after the fork: make the process what a fresh interpreter would be, then run the program in it.

What cannot be the same as in a fresh interpreter: variables that torch and its libraries read while they are imported
(they were read once, in the zygote); the hash seed (shared by the ranks of a node); four frames of ours below the
program's first one, which tracebacks of uncaught exceptions do not show but `inspect.stack()` does. numpy's OpenBLAS is
loaded with one thread, since it would start its pool before the fork; the rank's own number is set here.
"""

from __future__ import annotations

import atexit
import builtins
import contextlib
import ctypes
import faulthandler
import fcntl
import gc
import importlib.machinery
import io
import json
import os
import pkgutil
import random
import resource
import runpy
import signal
import sys
import threading
import time
import traceback
import types
from pathlib import Path
from typing import Any, NoReturn

from launcher.processes import die_with_parent, traced_by
from launcher.stacks import SIGNAL

__all__ = ["run"]


def run(order: dict[str, Any]) -> None:
    """Carry out the zygote's order in this process; returns when the program ends, or raises what it raises.

    The order holds: program (kind, target, args), python (interpreter), env, cwd, entry (what the interpreter would put
    first on sys.path), path (folders behind it, before all others), stacks (file for its stacks), fds (stdout, stderr;
    none: keep), terminal (stay in the terminal's session), parent (pid of the zygote), tracer (pid of the agent),
    fork (False: exec a plain interpreter).
    """
    die_with_parent(order["parent"])
    traced_by(order["tracer"])
    if not order["terminal"]:
        os.setsid()
    _restore_signals(order["ignored"])
    _redirect(order.get("fds", []), keep_stdin=order["stdin"])
    os.chdir(order["cwd"])
    program = order["program"]
    if program["kind"] == "command" or not order["fork"]:
        _exec(order)
    environment: dict[str, str] = order["env"]
    os.environ.clear()
    os.environ.update(environment)
    _fresh_streams(environment)
    _tell_stacks(order["stacks"])
    if faulthandler.is_enabled():  # PYTHONFAULTHANDLER: restoring the signals took its handlers away
        faulthandler.disable()
        faulthandler.enable()
    _fresh_randomness()
    threading.main_thread()._set_native_id()  # type: ignore[attr-defined]  # a fork leaves the parent's
    _set_threads(environment)
    sys.path[:0] = order["path"]
    _run_python(program["kind"], program["target"], program["args"], order["python"], environment, order["entry"])


def _restore_signals(ignored: list[int]) -> None:
    for number in signal.valid_signals():
        if number in (signal.SIGKILL, signal.SIGSTOP):
            continue
        with contextlib.suppress(OSError, ValueError):
            default: Any = signal.SIG_DFL
            if number == signal.SIGINT:
                default = signal.default_int_handler
            elif number in (signal.SIGPIPE, signal.SIGXFSZ, SIGNAL, *ignored):
                # As the interpreter itself sets at start, or as launch found it; who cannot write stacks is not to
                # die of being asked.
                default = signal.SIG_IGN
            signal.signal(number, default)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def _tell_stacks(path: str) -> None:
    """When it is asked by `SIGNAL`, a handler in C writes the stacks of all threads to a file that is held open."""
    given = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
    # Out of the way of programs that count on the lowest free number.
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    kept = fcntl.fcntl(given, fcntl.F_DUPFD_CLOEXEC, min(200, most // 2))
    os.close(given)
    faulthandler.register(SIGNAL, kept, all_threads=True)


def _redirect(fds: list[int], *, keep_stdin: bool) -> None:
    if not keep_stdin:
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.close(null)
    for target, fd in zip((1, 2), fds, strict=False):
        os.dup2(fd, target)
        os.close(fd)


def _exec(order: dict[str, Any]) -> None:
    program = order["program"]
    command = [program["target"], *program["args"]]
    environment: dict[str, str] = order["env"]
    if program["kind"] != "command":
        # Whole lines reach the log as they are printed, and none is lost when the rank is killed.
        environment.setdefault("PYTHONUNBUFFERED", "1")
        if program["kind"] == "module" and order["entry"] != order["cwd"]:
            # -m would look into the working directory first, where the code may be another by now.
            start = f"import runpy, sys; sys.path[0] = {order['entry']!r}; runpy._run_module_as_main({command[0]!r})"
            command = [order["python"], "-c", start, *command[1:]]
        else:
            command = [order["python"], *(["-m"] if program["kind"] == "module" else []), *command]
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # ignored signals would stay ignored across exec
    if hasattr(signal, "SIGXFSZ"):
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    try:
        os.execvpe(command[0], command, environment)
    except OSError as error:
        os.write(2, f"launch: {command[0]} cannot be started: {error.strerror}\n".encode())
        os._exit(126 if isinstance(error, PermissionError) else 127)


def _fresh_streams(environment: dict[str, str]) -> None:
    """sys.std* as the interpreter makes them, but stdout by lines, so that no printed line is lost by a SIGKILL."""
    unbuffered = bool(environment.get("PYTHONUNBUFFERED")) and not sys.flags.ignore_environment
    for name, fd, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
        old = getattr(sys, f"__{name}__")  # None if launch was started with it closed
        buffer: Any = open(fd, f"{mode}b", 0 if unbuffered and mode == "w" else -1, closefd=False)  # noqa: SIM115
        getattr(buffer, "raw", buffer).name = f"<{name}>"
        stream = io.TextIOWrapper(
            buffer,
            # PYTHONIOENCODING, UTF-8 mode and the locale were weighed when the zygote's interpreter started.
            encoding=None if old is None else old.encoding,
            errors=("backslashreplace" if name == "stderr" else "strict") if old is None else old.errors,
            newline="\n",
            line_buffering=mode == "w" and not unbuffered,
            write_through=unbuffered,
        )
        stream.mode = mode  # type: ignore[misc]  # as the interpreter does
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def _fresh_randomness() -> None:
    random.seed()
    numpy = sys.modules.get("numpy")
    if numpy is not None and "numpy.random" in sys.modules:
        numpy.random.seed(None)
    process = sys.modules.get("multiprocessing.process")
    if process is not None:
        process.current_process().authkey = os.urandom(32)
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.default_generator.seed()  # the CPU's; CUDA's start from a constant, here and in a fresh interpreter


def _set_threads(environment: dict[str, str]) -> None:
    wanted = environment.get("OPENBLAS_NUM_THREADS") or environment.get("OMP_NUM_THREADS", "").split(",")[0]
    threads = int(wanted) if wanted.isdigit() else len(os.sched_getaffinity(0))
    if threads > 1 and "numpy" in sys.modules:
        _set_openblas_threads(threads)


def _set_openblas_threads(threads: int) -> None:
    with open("/proc/self/maps") as maps:
        libraries = {line.split(None, 5)[-1].strip() for line in maps if "openblas" in line}
    for path in libraries:
        library = ctypes.CDLL(path)
        for name in ("scipy_openblas_set_num_threads64_", "openblas_set_num_threads64_", "openblas_set_num_threads"):
            function = getattr(library, name, None)
            if function is not None:
                function(ctypes.c_int(threads))
                break


def _run_python(
    kind: str, target: str, args: list[str], python: str, environment: dict[str, str], entry: str
) -> NoReturn:
    """The interpreter's own way of `python target args` or `python -m target args`, in a new `__main__`."""
    error_file = environment.get("TORCHELASTIC_ERROR_FILE")
    safe_path = bool(getattr(sys.flags, "safe_path", False))  # python -P, PYTHONSAFEPATH; since 3.11
    for name in [n for n in sys.modules if n == "launcher" or n.startswith("launcher.")]:
        del sys.modules[name]  # a user's own package of that name must be found
    main = types.ModuleType("__main__")
    main.__dict__.update(__builtins__=builtins, __loader__=None, __spec__=None, __package__=None)
    if sys.version_info < (3, 14):
        main.__dict__.setdefault("__annotations__", {})
    sys.modules["__main__"] = main
    preloaded = set(sys.modules)
    sys.argv = [target, *args]
    path = target if target.startswith("/") else f"{Path.cwd()}/{target}"  # . and .. stay
    sys.orig_argv = [python, *(["-m"] if kind == "module" else []), target, *args]
    code = 0
    failure: BaseException | None = None
    try:
        if kind == "module":
            if not safe_path:
                sys.path.insert(0, entry)
            runpy._run_module_as_main(target)  # type: ignore[attr-defined]  # what the interpreter's -m calls
        elif pkgutil.get_importer(path) is not None:
            sys.path.insert(0, path)
            runpy._run_module_as_main("__main__", False)  # type: ignore[attr-defined]
        else:
            if not safe_path:
                sys.path.insert(0, str(Path(target).resolve().parent))
            main.__file__ = path
            main.__dict__["__cached__"] = None
            main.__loader__ = importlib.machinery.SourceFileLoader("__main__", path)
            with open(path, "rb") as file:
                source = file.read()
            exec(compile(source, path, "exec", dont_inherit=True), main.__dict__)
    except SystemExit as leaving:
        code = _exit_code(leaving)
    except BaseException as error:
        trace = error.__traceback__
        while trace is not None and trace.tb_frame.f_globals is not main.__dict__:
            trace = trace.tb_next
        failure = error.with_traceback(trace or error.__traceback__)
    if failure is not None:  # not inside the except, where it would become the context of what a failing hook raises
        if error_file:
            _write_error(error_file, failure)
        code = _show(failure)
    _finish(code, main, preloaded)


def _show(error: BaseException) -> int:
    """What the interpreter does with an exception that nobody caught; returns the exit code."""
    trace = error.__traceback__
    sys.last_type, sys.last_value, sys.last_traceback = type(error), error, trace
    if sys.version_info >= (3, 12):
        sys.last_exc = error
    hook_error: BaseException | None = None
    try:
        sys.excepthook(type(error), error, trace)
    except SystemExit as leaving:
        return _exit_code(leaving)
    except BaseException as broken:
        hook_error = broken
    if hook_error is not None:
        trace = hook_error.__traceback__
        _print_error("Error in sys.excepthook:", hook_error.with_traceback(trace and trace.tb_next))
        _print_error("\nOriginal exception was:", error)
    return -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1


def _print_error(title: str, error: BaseException) -> None:
    if sys.stderr is not None:
        sys.stderr.write(title + "\n")
        sys.__excepthook__(type(error), error, error.__traceback__)


def _exit_code(leaving: SystemExit) -> int:
    """What the interpreter makes of sys.exit(value)."""
    if leaving.code is None:
        return 0
    if isinstance(leaving.code, int):
        return leaving.code & 0xFF
    if sys.stderr is None:
        os.write(2, f"{leaving.code}\n".encode(errors="backslashreplace"))
    else:
        sys.stderr.write(f"{leaving.code}\n")
    return 1


def _finish(code: int, main: types.ModuleType, preloaded: set[str]) -> NoReturn:
    """End as the interpreter does: join threads, run exit handlers, let go of the program's objects, flush, exit.

    What was loaded before the fork is left standing: taking torch apart writes to every page that the ranks of a node
    share, and cost 8 ranks on 2 cores 1.1 s of 2.6 s. So destructors of objects that only preloaded modules hold, and
    exit handlers of C libraries, do not run; `--no-preload` is for programs that need them.
    """
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    _flush()
    for name in [n for n in sys.modules if n not in preloaded]:
        del sys.modules[name]
    sys.last_exc = sys.last_value = sys.last_traceback = None  # type: ignore[attr-defined]
    main.__dict__.clear()
    gc.collect()
    if not _flush() and code == 0:
        code = 120  # the interpreter's own code for output that could not be written
    ctypes.CDLL(None).fflush(None)  # what C code printed
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def _flush() -> bool:
    flushed = True
    for stream in (sys.stdout, sys.stderr):
        if stream is None or getattr(stream, "closed", False):
            continue
        try:
            stream.flush()
        except Exception:  # whatever object the program put there
            flushed = flushed and stream is not sys.stdout
    return flushed


def _write_error(path: str, error: BaseException) -> None:
    """The record that the agent reads, in the shape of torch's `@record`, at the moment of the exception."""
    now = time.monotonic_ns()
    lines = traceback.format_exception(type(error), error, error.__traceback__)
    try:
        said = f"{type(error).__name__}: {error}"
    except Exception:  # the program's own __str__ is at fault, and is not what failed
        said = f"{type(error).__name__}: <its str() failed>"
    record = {
        "message": {
            "message": said,
            "extraInfo": {
                "py_callstack": "".join(lines),
                "timestamp": str(int(time.time())),
                "monotonic_ns": now,
                "wall_ns": time.time_ns(),
            },
        }
    }
    temporary = f"{path}.{os.getpid()}"
    with contextlib.suppress(OSError), open(temporary, "w") as file:
        json.dump(record, file)
        file.close()
        Path(temporary).replace(path)
