import os
import signal
import subprocess
import sys
import threading

import pytest

from qscope_jax.training.interruption import interruption
from tests.processes import ROOT


def send(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_one_signal_asks_to_stop_and_says_so(number, capfd):
    before = signal.getsignal(number)
    with interruption() as stop:
        assert not stop()
        send(number)
        assert stop() and stop()
    assert signal.getsignal(number) is before
    name = number.name
    assert capfd.readouterr().err == f"{name}: the run saves and stops after this step; a second {name} stops it at once\n"


def test_a_second_interrupt_stops_at_once(capfd):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), interruption():
        send(signal.SIGINT)
        send(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    assert capfd.readouterr().err.count("\n") == 1


TWICE = """
import os, signal
from qscope_jax.training.interruption import interruption
with interruption() as stop:
    os.kill(os.getpid(), signal.SIGTERM)
    print(stop(), flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    print("alive", flush=True)
"""


def test_a_second_sigterm_ends_the_process_as_if_nobody_listened():
    done = subprocess.run([sys.executable, "-c", TWICE], capture_output=True, text=True, cwd=ROOT, timeout=100)
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "True\n")


def test_nothing_stops_what_runs_outside_the_main_thread():
    before, answers = signal.getsignal(signal.SIGTERM), []

    def listen():
        with interruption() as stop:
            answers.append((stop(), signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert answers == [(False, before)]
