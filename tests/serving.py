"""A studio for the tests of its API and of its page."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ctf.studio import server
from ctf.studio.worker import Limits, Worker


@contextmanager
def serving(workers: list[Worker], limits: Limits, **more: Any) -> Iterator[str]:
    """A studio of these workers on a port of this machine: its address."""
    listening = server.listen("127.0.0.1", 0)
    running = server.server_of(server.build(workers, limits, **more))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        running.should_exit = True
        thread.join()
