"""The endpoints of the API: each checks a request, queues a task, and responds with its events.

Functions here have the names, and classes in schema.py too, from which clients for the API are
generated: they do not change.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import json
from collections.abc import AsyncGenerator, Sequence
from typing import Annotated, Any

import torch
from fastapi import APIRouter, HTTPException, Query, Request
from starlette.responses import Response, StreamingResponse
from torch import Tensor

from ctf import Pipeline, Sampling
from ctf.common.errors import UserError
from ctf.common.version import __version__
from ctf.common.weights import count_parameters
from ctf.pipelines import arguments
from ctf.pipelines.pipeline import LICENSE
from ctf.studio import schema, tasks
from ctf.studio.guard import error_response
from ctf.studio.tasks import Encode, Event, Generate, Job, Members, ServedModel, Task
from ctf.studio.worker import Worker

EVENT_STREAM = "text/event-stream"
STREAM_HEADERS = {  # for proxies: forward each event at once, and unchanged
    "Cache-Control": "no-store, no-transform",
    "X-Accel-Buffering": "no",
}
UPLOAD = {
    "required": True,
    "content": {"image/*": {"schema": {"type": "string", "format": "binary"}}},
}

router = APIRouter()


@router.post("/v1/generate", response_model=schema.Pictures)
async def generate(body: schema.GenerateRequest, request: Request) -> Response:
    """Sample images, or the tokens of images that are not kept (inpainting)."""
    worker = _worker(request, body.model)
    pipe, count = worker.model.pipe, len(body.classes) * body.count
    _check_count(worker.model, count)
    classes = pipe.class_numbers([name for name in body.classes for _ in range(body.count)])
    known_BL = None
    if (body.codes is None) != (body.keep is None):
        raise UserError("codes and keep: got one of them, expected both or neither")
    if body.codes is not None and body.keep is not None:
        codes_BL = _tensor(pipe, "codes", body.codes, count, torch.int64)
        keep_BL = _tensor(pipe, "keep", body.keep, count, torch.bool)
        known_BL = arguments.known_codes(pipe, codes_BL, keep_BL, count)
    seeds, sampling = arguments.seed_per_image(body.seed, count), _sampling(pipe, body.settings)
    task = Generate(tuple(classes), tuple(seeds), sampling, known_BL, previews=body.preview)
    return await _compute(request, worker, task)


@router.post("/v1/refine", response_model=schema.Pictures)
async def refine(body: schema.RefineRequest, request: Request) -> Response:
    """Sample the fine stage alone, for given coarse labels."""
    worker = _worker(request, body.model)
    pipe, count = worker.model.pipe, len(body.classes)
    _check_count(worker.model, count)
    classes = pipe.class_numbers(body.classes)
    coarse_BL = _tensor(pipe, "coarse", body.coarse, count, torch.int64)
    arguments.check_range("coarse", coarse_BL, pipe.clusters.count)
    seeds, sampling = arguments.seed_per_image(body.seed, count), _sampling(pipe, body.settings)
    task = Generate(tuple(classes), tuple(seeds), sampling, coarse_BL=coarse_BL)
    return await _compute(request, worker, task)


@router.post("/v1/members", response_model=schema.ClusterMembers)
async def members(body: schema.MembersRequest, request: Request) -> Response:
    """List the cluster of a token: its members, their probabilities, and the image with each."""
    worker = _worker(request, body.model)
    pipe = worker.model.pipe
    (number,) = pipe.class_numbers([body.class_name])
    (codes_L,) = _tensor(pipe, "codes", [body.codes], 1, torch.int64)
    arguments.check_range("codes", codes_L, pipe.clusters.codebook_size)
    if body.position >= len(codes_L):
        raise UserError(f"position: got {body.position}, expected 0 to {len(codes_L) - 1}")
    task = Members(number, codes_L, body.position, _sampling(pipe, body.settings))
    return await _compute(request, worker, task)


@router.post("/v1/encode", response_model=schema.Encoded, openapi_extra={"requestBody": UPLOAD})
async def encode(
    request: Request,
    model: Annotated[str | None, Query(max_length=200)] = None,
    class_name: Annotated[str, Query(alias="class", max_length=200)] = "0",
) -> Response:
    """Encode an image file, the body of the request, of any format that can be trained on."""
    if not request.headers.get("content-type", "").startswith("image/"):
        raise HTTPException(415, "expected an image file as the body, with Content-Type: image/...")
    data = await request.body()
    worker = _worker(request, model)
    (number,) = worker.model.pipe.class_numbers([class_name])
    if not data:
        raise UserError("got an empty body, expected an image file")
    max_pixels = request.app.state.limits.upload_pixels
    return await _compute(request, worker, Encode(data, number, max_pixels))


@router.get("/v1/models", response_model=schema.Models)
async def models(request: Request) -> Response:
    """List the models, with their classes, sizes and default settings."""
    limits, workers = request.app.state.limits, request.app.state.workers
    upload = {"upload_bytes": limits.upload_bytes, "upload_pixels": limits.upload_pixels}
    infos = [_model_info(worker.model) for worker in workers.values()]
    return _json_response({"models": infos, **upload})


@router.get("/health", response_model=schema.Health)
async def health(request: Request) -> Response:
    """Report that the studio runs, and the number of requests of each model."""
    queues = {name: worker.state() for name, worker in request.app.state.workers.items()}
    return _json_response({"status": "ok", "version": __version__, "models": queues})


def _model_info(model: ServedModel) -> dict[str, Any]:
    pipe = model.pipe
    parts: dict[str, Any]
    parts = {"tokenizer": pipe.tokenizer, "coarse": pipe.coarse, "fine": pipe.fine}
    return {
        "name": model.name,
        "class_names": list(pipe.class_names),
        "image_size": pipe.tokenizer.image_size,
        "grid": pipe.coarse.config.grid,
        "codebook_size": pipe.clusters.codebook_size,
        "clusters": pipe.clusters.count,
        "has_fine_stage": pipe.fine is not None,
        "sampling": vars(pipe.sampling),
        "parameters": {
            name: count_parameters(part) for name, part in parts.items() if part is not None
        },
        "license": pipe.origin.get(LICENSE),
        "images": model.max_images,
    }


# --- Arguments ------------------------------------------------------------------------------------


def _worker(request: Request, name: str | None) -> Worker:
    workers: dict[str, Worker] = request.app.state.workers
    if name is None:
        return next(iter(workers.values()))
    if name not in workers:
        raise UserError(f"no model {name!r}: there is {', '.join(workers)}")
    return workers[name]


def _check_count(model: ServedModel, count: int) -> None:
    if count > model.max_images:
        raise UserError(f"got {count} images, expected {model.max_images} or fewer per request")


def _tensor(
    pipe: Pipeline, name: str, lists: Sequence[Sequence[int]], count: int, dtype: torch.dtype
) -> Tensor:
    """Convert a list for each image, or one for all, into a tensor (count, L)."""
    length = pipe.coarse.config.length
    if len(lists) not in (1, count) or any(len(row) != length for row in lists):
        lengths = " or ".join(str(size) for size in sorted({len(row) for row in lists}))
        raise UserError(
            f"{name}: got {len(lists)} lists of {lengths} tokens, expected {count} of {length}, "
            "or 1 for all images"
        )
    return torch.tensor(lists, dtype=dtype).expand(count, length)


def _sampling(pipe: Pipeline, settings: schema.SamplingSettings) -> Sampling:
    return dataclasses.replace(pipe.sampling, **settings.model_dump(exclude_none=True))


# --- Results --------------------------------------------------------------------------------------


async def _compute(request: Request, worker: Worker, task: Task) -> Response:
    """Respond with a stream of events if the client accepts one, otherwise with JSON."""
    events = _follow(worker.submit(task), request)
    if EVENT_STREAM in request.headers.get("accept", ""):
        return StreamingResponse(_format(events), headers=STREAM_HEADERS, media_type=EVENT_STREAM)
    async with contextlib.aclosing(events):
        last = [event async for event in events if event is not None][-1]
    return error_response(**last.data) if last.name == "error" else _json_response(last.data)


async def _follow(job: Job, request: Request) -> AsyncGenerator[Event | None, None]:
    """Yield the events of a job, and None in a long silence between two.

    The job is cancelled when time is up, the client disconnects, or the server stops.
    """
    limits, jobs = request.app.state.limits, request.app.state.jobs
    late = tasks.error(
        429, f"no result within {limits.seconds:g} seconds; request less, or try later"
    )
    timer = asyncio.get_running_loop().call_later(limits.seconds, job.events.put_nowait, late)
    watcher = asyncio.create_task(_wait_for_disconnect(job, request))
    jobs.add(job)
    try:
        while True:
            try:
                async with asyncio.timeout(limits.silence):
                    event = await job.events.get()
            except TimeoutError:
                yield None
                continue
            yield event
            if event.name in ("done", "error"):
                return
    finally:
        jobs.discard(job)
        job.cancelled = True
        timer.cancel()
        watcher.cancel()


async def _wait_for_disconnect(job: Job, request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    job.events.put_nowait(tasks.error(408, "the client disconnected"))


async def _format(events: AsyncGenerator[Event | None, None]) -> AsyncGenerator[bytes, None]:
    """Format events as server-sent events; a comment keeps proxies from closing a silent stream."""
    async with contextlib.aclosing(events):
        async for event in events:
            if event is None:
                yield b": waiting\n\n"
            else:
                yield b"event: %s\ndata: %s\n\n" % (event.name.encode(), _json(event.data))


def _json_response(data: dict[str, Any]) -> Response:
    return Response(_json(data), media_type="application/json")


def _json(data: dict[str, Any]) -> bytes:
    """Format JSON values; bytes, which are PNG files, as base64."""
    return json.dumps(
        data, default=lambda png: base64.b64encode(png).decode(), separators=(",", ":")
    ).encode()
