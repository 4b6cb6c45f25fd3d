"""Fashion-MNIST, the data set that is included in the package.

Shape suffixes: N images, H and W height and width (28).
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from ctf.common.errors import UserError
from ctf.data.image_set import ImageSet, Splits
from ctf.data.scan import THREADS
from ctf.data.transforms import PLAIN, View, crop

NAME = "fashion-mnist"
FOLDER = Path(__file__).parent / "included" / NAME
CLASSES = (
    "t-shirt", "trouser", "pullover", "dress", "coat",
    "sandal", "shirt", "sneaker", "bag", "ankle-boot",
)  # fmt: skip
# SHA-256 of a split's grey pixels (N, 28, 28) followed by its labels (N,), one byte each.
SHA256 = {
    "train": "16d82e2b505296aa2b78bd5ea0992634f30419a4c97def7c907d154a35ac6157",
    "test": "9f1ec356a747bfe4ebab3cfb722d3694c9ca737e2570f6f90cf31d7b6fd689d4",
}
ORIGINAL_SIZE, PADDED_SIZE = 28, 32  # as published; with a black border of 2 pixels


class FashionMNIST(ImageSet):
    """One split; its grey pixels are kept in memory, border and RGB are added when it is read."""

    mirrors = False  # all shoes point the same way

    def __init__(self, split: str, size: int) -> None:
        self._pixels_NHW, labels_N = load_arrays(split)
        content = json.dumps([NAME, SHA256[split], size])
        super().__init__(
            name=NAME,
            class_names=CLASSES,
            classes_N=labels_N.astype(np.int64),
            image_size=size,
            fingerprint=hashlib.sha256(content.encode()).hexdigest(),
        )

    def read(self, indices: ArrayLike, view: View = PLAIN) -> NDArray[np.uint8]:
        """See `ImageSet.read`; the originals are bordered unless their own size is requested."""
        size = self.image_size
        side = ORIGINAL_SIZE if size == ORIGINAL_SIZE else PADDED_SIZE
        border = (side - ORIGINAL_SIZE) // 2
        grey_BHW = self._pixels_NHW[np.asarray(indices, dtype=np.int64)]
        grey_BHW = np.pad(grey_BHW, ((0, 0), (border, border), (border, border)))
        images = np.empty((len(grey_BHW), size, size, 3), dtype=np.uint8)
        if size == side == view.side(size):
            images[:] = (grey_BHW[:, :, ::-1] if view.flip else grey_BHW)[..., None]
        else:
            for image, grey_HW in zip(images, grey_BHW, strict=True):
                image[:] = np.asarray(crop(Image.fromarray(grey_HW), size, view))[..., None]
        return images


def load_arrays(split: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Load the published arrays of a split.

    Args:
        split: "train" or "test".

    Returns:
        Grey pixels (N, 28, 28) and labels (N,).

    Raises:
        UserError: the data file of the package is missing or damaged.
    """

    def unpack(sheet: bytes) -> NDArray[np.uint8]:
        return np.asarray(Image.open(io.BytesIO(sheet))).reshape(-1, ORIGINAL_SIZE, ORIGINAL_SIZE)

    path = FOLDER / "pictures.zip"
    try:
        with zipfile.ZipFile(path) as file, ThreadPoolExecutor(THREADS) as pool:
            sheets = [n for n in sorted(file.namelist()) if n.startswith(f"{split}/pixels-")]
            pixels = np.concatenate(list(pool.map(lambda name: unpack(file.read(name)), sheets)))
            labels = np.frombuffer(file.read(f"{split}/labels"), dtype=np.uint8)
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: missing or damaged ({error}); reinstall ctf") from None
    return pixels, labels


def open_fashion_mnist(size: int | None = None) -> Splits:
    """Open both splits; the published test split is `val`.

    Args:
        size: side in pixels; by default 32, the originals with a black border. 28 is without it.

    Raises:
        UserError: `size` is above 32, or the data file is damaged.
    """
    size = size or PADDED_SIZE
    if size > PADDED_SIZE:
        raise UserError(
            f"fashion-mnist: got --image-size {size}, expected {PADDED_SIZE} or less, the size of "
            "its images"
        )
    return Splits(train=FashionMNIST("train", size), val=FashionMNIST("test", size))
