"""For the tests of the evaluation: what draws real pictures, and features that are colours."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from ctf.data.image_set import ImageSet
from ctf.evaluation.extractors import Extractor, Features
from ctf.evaluation.reference_sets import Collection

Pixels = NDArray[np.uint8]


class Gallery:
    """A pipeline that draws real pictures: that of seed s is number s of its class, from 0 on.

    sampled: class and seed of every picture drawn so far. settings: those of every call.
    """

    def __init__(self, images: ImageSet) -> None:
        self.class_names = images.class_names
        self.images = images
        self.sampled: list[tuple[int, int]] = []
        self.settings: list[dict[str, Any]] = []

    def number(self, c: int, seed: int) -> int:
        of_class = np.flatnonzero(self.images.classes_N == c)
        return int(of_class[seed % len(of_class)])

    def sample(self, *, classes: Sequence[int], seed: int, **settings: Any) -> SimpleNamespace:
        self.settings.append(settings)
        drawn = [(c, seed + i) for i, c in enumerate(classes)]
        self.sampled += drawn
        pixels = self.images.read([self.number(*one) for one in drawn])
        return SimpleNamespace(images=[Image.fromarray(p) for p in pixels])


def colours(name: str = "colours", digest: str = "c", with_logits: bool = True) -> Extractor:
    """An extractor of 6 features: mean and deviation of red, green and blue, in units of 10.

    Its three classes are red, green and blue pictures.
    """

    def look(images: Pixels) -> Features:
        x = torch.from_numpy(images).float().flatten(1, 2) / 10
        means, deviations = x.mean(dim=1), x.std(dim=1)
        return Features(torch.cat([means, deviations], 1), means, means if with_logits else None)

    return Extractor(name, f"-{name}", digest, 16, look)


def noise(count: int, seed: int, side: int = 8) -> Pixels:
    random = np.random.default_rng(seed)
    return random.integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def of_pixels(pixels: Pixels, classes: Any = None, names: Any = None) -> Collection:
    """Pictures in memory, in batches of 7."""

    def batches() -> Any:
        return (pixels[start : start + 7] for start in range(0, len(pixels), 7))

    fingerprint = str(hash(pixels.tobytes()))
    size = (pixels.shape[1], pixels.shape[2])
    return Collection("pixels", fingerprint, len(pixels), size, batches, classes, names)
