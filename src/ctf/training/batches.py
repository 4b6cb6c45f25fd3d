"""How the batch of a step gets to the device that trains on it.

Shape suffix: B images of a batch.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

AHEAD = 2  # batches that are read before their step

# The numbers of the images, for error messages, and tensors to train on.
Batch = tuple[np.ndarray, list[Tensor]]


class Batches:
    """Batches on a device, by the number of their step.

    On a processor a batch is read when it is needed; another thread would take its time from the
    computation. For a GPU, a thread reads the next ones while it computes, into pinned memory, from
    which they are copied while it computes, too. A batch depends on its step alone, so both ways
    give the same ones.

    Args:
        read: Returns the batch of a step, in main memory. May be called by another thread.
        steps: Of the training; no batch beyond is read ahead.
        device: Where the batches are needed.
        ahead: How many are read ahead; by default none on a processor.
    """

    def __init__(
        self,
        read: Callable[[int], Batch],
        steps: int,
        device: torch.device,
        ahead: int | None = None,
    ) -> None:
        self.read, self.steps, self.device = read, steps, device
        self.ahead = (0 if device.type == "cpu" else AHEAD) if ahead is None else ahead
        self._pool = ThreadPoolExecutor(1, "batches") if self.ahead else None
        self._pending: dict[int, Future[Batch]] = {}

    def __call__(self, step: int) -> Batch:
        """Return the batch of a step. Raises what `read` raises."""
        if self._pool is None:
            images_B, tensors = self.read(step)
        else:
            wanted = range(step, max(step + 1, min(step + 1 + self.ahead, self.steps)))
            for other in self._pending.keys() - set(wanted):
                self._pending.pop(other).cancel()
            for each in wanted:
                if each not in self._pending:
                    self._pending[each] = self._pool.submit(self._pinned, each)
            images_B, tensors = self._pending.pop(step).result()
        return images_B, [to_device(tensor, self.device) for tensor in tensors]

    def _pinned(self, step: int) -> Batch:
        images_B, tensors = self.read(step)
        return images_B, [_pin(tensor, self.device) for tensor in tensors]


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor from main memory to a device; to a GPU, without waiting for what it does."""
    return _pin(tensor, device).to(device, non_blocking=True)


def _pin(tensor: Tensor, device: torch.device) -> Tensor:
    """Pinned memory is freed only after the copies from it are done."""
    return tensor.pin_memory() if device.type == "cuda" and not tensor.is_pinned() else tensor
