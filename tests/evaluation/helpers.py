"""Helpers for the tests of the evaluation: a fake pipeline, fake features, images in memory."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from ctf.common.errors import UserError
from ctf.data.image_set import ImageSet
from ctf.evaluation.evaluate import Evaluation
from ctf.evaluation.extractors import Extractor, Features
from ctf.evaluation.image_collection import BATCH, ImageCollection
from ctf.evaluation.options import EvaluationOptions
from ctf.evaluation.prepare import prepare
from ctf.evaluation.reference_sets import open_samples

Pixels = NDArray[np.uint8]


class RealImages:
    """A pipeline whose "samples" are real images: seed s gives image s of its class.

    sampled: class and seed of every sample so far. settings: those of every call.
    """

    fine = None

    def __init__(self, images: ImageSet) -> None:
        self.class_names = images.class_names
        self.images = images
        self.sampled: list[tuple[int, int]] = []
        self.settings: list[dict[str, Any]] = []

    def number(self, c: int, seed: int) -> int:
        """Which image of the set it is."""
        of_class = np.flatnonzero(self.images.classes_N == c)
        return int(of_class[seed % len(of_class)])

    def sample(self, *, classes: Sequence[int], seed: int, **settings: Any) -> SimpleNamespace:
        self.settings.append(settings)
        sampled = [(c, seed + i) for i, c in enumerate(classes)]
        self.sampled += sampled
        pixels = self.images.read([self.number(*one) for one in sampled])
        return SimpleNamespace(images=[Image.fromarray(p) for p in pixels])


def colour_extractor(
    name: str = "colours", digest: str = "c", with_logits: bool = True
) -> Extractor:
    """6 features: mean and deviation of red, green and blue, in units of 10.

    Its three classes are red, green and blue images.
    """

    def network(images: Pixels) -> Features:
        x = torch.from_numpy(images).float().flatten(1, 2) / 10
        means, deviations = x.mean(dim=1), x.std(dim=1)
        return Features(torch.cat([means, deviations], 1), means, means if with_logits else None)

    return Extractor(name, f"-{name}", digest, 16, network)


def noise(count: int, seed: int, side: int = 8) -> Pixels:
    random = np.random.default_rng(seed)
    return random.integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def collection(pixels: Pixels, classes: Any = None, names: Any = None) -> ImageCollection:
    """Images in memory, in batches of 7."""

    def batches() -> Any:
        return (pixels[start : start + 7] for start in range(0, len(pixels), 7))

    fingerprint = str(hash(pixels.tobytes()))
    size = (pixels.shape[1], pixels.shape[2])
    return ImageCollection("pixels", fingerprint, len(pixels), size, batches, classes, names)


def save_npz(path: Path, pixels: Pixels, classes_N: NDArray[np.int64] | None = None) -> Path:
    np.savez(path, pixels, *[] if classes_N is None else [classes_N])
    return path


def read(opened: ImageCollection) -> np.ndarray:
    batches = list(opened.batches())
    assert all(batch.dtype == np.uint8 and len(batch) <= BATCH for batch in batches)
    return np.concatenate(batches)


def read_samples(path: Path) -> np.ndarray:
    return read(open_samples(path))


def check_refused(path: Path, *words: str) -> None:
    """Check that a file or folder is refused with its name, in one or two lines."""
    with pytest.raises(UserError) as error:
        read_samples(path)
    message = str(error.value)
    assert str(path) in message and len(message.splitlines()) <= 2
    for word in words:
        assert word in message, message


OTHERS = {"settings", "background", "skip_bad"}  # arguments of `prepare`, not options


def prepared(model: str | Path, reference: str | Path | None = None, **options: Any) -> Evaluation:
    """`prepare` with the features that are fastest."""
    options = {"features": ("fashion",), "search": "search_samples" in options, **options}
    others = {name: options.pop(name) for name in OTHERS & options.keys()}
    source = None if reference is None else str(reference)
    return prepare(
        str(model), EvaluationOptions(source, **options), device=torch.device("cpu"), **others
    )


@contextlib.contextmanager
def silent(name: str) -> Iterator[Any]:
    """Takes the place of `show_progress`."""
    yield lambda done, total: None
