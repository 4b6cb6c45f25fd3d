"""Samples of a pipeline, generated once and cached; an interrupted generation resumes.

Shapes: N samples, B samples of a batch, H height, W width.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ctf.common import storage
from ctf.common.errors import UserError
from ctf.common.progress import Progress
from ctf.common.rng import generator
from ctf.evaluation.image_collection import ImageCollection
from ctf.evaluation.npz_files import save_images
from ctf.evaluation.options import Balance
from ctf.evaluation.reference_sets import open_samples
from ctf.pipelines.export import MAX_IMAGES
from ctf.pipelines.generation import BATCH_SIZE


class ImageModel(Protocol):
    """What generates samples: a pipeline, or a model of another library."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names by class number."""

    def sample(self, classes: Any, seed: Any = 0, **settings: Any) -> Any:
        """Sample an image for each class, image i from seed + i; `images` are those of PIL."""


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """Determines, together with the hash of a pipeline, all samples.

    samples: their number.
    seed: sample i is generated from seed + i.
    balance: exactly equal counts of all classes, or the class of each sample at random.
    settings: fields of `Sampling`.
    resize: pixels per side that samples are resized to.
    """

    samples: int
    seed: int = 0
    balance: Balance = "balanced"
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    resize: int | None = None

    def classes(self, class_count: int) -> np.ndarray:
        """Return the class of each sample, (N,) int64 in [0, `class_count`).

        Raises:
            UserError: no samples, or a number that is not divisible by the number of classes.
        """
        if self.samples < 1:
            raise UserError(f"got {self.samples} samples, expected 1 or more")
        if self.samples > MAX_IMAGES:
            raise UserError(f"got {self.samples} samples, expected {MAX_IMAGES:,} or fewer")
        if self.balance == "uniform":
            # Keys of a generator are not negative.
            return generator(self.seed % 2**64, class_count).integers(
                class_count, size=self.samples
            )
        if (rounded := self.rounded_up(class_count).samples) != self.samples:
            raise UserError(
                f"{self.samples} samples cannot be split equally among {class_count} classes; "
                f"try {rounded}, or --balance uniform"
            )
        return np.arange(self.samples) % class_count

    def rounded_up(self, class_count: int) -> GenerationConfig:
        """Round the number of samples up to a multiple of `class_count`, if balanced."""
        missing = -self.samples % class_count if self.balance == "balanced" else 0
        return dataclasses.replace(self, samples=self.samples + missing)


def cached_samples(
    pipe: ImageModel, config: GenerationConfig, folder: Path, progress: Progress
) -> ImageCollection:
    """Generate the samples that `folder`/samples.npz does not have yet, and open it.

    Batches always begin at the same samples, so interruptions do not change the result. A killed
    process loses the batch it was generating.
    """
    path, blocks = folder / "samples.npz", folder / "blocks"
    classes_N = config.classes(len(pipe.class_names))
    if not path.is_file():
        starts = range(0, len(classes_N), BATCH_SIZE)
        files = [blocks / f"{start:08d}.npy" for start in starts]
        for start, file in zip(starts, files, strict=True):
            if not file.is_file():
                batch = _generate_batch(pipe, config, classes_N, start)
                with storage.atomic(file) as temporary, open(temporary, "wb") as opened:
                    np.save(opened, batch)
            progress(min(start + BATCH_SIZE, len(classes_N)), len(classes_N))
        height, width, channels = np.load(files[0], mmap_mode="r").shape[1:]
        shape = (len(classes_N), height, width, channels)
        save_images(path, (np.load(file) for file in files), shape, classes_N)
    shutil.rmtree(blocks, ignore_errors=True)
    return dataclasses.replace(open_samples(path), class_names=tuple(pipe.class_names))


def generate(pipe: ImageModel, config: GenerationConfig) -> Iterator[np.ndarray]:
    """Generate all samples without caching: batches uint8 (B, H, W, 3)."""
    classes_N = config.classes(len(pipe.class_names))
    for start in range(0, len(classes_N), BATCH_SIZE):
        yield _generate_batch(pipe, config, classes_N, start)


def _generate_batch(
    pipe: ImageModel, config: GenerationConfig, classes_N: np.ndarray, start: int
) -> np.ndarray:
    settings = dict(config.settings)
    if config.resize is not None:
        settings["resize"] = config.resize
    classes: Any = classes_N[start : start + BATCH_SIZE]
    images = pipe.sample(classes=classes, seed=config.seed + start, **settings).images
    return np.stack([np.asarray(image) for image in images])
