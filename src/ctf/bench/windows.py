"""What windows of labels cost and save: passes of whole images, and the time of single ones.

Results are numbers by "ENGINE BATCH WINDOW passes" and "ENGINE BATCH WINDOW seconds". The window
"auto" is chosen by measured times, as for an image after others; "auto-first" begins without any.
How many passes an image takes and how long depends on the image, so each repetition samples other
ones, the same by all windows.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ctf import kernels
from ctf.bench import harness
from ctf.models.coarse import CoarseModel
from ctf.models.noise import noise_keys
from ctf.models.parallel import CoarseSampler
from ctf.models.sampling import Sampling
from ctf.pipelines import windows
from ctf.pipelines.pipeline import Pipeline
from ctf.pipelines.windows import AutoWindow

WINDOWS, BATCHES = (1, 2, 4, 8, 16, 64), (1, 8)
WHOLE, SINGLE = 8, 3  # repetitions in a round, of whole images and of single passes

Facts = dict[str, float]
Inputs = tuple[CoarseModel, Tensor, Tensor, Sampling]


def sample(inputs: Inputs, window: int = 1) -> CoarseSampler:
    """Sample all labels, as a pipeline does."""
    sampler = kernels.coarse_sampler(*inputs)
    while not sampler.done:
        sampler.advance(window)
    return sampler


class _Batches:
    """Samples batch after batch in one way, and notes how many passes each image took.

    Args:
        auto: Makes what chooses the windows; None where all are `window`.
    """

    def __init__(
        self, pipe: Pipeline, batch: int, window: int, auto: Callable[[], AutoWindow] | None = None
    ) -> None:
        self.pipe, self.batch, self.window, self.auto = pipe, batch, window, auto
        self.passes: list[int] = []

    def __call__(self, number: int) -> Callable[[], None]:
        """Prepare a batch, see `harness.in_turn`."""
        seeds = range(number * self.batch, (number + 1) * self.batch)
        classes_B = torch.tensor(seeds, device=self.pipe.device) % len(self.pipe.class_names)
        keys_BL = noise_keys(seeds, self.pipe.coarse.config.length)[:, 0]
        return partial(self._sample, (self.pipe.coarse, classes_B, keys_BL, self.pipe.sampling))

    def _sample(self, inputs: Inputs) -> None:
        if self.auto is None:
            sampler = sample(inputs, self.window)
        else:
            sampler, auto = kernels.coarse_sampler(*inputs), self.auto()
            while not sampler.done:
                windows.advance(sampler, auto)
        self.passes += sampler.passes


def whole_images(engine: str, pipe: Pipeline, rounds: int) -> Facts:
    """Sample the labels of images by each window: mean passes, and median seconds of a batch."""
    facts: Facts = {}
    for batch in BATCHES:
        ways: dict[int | str, _Batches] = {w: _Batches(pipe, batch, w) for w in WINDOWS}
        if kernels.is_exact(pipe.coarse):  # otherwise "auto" is a rule
            later = AutoWindow.of(pipe.coarse)
            ways["auto-first"] = _Batches(pipe, batch, 0, partial(AutoWindow.of, pipe.coarse))
            ways["auto"] = _Batches(pipe, batch, 0, partial(_same, later))
        facts |= _seconds(f"{engine} {batch}", ways, rounds * WHOLE, pipe.device)
        for window, way in ways.items():
            facts[f"{engine} {batch} {window} passes"] = statistics.mean(way.passes)
    return facts


class _Passes:
    """Takes passes of one size from the middle of an image on, with all that sampling does."""

    def __init__(self, inputs: Inputs, window: int) -> None:
        self.inputs, self.window, length = inputs, window, inputs[0].config.length
        self.known_BL = torch.randint(inputs[0].vocab_size, (len(inputs[1]), length))
        self.known_BL[:, length // 2 :] = -1
        self.sampler: CoarseSampler | None = None

    def __call__(self, number: int) -> Callable[[], object]:
        """Prepare a pass, see `harness.in_turn`. Images start anew before one is at its end."""
        if self.sampler is None or max(self.sampler.certain) + self.window > self.sampler.length:
            self.sampler = kernels.coarse_sampler(*self.inputs, self.known_BL)
            self.sampler.advance()  # over the known labels
        return partial(self.sampler.advance, self.window)


def single_passes(engine: str, model: CoarseModel, settings: Sampling, rounds: int) -> Facts:
    """Median seconds of a pass from the middle of an image on."""
    facts: Facts = {}
    device, length = next(model.parameters()).device, model.config.length
    for batch in BATCHES:
        classes_B = torch.randint(model.config.classes, (batch,), device=device)
        inputs = model, classes_B, noise_keys(range(batch), length)[:, 0], settings
        ways = {window: _Passes(inputs, window) for window in WINDOWS}
        facts |= _seconds(f"{engine} {batch}", ways, rounds * SINGLE, device)
    return facts


def _seconds(
    name: str,
    ways: Mapping[Any, Callable[[int], Callable[[], object]]],
    repetitions: int,
    device: torch.device,
) -> Facts:
    each = harness.in_turn(ways, repetitions, device, warm_up=1)
    return {f"{name} {way} seconds": statistics.median(each[way]) for way in ways}


def _same(auto: AutoWindow) -> AutoWindow:
    return auto
