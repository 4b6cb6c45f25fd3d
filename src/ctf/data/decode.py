"""Decoding of image files in the usual formats and modes to upright RGB images."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageFile, ImageOps

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # by content, whatever the suffix is


class UnreadableImageError(Exception):
    """An image that cannot be used; the message is the reason, in a few words."""


def read_bytes(path: Path) -> bytes:
    """Read a whole file.

    Raises:
        UnreadableImageError: there is no such file, or it cannot be read.
    """
    try:
        if not path.is_file():  # missing, a broken link, or a pipe, which would block
            raise UnreadableImageError("not a file")
        return path.read_bytes()
    except OSError as error:
        raise UnreadableImageError(f"cannot be read: {error.strerror}") from None


def decode(
    data: bytes, size: int, background: tuple[int, ...], max_pixels: int | None = None
) -> Image.Image:
    """Decode the content of an image file.

    Args:
        data: the encoded image.
        size: smallest allowed width and height in pixels.
        background: RGB colour behind transparent pixels.
        max_pixels: largest allowed width x height, checked before pixels are decoded; Pillow's
            limit by default.

    Returns:
        The upright image, RGB.

    Raises:
        UnreadableImageError: it is damaged, too small or too large, or of an unsupported format.
    """
    # Pillow only warns below twice its own limit.
    limit = max_pixels or Image.MAX_IMAGE_PIXELS or sys.maxsize
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as file:
            if file.width * file.height > limit:
                raise Image.DecompressionBombError
            if file.mode in ("I", "F"):
                raise UnreadableImageError(
                    "32-bit or floating-point pixels, whose range is not known"
                )
            image = to_rgb(file, background)
    except UnreadableImageError:
        raise
    except Image.DecompressionBombError:
        raise UnreadableImageError(f"more than {limit:,} pixels") from None
    except Exception:  # damaged data makes decoders raise nearly any exception
        raise UnreadableImageError("corrupt, truncated or of an unknown format") from None
    if min(image.size) < size:
        raise UnreadableImageError(too_small(*image.size, size))
    return image


def too_small(width: int, height: int, size: int) -> str:
    """Return the reason why an image of less than `size` pixels cannot be used."""
    return f"{width}x{height}, smaller than --image-size {size}"


def to_rgb(file: ImageFile.ImageFile, background: tuple[int, ...]) -> Image.Image:
    """Convert the first frame of a newly opened file of any mode to an upright RGB image.

    Transparent pixels are composited over `background`, 16-bit values are scaled to 8 bits, and
    colour profiles are not applied.
    """
    transparent = _transparent_value(file)
    plain_cmyk = file.format == "JPEG" and file.mode == "CMYK" and "adobe" not in file.info
    white_is_zero = getattr(file, "tag_v2", {}).get(262) == 0  # TIFF's PhotometricInterpretation

    file.load()
    try:
        image = ImageOps.exif_transpose(file)
    except Exception:  # damaged EXIF data; the image itself is intact and used as it is stored
        image = file.copy()
    if plain_cmyk:  # Pillow treats every CMYK JPEG as one of Adobe's, which are stored inverted
        image = ImageChops.invert(image)
    if image.mode.startswith("I;16"):
        image = _from_16_bit(image, white_is_zero, transparent)
    if image.has_transparency_data:
        canvas = Image.new("RGBA", image.size, (*background, 255))
        image = Image.alpha_composite(canvas, image.convert("RGBA"))
    return image.convert("RGB")


def _transparent_value(file: ImageFile.ImageFile) -> int | tuple[int, ...] | bytes | None:
    """Return a file's transparent value; scale PNG's like the pixels, which Pillow does not do."""
    value = file.info.get("transparency")
    if file.format == "PNG" and value is not None:
        match file.tile[0].args:
            case "L;2":
                file.info["transparency"] = value * 85
            case "L;4":
                file.info["transparency"] = value * 17
            case "RGB;16B":
                file.info["transparency"] = tuple(channel >> 8 for channel in value)
    return value


def _from_16_bit(
    image: Image.Image, white_is_zero: bool, transparent: int | tuple[int, ...] | bytes | None
) -> Image.Image:
    """Scale 16-bit grey values to 8 bits, with alpha where they equal the transparent value."""
    values = np.asarray(image).astype(np.uint32)
    if white_is_zero:  # Pillow inverts such values only if they have 8 bits
        values = 65535 - values
    image = Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    if transparent is not None:
        image.putalpha(Image.fromarray((values != transparent).astype(np.uint8) * 255))
    return image
