"""A load test of the studio: `python -m ctf.studio.load`.

It starts a studio on this machine and sends requests as fast as they are answered: one client
first, then many. Each response must have the class and seed of its request, and the same codes and
PNG file as `Pipeline.sample` gives for them. All traffic stays on the loopback interface.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import itertools
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import tyro

from ctf import Pipeline
from ctf.pipelines import export


@dataclasses.dataclass(frozen=True)
class Response:
    """A response to a request for one image; `status` is 0 and `body` empty if there was none."""

    class_number: int
    seed: int
    status: int
    body: dict[str, Any]
    seconds: float
    memory: int  # resident bytes of the studio


@dataclasses.dataclass(frozen=True)
class Report:
    """The results: all responses by status, images per second, and resident bytes."""

    statuses: Counter[int]
    mismatches: int  # responses that are not those of their request
    single_rate: float
    concurrent_rate: float
    slowest: float  # seconds
    memory_before: int
    memory_peak: int


def measure(model: str, clients: int, seconds: float, alone: float = 10.0) -> Report:
    """Start a studio, send requests by one client and then by many, and check all responses."""
    pipe = Pipeline.from_pretrained(model, engine="auto")
    seeds = itertools.count()
    with _studio(model) as (url, process):

        def run(clients: int, seconds: float) -> tuple[list[Response], float]:
            start = time.monotonic()
            requests = _send(url, process.pid, len(pipe.class_names), seeds, clients, seconds)
            responses = asyncio.run(requests)
            return responses, len(responses) / (time.monotonic() - start)

        for warm_up_clients in (1, clients):
            run(warm_up_clients, min(alone, 1.0))
        single, single_rate = run(1, alone)
        concurrent, concurrent_rate = run(clients, seconds)
    responses = [*single, *concurrent]
    return Report(
        statuses=Counter(response.status for response in responses),
        mismatches=_mismatches(pipe, [r for r in responses if r.status == 200]),
        single_rate=single_rate,
        concurrent_rate=concurrent_rate,
        slowest=max(response.seconds for response in concurrent),
        memory_before=single[-1].memory,
        memory_peak=max(response.memory for response in concurrent),
    )


@contextlib.contextmanager
def _studio(model: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    command = [sys.executable, "-m", "ctf", "studio", model, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            url = re.search(r"http://\S+", process.stdout.readline())
            if url is None:
                raise SystemExit("the studio did not start")
            yield url.group(), process
        finally:
            process.terminate()


async def _send(
    url: str, pid: int, classes: int, seeds: Iterator[int], clients: int, seconds: float
) -> list[Response]:
    """Let each client send one request after another, each with a new seed."""
    responses: list[Response] = []
    limits = httpx2.Limits(max_connections=clients, max_keepalive_connections=clients)
    end = time.monotonic() + seconds
    async with httpx2.AsyncClient(base_url=url, limits=limits, timeout=150) as http:

        async def client() -> None:
            while (start := time.monotonic()) < end:
                seed = next(seeds)
                number = seed % classes
                try:
                    got = await http.post("/v1/generate", json={"classes": [number], "seed": seed})
                    status, body = got.status_code, got.json()
                except (httpx2.HTTPError, ValueError):
                    status, body = 0, {}
                elapsed, memory = time.monotonic() - start, _resident_bytes(pid)
                responses.append(Response(number, seed, status, body, elapsed, memory))

        await asyncio.gather(*(client() for _ in range(clients)))
    return responses


def _resident_bytes(pid: int) -> int:
    """Return the resident memory of a process; 0 without /proc, which is Linux's."""
    path = Path(f"/proc/{pid}/status")
    found = re.search(r"VmRSS:\s+(\d+) kB", path.read_text()) if path.is_file() else None
    return int(found.group(1)) * 1024 if found else 0


def _mismatches(pipe: Pipeline, responses: list[Response]) -> int:
    """Count the responses that differ from what the pipeline samples."""
    if not responses:
        return 0
    classes = [response.class_number for response in responses]
    seeds = [response.seed for response in responses]
    samples = pipe.sample(classes, seeds, decode_separately=True)
    mismatches = 0
    for i, response in enumerate(responses):
        (got,) = response.body["pictures"]
        png = base64.b64encode(export.png(samples.images[i])).decode()
        mismatches += (got["class_number"], got["seed"], got["codes"], got["image"]) != (
            classes[i], seeds[i], samples.codes[i].tolist(), png,
        )  # fmt: skip
    return mismatches


def main(model: str = "fashion-mnist", clients: int = 200, seconds: float = 60.0) -> int:
    """Measure a studio under load; exit with 1 if a response is missing, an error or wrong.

    Example: python -m ctf.studio.load --clients 200 --seconds 60

    Args:
        model: a pipeline
        clients: number of concurrent clients
        seconds: how long they send requests
    """
    report = measure(model, clients, seconds)
    speedup = report.concurrent_rate / report.single_rate
    before, peak = (size / 2**20 for size in (report.memory_before, report.memory_peak))
    print(f"{report.statuses.total()} responses by status: {dict(report.statuses)}")
    print(f"{report.mismatches} responses that are not those of their request")
    print(f"one client: {report.single_rate:.2f} images/s")
    print(f"{clients} clients: {report.concurrent_rate:.2f} images/s, {speedup:.1f} times as many")
    print(f"slowest response: {report.slowest:.1f} s")
    print(f"memory: {before:.0f} MB before, {peak:.0f} MB at most")
    return int(set(report.statuses) != {200} or report.mismatches > 0)


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
