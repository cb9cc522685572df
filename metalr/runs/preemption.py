"""SIGTERM and SIGINT as a wish to stop soon: the run saves at the next step boundary; a later one ends it at once."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

SIGNALS = (signal.SIGTERM, signal.SIGINT)
ECHO_SECONDS = 1.0  # schedulers signal every process of a job, and wrappers pass it on: until then it is the same wish


@contextlib.contextmanager
def watch() -> Iterator[Callable[[], bool]]:
    """Gives `asked()`: whether a signal came. Outside the main thread signals keep their meaning, and it is False.

    Python runs handlers between its own instructions only, which a long compilation holds up. So a thread reads the
    bytes that the interpreter writes the moment a signal comes, and can end the process on the second one.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    came, first = threading.Event(), 0.0
    read, write = os.pipe()
    os.set_blocking(write, False)

    def listen() -> None:
        nonlocal first
        while data := os.read(read, 64):
            for number in data:
                if number in SIGNALS:
                    if came.is_set():
                        if time.monotonic() - first > ECHO_SECONDS:
                            os._exit(128 + number)
                        continue
                    first = time.monotonic()
                    came.set()
                    print("metalr: stopping: saves at the next step; once more to stop at once", file=sys.stderr)

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    before = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
    wakeup = signal.set_wakeup_fd(write)
    try:
        yield came.is_set
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(write)  # ends the thread
        thread.join()
        os.close(read)
