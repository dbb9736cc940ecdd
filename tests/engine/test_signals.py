import os
import signal
import subprocess
import sys
import threading

import pytest

from tests.processes import SECONDS, clean_environment
from upsnet.engine import signals
from upsnet.engine.signals import StopSignals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_a_wish_and_handlers_are_put_back(number):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with StopSignals() as signals:
        assert not signals.wanted
        os.kill(os.getpid(), number)
        assert signals.wanted
        os.kill(os.getpid(), signal.SIGINT)  # a launcher hands on at once what the terminal has sent to all
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


SECOND = """
import os, signal, sys, time
from upsnet.engine import signals
signals.ONE_WISH = 0.05
with signals.StopSignals():
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.1)
    os.kill(os.getpid(), int(sys.argv[1]))
    time.sleep(0.1)
    print("still here")
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_the_process_at_once(number):
    command = [sys.executable, "-c", SECOND, str(int(number))]
    done = subprocess.run(command, env=clean_environment(), capture_output=True, timeout=SECONDS, text=True)
    assert done.returncode == -number and not done.stdout and not done.stderr


def test_a_thread_changes_nothing():
    before = signal.getsignal(signal.SIGTERM)
    during = []

    def work():
        with StopSignals():
            during.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert during == [before] and signals.ONE_WISH < 30  # launchers kill after half a minute
