"""Samples of a pipeline that are kept to be scored; killed, the drawing goes on where it was.

Shapes: N samples, B of them at a time, H height, W width.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from PIL import Image

from ctf.common import storage
from ctf.common.errors import UserError
from ctf.common.progress import Progress
from ctf.common.rng import generator
from ctf.evaluation import reference_sets
from ctf.evaluation.reference_sets import Collection
from ctf.pipelines.generation import BATCH_SIZE

Balance = Literal["balanced", "uniform"]


class Samples(Protocol):
    """What a call of `sample` returns."""

    @property
    def images(self) -> Sequence[Image.Image]: ...


class Sampler(Protocol):
    """What is evaluated: `Pipeline`, or anything else that draws RGB pictures of a class."""

    @property
    def class_names(self) -> Sequence[str]: ...

    def sample(self, *, classes: Sequence[int], seed: int, **settings: Any) -> Samples:
        """Image i of the call is of classes[i] and is drawn from seed + i."""


@dataclasses.dataclass(frozen=True)
class Drawing:
    """How samples are drawn from a pipeline: with its hash, all that decides what they are."""

    samples: int
    seed: int = 0
    balance: Balance = "balanced"  # exactly equal counts of classes, or each at random
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)  # of `Sampling`
    resize: int | None = None  # pixels a side that samples are resized to before they are scored

    def classes(self, count: int) -> np.ndarray:
        """The class of each sample, of `count` classes: (N,), int64.

        Raises:
            UserError: no samples, or a number that cannot be shared equally.
        """
        if self.samples < 1:
            raise UserError(f"got {self.samples} samples, expected 1 or more")
        if self.balance == "uniform":
            # No generator takes a key below 0.
            return generator(self.seed % 2**64, count).integers(count, size=self.samples)
        if (shared := self.shared(count).samples) != self.samples:
            raise UserError(
                f"{self.samples} samples cannot be shared equally among {count} classes; "
                f"try {shared}, or --balance uniform"
            )
        return np.arange(self.samples) % count

    def shared(self, count: int) -> Drawing:
        """With as many samples more as it takes to be shared equally among `count` classes."""
        missing = -self.samples % count if self.balance == "balanced" else 0
        return dataclasses.replace(self, samples=self.samples + missing)


def draw(pipe: Sampler, drawing: Drawing, folder: Path, progress: Progress) -> Collection:
    """Draws what is not drawn yet, and keeps it in `folder`/samples.npz.

    Sample i is drawn from seed + i, and blocks always begin at the same samples, so interruptions
    do not change a bit. A kill loses the block that was being drawn.
    """
    path, blocks = folder / "samples.npz", folder / "blocks"
    classes_N = drawing.classes(len(pipe.class_names))
    if not path.is_file():
        starts = range(0, len(classes_N), BATCH_SIZE)
        files = [blocks / f"{start:08d}.npy" for start in starts]
        for start, file in zip(starts, files, strict=True):
            if not file.is_file():
                block = _draw_block(pipe, drawing, classes_N, start)
                with storage.atomic(file) as temporary, open(temporary, "wb") as opened:
                    np.save(opened, block)
            progress(min(start + BATCH_SIZE, len(classes_N)), len(classes_N))
        height, width, channels = np.load(files[0], mmap_mode="r").shape[1:]
        shape = (len(classes_N), height, width, channels)
        reference_sets.save_pictures(path, (np.load(file) for file in files), shape, classes_N)
    shutil.rmtree(blocks, ignore_errors=True)
    return dataclasses.replace(
        reference_sets.open_scored(path), class_names=tuple(pipe.class_names)
    )


def draw_blocks(pipe: Sampler, drawing: Drawing) -> Iterator[np.ndarray]:
    """All samples, a block at a time, uint8 (B, H, W, 3); nothing is kept."""
    classes_N = drawing.classes(len(pipe.class_names))
    for start in range(0, len(classes_N), BATCH_SIZE):
        yield _draw_block(pipe, drawing, classes_N, start)


def _draw_block(pipe: Sampler, drawing: Drawing, classes_N: np.ndarray, start: int) -> np.ndarray:
    settings = dict(drawing.settings)
    if drawing.resize is not None:
        settings["resize"] = drawing.resize
    classes = classes_N[start : start + BATCH_SIZE].tolist()
    images = pipe.sample(classes=classes, seed=drawing.seed + start, **settings).images
    return np.stack([np.asarray(image) for image in images])
