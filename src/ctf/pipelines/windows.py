"""How many labels a pass of the coarse model should compute: `window="auto"`.

What a pass costs depends on the machine, the engine and the batch; how many labels it makes certain
depends on the model and the settings. Both are measured while images are sampled. Whatever is
chosen, the labels are the same.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence

import torch

from ctf.models.parallel import CoarseSampler

TRIALS = 2  # passes of each size at first; the first may be slow for reasons of its own
REMEMBERED = 5  # passes whose times count
DECAY = 0.9  # of the weight of a pass in the mean of labels
RETRY = 16  # passes until another size is tried again, at first


@dataclasses.dataclass
class _Measured:
    """Passes of one size: their last seconds, and the decaying mean of labels made certain."""

    seconds: list[float] = dataclasses.field(default_factory=list)
    labels: float = 0.0
    weight: float = 0.0
    passes: int = 0

    def add(self, seconds: float, labels: float) -> None:
        self.seconds = [*self.seconds[-REMEMBERED + 1 :], seconds]
        if self.passes == 1:  # without the first
            self.seconds = [seconds]
        self.passes += 1
        self.labels = DECAY * self.labels + labels
        self.weight = DECAY * self.weight + 1

    @property
    def speed(self) -> float:
        """Labels a second."""
        return self.labels / self.weight / statistics.median(self.seconds)


class AutoWindow:
    """Chooses the window of each pass, for batches of one size.

    It begins with one label, doubles the window as long as that makes sampling faster, and stays
    with the fastest. The sizes next to it are tried again now and then, and more and more rarely
    as long as they are slower.

    Args:
        sizes: The windows to choose from, 1 first.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self._sizes = tuple(sizes)
        self._measured = {size: _Measured() for size in self._sizes}
        self._largest = 0  # index of the largest that was tried at first
        self._climbing, self._since, self._retry, self._above = True, 0, RETRY, True

    def next(self) -> int:
        """The window of the next pass."""
        if self._climbing:
            if self._measured[self._sizes[self._largest]].passes < TRIALS:
                return self._sizes[self._largest]
            is_fastest = self._best() == self._largest
            if is_fastest and self._largest + 1 < len(self._sizes):
                self._largest += 1
                return self._sizes[self._largest]
            self._climbing = False
        best = self._best()
        self._since += 1
        if self._since < self._retry:
            return self._sizes[best]
        self._since, self._retry, self._above = 0, 2 * self._retry, not self._above
        other = best - 1 if self._above else best + 1
        return self._sizes[other if 0 <= other < len(self._sizes) else best]

    def record(self, window: int, seconds: float, labels: float) -> None:
        """Say how long a pass took, and how many labels of an image it made certain on average."""
        before = None if self._climbing else self._best()
        self._measured[window].add(seconds, labels)
        if before is not None and self._best() != before:
            self._retry = RETRY

    def _best(self) -> int:
        """The index of the fastest size so far."""
        known = [i for i, size in enumerate(self._sizes) if self._measured[size].passes]
        return max(known, key=lambda i: self._measured[self._sizes[i]].speed)


def advance(
    sampler: CoarseSampler, auto: AutoWindow, clock: Callable[[], float] = time.perf_counter
) -> None:
    """Take a pass of a sampler over a window that is chosen, and measured, by `auto`."""
    window, left = auto.next(), sampler.certain.count(sampler.length)
    began = clock()
    labels = sampler.advance(window)
    if torch.cuda.is_available():  # a pass over one label does not wait for its result
        torch.cuda.synchronize()
    auto.record(window, clock() - began, sum(labels) / (len(labels) - left))
