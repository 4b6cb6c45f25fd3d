"""Decoding of image files in the usual formats and modes to upright RGB images."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageFile, ImageOps

# How files of each supported format begin, by Pillow's name of it; stricter than Pillow where that
# accepts nearly anything. Left out: programs (EPS), formats without a decoder (HDF5, GRIB, WMF),
# and those of measurements, whose pixels have no known range (FITS, SPIDER).
SIGNATURES = {
    name: re.compile(pattern, re.DOTALL)
    for name, pattern in {
        "PNG": rb"\x89PNG\r\n\x1a\n",
        "JPEG": rb"\xff\xd8\xff",
        "WEBP": rb"RIFF.{4}WEBP",
        "GIF": rb"GIF8[79]a",
        "TIFF": rb"(II|MM)(\*\0|\0\*)|II\+\0|MM\0\+",
        "AVIF": rb".{4}ftyp(avi[fs]|m[is]f1.{4}(.{4}){0,12}?avi[fs])",
        "JPEG2000": rb"\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51",
        "BMP": rb"BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0",
        "DIB": rb"[\x28\x34\x38\x6c\x7c]\0\0\0.{8}\x01\0[\x01\x04\x08\x10\x18\x20]\0",
        "PPM": rb"P[1-6f]\s(\s|#[^\n]*\n)*\d",
        "QOI": rb"qoif",
        "TGA": (
            rb".(\x01[\x01\x09].{4}[\x0f\x10\x18\x20]|\0[\x02\x03\x0a\x0b]\0{5})"
            rb".{8}[\x01\x08\x10\x18\x20][\0-\x3f]"
        ),
        "ICO": rb"\0\0\x01\0[^\0]\0.{3}\0",
        "CUR": rb"\0\0\x02\0[^\0]\0.{3}\0",
        "ICNS": rb"icns",
        "PSD": rb"8BPS\0\x01",
        "DDS": rb"DDS \x7c\0\0\0",
        "SGI": rb"\x01\xda[\0\x01][\x01\x02]\0[\x01-\x03]",
        "SUN": rb"\x59\xa6\x6a\x95",
        "PCX": rb"\n[\0\x02\x03\5]\x01[\x01\x02\4\x08]",
        "DCX": rb"\xb1\x68\xde\x3a",
        "FLI": rb".{4}[\x11\x12]\xaf.{8}[\0\x03]\0",
        "BLP": rb"BLP[12]",
        "FTEX": rb"FTEX",
        "MSP": rb"DanM|LinS",
        "XBM": rb"\s*(/\*.*\*/\s*)?#define[ \t]+\w*_width[ \t]+\d+\s+#define[ \t]+\w*_height[ \t]",
        "XPM": rb"/\* XPM \*/",
    }.items()
}
FORMATS = tuple(SIGNATURES)
HEAD = 512  # bytes of a file that tell whether it is an image

# The usual names of such files, for messages; any other name will do, too.
SUFFIXES = (
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".gif", ".bmp", ".dib", ".tif",
    ".tiff", ".avif", ".avifs", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx", ".ppm", ".pgm",
    ".pbm", ".pnm", ".pfm", ".qoi", ".tga", ".ico", ".icns", ".psd", ".dds", ".sgi", ".pcx",
)  # fmt: skip


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


def image_format(head: bytes) -> str | None:
    """Return Pillow's name of an image's format by its first bytes; None if it is none of FORMATS.

    Args:
        head: the first `HEAD` bytes of the file, or all if it is shorter.
    """
    return next((name for name, begin in SIGNATURES.items() if begin.match(head)), None)


def is_image(head: bytes) -> bool:
    """Whether the first `HEAD` bytes of a file are those of an image of a supported format."""
    return image_format(head) is not None


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
