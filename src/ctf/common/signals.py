"""SIGTERM, as schedulers send it: the work is saved, and the command exits with 0."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

from ctf.common.errors import Stopped


@contextlib.contextmanager
def termination_requested() -> Iterator[threading.Event]:
    """Yield an event that SIGTERM sets, instead of ending the process.

    If the block runs to its end nevertheless, the handler from before gets the signal.
    """
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event  # only the main thread can handle signals
        return
    before = signal.signal(signal.SIGTERM, lambda *_: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGTERM, before)
    if event.is_set() and callable(before):
        signal.raise_signal(signal.SIGTERM)


@contextlib.contextmanager
def stop_on_sigterm(folder: Path) -> Iterator[None]:
    """Make SIGTERM raise `Stopped` at once; files that were written completely stay.

    A library that is interrupted may raise an error of its own instead: that, too, is `Stopped`.

    With several processes it is not handled: the others would wait for one that has left.
    """
    from ctf.common import distributed  # here, since it imports torch

    if distributed.launched_size() > 1 or threading.current_thread() is not threading.main_thread():
        yield
        return

    requested = threading.Event()
    stopped = Stopped(f"{folder}: stopped; run it again to resume")

    def stop(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one would disturb the exit
        requested.set()
        raise stopped

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except Exception as error:
        if requested.is_set():
            raise stopped from error
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
