"""What passes between the server and a worker: tasks, jobs and events.

Shapes: B images of a task, L tokens of an image.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Hashable
from typing import Any, Literal, NamedTuple

from torch import Tensor

from ctf import Pipeline, Sampling


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits on requests."""

    images: int = 64  # per request
    waiting: int = 256  # requests in the queue of a model; any more get status 429
    seconds: float = 120.0  # from a request to its response, time in the queue included
    silence: float = 15.0  # seconds without an event, after which a stream gets a comment
    body_bytes: int = 1 << 20  # of a request in JSON
    upload_bytes: int = 10 << 20  # of an image file
    upload_pixels: int = 16_000_000  # of an image, by its header, before it is decoded
    upload_seconds: float = 30.0  # for the body of a request to arrive


@dataclasses.dataclass(frozen=True)
class ServedModel:
    """A pipeline, the name under which it is served, and the hash of its files."""

    name: str
    pipe: Pipeline
    weights: str
    max_images: int  # per request


@dataclasses.dataclass(frozen=True)
class Generate:
    """Images to sample, or, for given coarse labels, to sample the fine stage of.

    Attributes:
        classes: B class numbers.
        seeds: B seeds.
        sampling: The settings of both stages.
        known_BL: int64, known codes, and -1 where one is to be sampled. None: all are.
        coarse_BL: int64, coarse labels. None: they are to be sampled, too.
        previews: Whether to decode previews while coarse labels are sampled.
    """

    classes: tuple[int, ...]
    seeds: tuple[int, ...]
    sampling: Sampling
    known_BL: Tensor | None = None
    coarse_BL: Tensor | None = None
    previews: bool = True

    @property
    def size(self) -> int:
        """The number of images, B."""
        return len(self.classes)

    @property
    def batch_key(self) -> Hashable:
        """Tasks with the same key can be computed in one batch."""
        return self.sampling, self.known_BL is None, self.coarse_BL is None


@dataclasses.dataclass(frozen=True)
class Encode:
    """An image file to encode, and the class with which its tokens will be resampled."""

    data: bytes
    class_number: int
    max_pixels: int
    size, batch_key, previews = 1, None, False


@dataclasses.dataclass(frozen=True)
class Members:
    """An image to decode with each member of a token's cluster, and to compare these members."""

    class_number: int
    codes_L: Tensor
    position: int  # of the token
    sampling: Sampling
    size, batch_key, previews = 1, None, False


Task = Generate | Encode | Members


class Event(NamedTuple):
    """An event of the API: its name, and its data as JSON values (images as PNG bytes).

    `queued` comes first, then `row` after each row of coarse labels, at last `done` or `error`.
    """

    name: Literal["queued", "row", "done", "error"]
    data: dict[str, Any]


def error(status: int, reason: str) -> Event:
    """Return the event for a task that failed; `status` is an HTTP status."""
    return Event("error", {"status": status, "reason": reason})


class Job:
    """A task, and a queue of events from the thread of its worker to the server's event loop.

    Attributes:
        task: What to compute.
        events: The events that the server has not read yet.
        cancelled: Whether nobody waits for the result any longer; a cancelled job is removed from
            the queue of its worker, or at the next step from its batch.
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        self.events: asyncio.Queue[Event] = asyncio.Queue()
        self.cancelled = False
        self._loop = asyncio.get_running_loop()

    def send(self, event: Event) -> None:
        """Send an event; threadsafe."""
        if not self.cancelled and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self.events.put_nowait, event)
