"""Image files, and comparisons of image sets, for the tests of this room."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ctf.common.errors import UserError
from ctf.data.image_set import Splits
from ctf.data.images import open_images
from tests.conftest import disc_image

WHITE, RED = (255, 255, 255), (255, 0, 0)
SIZE = 16


def gradient(height: int = 24, width: int = 32) -> np.ndarray:
    """(H, W, 3): each corner has a colour of its own, and no symmetry of the square keeps it."""
    y, x = np.mgrid[0:height, 0:width]
    red, green = 255 * x // (width - 1), 255 * y // (height - 1)
    return np.stack([red, green, 255 - (red + green) // 2], axis=-1).astype(np.uint8)


RGB = gradient()
GREY = RGB[..., 0]


def encode(image: Image.Image, file_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def encoded_disc(seed: int, file_format: str = "PNG") -> bytes:
    return encode(disc_image(0.1 * seed, seed), file_format)


def save(path: Path, pixels: np.ndarray = RGB) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def by_content(splits: Splits) -> dict[bytes, tuple[str, str]]:
    """The class and the split of each image, by its pixels."""
    return {
        pixels.tobytes(): (part.class_names[c], split)
        for split, part in (("train", splits.train), ("val", splits.val))
        for pixels, c in zip(part.read(np.arange(len(part))), part.classes_N, strict=True)
    }


def equal(a: Splits, b: Splits) -> bool:
    return a.skipped == b.skipped and all(
        x.fingerprint == y.fingerprint
        and np.array_equal(x.classes_N, y.classes_N)
        and np.array_equal(x.read(np.arange(len(x))), y.read(np.arange(len(y))))
        for x, y in ((a.train, b.train), (a.val, b.val))
    )


def refusal(source: str | Path, size: int | None = SIZE, **options: object) -> str:
    """The message of the error when a source is opened."""
    with pytest.raises(UserError) as caught:
        open_images(source, size, **options)  # type: ignore[arg-type]
    return str(caught.value)
