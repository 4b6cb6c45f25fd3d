"""One thread for each pipeline does all its computing. Requests wait in line; those that can be
drawn together are drawn as one batch.

Shapes: B images of a request, N images of a batch, L tokens of an image, S members of a cluster.
"""

from __future__ import annotations

import asyncio
import dataclasses
import io
import logging
import threading
import time
import warnings
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from ctf.common.errors import UserError
from ctf.data.decode import FORMATS, UnreadableImage, decode
from ctf.data.transforms import as_pil, crop
from ctf.kernels.sampling_cpu import is_exact
from ctf.models.sampling import Sampling
from ctf.pipelines import export
from ctf.pipelines.generation import BATCH_SIZE, Samples
from ctf.pipelines.pipeline import Pipeline

log = logging.getLogger("ctf.studio")


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a studio takes.

    Args:
        images: of one request.
        waiting: requests for one model that wait; more are sent away.
        seconds: from a request to its answer, waiting included.
        body_bytes: of a request in JSON.
        upload_bytes: of a picture's file.
        upload_pixels: of a picture, told by its header before it is unpacked.
        upload_seconds: for the whole body of a request to arrive.
    """

    images: int = 64
    waiting: int = 256
    seconds: float = 120.0
    body_bytes: int = 1 << 20
    upload_bytes: int = 10 << 20
    upload_pixels: int = 16_000_000
    upload_seconds: float = 30.0


class Busy(Exception):
    """Too many wait already; `seconds` is when to ask again."""

    def __init__(self, seconds: int) -> None:
        self.seconds = seconds


# --- What can be asked for ------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Generate:
    """Images from classes and seeds, B of each; `codes` and `keep` as in `Pipeline.sample`."""

    classes: tuple[int, ...]
    seeds: tuple[int, ...]
    sampling: Sampling
    codes_BL: Tensor | None = None
    keep_BL: Tensor | None = None
    preview: bool = True

    def key(self) -> tuple[Any, ...]:
        return ("generate", self.sampling, self.codes_BL is not None)


@dataclasses.dataclass(frozen=True)
class Refine:
    """Other details for coarse labels."""

    classes: tuple[int, ...]
    seeds: tuple[int, ...]
    sampling: Sampling
    coarse_BL: Tensor

    def key(self) -> tuple[Any, ...]:
        return ("refine", self.sampling)


@dataclasses.dataclass(frozen=True)
class Encode:
    """The codes of a picture's file."""

    data: bytes
    chosen: int  # the class that it is said to be of
    largest: int  # pixels


@dataclasses.dataclass(frozen=True)
class Look:
    """The cluster of one token of an image, with another member put in, each in turn."""

    chosen: int
    codes_L: Tensor
    position: int
    sampling: Sampling


Task = Generate | Refine | Encode | Look


# --- What is told while and after it is done ------------------------------------------------------


class Row(NamedTuple):
    """After each row of coarse labels: previews as PNG, or none where none were asked for."""

    rows: int
    total: int
    images: list[bytes]


class Done(NamedTuple):
    """The answer, as JSON values."""

    answer: dict[str, Any]


class Failed(NamedTuple):
    """Why there is none."""

    status: int
    reason: str


Message = Row | Done | Failed


class Job:
    """A task, and the one who waits for it, in an event loop."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.size = len(task.seeds) if isinstance(task, (Generate, Refine)) else 1
        self.messages: asyncio.Queue[Message] = asyncio.Queue()
        self.wanted = True
        self._loop = asyncio.get_running_loop()

    def leave(self) -> None:
        """Nobody waits any more."""
        self.wanted = False

    def tell(self, message: Message) -> None:
        """From any thread."""
        if self.wanted and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self.messages.put_nowait, message)


# --- The worker -----------------------------------------------------------------------------------


class Worker:
    """A pipeline and the thread that computes with it.

    name: what requests call it.
    weights: see `hash_pipeline`.
    parameters: of each model; of those in int8 there is no count.
    """

    def __init__(self, name: str, pipe: Pipeline, weights: str, limits: Limits) -> None:
        self.name, self.pipe, self.weights, self.limits = name, pipe, weights, limits
        models: dict[str, torch.nn.Module | None]
        models = {"tokenizer": pipe.tokenizer, "coarse": pipe.coarse, "fine": pipe.fine}
        self.parameters = {
            name: sum(tensor.numel() for tensor in model.state_dict().values())
            for name, model in models.items()
            if model is not None and is_exact(model)
        }
        self.most = min(limits.images, pipe.largest_batch(guidance=2.0))
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._running = 0  # jobs
        self._seconds = 1.0  # that a batch took of late
        self._thread = threading.Thread(target=self._work, name=f"ctf-studio-{name}", daemon=True)
        self._thread.start()

    def submit(self, task: Task) -> tuple[Job, int]:
        """Puts a task in line; returns it with the number of those before it.

        Raises:
            Busy: the line is full.
        """
        job = Job(task)
        with self._changed:
            self._forget()
            if len(self._waiting) >= self.limits.waiting:
                images = sum(job.size for job in self._waiting)
                raise Busy(max(1, round(self._seconds * (1 + images / BATCH_SIZE))))
            ahead = len(self._waiting) + self._running
            self._waiting.append(job)
            self._changed.notify()
        return job, ahead

    def state(self) -> dict[str, int]:
        with self._changed:
            self._forget()
            return {"waiting": len(self._waiting), "running": self._running}

    def _forget(self) -> None:
        """Those who left make room in the line at once."""
        if not all(job.wanted for job in self._waiting):
            self._waiting = deque(job for job in self._waiting if job.wanted)

    def _take(self) -> list[Job]:
        """The next task, and all behind it that can be drawn in the same batch."""
        with self._changed:
            self._running = 0
            while True:
                self._forget()
                if self._waiting:
                    break
                self._changed.wait()
            jobs = [self._waiting.popleft()]
            first = jobs[0].task
            if isinstance(first, (Generate, Refine)):
                key, room = first.key(), self._room(first.sampling) - jobs[0].size
                left: deque[Job] = deque()
                for job in self._waiting:
                    task = job.task
                    fits = isinstance(task, (Generate, Refine)) and task.key() == key
                    if fits and job.size <= room:
                        jobs.append(job)
                        room -= job.size
                    else:
                        left.append(job)
                self._waiting = left
            self._running = len(jobs)
            return jobs

    def _room(self, settings: Sampling) -> int:
        return self.pipe.largest_batch(guidance=settings.guidance)

    def _work(self) -> None:
        while True:
            jobs = self._take()
            began = time.monotonic()
            self._do(jobs)
            self._seconds = 0.5 * self._seconds + 0.5 * (time.monotonic() - began)

    def _do(self, jobs: Sequence[Job]) -> None:
        try:
            match jobs[0].task:
                case Generate():
                    self._generate(jobs)
                case Refine():
                    self._refine(jobs)
                case Encode() as task:
                    jobs[0].tell(Done(self._encode(task)))
                case Look() as task:
                    self._look(jobs[0], task)
        except (UserError, UnreadableImage) as error:
            if len(jobs) > 1:  # one's mistake is not the others'
                for job in jobs:
                    self._do([job])
            else:
                jobs[0].tell(Failed(422, str(error)))
        except Exception:
            log.exception("a batch of %d requests failed", len(jobs))
            for job in jobs:
                job.tell(Failed(500, "something went wrong here; the log of the studio says what"))

    def _generate(self, jobs: Sequence[Job]) -> None:
        tasks = [job.task for job in jobs if isinstance(job.task, Generate)]
        owners = [job for job in jobs for _ in range(job.size)]
        codes_NL = keep_NL = None
        if tasks[0].codes_BL is not None:
            codes_NL = torch.cat([t.codes_BL for t in tasks if t.codes_BL is not None])
            keep_NL = torch.cat([t.keep_BL for t in tasks if t.keep_BL is not None])
        for event in self.pipe.stream(
            [number for task in tasks for number in task.classes],
            [seed for task in tasks for seed in task.seeds],
            codes=codes_NL,
            known=keep_NL,
            decode_separately=True,
            preview=False,
            active=lambda: [i for i, job in enumerate(owners) if job.wanted],
            **_as_keywords(tasks[0].sampling),
        ):
            if event.samples is not None:
                for job, task, rows in _rows(jobs, tasks, event.numbers):
                    job.tell(Done(self._pictures(task, event.samples, rows)))
                continue
            shown = {}
            watched = [i for i, n in enumerate(event.numbers) if _preview(owners[n].task)]
            if watched:
                numbers = [event.numbers[i] for i in watched]
                previews = self.pipe.preview(
                    event.coarse[watched],
                    codes=None if codes_NL is None else codes_NL[numbers],
                    known=None if keep_NL is None else keep_NL[numbers],
                )
                shown = dict(zip(watched, map(export.png, previews), strict=True))
            for job, _, rows in _rows(jobs, tasks, event.numbers):
                images = [shown[row] for row in rows if row in shown]
                job.tell(Row(event.rows, event.total, images))

    def _refine(self, jobs: Sequence[Job]) -> None:
        tasks = [job.task for job in jobs if isinstance(job.task, Refine)]
        drawn = self.pipe.refine(
            [number for task in tasks for number in task.classes],
            torch.cat([task.coarse_BL for task in tasks]),
            [seed for task in tasks for seed in task.seeds],
            decode_separately=True,
            **_as_keywords(tasks[0].sampling),
        )
        everyone = tuple(range(len(drawn.images)))
        for job, task, rows in _rows(jobs, tasks, everyone):
            job.tell(Done(self._pictures(task, drawn, rows)))

    def _pictures(
        self, task: Generate | Refine, drawn: Samples, rows: Sequence[int]
    ) -> dict[str, Any]:
        pictures = []
        for i, row in enumerate(rows):
            settings = self._settings(task.classes[i], task.seeds[i], task.sampling)
            if isinstance(task, Refine):
                settings["coarse"] = task.coarse_BL[i].tolist()
            elif task.codes_BL is not None and task.keep_BL is not None:
                keep_L = task.keep_BL[i]
                settings["codes"] = task.codes_BL[i].where(keep_L, 0).tolist()
                settings["keep"] = keep_L.tolist()
            codes_L, coarse_L = drawn.codes[row].tolist(), drawn.coarse[row].tolist()
            pictures.append(self._picture(drawn.images[row], codes_L, coarse_L, settings))
        return {"pictures": pictures}

    def _picture(
        self, image: Image.Image, codes: list[int], coarse: list[int], settings: dict[str, Any]
    ) -> dict[str, Any]:
        number = settings["classes"][0]
        return {
            "model": self.name,
            "class_number": number,
            "class_name": self.pipe.class_names[number],
            "seed": settings["seed"],
            "image": export.png(image),
            "codes": codes,
            "coarse": coarse,
            "settings": settings,
        }

    def _settings(self, number: int, seed: int, sampling: Sampling) -> dict[str, Any]:
        one = export.Settings((number,), 1, seed, sampling, model=self.name, weights=self.weights)
        return one.to_json()

    def _encode(self, task: Encode) -> dict[str, Any]:
        picture = _open(task.data, task.largest)
        codes_1L = self.pipe.encode([picture])
        labels_1L = self.pipe.clusters.labels_V[codes_1L.to(self.pipe.device)].cpu()
        settings = self._settings(task.chosen, 0, self.pipe.sampling)
        settings["codes"] = codes_1L[0].tolist()
        settings["keep"] = [True] * codes_1L.shape[1]
        (image,) = as_pil(self.pipe.decode(codes_1L.to(self.pipe.device)))
        (coarse,) = self.pipe.preview(labels_1L)
        return {
            "original": export.png(crop(picture, self.pipe.tokenizer.config.image_size)),
            "coarse": export.png(coarse),
            "picture": self._picture(image, codes_1L[0].tolist(), labels_1L[0].tolist(), settings),
        }

    def _look(self, job: Job, task: Look) -> None:
        codes_L = task.codes_L.to(self.pipe.device)
        labels_L = self.pipe.clusters.labels_V[codes_L]
        found = self.pipe.members(
            task.chosen, labels_L, task.position, **_as_keywords(task.sampling)
        )
        members = []
        for code, probability in zip(
            found.codes.tolist(), found.probabilities.tolist(), strict=True
        ):
            if not job.wanted:
                return
            swapped_L = codes_L.clone()
            swapped_L[task.position] = code
            (image,) = as_pil(self.pipe.decode(swapped_L[None]))
            members.append({"code": code, "probability": probability, "image": export.png(image)})
        job.tell(Done({"cluster": found.cluster, "position": task.position, "members": members}))


def _as_keywords(settings: Sampling) -> dict[str, Any]:
    return {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings)}


def _preview(task: Task) -> bool:
    return isinstance(task, Generate) and task.preview


def _rows(
    jobs: Sequence[Job], tasks: Sequence[Any], numbers: Sequence[int]
) -> list[tuple[Job, Any, list[int]]]:
    """Of each job that is still in the batch: the rows of its images, which are `numbers` of it."""
    row_of = {number: row for row, number in enumerate(numbers)}
    found, start = [], 0
    for job, task in zip(jobs, tasks, strict=True):
        mine = range(start, start + job.size)
        start += job.size
        if job.wanted and all(number in row_of for number in mine):
            found.append((job, task, [row_of[number] for number in mine]))
    return found


def _open(data: bytes, largest: int) -> Image.Image:
    """The picture in a file, RGB; raises `UnreadableImage`, before it unpacks what is too large."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", Image.DecompressionBombWarning
            )  # the limit here is lower
            with Image.open(io.BytesIO(data), formats=FORMATS) as file:
                width, height = file.size
    except Image.DecompressionBombError:  # Pillow's own limit, which is higher
        raise UnreadableImage(f"too many pixels, expected {largest:,} or fewer in all") from None
    except Exception:  # decoders raise nearly everything when the data is damaged
        raise UnreadableImage("corrupt, truncated or of an unknown format") from None
    if width * height > largest:
        raise UnreadableImage(f"{width} x {height} pixels, expected {largest:,} or fewer in all")
    return decode(data, 1, (255, 255, 255))
