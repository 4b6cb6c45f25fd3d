"""A studio for tests, and requests to it."""

import base64
import io
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx2
import torch
from PIL import Image

from ctf import Pipeline
from ctf.studio import server
from ctf.studio.tasks import Limits
from ctf.studio.worker import Worker
from tests.conftest import disc_image

LENGTH = 16  # tokens of an image of the shared run
LIMITS = Limits(
    images=8, waiting=4, seconds=20, body_bytes=100_000, upload_bytes=200_000, upload_pixels=10_000
)


@contextmanager
def serving(workers: list[Worker], limits: Limits = LIMITS, **options: Any) -> Iterator[str]:
    """Serve these workers on a free port; yield the URL."""
    listening = server.listen("127.0.0.1", 0)
    running = server.create_server(server.create_app(workers, limits, **options))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        running.should_exit = True
        thread.join()


def post(client: httpx2.Client, path: str, **body: Any) -> dict[str, Any]:
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    return dict(response.json())


def stream(client: httpx2.Client, **body: Any) -> list[tuple[str, dict[str, Any]]]:
    """Return the names and data of all events of /v1/generate."""
    accept = {"Accept": "text/event-stream"}
    with client.stream("POST", "/v1/generate", json=body, headers=accept) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        text = response.read().decode()
    events = re.findall(r"^event: (\w+)\ndata: (.*)\n$", text, re.M)
    return [(name, json.loads(data)) for name, data in events]


def expect_error(response: httpx2.Response, status: int, *words: str) -> None:
    """Check that an error has a status and a reason, with these words, and no traceback."""
    assert response.status_code == status, response.text
    error = response.json()
    assert set(error) <= {"reason", "where"} and error["reason"]
    assert "Traceback" not in response.text
    for word in words:
        assert word in response.text


def open_png(encoded: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(encoded)))


def image_file(size: tuple[int, int] = (48, 40), kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    disc_image(0.3, 1).resize(size).save(file, format=kind)
    return file.getvalue()


@contextmanager
def hold_steps(
    pipe: Pipeline, again_after: int = -1
) -> Iterator[tuple[threading.Event, list[int]]]:
    """Block the coarse model's steps until the event is set; the list has the rows of each step.

    A step is a label of each image: with the window "auto", their number would depend on time.

    Args:
        again_after: After this number of steps, the event is cleared.
    """
    gate, steps = threading.Event(), []  # type: ignore[var-annotated]

    def wait(_: object, inputs: tuple[torch.Tensor], __: object) -> None:
        if len(steps) == again_after:
            gate.clear()
        steps.append(len(inputs[0]))
        assert gate.wait(60)

    hook = pipe.coarse.head.register_forward_hook(wait)
    window, pipe.window = pipe.window, 1
    try:
        yield gate, steps
    finally:
        pipe.window = window
        gate.set()
        hook.remove()


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(0.01)
