"""What windows of labels cost and save: passes of whole images, and the time of single ones.

Results are numbers by "ENGINE BATCH WINDOW passes" and "ENGINE BATCH WINDOW seconds". The window
"auto" is chosen by measured times, as for an image after others; "auto-first" begins without any.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from functools import partial

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

Facts = dict[str, float]
Inputs = tuple[CoarseModel, Tensor, Tensor, Sampling]


def sample(inputs: Inputs, window: int = 1) -> CoarseSampler:
    """Sample all labels, as a pipeline does."""
    sampler = kernels.coarse_sampler(*inputs)
    while not sampler.done:
        sampler.advance(window)
    return sampler


def whole_images(engine: str, pipe: Pipeline, rounds: int) -> Facts:
    """Sample the labels of images by each window: mean passes, and median seconds of a batch."""
    facts: Facts = {}
    for batch in BATCHES:
        classes_B = torch.arange(batch, device=pipe.device) % len(pipe.class_names)
        keys_BL = noise_keys(range(batch), pipe.coarse.config.length)[:, 0]
        inputs = pipe.coarse, classes_B, keys_BL, pipe.sampling
        ways: dict[int | str, Callable[[], CoarseSampler]] = {
            window: partial(sample, inputs, window) for window in WINDOWS
        }
        if kernels.is_exact(pipe.coarse):  # otherwise "auto" is a rule
            ways["auto-first"] = partial(_sample_auto, inputs, None)
            ways["auto"] = partial(_sample_auto, inputs, AutoWindow.of(pipe.coarse))
        for window, call in ways.items():
            facts[f"{engine} {batch} {window} passes"] = statistics.mean(call().passes)
        facts |= _seconds(f"{engine} {batch}", ways, rounds, pipe.device)
    return facts


def single_passes(engine: str, model: CoarseModel, settings: Sampling, rounds: int) -> Facts:
    """Median seconds of a pass from the middle of an image on, with all that sampling does."""
    facts: Facts = {}
    device, length = next(model.parameters()).device, model.config.length
    for batch in BATCHES:
        classes_B = torch.randint(model.config.classes, (batch,), device=device)
        keys_BL = noise_keys(range(batch), length)[:, 0]
        known_BL = torch.randint(model.vocab_size, (batch, length), device=device)
        known_BL[:, length // 2 :] = -1
        ways: dict[int | str, Callable[[], object]] = {}
        for window in WINDOWS:
            sampler = kernels.coarse_sampler(model, classes_B, keys_BL, settings, known_BL)
            sampler.advance(window)  # over the known labels, too
            ways[window] = partial(sampler.advance, window)
        facts |= _seconds(f"{engine} {batch}", ways, rounds, device)
    return facts


def _seconds(
    name: str, ways: Mapping[int | str, Callable[[], object]], rounds: int, device: torch.device
) -> Facts:
    calls = {way: partial(_call, call) for way, call in ways.items()}
    each = harness.in_turn(calls, rounds, device, warm_up=1)
    return {f"{name} {way} seconds": statistics.median(each[way]) for way in ways}


def _call(call: Callable[[], object], _: int) -> Callable[[], object]:
    return call


def _sample_auto(inputs: Inputs, auto: AutoWindow | None) -> CoarseSampler:
    sampler = kernels.coarse_sampler(*inputs)
    auto = auto or AutoWindow.of(sampler.model)
    while not sampler.done:
        windows.advance(sampler, auto)
    return sampler
