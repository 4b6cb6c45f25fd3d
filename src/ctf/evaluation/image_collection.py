"""What is scored, or scored against: images, or the statistics of images.

Shapes: N images, B images of a batch, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from ctf.data.image_set import Splits
from ctf.evaluation.distances import Gaussian

BATCH = 64  # images


@dataclass(frozen=True)
class StoredStatistics:
    """Mean and covariance of the features of images that are not available themselves.

    features: digest of the extractor; None if the file does not say, as ADM's.
    """

    name: str
    fingerprint: str
    pooled: Gaussian
    spatial: Gaussian | None
    features: str | None


@dataclass(frozen=True)
class ImageCollection:
    """Images of one size that can be read in batches, repeatedly and in the same order.

    name: for people.
    fingerprint: a hash of the images.
    size: (H, W).
    batches: yields uint8 (B, H, W, 3) with B at most `BATCH`.
    classes_N: int64 of 0 or more, if known.
    class_names: by class number, if known.
    statistics: of the larger set that these images were taken from, as in ADM's reference batches.
    summary: what files were understood to be, see `summary.summarize`; in full if true is passed.
    splits: the training and held-out images that these belong to, if there are such.
    """

    name: str
    fingerprint: str
    count: int
    size: tuple[int, int]
    batches: Callable[[], Iterator[np.ndarray]]
    classes_N: np.ndarray | None = None
    class_names: tuple[str, ...] | None = None
    statistics: StoredStatistics | None = None
    summary: Callable[[bool], str] | None = None
    splits: Splits | None = None
