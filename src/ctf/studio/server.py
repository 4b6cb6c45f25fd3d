"""The studio's addresses: the page, and the API beside it; the command that serves both."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import socket
from collections.abc import AsyncGenerator, Collection, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import uvicorn
from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response, StreamingResponse
from torch import Tensor

from ctf.common.errors import UserError
from ctf.common.version import __version__
from ctf.kernels.sampling_cpu import Engine
from ctf.models.sampling import Sampling
from ctf.pipelines.arguments import check_seed
from ctf.pipelines.folder import find_pipeline, hash_pipeline
from ctf.pipelines.pipeline import LICENSE, Pipeline
from ctf.studio import schema
from ctf.studio.guard import LOOPBACK, Guard, mistake
from ctf.studio.worker import (
    Busy,
    Done,
    Encode,
    Failed,
    Generate,
    Job,
    Limits,
    Look,
    Message,
    Refine,
    Row,
    Task,
    Worker,
)

PAGE = Path(__file__).parent / "page"
KINDS = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
SSE = "text/event-stream"


class Studio:
    """The pipelines that are served, and how requests get from JSON to their workers and back."""

    def __init__(self, workers: Sequence[Worker], limits: Limits) -> None:
        self.workers = {worker.name: worker for worker in workers}
        self.limits = limits

    def worker(self, name: str | None) -> Worker:
        if name is None:
            return next(iter(self.workers.values()))
        if name not in self.workers:
            raise UserError(f"no model {name!r}: there is {', '.join(self.workers)}")
        return self.workers[name]

    def generate(self, asked: schema.GenerateRequest) -> tuple[Worker, Generate]:
        worker = self.worker(asked.model)
        self._check_count(worker, len(asked.classes) * asked.count)
        numbers = worker.pipe.class_numbers(asked.classes)
        classes = tuple(number for number in numbers for _ in range(asked.count))
        codes = keep = None
        if (asked.codes is None) != (asked.keep is None):
            raise UserError("codes and keep: got one of them, expected both or neither")
        if asked.codes is not None and asked.keep is not None:
            codes = _tensor(worker.pipe, "codes", asked.codes, len(classes), torch.int64)
            keep = _tensor(worker.pipe, "keep", asked.keep, len(classes), torch.bool)
            _check_range("codes", codes[keep], worker.pipe.clusters.codebook_size)
        sampling = _sampling(worker.pipe, asked.settings)
        seeds = _seeds(asked.seed, len(classes))
        return worker, Generate(classes, seeds, sampling, codes, keep, asked.preview)

    def refine(self, asked: schema.RefineRequest) -> tuple[Worker, Refine]:
        worker = self.worker(asked.model)
        self._check_count(worker, len(asked.classes))
        classes = tuple(worker.pipe.class_numbers(asked.classes))
        coarse = _tensor(worker.pipe, "coarse", asked.coarse, len(classes), torch.int64)
        _check_range("coarse", coarse, worker.pipe.clusters.count)
        sampling = _sampling(worker.pipe, asked.settings)
        return worker, Refine(classes, _seeds(asked.seed, len(classes)), sampling, coarse)

    def look(self, asked: schema.MembersRequest) -> tuple[Worker, Look]:
        worker = self.worker(asked.model)
        (chosen,) = worker.pipe.class_numbers([asked.chosen])
        (codes_L,) = _tensor(worker.pipe, "codes", [asked.codes], 1, torch.int64)
        _check_range("codes", codes_L, worker.pipe.clusters.codebook_size)
        if asked.position >= len(codes_L):
            raise UserError(f"position: got {asked.position}, expected 0 to {len(codes_L) - 1}")
        sampling = _sampling(worker.pipe, asked.settings)
        return worker, Look(chosen, codes_L, asked.position, sampling)

    def encode(self, model: str | None, chosen: str, data: bytes) -> tuple[Worker, Encode]:
        worker = self.worker(model)
        (number,) = worker.pipe.class_numbers([chosen])
        if not data:
            raise UserError("got no picture: expected the bytes of its file as the body")
        return worker, Encode(data, number, self.limits.upload_pixels)

    def _check_count(self, worker: Worker, count: int) -> None:
        if count > worker.most:
            raise UserError(f"got {count} images, expected {worker.most} or fewer in a request")

    def models(self) -> dict[str, Any]:
        return {
            "models": [_info(worker) for worker in self.workers.values()],
            "upload_bytes": self.limits.upload_bytes,
            "upload_pixels": self.limits.upload_pixels,
        }

    async def answer(self, request: Request, worker: Worker, task: Task) -> Response:
        """Waits for a task: an event stream where the request accepts one, else JSON."""
        try:
            job, ahead = worker.submit(task)
        except Busy as busy:
            later = {"Retry-After": str(busy.seconds)}
            return mistake(429, "too many requests wait already", headers=later)
        messages = _follow(job, request, self.limits.seconds)
        if SSE in request.headers.get("accept", ""):
            return StreamingResponse(_events(messages, ahead), media_type=SSE)
        async with contextlib.aclosing(messages):
            async for message in messages:
                match message:
                    case Done(answer):
                        return Response(_json(answer), media_type="application/json")
                    case Failed(status, reason):
                        return mistake(status, reason)
        return mistake(408, "the client left")  # and will not read this


def _tensor(
    pipe: Pipeline, name: str, given: Sequence[Sequence[int]], count: int, dtype: torch.dtype
) -> Tensor:
    """(count, L) of a list for each image, or one for all."""
    length = pipe.coarse.config.length
    if len(given) not in (1, count) or any(len(row) != length for row in given):
        shapes = ", ".join(sorted({str(len(row)) for row in given}))
        raise UserError(
            f"{name}: got {len(given)} lists of {shapes}, expected {count} or 1 of {length}"
        )
    return torch.tensor(given, dtype=dtype).expand(count, length)


def _check_range(name: str, given: Tensor, stop: int) -> None:
    if given.numel() and not 0 <= int(given.min()) <= int(given.max()) < stop:
        raise UserError(f"{name}: expected numbers from 0 to {stop - 1}")


def _seeds(seed: int, count: int) -> tuple[int, ...]:
    check_seed(seed, count)
    return tuple(range(seed, seed + count))


def _sampling(pipe: Pipeline, asked: schema.SamplingSettings) -> Sampling:
    return Sampling(**{**vars(pipe.sampling), **asked.given()})


def _info(worker: Worker) -> dict[str, Any]:
    pipe = worker.pipe
    return {
        "name": worker.name,
        "class_names": list(pipe.class_names),
        "image_size": pipe.tokenizer.config.image_size,
        "grid": pipe.coarse.config.grid,
        "codebook_size": pipe.clusters.codebook_size,
        "clusters": pipe.clusters.count,
        "has_fine_stage": pipe.fine is not None,
        "sampling": vars(pipe.sampling),
        "parameters": worker.parameters,
        "license": pipe.origin.get(LICENSE),
        "images": worker.most,
    }


# --- From a worker to a client --------------------------------------------------------------------


async def _follow(job: Job, request: Request, seconds: float) -> AsyncGenerator[Message, None]:
    """What is told of a job, until it is done, its time is over, or the client has left."""
    deadline = asyncio.get_running_loop().time() + seconds
    gone = asyncio.ensure_future(_disconnected(request))
    told = asyncio.ensure_future(job.messages.get())
    try:
        while True:
            left = deadline - asyncio.get_running_loop().time()
            await asyncio.wait({told, gone}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if not told.done():
                if not gone.done():
                    yield Failed(
                        429, f"not done within {seconds:g} seconds; ask for less, or later"
                    )
                return
            message = told.result()
            yield message
            if not isinstance(message, Row):
                return
            told = asyncio.ensure_future(job.messages.get())
    finally:
        job.leave()
        gone.cancel()
        told.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _events(
    messages: AsyncGenerator[Message, None], ahead: int
) -> AsyncGenerator[bytes, None]:
    """Server-sent events: queued, row, ..., then done or error."""
    async with contextlib.aclosing(messages):
        yield _event("queued", {"ahead": ahead})
        async for message in messages:
            match message:
                case Row(rows, total, images):
                    yield _event("row", {"rows": rows, "total": total, "images": images})
                case Done(answer):
                    yield _event("done", answer)
                case Failed(status, reason):
                    yield _event("error", {"status": status, "reason": reason})


def _event(name: str, data: dict[str, Any]) -> bytes:
    return b"event: " + name.encode() + b"\ndata: " + _json(data) + b"\n\n"


def _json(answer: dict[str, Any]) -> bytes:
    return json.dumps(answer, default=_base64, separators=(",", ":")).encode()


def _base64(data: object) -> str:
    if not isinstance(data, bytes):
        raise TypeError(type(data))
    return base64.b64encode(data).decode()


# --- The application ------------------------------------------------------------------------------


def build(
    workers: Sequence[Worker],
    limits: Limits,
    *,
    hosts: Collection[str] | None = LOOPBACK,
    token: str | None = None,
    embedders: Collection[str] = (),
) -> Guard:
    """The whole application; see `Guard` for the arguments."""
    studio = Studio(workers, limits)
    app = FastAPI(
        title="ctf studio",
        version=__version__,
        description=(
            "Images from coarse to fine. `Accept: text/event-stream` gives the events queued, row "
            "(previews), and done or error; otherwise the answer is JSON. What cannot be done is "
            "answered with 4xx and a reason. 429 has Retry-After where the line is full."
        ),
        docs_url=None,
        redoc_url=None,
        responses={
            status: {"model": schema.Mistake, "description": text}
            for status, text in (
                (400, "no JSON"),
                (401, "the token is missing or wrong"),
                (403, "from the page of another site"),
                (408, "came too slowly"),
                (413, "too large"),
                (415, "of another type"),
                (421, "called by a name that is not this machine's"),
                (422, "a value out of its range"),
                (429, "too many requests, or not done in time"),
            )
        },
    )

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        status = 400 if first["type"].startswith("json") else 422
        return mistake(status, first["msg"], where or None)

    @app.exception_handler(UserError)
    async def wrong(_: Request, error: UserError) -> Response:
        return mistake(422, str(error))

    @app.exception_handler(HTTPException)
    async def refused(_: Request, error: HTTPException) -> Response:
        return mistake(error.status_code, error.detail, headers=dict(error.headers or {}))

    @app.post("/v1/generate", response_model=schema.Pictures)
    async def generate(asked: schema.GenerateRequest, request: Request) -> Response:
        """Draws images, or the parts of images that are not kept."""
        return await studio.answer(request, *studio.generate(asked))

    @app.post("/v1/refine", response_model=schema.Pictures)
    async def refine(asked: schema.RefineRequest, request: Request) -> Response:
        """Draws the details of coarse labels again."""
        return await studio.answer(request, *studio.refine(asked))

    @app.post("/v1/members", response_model=schema.ClusterMembers)
    async def members(asked: schema.MembersRequest, request: Request) -> Response:
        """The cluster of a token: its members, their probabilities, and the image with each."""
        return await studio.answer(request, *studio.look(asked))

    file = {"type": "string", "format": "binary"}
    body = {"required": True, "content": {"image/*": {"schema": file}}}

    @app.post("/v1/encode", response_model=schema.Encoded, openapi_extra={"requestBody": body})
    async def encode(
        request: Request,
        model: Annotated[str | None, Query(max_length=200)] = None,
        chosen: Annotated[str, Query(alias="class", max_length=200)] = "0",
    ) -> Response:
        """The codes of a picture: PNG, JPEG, WebP, GIF, BMP or TIFF, its bytes as the body."""
        if not request.headers.get("content-type", "").startswith("image/"):
            raise HTTPException(
                415, "expected the bytes of a picture, with Content-Type: image/..."
            )
        data = await request.body()
        return await studio.answer(request, *studio.encode(model, chosen, data))

    @app.get("/v1/models", response_model=schema.Models)
    async def models() -> Response:
        """The pipelines that are served, and what they can do."""
        return Response(_json(studio.models()), media_type="application/json")

    @app.get("/health", response_model=schema.Health)
    async def health() -> Response:
        """Whether the studio answers, and how long the lines are."""
        lines = {worker.name: worker.state() for worker in workers}
        said = {"status": "ok", "version": __version__, "models": lines}
        return Response(_json(said), media_type="application/json")

    for path in PAGE.iterdir():
        address = {"index.html": "/", "docs.html": "/docs"}.get(path.name, f"/page/{path.name}")
        app.add_route(address, _static(path))
    return Guard(app, limits=limits, hosts=hosts, token=token, embedders=embedders)


def _static(path: Path) -> Any:
    """A file that is read now: no request ever reaches the file system."""
    content = path.read_bytes()
    tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = {"ETag": tag, "Cache-Control": "no-cache"}

    async def send(request: Request) -> Response:
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers, media_type=KINDS[path.suffix])

    return send


# --- The command ----------------------------------------------------------------------------------


def load(
    names: Sequence[str], device: torch.device, engine: Engine, limits: Limits
) -> list[Worker]:
    """A worker for each pipeline; folders are called by their last part.

    engine: "auto" or "eager". Compiled steps want batches of one size, and in int8 an image depends
        on those beside it, so neither will do here; on a GPU, where auto compiles, it is eager.

    Raises:
        UserError: there is no such pipeline, or two of one name.
    """
    if device.type == "cuda":
        engine = "eager"
    workers: list[Worker] = []
    for name in names:
        folder = find_pipeline(name)
        shown = folder.resolve().name if Path(name).is_dir() else name
        if any(worker.name == shown for worker in workers):
            raise UserError(f"got two models called {shown}, expected different names")
        pipe = Pipeline.from_pretrained(folder, device, engine=engine)
        workers.append(Worker(shown, pipe, hash_pipeline(folder), limits))
    return workers


def listen(host: str, port: int) -> socket.socket:
    """Raises UserError where the address cannot be had. Port 0 is any that is free."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{host} port {port}: {reason}; choose another --port") from None


def server_of(app: Guard) -> uvicorn.Server:
    """`run(sockets=[...])` serves until interrupted, or until `should_exit` is set."""
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        lifespan="off",
        timeout_graceful_shutdown=3,
    )
    return uvicorn.Server(config)
