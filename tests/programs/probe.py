"""Everything that a program can see of its own process, as JSON into the file named by PROBE."""

import argparse
import atexit
import inspect
import json
import multiprocessing
import os
import pickle
import random
import signal
import sys
import threading
from pathlib import Path


class Thing:
    """Defined in __main__, to be pickled and read back."""

    def __init__(self, value):
        self.value = value


def double(x):
    return 2 * x, os.getppid() != 1, __name__


def in_spawned(x):
    import builtins

    return x + 1, sys.argv[1:], hasattr(builtins, "print")


class Squares:
    def __len__(self):
        return 6

    def __getitem__(self, index):
        return index * index


def open_files():
    found = {}
    for fd in Path("/proc/self/fd").iterdir():
        try:
            target = str(fd.readlink())
        except OSError:
            continue  # the one that lists
        found[int(fd.name)] = target.split(":")[0].split("/")[-1]
    return {fd: what for fd, what in sorted(found.items()) if fd > 2}


def signals():
    found = {}
    for number in signal.valid_signals():
        if (handler := signal.getsignal(number)) is not None:
            found[int(number)] = getattr(handler, "__name__", str(int(handler)) if isinstance(handler, int) else "?")
    return found


def stream(file):
    raw = getattr(file.buffer, "raw", file.buffer)  # python -u has no buffer between
    return {
        "name": file.name if not isinstance(file.name, int) else "fd", "mode": file.mode, "encoding": file.encoding,
        "errors": file.errors, "newlines": file.newlines, "fd": file.fileno(), "closed": file.closed,
        "line_buffering": file.line_buffering, "write_through": file.write_through,
        "buffer": [type(file).__name__, type(file.buffer).__name__, type(raw).__name__],
        "buffer_name": str(file.buffer.name), "raw": [str(raw.name), raw.mode, raw.closefd],
    }  # fmt: skip


def of_main():
    main = sys.modules["__main__"]
    return {
        "is_me": main.__dict__ is globals(), "name": __name__, "package": __package__, "doc": __doc__,
        "file": globals().get("__file__"), "cached": globals().get("__cached__", "none"),
        "spec": None if __spec__ is None else [__spec__.name, __spec__.origin],
        "loader": type(__loader__).__name__, "loader_path": getattr(__loader__, "path", None),
        "annotations": globals().get("__annotations__", "none"), "builtins": __builtins__ is sys.modules["builtins"],
        "names": sorted(n for n in globals() if n.startswith("__")), "repr": repr(main),
    }  # fmt: skip


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("words", nargs="*")
    parser.add_argument("--torch", action="store_true")
    parser.add_argument("--processes", action="store_true")
    options = parser.parse_args()
    libraries = {"torch", "numpy"} & set(sys.modules)
    seen = {
        "main": of_main(), "argv": sys.argv, "orig_argv": sys.orig_argv, "path": sys.path, "flags": repr(sys.flags),
        "executable": sys.executable,
        "prefix": [sys.prefix, sys.exec_prefix, sys.base_prefix], "cwd": str(Path.cwd()),
        "warnoptions": sys.warnoptions, "xoptions": sys._xoptions, "prog": parser.prog, "usage": parser.format_usage(),
        "dont_write_bytecode": sys.dont_write_bytecode, "recursion": sys.getrecursionlimit(),
        "switch": sys.getswitchinterval(), "gc": __import__("gc").isenabled(),
        "threshold": __import__("gc").get_threshold(),
        "signals": signals(), "mask": [int(s) for s in signal.pthread_sigmask(signal.SIG_BLOCK, ())],
        "files": open_files(), "umask": os.umask(0o22), "nice": os.nice(0),
        "limits": [__import__("resource").getrlimit(n) for n in range(10)],
        "streams": {n: stream(getattr(sys, n)) for n in ("stdin", "stdout", "stderr")},
        "dunder_streams": [getattr(sys, n) is getattr(sys, f"__{n}__") for n in ("stdin", "stdout", "stderr")],
        "excepthook": sys.excepthook is sys.__excepthook__, "displayhook": sys.displayhook is sys.__displayhook__,
        "wakeup": signal.set_wakeup_fd(-1), "timer": signal.getitimer(signal.ITIMER_REAL),
        "threads": [threading.active_count(), threading.current_thread().name],
        "tasks": len(list(Path("/proc/self/task").iterdir())),
        "main_thread": threading.main_thread() is threading.current_thread(),
        "native": threading.get_native_id() == os.getpid() and threading.main_thread().native_id == os.getpid(),
        "process": [multiprocessing.current_process().name, multiprocessing.parent_process() is None,
                    multiprocessing.active_children(), multiprocessing.get_start_method(allow_none=True)],
        "launcher_loaded": [m for m in sys.modules if m.split(".")[0] == "launcher"],
        "source": inspect.getsource(Thing).splitlines()[0], "where": inspect.getsourcefile(Thing),
        "pickle": pickle.loads(pickle.dumps(Thing(5))).value, "qualified": Thing.__module__,
        "locale": __import__("locale").setlocale(0),
        "encoding": [sys.getfilesystemencoding(), sys.getdefaultencoding()],
        "faulthandler": __import__("faulthandler").is_enabled(),
        "trace": [sys.gettrace() is None, sys.getprofile() is None],
        "tz": __import__("time").tzname,
    }  # fmt: skip
    own = {
        "random": random.random(), "authkey": multiprocessing.current_process().authkey.hex(), "pid": os.getpid(),
        "session": os.getsid(0) == os.getpid(),
        "temp": __import__("tempfile").mktemp(),
        "uuid": str(__import__("uuid").uuid4()), "environment": dict(os.environ),
        "loaded": sorted(libraries),
    }  # fmt: skip
    if options.processes and os.environ["RANK"] == "1":
        for method in ("fork", "forkserver", "spawn"):
            with multiprocessing.get_context(method).Pool(1) as pool:
                seen[f"pool {method}"] = [pool.apply(double, (4,)), pool.apply(in_spawned, (6,))]
    if options.torch:
        import numpy
        import torch

        own["numpy"] = numpy.random.random()
        own["initial_seed"] = torch.initial_seed()
        seen["cuda"] = [torch.cuda.is_initialized(), torch.cuda._is_in_bad_fork()]
        seen["get_num_threads"] = [torch.get_num_threads(), torch.get_num_interop_threads()]
        seen["grad"] = torch.is_grad_enabled()
        x = torch.randn(300, 300, requires_grad=True)
        (x @ x).sum().backward()  # starts autograd's and OpenMP's threads
        seen["backward"] = x.grad is not None
        for method in (None, "fork", "forkserver", "spawn") if "LOADERS" in os.environ else ():
            workers = 0 if method is None else 1
            loader = torch.utils.data.DataLoader(
                Squares(), batch_size=2, num_workers=workers, multiprocessing_context=method
            )
            own[f"loader {method}"] = [batch.tolist() for batch in loader]
    with open(f"{os.environ['PROBE']}.{os.environ.get('RANK', '')}", "w") as file:
        json.dump({"seen": seen, "own": own}, file)

    class Last:
        def __del__(self):
            print("deleted")

    globals()["last"] = Last()
    atexit.register(lambda: print("atexit ran", flush=True))
    worker = threading.Thread(target=lambda: (done.wait(), print("thread joined")))
    done = threading.Event()
    worker.start()
    threading.Timer(0.05, done.set).start()
    print("printed, not flushed")
    sys.stdout.write("no newline at the end")


if __name__ == "__main__":
    main()
