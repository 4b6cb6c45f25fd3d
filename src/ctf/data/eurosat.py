"""EuroSAT in RGB, an image set that is included in the package."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ctf.data.image_set import Splits
from ctf.data.sheets import INCLUDED_SETS, SheetImageSet, Sheets, check_size

NAME = "eurosat"
FOLDER = INCLUDED_SETS / NAME
CLASSES = (  # the published folders in their order
    "AnnualCrop", "Forest", "HerbaceousVegetation", "Highway", "Industrial",
    "Pasture", "PermanentCrop", "Residential", "River", "SeaLake",
)  # fmt: skip
# SHA-256 of a split's decoded pixels (N, 64, 64, 3) followed by its labels (N,), one byte each.
SHA256 = {
    "train": "8d546469b045f46af01544d6a44fc3d9af69a54990b0d3726c1e23035656fd5f",
    "val": "8baf8e5a529d116f511c48fe520a134c38959350d8d85ae96b5d0719113a5d45",
}
FILE_SHA256 = "d05296c6ea7ea251e74bfa64359741c3a372d256396264afc37f56e0597e909e"
SIZE = 64
VAL_EVERY = 5  # the fifth image of each class is held out, the tenth, ...


class EuroSAT(SheetImageSet):
    """One split."""

    def __init__(self, split: str, size: int) -> None:
        content = json.dumps([NAME, SHA256[split], size])
        super().__init__(
            sheets(),
            split,
            name=NAME,
            class_names=CLASSES,
            image_size=size,
            fingerprint=hashlib.sha256(content.encode()).hexdigest(),
        )


def sheets() -> Sheets:
    """Return the data file of the package."""
    return Sheets(FOLDER / "images.zip", FILE_SHA256, SIZE, "RGB")


def open_eurosat(size: int | None = None) -> Splits:
    """Open both splits, which `split` chose: the published images have none.

    Args:
        size: side in pixels; by default 64, that of the originals.

    Raises:
        UserError: `size` is above 64, or the data file is damaged.
    """
    size = size or SIZE
    check_size(NAME, size, SIZE)
    sheets().check()
    return Splits(train=EuroSAT("train", size), val=EuroSAT("val", size))


def split(names: Sequence[str], classes_N: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
    """Choose the images of each split, and their order.

    Images are ordered by the SHA-256 of their names, so that the first few are of all classes; in
    that order, every fifth of each class is held out.

    Args:
        names: file name of each image, such as "River_12.jpg".
        classes_N: class of each image.

    Returns:
        The numbers of the images in "train" and "val".
    """
    digests = [hashlib.sha256(name.encode()).digest() for name in names]
    order_N = np.array(sorted(range(len(names)), key=digests.__getitem__))
    in_val_N = np.zeros(len(names), dtype=np.bool_)
    for number in np.unique(classes_N):
        of_class = order_N[classes_N[order_N] == number]
        in_val_N[of_class[VAL_EVERY - 1 :: VAL_EVERY]] = True
    return {"train": order_N[~in_val_N[order_N]], "val": order_N[in_val_N[order_N]]}
