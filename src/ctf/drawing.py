"""Samples of a pipeline that are kept to be scored; killed, the drawing goes on where it was.

Shapes: N samples, B of them at a time, H height, W width.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from PIL import Image

from ctf import checkpoint, collection
from ctf.collection import Collection
from ctf.errors import UserError
from ctf.loop import generator

Report = Callable[[int, int], None]
Balance = Literal["balanced", "uniform"]

BLOCK = 512  # samples in a file while they are drawn: what a kill loses at most


class Samples(Protocol):
    """What a call of `sample` returns."""

    @property
    def images(self) -> Sequence[Image.Image]: ...


class Sampler(Protocol):
    """What is evaluated: `Pipeline`, or anything else that draws pictures of a class."""

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
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)  # all of `Sampling`
    resize: int | None = None  # pixels a side that samples are resized to before they are scored

    def classes(self, count: int) -> np.ndarray:
        """The class of each sample, of `count` classes: (N,), int64.

        Raises:
            UserError: no samples, or a number that cannot be shared equally.
        """
        if self.samples < 1:
            raise UserError(f"got {self.samples} samples, expected 1 or more")
        if self.balance == "uniform":
            return generator(self.seed, count).integers(count, size=self.samples)
        if self.samples % count:
            more = -(-self.samples // count) * count
            raise UserError(
                f"{self.samples} samples cannot be shared equally among {count} classes; "
                f"try {more}, or --balance uniform"
            )
        return np.arange(self.samples) % count


def draw(pipe: Sampler, drawing: Drawing, folder: Path, report: Report) -> Collection:
    """Draws what is not drawn yet, and keeps it in `folder`/samples.npz.

    Sample i is drawn from seed + i, so neither blocks nor interruptions change what is scored.
    """
    classes_N = drawing.classes(len(pipe.class_names))
    path, blocks = folder / "samples.npz", folder / "blocks"
    if not path.is_file():
        starts = range(0, len(classes_N), BLOCK)
        files = [blocks / f"{start:08d}.npy" for start in starts]
        for start, file in zip(starts, files, strict=True):
            if not file.is_file():
                block = draw_block(pipe, drawing, classes_N, start)
                with checkpoint.atomic(file) as temporary, open(temporary, "wb") as opened:
                    np.save(opened, block)
            report(min(start + BLOCK, len(classes_N)), len(classes_N))
        height, width, channels = np.load(files[0], mmap_mode="r").shape[1:]
        collection.save_pictures(
            path,
            (np.load(file) for file in files),
            (len(classes_N), height, width, channels),
            classes_N,
        )
    shutil.rmtree(blocks, ignore_errors=True)
    kept = collection.open_scored(path)
    return dataclasses.replace(kept, class_names=tuple(pipe.class_names))


def draw_block(pipe: Sampler, drawing: Drawing, classes_N: np.ndarray, start: int) -> np.ndarray:
    """The samples from `start` on, a block of them: uint8 (B, H, W, 3)."""
    settings = dict(drawing.settings)
    if drawing.resize is not None:
        settings["resize"] = drawing.resize
    classes = classes_N[start : start + BLOCK].tolist()
    images = pipe.sample(classes=classes, seed=drawing.seed + start, **settings).images
    return np.stack([np.asarray(image.convert("RGB")) for image in images])
