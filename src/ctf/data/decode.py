"""Decoding of image files in the usual formats and modes to upright RGB images."""

from __future__ import annotations

import difflib
import io
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray
from PIL import (
    Image,
    ImageChops,
    ImageCms,
    ImageColor,
    ImageFile,
    ImageOps,
    UnidentifiedImageError,
)

from ctf.common.errors import UserError
from ctf.data import tiff
from ctf.data.formats import HEAD as HEAD
from ctf.data.formats import image_format, unsupported_format
from ctf.data.formats import is_image as is_image

CORRUPT = "corrupt, truncated or of an unknown format"

# What `read_image` takes.
ImageLike = (
    str | os.PathLike[str] | bytes | bytearray | memoryview | NDArray[np.uint8] | Image.Image
)
Transparent = int | tuple[int, ...] | bytes | None
WHITE: tuple[int, ...] = (255, 255, 255)

# The usual names of such files, for messages; any other name will do, too.
SUFFIXES = (
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".gif", ".bmp", ".dib", ".tif",
    ".tiff", ".avif", ".avifs", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx", ".ppm", ".pgm",
    ".pbm", ".pnm", ".pfm", ".qoi", ".tga", ".ico", ".icns", ".psd", ".dds", ".sgi", ".pcx",
    ".mpo",
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
    with _readable(limit):
        try:
            image = _decode(data, background, limit)
        except Exception:
            if image_format(data[:HEAD]) != "PNG":
                raise
            # Pillow refuses a file for a damaged or long text or profile, too.
            image = _decode(_without_metadata(data), background, limit)
    if min(image.size) < size:
        raise UnreadableImageError(too_small(*image.size, size))
    return image


def read_image(image: ImageLike, background: tuple[int, ...]) -> Image.Image:
    """Read an image in any form to upright RGB, as `decode` does.

    Args:
        image: a path; an encoded image; an array of uint8, (H, W) grey or (H, W, 3 or 4); or an
            image of Pillow. A newly opened one is read as its file is; one that was loaded or
            edited may have lost what its file said, see `to_rgb`.
        background: RGB colour behind transparent pixels.

    Raises:
        UnreadableImageError: as for `decode`; it is something else.
    """
    match image:
        case str() | os.PathLike():
            return decode(read_bytes(Path(image)), 1, background)
        case bytes() | bytearray() | memoryview():
            return decode(bytes(image), 1, background)
        case np.ndarray() if image.dtype == np.uint8 and (
            image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (3, 4))
        ):
            return to_rgb(Image.fromarray(image), background)
        case np.ndarray():
            raise UnreadableImageError(
                f"array of {image.dtype}, {image.shape}; expected uint8, (H, W) or (H, W, 3 or 4)"
            )
        case Image.Image():
            pass
        case _:
            raise UnreadableImageError(
                f"{type(image).__name__}; expected a path, bytes, an array or an image of Pillow"
            )
    # A file that is not loaded yet; once it is, Pillow's image lacks what these formats say of it.
    if isinstance(image, ImageFile.ImageFile) and image.tile and image.format != "AVIF":
        if image.fp is None or getattr(image.fp, "closed", False):
            raise UnreadableImageError("its file was closed; pass its path instead")
        if image.format in ("PNG", "TIFF", "PPM", "JPEG2000") and image.tell() == 0:
            position = image.fp.tell()
            image.fp.seek(0)
            data = image.fp.read()
            image.fp.seek(position)
            return decode(data, 1, background)
    with _readable(sys.maxsize):
        return to_rgb(image, background)


def parse_colour(name: str) -> tuple[int, ...]:
    """Return the RGB values of a colour, which is a name or #rrggbb.

    Raises:
        UserError: there is no such colour.
    """
    try:
        return ImageColor.getrgb(name)[:3]
    except ValueError:
        close = difflib.get_close_matches(name.lower(), ImageColor.colormap, n=1)
        hint = f"did you mean {close[0]!r}?" if close else "expected a name or #rrggbb"
        raise UserError(f"background: unknown colour {name!r}: {hint}") from None


def image_size(data: bytes) -> tuple[int, int]:
    """Read width and height of an encoded image from its header, before any rotation by EXIF data.

    Raises:
        UnreadableImageError: as for `decode`.
    """
    with _readable(sys.maxsize):
        name = _known_format(data)
        if name == "TIFF":
            return tiff.size(tiff.read_tags(data))
        with Image.open(io.BytesIO(data), formats=[name]) as file:
            return file.size


def to_rgb(
    image: Image.Image, background: tuple[int, ...], data: bytes | None = None
) -> Image.Image:
    """Convert an image of any mode to an upright RGB image.

    Transparent pixels are composited over `background`, deeper values are scaled to 8 bits, and
    colour profiles are not applied. Of a newly opened file, the first frame is converted as the
    file says. A copy or crop of it has lost some of this: CMYK is then what Pillow's is (of a JPEG
    without Adobe's marker: inverted), 16 bits are 0 (black) to 65535 (white).

    Args:
        image: the image.
        background: RGB colour behind transparent pixels.
        data: the file that it was opened from, if known.

    Raises:
        UnreadableImageError: its pixels have no known range.
    """
    transparent, scaled = _transparent_values(image)
    white = _white(image, data)
    is_jpeg, is_tga = image.format in ("JPEG", "MPO"), image.format == "TGA"
    plain_cmyk = is_jpeg and image.mode == "CMYK" and "adobe" not in image.info
    white_is_zero = getattr(image, "tag_v2", {}).get(tiff.PHOTOMETRIC) == 0

    image.load()
    try:
        image = ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF data; the image itself is intact and used as it is stored
        image = image.copy()
    if transparent is not None:
        image.info["transparency"] = scaled
    if plain_cmyk:  # Pillow treats every CMYK JPEG as one of Adobe's, which are stored inverted
        image = ImageChops.invert(image)
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = _from_16_bit(image, white, white_is_zero, transparent)
    elif white != 255:
        image = image.point(
            [min(255, round(i * 255 / white)) for i in range(256)] * len(image.getbands())
        )
    if image.mode == "LAB":
        image = cast(Image.Image, ImageCms.applyTransform(image, _lab_to_rgb()))
    if image.mode == "La":
        image = image.convert("LA")
    if is_tga and image.mode in ("LA", "RGBA") and image.getextrema()[-1] == (0, 0):
        image.putalpha(255)  # by convention, the fourth channel is then not alpha
    if image.has_transparency_data:
        canvas = Image.new("RGBA", image.size, (*background, 255))
        image = Image.alpha_composite(canvas, image.convert("RGBA"))
    return image.convert("RGB")


def too_small(width: int, height: int, size: int) -> str:
    """Return the reason why an image of less than `size` pixels cannot be used."""
    return f"{width}x{height}, smaller than --image-size {size}"


@contextmanager
def _readable(limit: int) -> Iterator[None]:
    """Raise UnreadableImageError, with the reason, in place of what reading an image raises."""
    try:
        yield
    except UnreadableImageError:
        raise
    except tiff.UnsupportedTiffError as reason:
        raise UnreadableImageError(str(reason)) from None
    except Image.DecompressionBombError:
        raise UnreadableImageError(f"more than {limit:,} pixels") from None
    except Exception:  # damaged data makes decoders raise nearly any exception
        raise UnreadableImageError(CORRUPT) from None


def _decode(data: bytes, background: tuple[int, ...], limit: int) -> Image.Image:
    with _opened(data, limit) as image:
        image = to_rgb(image, background, data)
    if image.width * image.height > limit:  # an icon says less than it has
        raise Image.DecompressionBombError
    return image


def _without_metadata(png: bytes) -> bytes:
    """Return a PNG file with only the chunks that its pixels and their orientation depend on."""
    chunks, at = [png[:8]], 8
    while at < len(png):
        end = at + 12 + int.from_bytes(png[at : at + 4], "big")
        name = png[at + 4 : at + 8]
        if name[:1].isupper() or name in (b"tRNS", b"eXIf"):
            chunks.append(png[at:end])
        at = end
    return b"".join(chunks)


def _known_format(data: bytes) -> str:
    if name := image_format(data[:HEAD]):
        return name
    other = unsupported_format(data[:HEAD])
    raise UnreadableImageError(f"{other}, which is not supported" if other else CORRUPT)


def _opened(data: bytes, limit: int) -> Image.Image:
    """Open an encoded image of at most `limit` pixels; those that Pillow gets wrong are read."""
    name = _known_format(data)
    if name == "TIFF":
        tags = tiff.read_tags(data)
        if not tiff.pillow_is_right(tags):
            return tiff.read(data, tags, limit)
    try:
        file = Image.open(io.BytesIO(data), formats=[name])
    except UnidentifiedImageError:
        if name == "TIFF":
            return tiff.read(data, tags, limit)
        if name == "JPEG" and re.search(rb"\xff[\xc0-\xc2]\0.\x0c", data, re.DOTALL):
            raise UnreadableImageError("JPEG with 12 bits a sample; expected 8") from None
        raise
    if file.width * file.height > limit:
        raise Image.DecompressionBombError
    if file.format == "PPM" and file.tile[0].codec_name == "ppm":
        return _read_ppm(file, data)
    return file


def _read_ppm(file: ImageFile.ImageFile, data: bytes) -> Image.Image:
    """Read a PGM or PPM file whose largest value is not 255, as Pillow does but faster."""
    _, top = cast(tuple[str, int], file.tile[0].args)
    values = np.frombuffer(
        data,
        np.uint8 if top < 256 else ">u2",
        file.width * file.height * len(file.getbands()),
        file.tile[0].offset,
    )
    scaled = (values.clip(max=top).astype(np.uint32) * 255 + top // 2) // top
    mode = "L" if file.mode == "I" else file.mode
    return Image.frombytes(mode, file.size, scaled.astype(np.uint8).tobytes())


def _white(image: Image.Image, data: bytes | None) -> int:
    """Return the value of white in the pixels that Pillow gives.

    Raises:
        UnreadableImageError: it is not known.
    """
    deep = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")
    if image.mode in ("I", "F") and not deep:
        raise UnreadableImageError("32-bit or floating-point pixels, whose range is not known")
    bits = 16 if deep else 8
    if deep and hasattr(image, "tag_v2"):
        return int(2 ** max(image.tag_v2.get(tiff.BITS, (16,))) - 1)
    if image.format == "JPEG2000" and data is not None and image.mode not in ("P", "PA"):
        start = data.index(b"\xff\x4f\xff\x51")
        depth = (data[start + 42] & 127) + 1
        if data[start + 42] > 127:
            raise UnreadableImageError("signed pixels, whose range is not known")
        if depth > bits:  # Pillow rounds to 8 bits, and white to 256, which becomes 0
            raise UnreadableImageError(f"JPEG 2000 with {depth} bits a sample; expected 8, or grey")
        return (2**depth - 1) << (bits - depth)  # Pillow shifts each value to the highest bits
    return int(2**bits - 1)


def _transparent_values(image: Image.Image) -> tuple[Transparent, Transparent]:
    """Return a file's transparent value, and the same scaled like the pixels.

    The latter is PNG's, by its bits a sample, which Pillow knows until the image is loaded.
    """
    value = image.info.get("transparency")
    if image.format == "PNG" and value is not None and (tile := getattr(image, "tile", None)):
        match tile[0].args:
            case "L;2":
                return value, value * 85
            case "L;4":
                return value, value * 17
            case "RGB;16B":
                return value, tuple(channel >> 8 for channel in value)
    return value, value


def _from_16_bit(
    image: Image.Image,
    white: int,
    white_is_zero: bool,
    transparent: Transparent,
) -> Image.Image:
    """Scale grey values to 8 bits, with alpha where they equal the transparent value."""
    values = np.asarray(image).astype(np.uint32).clip(max=white)
    if white_is_zero:  # Pillow inverts such values only if they have 8 bits
        values = white - values
    image = Image.fromarray(((values * 255 + white // 2) // white).astype(np.uint8))
    if transparent is not None:
        image.putalpha(Image.fromarray((values != transparent).astype(np.uint8) * 255))
    return image


@cache
def _lab_to_rgb() -> ImageCms.ImageCmsTransform:
    """Return the transform from CIELAB to sRGB, which Pillow's `convert` does not have."""
    lab, rgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    return ImageCms.buildTransform(lab, rgb, "LAB", "RGB")
