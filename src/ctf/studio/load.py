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

SECONDS_ALONE = 10.0  # for which a single client sends requests, to compare with


@dataclasses.dataclass(frozen=True)
class Response:
    """A request, and its response; `status` is 0 and `body` empty if there was none."""

    class_number: int
    seed: int
    status: int
    body: dict[str, Any]
    seconds: float
    memory: int  # resident bytes of the studio when the response came


@dataclasses.dataclass(frozen=True)
class Report:
    """The results of a load test.

    Attributes:
        single, concurrent: The responses to one client, and to many.
        single_rate, concurrent_rate: Images per second.
        mismatches: The number of responses that are not those of their request.
    """

    single: list[Response]
    concurrent: list[Response]
    single_rate: float
    concurrent_rate: float
    mismatches: int

    @property
    def statuses(self) -> Counter[int]:
        """The number of responses with each HTTP status."""
        return Counter(response.status for response in [*self.single, *self.concurrent])

    @property
    def memory(self) -> tuple[int, int]:
        """Resident bytes of the studio before the concurrent requests, and at most."""
        return self.single[-1].memory, max(response.memory for response in self.concurrent)


def measure(model: str, clients: int, seconds: float, alone: float = SECONDS_ALONE) -> Report:
    """Start a studio, send requests for some seconds, and check all responses."""
    pipe = Pipeline.from_pretrained(model, engine="auto")
    with _studio(model) as (url, process):
        load = _Load(url, process.pid, len(pipe.class_names))
        load.run(1, min(alone, 1.0))  # warm-up
        load.run(clients, min(alone, 1.0))
        single, single_rate = load.run(1, alone)
        concurrent, concurrent_rate = load.run(clients, seconds)
    mismatches = _mismatches(pipe, [r for r in [*single, *concurrent] if r.status == 200])
    return Report(single, concurrent, single_rate, concurrent_rate, mismatches)


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


class _Load:
    """Clients of a studio, which send each seed once."""

    def __init__(self, url: str, pid: int, classes: int) -> None:
        self.url, self.pid, self.classes = url, pid, classes
        self.seeds = itertools.count()

    def run(self, clients: int, seconds: float) -> tuple[list[Response], float]:
        """Send requests; return the responses and the number of images per second."""
        start = time.monotonic()
        responses = asyncio.run(self._run(clients, start + seconds))
        return responses, len(responses) / (time.monotonic() - start)

    async def _run(self, clients: int, end: float) -> list[Response]:
        responses: list[Response] = []
        limits = httpx2.Limits(max_connections=clients, max_keepalive_connections=clients)
        async with httpx2.AsyncClient(base_url=self.url, limits=limits, timeout=150) as http:

            async def client() -> None:
                while time.monotonic() < end:
                    responses.append(await self._request(http))

            await asyncio.gather(*(client() for _ in range(clients)))
        return responses

    async def _request(self, http: httpx2.AsyncClient) -> Response:
        seed = next(self.seeds)
        number = seed % self.classes
        start = time.monotonic()
        try:
            got = await http.post("/v1/generate", json={"classes": [number], "seed": seed})
            status, body = got.status_code, got.json()
        except (httpx2.HTTPError, ValueError):
            status, body = 0, {}
        elapsed = time.monotonic() - start
        return Response(number, seed, status, body, elapsed, _resident_bytes(self.pid))


def _resident_bytes(pid: int) -> int:
    """Return the resident memory of a process, or 0 without /proc (it is Linux's)."""
    path = Path(f"/proc/{pid}/status")
    found = re.search(r"VmRSS:\s+(\d+) kB", path.read_text()) if path.is_file() else None
    return int(found.group(1)) * 1024 if found else 0


def _mismatches(pipe: Pipeline, responses: list[Response]) -> int:
    """Count the responses that differ from what the pipeline samples."""
    if not responses:
        return 0
    samples = pipe.sample(
        [response.class_number for response in responses],
        [response.seed for response in responses],
        decode_separately=True,
    )
    mismatches = 0
    for response, codes_L, image in zip(responses, samples.codes, samples.images, strict=True):
        (got,) = response.body["pictures"]
        expected = {
            "class_number": response.class_number,
            "seed": response.seed,
            "codes": codes_L.tolist(),
            "image": base64.b64encode(export.png(image)).decode(),
        }
        mismatches += any(got[key] != value for key, value in expected.items())
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
    statuses, speedup = report.statuses, report.concurrent_rate / report.single_rate
    before, peak = (round(size / 2**20) for size in report.memory)
    print(f"{statuses.total()} responses by status: {dict(statuses)}")
    print(f"{report.mismatches} responses that are not those of their request")
    print(f"one client: {report.single_rate:.2f} images/s")
    print(f"{clients} clients: {report.concurrent_rate:.2f} images/s, {speedup:.1f} times as many")
    print(f"slowest response: {max(r.seconds for r in report.concurrent):.1f} s")
    print(f"memory: {before} MB before, {peak} MB at most")
    return int(set(statuses) != {200} or report.mismatches > 0)


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
