"""End in the way that the last argument names; `all`: rank r takes the r-th, once all ranks have come this far."""

import atexit
import os
import signal
import sys
import threading
import time
from pathlib import Path


class Loud:
    def __str__(self):
        return "an object said this"


class Mute(Exception):
    def __str__(self):
        raise RuntimeError("cannot be printed")


class Odd(BaseException):
    pass


def deeper():
    try:
        {}["key"]
    except KeyError as error:
        raise ValueError("chained") from error


def raise_chained():
    deeper()


def raise_noted():
    error = OSError(2, "with a note")
    if hasattr(error, "add_note"):
        error.add_note("the note")
    raise error


def raise_odd():
    raise Odd("neither Exception nor SystemExit")


def raise_mute():
    raise Mute


def raise_interrupt():
    raise KeyboardInterrupt


def raise_runtime_syntax():
    compile("a = = 2", "<here>", "exec")


def import_missing():
    import nothing.of.that.name  # noqa: F401


def own_hook():
    sys.excepthook = lambda kind, value, trace: print("my hook:", kind.__name__, value, flush=True)
    raise ValueError("for the hook")


def broken_hook():
    sys.excepthook = lambda *_: {}["hook"]
    raise ValueError("for the broken hook")


def in_thread():
    thread = threading.Thread(target=raise_chained, name="mine")
    thread.start()


def slow_thread():
    threading.Thread(target=lambda: (time.sleep(0.1), print("thread done"))).start()
    print("main done")


def at_exit():
    atexit.register(lambda: print("first registered, last run"))
    atexit.register(raise_noted)
    atexit.register(lambda: print("last registered, first run"))
    sys.exit(4)


def exit_from_exit():
    atexit.register(lambda: sys.exit(9))


def no_stderr():
    sys.stderr = None
    sys.exit("nobody reads this")


def closed_stdout():
    print("before")
    sys.stdout.close()


def child_forked():
    if os.fork() == 0:
        print("in the child")
        sys.exit(5)
    _, status = os.wait()
    print("child left with", os.waitstatus_to_exitcode(status))


def c_printf():
    import ctypes

    ctypes.CDLL(None).printf(b"from C, buffered\n")


ENDINGS = {
    "nothing": lambda: None,
    "exit3": lambda: sys.exit(3),
    "exit_text": lambda: sys.exit("this is the text"),
    "exit_none": lambda: sys.exit(None),
    "exit_true": lambda: sys.exit(True),
    "exit_300": lambda: sys.exit(300),
    "exit_minus": lambda: sys.exit(-1),
    "exit_object": lambda: sys.exit(Loud()),
    "os_exit": lambda: os._exit(7),
    "terminated": lambda: os.kill(os.getpid(), signal.SIGUSR1),
    "aborted": os.abort,
    "raise_chained": raise_chained,
    "raise_noted": raise_noted,
    "raise_odd": raise_odd,
    "raise_mute": raise_mute,
    "raise_interrupt": raise_interrupt,
    "raise_runtime_syntax": raise_runtime_syntax,
    "import_missing": import_missing,
    "own_hook": own_hook,
    "broken_hook": broken_hook,
    "in_thread": in_thread,
    "slow_thread": slow_thread,
    "at_exit": at_exit,
    "exit_from_exit": exit_from_exit,
    "no_stderr": no_stderr,
    "closed_stdout": closed_stdout,
    "child_forked": child_forked,
    "c_printf": c_printf,
}

if __name__ == "__main__":
    # The first failure has the others asked to leave: what each does by itself is what is looked at.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    which = sys.argv[-1]
    if which == "all":
        which = list(ENDINGS)[int(os.environ["RANK"])]
        Path(f"came-{which}").touch()
        while len(list(Path().glob("came-*"))) < len(ENDINGS):
            time.sleep(0.005)
    ENDINGS[which]()
