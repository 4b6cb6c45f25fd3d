"""SIGTERM, as schedulers send it: the work comes to a good place, and the command leaves with 0."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

from ctf.common.errors import Stopped


@contextlib.contextmanager
def asked() -> Iterator[threading.Event]:
    """Whether SIGTERM came meanwhile, which then does not end the process.

    If the work came to its end nevertheless, `at_once` around it gets the signal.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked  # only the main thread may listen
        return
    before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, before)
    if asked.is_set() and callable(before):
        signal.raise_signal(signal.SIGTERM)


@contextlib.contextmanager
def at_once(folder: Path) -> Iterator[None]:
    """Lets SIGTERM raise `Stopped` wherever it comes; what is whole on the disk stays so.

    Of several processes none listens: those that wait for one that left would wait for long.
    """
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    if not alone or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one would disturb the leaving
        raise Stopped(f"{folder}: stopped; run it again to go on")

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
