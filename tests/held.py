"""A folder in which another process works."""

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

from ctf.common import locks


@contextlib.contextmanager
def held_by_another(folder: Path) -> Iterator[int]:
    """Yield the pid of another process that holds the folder until it gets SIGTERM or SIGKILL."""
    ready, written = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
        with locks.hold(folder):
            os.write(written, b"1")
            signal.pause()
        os._exit(0)
    os.close(written)
    assert os.read(ready, 1) == b"1"
    os.close(ready)
    try:
        yield pid
    finally:
        end(pid)


def end(pid: int, number: int = signal.SIGKILL) -> None:
    with contextlib.suppress(ProcessLookupError, ChildProcessError):
        os.kill(pid, number)
        os.waitpid(pid, 0)
