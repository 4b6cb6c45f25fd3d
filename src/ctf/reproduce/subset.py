"""Training images that no model is trained on: searches compare with them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ctf.data.image_set import ImageSet
from ctf.data.transforms import PLAIN, View


class Subset(ImageSet):
    """The images of a set with the numbers `rows` (M,), int64, in that order."""

    def __init__(self, images: ImageSet, rows: NDArray[np.int64]) -> None:
        super().__init__(
            images.name,
            images.class_names,
            images.classes_N[rows],
            images.image_size,
            hashlib.sha256(images.fingerprint.encode() + rows.tobytes()).hexdigest(),
        )
        self.mirrors = images.mirrors
        self._images, self._rows = images, rows

    def read(self, indices: ArrayLike, view: View = PLAIN) -> NDArray[np.uint8]:
        """Read images, as `ImageSet.read`."""
        return self._images.read(self._rows[np.asarray(indices)], view)

    def read_views(self, indices: ArrayLike, views: Sequence[View]) -> Iterator[NDArray[np.uint8]]:
        """Read views of images, as `ImageSet.read_views`."""
        return self._images.read_views(self._rows[np.asarray(indices)], views)


def split_off(images: ImageSet, count: int) -> tuple[Subset, Subset]:
    """Return all but `count` images, and these, evenly spread: a folder is sorted by class.

    Raises:
        ValueError: One of the two would be empty.
    """
    if not 0 < count < len(images):
        raise ValueError(f"cannot split {count} of {len(images)} images off")
    rows = np.arange(count) * len(images) // count
    rest = np.delete(np.arange(len(images)), rows)
    return Subset(images, rest), Subset(images, rows)
