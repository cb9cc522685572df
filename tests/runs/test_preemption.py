"""Signals as a wish to stop: one that is passed on twice is the same wish, a later one ends the process."""

import os
import signal
import subprocess
import sys
import time

from metalr.runs import preemption


def until(condition):
    began = time.monotonic()
    while not condition() and time.monotonic() - began < 5:
        time.sleep(0.01)
    assert condition()


def test_a_signal_that_comes_twice_at_once_is_one_wish(capfd):
    with preemption.watch() as asked:
        assert not asked()
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        until(asked)
        time.sleep(0.1)
    assert capfd.readouterr().err.count("metalr: stopping") == 1


def test_a_later_one_ends_the_process():
    code = (
        "import time; from metalr.runs import preemption; preemption.ECHO_SECONDS = 0.2\n"
        "with preemption.watch() as asked:\n    print('ready', flush=True)\n    time.sleep(30)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    with process:
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 128 + signal.SIGTERM
