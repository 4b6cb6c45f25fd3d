"""The application (the API, the page, error handling), and the server that runs it."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from ctf import Pipeline
from ctf.common.errors import UserError
from ctf.common.version import __version__
from ctf.pipelines.arguments import Window
from ctf.pipelines.folder import find_pipeline, hash_pipeline
from ctf.studio import api, schema, tasks
from ctf.studio.guard import LOOPBACK, Guard, error_response
from ctf.studio.tasks import Job, Limits, ServedModel
from ctf.studio.worker import Worker

PAGE = Path(__file__).parent / "page"
MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
DESCRIPTION = (
    "Coarse-to-fine image generation. With `Accept: text/event-stream`, a response is a stream of "
    "the events queued, row (with previews), and done or error; otherwise it is JSON. Requests "
    "that cannot be served get a 4xx status and a reason; 429 has a Retry-After header if the "
    "queue is full."
)
ERRORS = {
    400: "Invalid JSON",
    401: "Missing or wrong token",
    403: "Request by a page of another origin",
    408: "The body arrived too slowly",
    413: "Body too large",
    415: "Unsupported media type",
    421: "Unknown host name",
    422: "Value out of range",
    429: "Too many requests, or no result within the time limit",
    503: "The studio is stopping",
}


def create_app(
    workers: Sequence[Worker],
    limits: Limits,
    *,
    hosts: Collection[str] | None = LOOPBACK,
    token: str | None = None,
    embedders: Collection[str] = (),
    root_path: str = "",
) -> Guard:
    """Return the ASGI application; the options are those of `Guard`."""
    app = FastAPI(
        title="ctf studio",
        version=__version__,
        description=DESCRIPTION,
        servers=[{"url": "."}],  # relative to openapi.json
        docs_url=None,
        redoc_url=None,
        responses={
            status: {"model": schema.Mistake, "description": text}
            for status, text in ERRORS.items()
        },
    )
    app.state.workers = {worker.model.name: worker for worker in workers}
    app.state.limits = limits
    app.state.jobs = set()  # that responses wait for
    app.include_router(api.router)
    for path in PAGE.iterdir():
        route = {"index.html": "/", "docs.html": "/docs"}.get(path.name, f"/page/{path.name}")
        app.add_route(route, _static(path))

    @app.exception_handler(RequestValidationError)
    async def invalid_request(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        status = 400 if first["type"].startswith("json") else 422
        return error_response(status, first["msg"], where or None)

    @app.exception_handler(UserError)
    async def user_error(_: Request, error: UserError) -> Response:
        return error_response(422, str(error))

    @app.exception_handler(HTTPException)
    async def http_error(_: Request, error: HTTPException) -> Response:
        return error_response(error.status_code, error.detail, headers=dict(error.headers or {}))

    inline = re.findall("<script>(.*?)</script>", (PAGE / "index.html").read_text(), re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(code.encode()).digest()) for code in inline]
    return Guard(
        app,
        limits=limits,
        hosts=hosts,
        token=token,
        embedders=embedders,
        root_path=root_path,
        script_hashes=[f"sha256-{digest.decode()}" for digest in digests],
    )


def _static(path: Path) -> Callable[[Request], Awaitable[Response]]:
    """Return an endpoint for a file, which is read now: no request reaches the file system."""
    content = path.read_bytes()
    tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = {"ETag": tag, "Cache-Control": "no-cache"}

    async def send(request: Request) -> Response:
        known = request.headers.get("if-none-match", "").split(",")
        if tag in [value.strip().removeprefix("W/") for value in known]:  # W/ is of proxies
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers, media_type=MEDIA_TYPES[path.suffix])

    return send


def start_workers(
    names: Sequence[str],
    device: torch.device,
    engine: Literal["auto", "eager"],
    limits: Limits,
    window: Window = "auto",
) -> list[Worker]:
    """Load pipelines, by names as in `Pipeline.from_pretrained`, and start a worker for each.

    A folder is served under the last part of its path. On a GPU, the engine is "eager": "auto"
    compiles there, and records each size of a batch, for which a visitor would have to wait.

    Raises:
        UserError: There is no such pipeline, or two have the same name.
    """
    if device.type == "cuda":
        engine = "eager"
    workers: dict[str, Worker] = {}
    for name in names:
        folder = find_pipeline(name)
        served_as = folder.resolve().name if Path(name).is_dir() else name
        if served_as in workers:
            raise UserError(f"got two models named {served_as}, expected different names")
        pipe = Pipeline.from_pretrained(folder, device, engine=engine)
        pipe.window = window
        max_images = min(limits.images, pipe.largest_batch(guidance=2.0))
        model = ServedModel(served_as, pipe, hash_pipeline(folder), max_images)
        workers[served_as] = Worker(model, limits)
    return list(workers.values())


def listen(host: str, port: int) -> socket.socket:
    """Open a socket; port 0 is any free port.

    Raises:
        UserError: The address is in use or invalid.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{host} port {port}: {reason}; choose another --port") from None


class Server(uvicorn.Server):
    """A server that `run(sockets=[...])` runs until Ctrl+C, SIGTERM, or `should_exit`.

    Then clients that wait for a result get an error, and all connections end within 3 seconds.
    """

    def __init__(self, app: Guard) -> None:
        quiet: dict[str, Any] = {"log_level": "warning", "access_log": False}
        quiet |= {"server_header": False, "lifespan": "off"}
        # Idle connections stay open for longer than those of proxies, which would otherwise send
        # requests on connections that are being closed. Headers of proxies are not read.
        config = uvicorn.Config(
            app, timeout_keep_alive=75, timeout_graceful_shutdown=3, proxy_headers=False, **quiet
        )
        super().__init__(config)
        self.guard = app

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End all connections."""
        jobs: set[Job] = self.guard.app.state.jobs
        for job in jobs:
            job.events.put_nowait(tasks.error(503, "the studio is stopping"))
        self.guard.stop_receiving()
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals; unlike the method of uvicorn, do not raise them again at the end."""
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread can handle signals
            return
        signals = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self.handle_exit) for number in signals}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def create_server(app: Guard) -> Server:
    """Return a server: `run(sockets=[...])` serves until Ctrl+C or until `should_exit` is set."""
    return Server(app)


def serve(server: Server, workers: Sequence[Worker], listening: socket.socket) -> None:
    """Serve until Ctrl+C or SIGTERM, then end the workers."""
    with server.capture_signals():
        server.run(sockets=[listening])
        stopped = [worker.stop(seconds=2) for worker in workers]
    if not all(stopped):
        # A worker is inside a long operation of PyTorch: the exit of Python would wait or abort.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
