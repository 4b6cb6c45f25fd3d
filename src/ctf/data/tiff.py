"""TIFF files that Pillow cannot read or reads with the wrong range, by the file's own tags.

These are files of 9 to 16 bits a sample, in either byte order, packed or not, in chunks of pixels
or in planes, and other arrangements that Pillow does not know. Pillow still decompresses the data:
it is given the same strips as an 8-bit image that is as wide as a row has bytes. MinSampleValue and
MaxSampleValue do not change what is black and white, as TIFF 6.0 has it.

Shapes: H, W height and width, C samples a pixel. Tags and their meaning: TIFF 6.0.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2, TiffImageFile

SUBFILE_TYPE, WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC = 254, 256, 257, 258, 259, 262
FILL_ORDER, STRIP_OFFSETS, ORIENTATION, SAMPLES, STRIP_ROWS, STRIP_BYTES = (
    266, 273, 274, 277, 278, 279,
)  # fmt: skip
PLANAR, PREDICTOR, COLOR_MAP, TILE_WIDTH, TILE_HEIGHT, TILE_OFFSETS, TILE_BYTES = (
    284, 317, 320, 322, 323, 324, 325,
)  # fmt: skip
EXTRA_SAMPLES, SAMPLE_FORMAT, DNG_VERSION = 338, 339, 50706

LOSSLESS = (1, 5, 8, 32773, 32946, 34925, 50000)  # none, LZW, deflate, PackBits, LZMA, Zstandard
# By photometric interpretation: 0 and 1 are grey, 2 RGB, 3 a palette, 5 CMYK.
MODES = {0: "L", 1: "L", 2: "RGB", 3: "P", 5: "CMYK"}

Tags = Mapping[int, Any]


class UnsupportedTiffError(Exception):
    """A TIFF whose pixels have no known meaning; the message is the reason, in a few words."""


def read_tags(data: bytes) -> Tags:
    """Read the tags of the first image of a TIFF file.

    Raises:
        UnsupportedTiffError: it is only the preview of a camera's raw file.
        Exception: of nearly any type if the file is damaged.
    """
    tags = ImageFileDirectory_v2(data[:16] if data[2] == 43 or data[3] == 43 else data[:8])
    file = io.BytesIO(data)
    file.seek(tags.next)
    tags.load(file)
    raw = tags.get(SUBFILE_TYPE, 0) & 1 or DNG_VERSION in tags or data[8:10] == b"CR"
    if raw or tags.get(PHOTOMETRIC) in (32803, 34892):
        raise UnsupportedTiffError("raw file of a camera, or a preview as the first image")
    return tags


def pillow_is_right(tags: Tags) -> bool:
    """Whether Pillow reads such a file in its own range, if it can read it at all."""
    bits = {*_tuple(tags.get(BITS, 1))}
    if {*_tuple(tags.get(SAMPLE_FORMAT, 1))} != {1}:
        return False
    if tags.get(PHOTOMETRIC) == 6 and tags.get(COMPRESSION, 1) == 1:  # YCbCr, maybe subsampled
        return sum(_tuple(tags.get(STRIP_BYTES, 0))) >= 3 * tags[WIDTH] * tags[HEIGHT]
    chunky_colour = tags.get(PHOTOMETRIC) in (2, 5) and tags.get(PLANAR, 1) == 1
    return bits <= {1, 2, 4, 8} or (bits == {16} and chunky_colour)


def read(data: bytes, tags: Tags, max_pixels: int) -> Image.Image:
    """Read the first image of a TIFF file, with 8 bits a sample: mode L, LA, La, RGB, ... or CMYK.

    Raises:
        UnsupportedTiffError: the arrangement or range of the pixels is not known.
        Image.DecompressionBombError: it has more than `max_pixels` pixels.
        Exception: of nearly any type if the file is damaged.
    """
    bits, colour = _bits(tags), tags.get(PHOTOMETRIC, 0)
    if colour == 6 and tags.get(COMPRESSION, 1) == 1:
        raise UnsupportedTiffError("uncompressed TIFF with subsampled colours")
    if colour not in MODES:
        raise UnsupportedTiffError(f"TIFF with {bits} bits a sample of colour space {colour}")
    samples_HWC = _samples(data, tags, bits, max_pixels)
    mode = MODES[colour]
    top = 2**bits - 1
    if mode == "P":
        palette = np.array(tags[COLOR_MAP], np.uint16).reshape(3, -1) >> 8  # as Pillow does
        colours_HWC = palette.T[samples_HWC[..., 0]]
        rest_HWC = _to_8_bits(samples_HWC[..., 1:], top)
        pixels_HWC, mode = np.concatenate([colours_HWC, rest_HWC], axis=2).astype(np.uint8), "RGB"
    elif bits == 16 and mode != "L":  # the higher byte, as Pillow does
        pixels_HWC = (samples_HWC >> 8).astype(np.uint8)
    else:
        pixels_HWC = _to_8_bits(samples_HWC, top)
        if colour == 0:  # white is zero
            pixels_HWC[..., 0] = _to_8_bits(top - samples_HWC[..., 0], top)
    channels = len(Image.new(mode, (1, 1)).getbands())
    if pixels_HWC.shape[2] < channels:
        raise UnsupportedTiffError(f"TIFF of {pixels_HWC.shape[2]} samples a pixel in mode {mode}")
    extra = pixels_HWC.shape[2] - channels
    if mode == "L" and extra > 1:  # bands of a satellite or channels of a microscope
        raise UnsupportedTiffError(f"TIFF of {1 + extra} grey values a pixel")
    alpha = _alpha(tags, extra, mode)
    channels += alpha != ""
    height, width = pixels_HWC.shape[:2]
    pixels = np.ascontiguousarray(pixels_HWC[..., :channels]).tobytes()
    image = Image.frombytes(mode + alpha, (width, height), pixels)
    image.getexif()[ORIENTATION] = tags.get(ORIENTATION, 1)
    return image


def size(tags: Tags) -> tuple[int, int]:
    """Return width and height in pixels, before any rotation."""
    return tags[WIDTH], tags[HEIGHT]


def _bits(tags: Tags) -> int:
    """Return the bits of a sample, if all are unsigned integers of a known range."""
    bits = {*_tuple(tags.get(BITS, 1))}
    match {*_tuple(tags.get(SAMPLE_FORMAT, 1))}:
        case formats if formats <= {1, 4} and max(bits) <= 16:
            pass
        case formats if formats == {2}:
            raise UnsupportedTiffError("signed pixels, whose range is not known")
        case _:
            raise UnsupportedTiffError("32-bit or floating-point pixels, whose range is not known")
    if len(bits) > 1:
        raise UnsupportedTiffError("TIFF of different bits in each sample")
    return int(bits.pop())


def _alpha(tags: Tags, extra: int, mode: str) -> str:
    """Return what Pillow's modes call the first extra sample: "A", "a" (premultiplied) or none."""
    kinds = _tuple(tags.get(EXTRA_SAMPLES, ()))
    if extra == 0 or mode == "CMYK":
        return ""
    if not kinds:  # as Pillow does
        return "A" if mode == "RGB" else ""
    return {1: "a", 2: "A"}.get(kinds[0], "")


def _to_8_bits(values: NDArray[np.uint16], top: int) -> NDArray[np.uint8]:
    """Scale 0 to `top` to 0 to 255, to the nearest."""
    return ((values.astype(np.uint32) * 255 + top // 2) // top).astype(np.uint8)


def _samples(data: bytes, tags: Tags, bits: int, max_pixels: int) -> NDArray[np.uint16]:
    """Decompress and unpack the samples (H, W, C)."""
    width, height = size(tags)
    count = tags.get(SAMPLES, 1)
    if not 1 <= count <= 8:
        raise UnsupportedTiffError(f"TIFF of {count} samples a pixel")
    if (compression := tags.get(COMPRESSION, 1)) not in LOSSLESS:
        raise UnsupportedTiffError(f"TIFF with {bits} bits a sample and compression {compression}")
    if TILE_WIDTH in tags:
        block_width, block_height = tags[TILE_WIDTH], tags[TILE_HEIGHT]
        offsets, sizes = _tuple(tags[TILE_OFFSETS]), _tuple(tags[TILE_BYTES])
    else:
        block_width, block_height = width, min(tags.get(STRIP_ROWS, height), height)
        offsets = _tuple(tags[STRIP_OFFSETS])
        sizes = _tuple(tags.get(STRIP_BYTES, len(data) - offsets[0]))
    across, down = -(-width // block_width), -(-height // block_height)
    if min(width, height, block_width, block_height) < 1:
        raise ValueError("no pixels")
    if across * block_width * down * block_height > max_pixels:
        raise Image.DecompressionBombError
    planes, chunk = (count, 1) if tags.get(PLANAR, 1) == 2 else (1, count)
    # The last strip has fewer rows; tiles are padded.
    rows = across * down * block_height if TILE_WIDTH in tags else height
    row_bytes = -(-block_width * chunk * bits // 8)
    parts = []
    for plane in range(planes):
        span = slice(plane * across * down, (plane + 1) * across * down)
        blocks = list(zip(offsets[span], sizes[span], strict=True))
        if len(blocks) != across * down:
            raise ValueError("strips or tiles are missing")
        packed = _decompress(data, blocks, compression, tags.get(FILL_ORDER, 1), row_bytes,
                             rows, block_height)  # fmt: skip
        values = _unpack(packed, bits, block_width * chunk, big_endian=data[:2] == b"MM")
        values = values.reshape(rows, block_width, chunk)
        if compression != 1 and tags.get(PREDICTOR, 1) == 2:  # each is the difference to the left
            values = np.cumsum(values, axis=1, dtype=np.uint16) & np.uint16(2**bits - 1)
        if TILE_WIDTH in tags:
            tiles = values.reshape(down, across, block_height, block_width, chunk)
            values = tiles.swapaxes(1, 2).reshape(down * block_height, -1, chunk)
        parts.append(values[:height, :width])
    return np.concatenate(parts, axis=2)


def _decompress(
    data: bytes,
    blocks: Sequence[tuple[int, int]],
    compression: int,
    fill_order: int,
    row_bytes: int,
    rows: int,
    block_rows: int,
) -> NDArray[np.uint8]:
    """Decompress strips, or tiles one below the other, to bytes (rows, row_bytes)."""
    names = (
        WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, FILL_ORDER, STRIP_OFFSETS, SAMPLES,
        STRIP_ROWS, STRIP_BYTES,
    )  # fmt: skip
    arrays_start = 8 + 2 + 12 * len(names) + 4
    data_start = arrays_start + 2 * 4 * len(blocks)
    offsets = [offset + data_start for offset, _ in blocks]
    sizes = [size for _, size in blocks]
    values = [row_bytes, rows, 8, compression, 1, fill_order, offsets[0], 1, block_rows, sizes[0]]
    counts = dict.fromkeys(names, 1)
    if len(blocks) > 1:
        counts[STRIP_OFFSETS] = counts[STRIP_BYTES] = len(blocks)
        values[6], values[9] = arrays_start, arrays_start + 4 * len(blocks)
    entries = zip(names, counts.values(), values, strict=True)
    file = b"".join([
        struct.pack("<4sIH", b"II*\0", 8, len(names)),
        *(struct.pack("<HHII", name, 4, count, value) for name, count, value in entries),
        bytes(4), struct.pack(f"<{2 * len(blocks)}I", *offsets, *sizes), data,
    ])  # fmt: skip
    # Not by Image.open, whose limit is one of pixels: there are up to 16 bytes in one here.
    with TiffImageFile(io.BytesIO(file)) as image:
        return np.asarray(image)


def _unpack(
    packed: NDArray[np.uint8], bits: int, count: int, *, big_endian: bool
) -> NDArray[np.uint16]:
    """Unpack rows of bytes to `count` samples each; but for 16 bits, the highest bit is first."""
    if bits == 16:
        return np.ascontiguousarray(packed).view(">u2" if big_endian else "<u2").astype(np.uint16)
    starts = np.arange(count) * bits
    first, shift = starts >> 3, 24 - bits - (starts & 7)
    padded = np.pad(packed, ((0, 0), (0, 2)))
    values = padded[:, first].astype(np.uint32) << 8
    values = (values | padded[:, first + 1]) << 8
    values = (values | padded[:, first + 2]) >> shift.astype(np.uint32)
    return (values & np.uint32(2**bits - 1)).astype(np.uint16)


def _tuple(value: Any) -> tuple[int, ...]:
    return value if isinstance(value, tuple) else (value,)
