"""How many labels a pass of the coarse model should compute: `window="auto"`.

What a pass costs depends on the machine, the engine and its rows; how many labels it makes certain
depends on the model and the settings. Both are measured while images are sampled. Whatever is
chosen, the labels are the same.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence

import torch

from ctf.models.coarse import CoarseModel
from ctf.models.parallel import CoarseSampler

TRIALS = 2  # passes of a size until its time counts; the first may be slow for reasons of its own
REMEMBERED = 5  # passes whose times count
DECAY = 0.98  # of the weight of a guess, with each pass
RETRY = 16  # passes until another size is tried again, at first
ENDING = 1.1  # passes that a batch takes whose images do not end together, by their mean
LAST_PART = 1 / 16  # of the labels, where it hardly matters that images are parted
# Rows up to which a pass mostly reads weights, so that more of them cost little.
FEW_ROWS, FEW_ROWS_OF_GPU = 4, 256
_LOCK = threading.Lock()  # parts of a batch use the window of their pipeline at the same time


class AutoWindow:
    """Chooses the window of each pass.

    The time of a pass is known by its rows, of which each image has one for each label of the
    window (two under guidance): the least of the last passes, since what disturbs one makes it
    slower. A guess is right with a probability that depends on how many guesses are before it in
    the window, all right; each pass shows some of these, for smaller and larger windows, too.

    It begins with one label, doubles the window as long as that may make sampling faster, and stays
    with the fastest. The sizes next to it are tried again now and then, and more and more rarely
    as long as they are slower. A larger window parts the images of a batch, which makes all later
    passes slower, too. So unless there are few rows, batches try one at their last labels alone.

    Args:
        sizes: The windows to choose from, 1 first.
        length: Labels of an image.
        few_rows: Rows up to which a pass probably takes about as long as over one.
    """

    def __init__(self, sizes: Sequence[int], length: int, few_rows: int) -> None:
        self._sizes, self._length, self._few_rows = tuple(sizes), length, few_rows
        self._times, self._together = _Times(), _Times()
        guesses = self._sizes[-1] - 1
        self._seen, self._right = [0.0] * guesses, [0.0] * guesses  # by the number before
        self._best, self._since, self._retry, self._above = 1, 0, RETRY, True

    @classmethod
    def of(cls, model: CoarseModel) -> AutoWindow:
        """One for a model, on its device."""
        is_cpu = model.backbone.norm.weight.device.type == "cpu"
        few_rows = FEW_ROWS if is_cpu else FEW_ROWS_OF_GPU
        return cls(model.backbone.windows, model.config.length, few_rows)

    def next(self, rows: int, left: int, *, together: bool = False) -> int:
        """The window of the next pass.

        Args:
            rows: Those of a pass over one label of each image.
            left: How many labels are left to sample, at most, of an image.
            together: Whether there are several images, all at the same label. Passes over one label
                keep them together, and take less time than where each image is at its own.
        """
        # One that reaches beyond the last label is enough.
        sizes = [
            w for w, before in zip(self._sizes, (0, *self._sizes), strict=False) if before < left
        ]
        largest = max((r for r, n in self._times.passes.items() if n >= TRIALS), default=0)
        known = [w for w in sizes if rows * w <= largest]
        if not known:
            return sizes[0]
        speeds = {w: self._labels(w) / self._times.of(rows * w) for w in known}
        if together and rows in self._together.passes:
            speeds[1] = ENDING / self._together.of(rows)
        best = max(known, key=lambda w: speeds[w])
        last = left <= LAST_PART * self._length
        if len(known) < len(sizes) and (best > 1 or rows <= self._few_rows or last):
            larger = sizes[len(known)]
            # At best it takes no longer than what is known.
            if self._labels(larger) / self._times.of(largest) > speeds[best]:
                return larger
        if best != self._best:
            self._best, self._since, self._retry = best, 0, RETRY
        self._since += 1
        if self._since < self._retry or (together and best == 1 and not last):
            return best
        self._since, self._retry, self._above = 0, 2 * self._retry, not self._above
        other = sizes.index(best) + (-1 if self._above else 1)
        return sizes[other] if 0 <= other < len(sizes) else best

    def record(
        self,
        rows: int,
        seconds: float,
        guesses: Iterable[tuple[int, int]],
        *,
        together: bool = False,
    ) -> None:
        """Say how a pass went.

        Args:
            rows: Of the pass.
            seconds: It took.
            guesses: For each image, how many labels were guessed, and how many were right until
                the first that was wrong.
            together: Whether it was over one label of images that are together, see `next`.
        """
        if together:
            self._together.add(rows, seconds)
        if not together or self._times.passes.get(rows, 0) < TRIALS:
            self._times.add(rows, seconds)
        self._seen = [DECAY * seen for seen in self._seen]
        self._right = [DECAY * right for right in self._right]
        for guessed, right in guesses:
            for number in range(min(right + 1, guessed)):
                self._seen[number] += 1
                self._right[number] += number < right

    def _labels(self, window: int) -> float:
        """How many labels of an image a pass makes certain on average."""
        labels, all_right, probability = 1.0, 1.0, 0.5
        for seen, right in zip(self._seen[: window - 1], self._right, strict=False):
            # Where little was seen, it is as after one guess less.
            probability = (right + probability) / (seen + 1)
            all_right *= probability
            labels += all_right
        return labels


class _Times:
    """The time of a pass by its rows."""

    def __init__(self) -> None:
        self.passes: dict[int, int] = {}  # how many were measured, by rows
        self._seconds: dict[int, list[float]] = {}  # of the last of them

    def add(self, rows: int, seconds: float) -> None:
        """Add a measured time."""
        self.passes[rows] = self.passes.get(rows, 0) + 1
        before = self._seconds.get(rows, [])[1 - REMEMBERED :]
        self._seconds[rows] = [seconds] if self.passes[rows] <= TRIALS else [*before, seconds]
        if len(self._seconds[rows]) == REMEMBERED:
            # Then more rows take as long, or were measured when all was faster than now.
            least = min(self._seconds[rows])
            for r, others in self._seconds.items():
                self._seconds[r] = [least] if r > rows and min(others) < least else others

    def of(self, rows: int) -> float:
        """Seconds of a pass: measured, or between what was measured for fewer and more rows.

        Where nothing was for fewer, it is the least that they can take, so that they are tried.
        """
        fewer = max((r for r in self._seconds if r <= rows), default=0)
        more = min((r for r in self._seconds if r >= rows), default=fewer)
        if not fewer:
            return self._measured(more) * rows / more
        share = (rows - fewer) / max(more - fewer, 1)
        return (1 - share) * self._measured(fewer) + share * self._measured(more)

    def _measured(self, rows: int) -> float:
        """No more than what more rows took."""
        return min(min(seconds) for r, seconds in self._seconds.items() if r >= rows)


def advance(
    sampler: CoarseSampler, auto: AutoWindow, clock: Callable[[], float] = time.perf_counter
) -> None:
    """Take a pass of a sampler over a window that is chosen, and measured, by `auto`."""
    rows, before = sampler.rows, list(sampler.certain)
    places = [start for start in before if start < sampler.length]
    together = len(places) > 1 and len({*places}) == 1
    with _LOCK:
        window = auto.next(rows, sampler.length - min(before), together=together)
    began = clock()
    labels = sampler.advance(window)
    if torch.cuda.is_available():  # a pass over one label does not wait for its result
        torch.cuda.synchronize()
    seconds = clock() - began
    guesses = []
    for start, count in zip(before, labels, strict=True):
        if start < sampler.length:
            guessed = min(window, sampler.length - start) - 1
            guesses.append((guessed, min(count - 1, guessed)))  # known labels come on top
    with _LOCK:
        auto.record(rows * window, seconds, guesses, together=together and window == 1)
