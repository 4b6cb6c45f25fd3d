"""Image sets that the package includes: sheets of many images each, in a zip file.

Shape suffixes: B images of a batch, N images of a set, H and W height and width of an original,
C its channels (1 for grey, 3 for RGB), S = image_size.
"""

from __future__ import annotations

import functools
import hashlib
import io
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, UnidentifiedImageError

from ctf.common.errors import UserError
from ctf.data.image_set import ImageSet
from ctf.data.scan import THREADS
from ctf.data.transforms import PLAIN, View, crop

INCLUDED_SETS = Path(__file__).parent / "included"  # a folder for each
T = TypeVar("T")


@dataclass(frozen=True)
class Sheets:
    """A zip file of square images in splits.

    A folder for each split has the file `labels`, a byte for each image, and the images in their
    order, one below another in sheets of PNG or WebP: `pixels-000.png`, ...

    Attributes:
        path: the zip file.
        sha256: its SHA-256 (hex).
        side: side H = W of the images in pixels.
        mode: "L" (grey) or "RGB".
    """

    path: Path
    sha256: str
    side: int
    mode: str

    def check(self) -> None:
        """Check that the file is the one that was packed.

        Raises:
            UserError: it is missing or damaged.
        """

        def digest() -> str:
            with self.path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()

        if (got := self._reading(digest)) != self.sha256:
            raise self._error(f"got SHA-256 {got}, expected {self.sha256}")

    def labels(self, split: str) -> NDArray[np.uint8]:
        """Read the class number of each image of a split, (N,).

        Raises:
            UserError: the file is missing or damaged.
        """

        def read() -> NDArray[np.uint8]:
            with zipfile.ZipFile(self.path) as file:
                return np.frombuffer(file.read(f"{split}/labels"), dtype=np.uint8)

        return self._reading(read)

    def pixels(self, split: str) -> NDArray[np.uint8]:
        """Decode the images of a split, (N, H, W, C).

        Raises:
            UserError: the file is missing or damaged.
        """
        channels = len(self.mode)

        def unpack(sheet: bytes) -> NDArray[np.uint8]:
            pixels = np.asarray(Image.open(io.BytesIO(sheet)).convert(self.mode))
            return pixels.reshape(-1, self.side, self.side, channels)

        def read() -> NDArray[np.uint8]:
            count = len(self.labels(split))
            pixels_NHWC = np.empty((count, self.side, self.side, channels), dtype=np.uint8)
            with zipfile.ZipFile(self.path) as file, ThreadPoolExecutor(THREADS) as pool:
                names = [n for n in sorted(file.namelist()) if n.startswith(f"{split}/pixels-")]
                start = 0
                for sheet in pool.map(lambda name: unpack(file.read(name)), names):
                    pixels_NHWC[start : start + len(sheet)] = sheet
                    start += len(sheet)
            return pixels_NHWC

        return self._reading(read)

    def _reading(self, read: Callable[[], T]) -> T:
        try:
            return read()
        except (OSError, zipfile.BadZipFile, UnidentifiedImageError) as error:
            raise self._error(error) from None

    def _error(self, reason: object) -> UserError:
        return UserError(f"{self.path}: missing or damaged ({reason}); reinstall ctf")


class SheetImageSet(ImageSet):
    """A split of `Sheets`: decoded when an image of it is first read, and then kept in memory."""

    def __init__(self, sheets: Sheets, split: str, *, border: int = 0, **attributes: Any) -> None:
        super().__init__(classes_N=sheets.labels(split).astype(np.int64), **attributes)
        self._sheets, self._split = sheets, split
        self._border = border  # black, in pixels

    @functools.cached_property
    def _pixels_NHWC(self) -> NDArray[np.uint8]:
        return self._sheets.pixels(self._split)

    def read(self, indices: ArrayLike, view: View = PLAIN) -> NDArray[np.uint8]:
        """See `ImageSet.read`."""
        size, border = self.image_size, self._border
        pixels_BHWC = self._pixels_NHWC[np.asarray(indices, dtype=np.int64)]
        if border:
            pixels_BHWC = np.pad(pixels_BHWC, ((0, 0), (border, border), (border, border), (0, 0)))
        images_BSSC = np.empty((len(pixels_BHWC), size, size, 3), dtype=np.uint8)
        if size == pixels_BHWC.shape[1] == view.side(size):
            images_BSSC[:] = pixels_BHWC[:, :, ::-1] if view.flip else pixels_BHWC
            return images_BSSC
        for image_SSC, pixels_HWC in zip(images_BSSC, pixels_BHWC, strict=True):
            original = Image.fromarray(pixels_HWC.squeeze())  # a grey image has no third axis
            image_SSC[:] = np.asarray(crop(original, size, view)).reshape(size, size, -1)
        return images_BSSC


def check_size(name: str, size: int, largest: int) -> None:
    """Check that a set of this name can be opened at this size.

    Raises:
        UserError: the images would have to be enlarged.
    """
    if size > largest:
        raise UserError(
            f"{name}: got --image-size {size}, expected {largest} or less, the size of its images"
        )
