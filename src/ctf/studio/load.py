"""Many clients at once: `python -m ctf.studio.load`.

Starts a studio of its own on this machine, and asks it as fast as it answers: first one client,
then many. Every answer must be that of its own request, and show the very picture that the pipeline
draws for its seed, as the same file. Traffic goes to the loopback interface only.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import tyro

from ctf.pipelines import export
from ctf.pipelines.pipeline import Pipeline

MOST_MEMORY = 200 * 2**20  # bytes more than at the start
LEAST_SPEED_UP = 3.0
SECONDS_ALONE = 10.0  # that one client asks, to compare with
SEED = 1_000_000


@dataclasses.dataclass(frozen=True)
class Found:
    """What was seen.

    statuses: how many answers had each HTTP status; 0 for none.
    crossed: answers to another's request, or another picture than the pipeline draws.
    alone, together: images a second, of one client and of all.
    memory: bytes that the studio held before, and the most that it held meanwhile.
    slowest: seconds that an answer took.
    """

    statuses: dict[int, int]
    crossed: int
    answers: int
    alone: float
    together: float
    memory: tuple[int, int]
    slowest: float

    def mistakes(self) -> list[str]:
        """What must not be; empty where all is well."""
        found = []
        if wrong := {status: count for status, count in self.statuses.items() if status != 200}:
            found.append(f"answers other than 200: {wrong}")
        if self.crossed:
            found.append(f"{self.crossed} answers are not those of their request")
        if self.memory[1] - self.memory[0] > MOST_MEMORY:
            found.append("the studio has grown by more than 200 MB")
        return found


@dataclasses.dataclass(frozen=True)
class Asked:
    """One request and what came back."""

    number: int
    seed: int
    status: int
    seconds: float
    answer: dict[str, Any]


def measure(model: str, clients: int, seconds: float, alone: float = SECONDS_ALONE) -> Found:
    """Starts a studio, asks it, and checks every answer."""
    pipe = Pipeline.from_pretrained(model, engine="auto")
    classes = len(pipe.class_names)
    with _studio(model) as (address, process):
        asyncio.run(_ask(address, classes, 1, 1.0, SEED // 2))  # it has drawn before
        asyncio.run(_ask(address, classes, clients, 1.0, SEED // 2))
        before = _held(process)
        began = time.monotonic()
        single = asyncio.run(_ask(address, classes, 1, alone, SEED))
        rate_alone = len(single) / (time.monotonic() - began)
        began = time.monotonic()
        watching = _Memory(process)
        many = asyncio.run(_ask(address, classes, clients, seconds, 2 * SEED, watching))
        rate_together = len(many) / (time.monotonic() - began)
        most = max(watching.most, _held(process))
    everything = [*single, *many]
    statuses: dict[int, int] = {}
    for asked in everything:
        statuses[asked.status] = statuses.get(asked.status, 0) + 1
    return Found(
        statuses,
        _crossed(pipe, [asked for asked in everything if asked.status == 200]),
        len(everything),
        rate_alone,
        rate_together,
        (before, most),
        max(asked.seconds for asked in many),
    )


@contextlib.contextmanager
def _studio(model: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    command = [sys.executable, "-m", "ctf", "studio", model, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            found = re.search(r"http://\S+", process.stdout.readline())
            if found is None:
                raise SystemExit("the studio did not start")
            yield found.group(), process
        finally:
            process.terminate()


class _Memory:
    """The most that a process held whenever it was looked at."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process, self.most = process, 0

    async def watch(self) -> None:
        while True:
            self.most = max(self.most, _held(self.process))
            await asyncio.sleep(0.25)


def _held(process: subprocess.Popen[str]) -> int:
    """Bytes in memory, where the system tells (Linux); else 0."""
    path = Path(f"/proc/{process.pid}/status")
    if not path.is_file():
        return 0
    found = re.search(r"VmRSS:\s+(\d+) kB", path.read_text())
    return int(found.group(1)) * 1024 if found else 0


async def _ask(
    address: str,
    classes: int,
    clients: int,
    seconds: float,
    seed: int,
    memory: _Memory | None = None,
) -> list[Asked]:
    """Clients that ask one after another until the time is over, each seed once."""
    done: list[Asked] = []
    numbers = iter(range(10**9))
    watching = asyncio.create_task(memory.watch()) if memory else None
    limits = httpx2.Limits(max_connections=clients, max_keepalive_connections=clients)
    end = time.monotonic() + seconds
    async with httpx2.AsyncClient(base_url=address, limits=limits, timeout=150) as client:

        async def one() -> None:
            while time.monotonic() < end:
                number = next(numbers)
                body = {"classes": [number % classes], "seed": seed + number}
                began = time.monotonic()
                try:
                    answer = await client.post("/v1/generate", json=body)
                    status, said = answer.status_code, answer.json()
                except (httpx2.HTTPError, ValueError):
                    status, said = 0, {}
                taken = time.monotonic() - began
                done.append(Asked(number % classes, seed + number, status, taken, said))

        await asyncio.gather(*(one() for _ in range(clients)))
    if watching is not None:
        watching.cancel()
    return done


def _crossed(pipe: Pipeline, answers: list[Asked]) -> int:
    """How many answers are not what the pipeline draws for their class and seed."""
    if not answers:
        return 0
    drawn = pipe.sample(
        [a.number for a in answers], [a.seed for a in answers], decode_separately=True
    )
    wrong = 0
    for asked, codes_L, image in zip(answers, drawn.codes, drawn.images, strict=True):
        (picture,) = asked.answer["pictures"]
        got = (picture["seed"], picture["class_number"], picture["codes"], picture["image"])
        encoded = base64.b64encode(export.png(image)).decode()
        wrong += got != (asked.seed, asked.number, codes_L.tolist(), encoded)
    return wrong


def main(model: str = "fashion-mnist", clients: int = 200, seconds: float = 60.0) -> int:
    """Asks a studio as many clients at once, and says what came of it; 1 where it failed.

    Example: python -m ctf.studio.load --clients 200 --seconds 60

    Args:
        model: a pipeline; the shipped one by default
        clients: that ask at the same time
        seconds: for which they ask
    """
    found = measure(model, clients, seconds)
    megabytes = [round(size / 2**20) for size in found.memory]
    print(f"{found.answers} answers: {found.statuses}; {found.crossed} of them not their own")
    print(f"one client: {found.alone:.2f} images a second")
    print(f"{clients} clients: {found.together:.2f}, {found.together / found.alone:.1f} times that")
    print(f"slowest answer: {found.slowest:.1f} s")
    print(f"memory: {megabytes[0]} MB before, {megabytes[1]} MB at most")
    mistakes = found.mistakes()
    if found.together < LEAST_SPEED_UP * found.alone:
        mistakes.append(f"many together are less than {LEAST_SPEED_UP:g} times as fast as one")
    for mistake in mistakes:
        print(f"FAILED: {mistake}")
    return int(bool(mistakes))


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
