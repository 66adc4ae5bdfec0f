"""Stop signals set a flag, and everything is as before afterwards."""

from __future__ import annotations

import os
import signal
import threading

from trainer.signals import STOP, StopSignals


def test_each_signal_sets_the_flag_and_the_old_handlers_come_back():
    before = {s: signal.getsignal(s) for s in STOP}
    for number in STOP:
        with StopSignals() as stop:
            assert (stop.requested, stop.signum) == (False, None)
            os.kill(os.getpid(), number)
            assert (stop.requested, stop.signum) == (True, number)
        assert {s: signal.getsignal(s) for s in STOP} == before


def test_what_the_script_handles_or_ignores_stays_but_for_sigterm():
    heard = []
    old = {s: signal.getsignal(s) for s in STOP}
    try:
        signal.signal(signal.SIGUSR1, lambda *_: heard.append("mine"))
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        with StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGUSR1)
            os.kill(os.getpid(), signal.SIGUSR2)
            assert (heard, stop.requested) == (["mine"], False)
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.requested
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def test_outside_the_main_thread_nothing_is_installed():
    found = []

    def enter():
        with StopSignals() as stop:
            found.append((stop.requested, signal.getsignal(signal.SIGTERM)))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [(False, before)]
