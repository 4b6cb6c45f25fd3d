"""The bytes of a picture file, of any usual format and mode, -> an upright RGB picture."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageFile, ImageOps

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # whatever a file's name claims


class Unusable(Exception):
    """Why a file cannot be used, in a few words."""


def read_bytes(path: Path) -> bytes:
    """The content of a file; raises `Unusable`."""
    try:
        if not path.is_file():  # gone, a broken link, or a pipe that would never end
            raise Unusable("not a file")
        return path.read_bytes()
    except OSError as error:
        raise Unusable(f"cannot be read: {error.strerror}") from None


def decode(data: bytes, size: int, colour: tuple[int, ...]) -> Image.Image:
    """A file's content as an RGB picture of at least `size` pixels a side, or `Unusable`."""
    limit = Image.MAX_IMAGE_PIXELS or sys.maxsize  # Pillow only warns below twice its limit
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as file:
            if file.width * file.height > limit:
                raise Image.DecompressionBombError
            if file.mode in ("I", "F"):
                raise Unusable("32-bit or floating-point pixels, whose range is not known")
            image = to_rgb(file, colour)
    except Unusable:
        raise
    except Image.DecompressionBombError:
        raise Unusable(f"more than {limit:,} pixels") from None
    except Exception:  # decoders raise nearly everything when the data is damaged
        raise Unusable("corrupt, truncated or of an unknown format") from None
    check_size(*image.size, size)
    return image


def check_size(width: int, height: int, size: int) -> None:
    """Raises `Unusable` where one of the sides is shorter than `size`."""
    if min(width, height) < size:
        raise Unusable(f"{width}x{height}, smaller than --image-size {size}")


def to_rgb(file: ImageFile.ImageFile, colour: tuple[int, ...]) -> Image.Image:
    """The first frame of a newly opened picture of any mode, upright, as RGB upon `colour`.

    16-bit values are scaled to 8 bits. Colour profiles are not applied.
    """
    key = file.info.get("transparency")
    if file.format == "PNG" and key is not None:
        # Pillow scales the pixels to 8 bits, but not the colour that counts as transparent.
        match file.tile[0].args:
            case "L;2":
                file.info["transparency"] = key * 85
            case "L;4":
                file.info["transparency"] = key * 17
            case "RGB;16B":
                file.info["transparency"] = tuple(value >> 8 for value in key)
    plain_cmyk = file.format == "JPEG" and file.mode == "CMYK" and "adobe" not in file.info
    white_is_zero = getattr(file, "tag_v2", {}).get(262) == 0  # TIFF's PhotometricInterpretation

    file.load()
    try:
        image = ImageOps.exif_transpose(file)
    except Exception:  # of damaged EXIF data; the picture is whole, and shown as it is stored
        image = file.copy()
    if plain_cmyk:  # Pillow takes every CMYK JPEG for Adobe's, which is stored inverted
        image = ImageChops.invert(image)
    if image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.uint32)
        if white_is_zero:  # Pillow heeds it for 8 bits only
            values = 65535 - values
        image = Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
        if key is not None:
            image.putalpha(Image.fromarray((values != key).astype(np.uint8) * 255))
    if image.has_transparency_data:
        ground = Image.new("RGBA", image.size, (*colour, 255))
        image = Image.alpha_composite(ground, image.convert("RGBA"))
    return image.convert("RGB")
