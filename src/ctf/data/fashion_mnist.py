"""Fashion-MNIST, an image set that is included in the package."""

from __future__ import annotations

import hashlib
import json

import numpy as np
from numpy.typing import NDArray

from ctf.data.image_set import Splits
from ctf.data.sheets import INCLUDED_SETS, SheetImageSet, Sheets, check_size

NAME = "fashion-mnist"
FOLDER = INCLUDED_SETS / NAME
CLASSES = (
    "t-shirt", "trouser", "pullover", "dress", "coat",
    "sandal", "shirt", "sneaker", "bag", "ankle-boot",
)  # fmt: skip
# SHA-256 of a split's grey pixels (N, 28, 28) followed by its labels (N,), one byte each.
SHA256 = {
    "train": "16d82e2b505296aa2b78bd5ea0992634f30419a4c97def7c907d154a35ac6157",
    "test": "9f1ec356a747bfe4ebab3cfb722d3694c9ca737e2570f6f90cf31d7b6fd689d4",
}
FILE_SHA256 = "616ab1fc5ac3cc3e69234ad21f72324da269a4ac413612432171e32ec7f84c37"
ORIGINAL_SIZE, PADDED_SIZE = 28, 32  # as published; with a black border of 2 pixels


class FashionMNIST(SheetImageSet):
    """One split; its grey pixels are kept in memory, border and RGB are added when it is read.

    The originals have a border unless their own size is requested.
    """

    mirrors = False  # all shoes point the same way

    def __init__(self, split: str, size: int) -> None:
        content = json.dumps([NAME, SHA256[split], size])
        super().__init__(
            sheets(),
            split,
            border=0 if size == ORIGINAL_SIZE else (PADDED_SIZE - ORIGINAL_SIZE) // 2,
            name=NAME,
            class_names=CLASSES,
            image_size=size,
            fingerprint=hashlib.sha256(content.encode()).hexdigest(),
        )


def sheets() -> Sheets:
    """Return the data file of the package."""
    return Sheets(FOLDER / "pictures.zip", FILE_SHA256, ORIGINAL_SIZE, "L")


def load_arrays(split: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Load the published arrays of a split.

    Args:
        split: "train" or "test".

    Returns:
        Grey pixels (N, 28, 28) and labels (N,).

    Raises:
        UserError: the data file of the package is missing or damaged.
    """
    return sheets().pixels(split).squeeze(-1), sheets().labels(split)


def open_fashion_mnist(size: int | None = None) -> Splits:
    """Open both splits; the published test split is `val`.

    Args:
        size: side in pixels; by default 32, the originals with a black border. 28 is without it.

    Raises:
        UserError: `size` is above 32, or the data file is damaged.
    """
    size = size or PADDED_SIZE
    check_size(NAME, size, PADDED_SIZE)
    sheets().check()
    return Splits(train=FashionMNIST("train", size), val=FashionMNIST("test", size))
