"""Workers: each model has a queue of jobs, and one thread that computes them in batches.

A batch is the first job of the queue, and all others with the same settings that fit into memory.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence

from starlette.exceptions import HTTPException

from ctf.common.errors import UserError
from ctf.data.decode import UnreadableImageError
from ctf.pipelines.generation import BATCH_SIZE
from ctf.studio import compute, tasks
from ctf.studio.tasks import Event, Generate, Job, Limits, ServedModel, Task

log = logging.getLogger("ctf.studio")


class Worker:
    """The queue and the thread of a model.

    Attributes:
        model: The model.
        running: The jobs of the current batch.
    """

    def __init__(self, model: ServedModel, limits: Limits) -> None:
        self.model = model
        self.running: Sequence[Job] = ()
        self._queue: deque[Job] = deque()
        self._max_waiting = limits.waiting
        self._changed = threading.Condition()  # guards the queue and `running`
        self._batch_seconds = 1.0  # exponential moving average
        self._stopping = False
        name = f"studio-{model.name}"
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, task: Task) -> Job:
        """Queue a task; called in the server's event loop.

        Raises:
            HTTPException: The queue is full: status 429, with a Retry-After header.
        """
        job = Job(task)
        with self._changed:
            self._drop_cancelled()
            if len(self._queue) >= self._max_waiting:
                images = sum(waiting.task.size for waiting in self._queue)
                seconds = max(1, round(self._batch_seconds * (1 + images / BATCH_SIZE)))
                headers = {"Retry-After": str(seconds)}
                raise HTTPException(429, "too many requests in the queue", headers)
            job.send(Event("queued", {"ahead": len(self._queue) + len(self.running)}))
            self._queue.append(job)
            self._changed.notify()
        return job

    def state(self) -> dict[str, int]:
        """Return the numbers of waiting and running jobs."""
        with self._changed:
            self._drop_cancelled()
            return {"waiting": len(self._queue), "running": len(self.running)}

    def stop(self, seconds: float) -> bool:
        """Cancel all jobs; return whether the thread ended within this time."""
        with self._changed:
            self._stopping = True
            for job in (*self.running, *self._queue):
                job.cancelled = True
            self._changed.notify()
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _drop_cancelled(self) -> bool:
        """Remove cancelled jobs from the queue; return whether any jobs are left."""
        self._queue = deque(job for job in self._queue if not job.cancelled)
        return bool(self._queue)

    def _run(self) -> None:
        while batch := self._next_batch():
            start = time.monotonic()
            self._compute(batch)
            self._batch_seconds = (self._batch_seconds + time.monotonic() - start) / 2

    def _next_batch(self) -> Sequence[Job]:
        """Take a batch from the queue; wait for a job if there is none. At the end, it is empty."""
        with self._changed:
            self.running = ()
            self._changed.wait_for(lambda: self._drop_cancelled() or self._stopping)
            if self._stopping:
                return ()
            batch = [self._queue.popleft()]
            first = batch[0].task
            if isinstance(first, Generate):  # other tasks are computed alone
                max_images = self.model.pipe.largest_batch(guidance=first.sampling.guidance)
                room = max_images - first.size
                for job in list(self._queue):
                    if job.task.batch_key == first.batch_key and job.task.size <= room:
                        self._queue.remove(job)
                        batch.append(job)
                        room -= job.task.size
            self.running = batch
            return batch

    def _compute(self, batch: Sequence[Job]) -> None:
        try:
            compute.run(self.model, batch)
        except (UserError, UnreadableImageError) as error:
            if len(batch) == 1:
                batch[0].send(tasks.error(422, str(error)))
                return
            for job in batch:  # one by one: only those with errors fail
                self._compute([job])
        except Exception:
            log.exception("a batch of %d requests failed", len(batch))
            for job in batch:
                job.send(tasks.error(500, "internal error, see the log of the studio"))
