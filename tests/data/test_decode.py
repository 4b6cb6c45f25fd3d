"""Decoding of every format and mode to upright RGB images."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from ctf.data.decode import (
    HEAD,
    SUFFIXES,
    UnreadableImageError,
    decode,
    is_image,
    parse_colour,
    read_image,
)
from tests.data.helpers import GREY, RED, RGB, WHITE, encode


def decoded(data: bytes, background: tuple[int, int, int] = WHITE) -> np.ndarray:
    return np.asarray(decode(data, 8, background)).astype(int)


def png(pixels: np.ndarray, depth: int, colour_type: int, trns: bytes = b"") -> bytes:
    """A PNG from rows of bytes (H, row length), in variants that Pillow does not write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    samples = {0: 1, 2: 3, 4: 2, 6: 4}[colour_type]
    width = pixels.shape[1] * 8 // depth // samples
    head = struct.pack(">IIBBBBB", width, len(pixels), depth, colour_type, 0, 0, 0)
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    parts = chunk(b"IHDR", head) + (chunk(b"tRNS", trns) if trns else b"")
    parts += chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def png16(values: np.ndarray, colour_type: int, trns: bytes = b"") -> bytes:
    rows = values.astype(">u2").reshape(len(values), -1)
    return png(rows.view(np.uint8), 16, colour_type, trns)


def tiff16(values: np.ndarray, photometric: int, orientation: int = 1) -> bytes:
    """A little-endian TIFF of 16 bits per sample, values (H, W) or (H, W, C)."""
    height, width = values.shape[:2]
    samples = values.size // (height * width)
    pixels = values.astype("<u2").tobytes()
    depths = struct.pack(f"<{samples}H", *[16] * samples)
    tags = [
        (256, 4, 1, width), (257, 4, 1, height),
        (258, 3, samples, 16 if samples == 1 else 8 + len(pixels)),
        (259, 3, 1, 1), (262, 3, 1, photometric), (273, 4, 1, 8), (274, 3, 1, orientation),
        (277, 3, 1, samples), (278, 4, 1, height), (279, 4, 1, len(pixels)),
    ]  # fmt: skip
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *t) for t in tags)
    start = 8 + len(pixels) + len(depths)
    return b"II*\0" + struct.pack("<I", start) + pixels + depths + directory + b"\0" * 4


def without_adobe(jpeg: bytes) -> bytes:
    at = jpeg.index(b"\xff\xee")
    return jpeg[:at] + jpeg[at + 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big") :]


@pytest.mark.parametrize(
    ("file_format", "options", "tolerance"),
    [
        ("PNG", {}, 0), ("BMP", {}, 0), ("TIFF", {}, 0), ("TIFF", {"compression": "tiff_lzw"}, 0),
        ("WEBP", {"lossless": True}, 0), ("WEBP", {"quality": 95}, 12), ("GIF", {}, 60),
        ("JPEG", {"quality": 98, "subsampling": 0}, 5),
    ],
)  # fmt: skip
def test_colours_survive_every_format(
    file_format: str, options: dict[str, object], tolerance: int
) -> None:
    difference = abs(decoded(encode(Image.fromarray(RGB), file_format, **options)) - RGB)
    assert difference.max() <= tolerance
    assert difference.mean() <= tolerance / 4


@pytest.mark.parametrize("file_format", ["PNG", "BMP", "TIFF", "GIF", "JPEG", "WEBP"])
def test_grey_is_repeated_to_three_channels(file_format: str) -> None:
    options = {"JPEG": {"quality": 100}, "WEBP": {"lossless": True}}.get(file_format, {})
    image = decoded(encode(Image.fromarray(GREY), file_format, **options))
    assert abs(image - GREY[..., None]).max() <= (1 if file_format == "JPEG" else 0)


@pytest.mark.parametrize("file_format", ["PNG", "BMP", "TIFF", "GIF"])
def test_one_bit_images(file_format: str) -> None:
    image = decoded(encode(Image.fromarray(GREY >= 128).convert("1"), file_format))
    assert np.array_equal(image, np.repeat((GREY >= 128)[..., None] * 255, 3, axis=2))


@pytest.mark.parametrize("file_format", ["PNG", "GIF", "BMP", "TIFF"])
def test_palette_images(file_format: str) -> None:
    few = Image.fromarray(RGB).quantize(16)
    assert np.array_equal(decoded(encode(few, file_format)), np.asarray(few.convert("RGB")))


@pytest.mark.parametrize("file_format", ["PNG", "GIF"])
def test_palette_with_a_transparent_entry(file_format: str) -> None:
    few = Image.fromarray(RGB).quantize(16)
    index = np.asarray(few)
    hidden = index[0, 0]
    expected = np.where((index == hidden)[..., None], RED, np.asarray(few.convert("RGB")))
    image = decoded(encode(few, file_format, transparency=int(hidden)), RED)
    assert np.array_equal(image, expected)


def test_palette_with_partial_transparency() -> None:
    few = Image.fromarray(RGB).quantize(4)
    alpha = np.array([0, 51, 128, 255])[np.asarray(few)][..., None]
    expected = (np.asarray(few.convert("RGB")) * alpha + np.array(RED) * (255 - alpha)) / 255
    image = decoded(encode(few, "PNG", transparency=bytes([0, 51, 128, 255])), RED)
    assert abs(image - expected).max() <= 1


@pytest.mark.parametrize(("mode", "file_format"), [
    ("RGBA", "PNG"), ("RGBA", "WEBP"), ("RGBA", "TIFF"), ("LA", "PNG"),
])  # fmt: skip
def test_alpha_is_composited_over_the_background(mode: str, file_format: str) -> None:
    alpha = np.broadcast_to(np.linspace(0, 255, 24).astype(np.uint8)[:, None], (24, 32))
    plain = RGB if mode == "RGBA" else np.repeat(GREY[..., None], 3, axis=2)
    image = Image.fromarray(plain).convert(mode)
    image.putalpha(Image.fromarray(np.ascontiguousarray(alpha)))
    options = {"lossless": True, "exact": True} if file_format == "WEBP" else {}
    data = encode(image, file_format, **options)
    share = alpha[..., None] / 255
    for colour in (WHITE, RED):
        expected = plain * share + np.array(colour) * (1 - share)
        assert abs(decoded(data, colour) - expected).max() <= 1
    assert np.array_equal(decoded(data, RED)[0], np.broadcast_to(RED, (32, 3)))


DEEP = np.linspace(0, 65535, 24 * 32).astype(np.int64).reshape(24, 32)


def test_16_bit_grey_is_scaled_and_not_clipped() -> None:
    expected = np.round(DEEP / 257)[..., None]
    assert expected.max() == 255
    assert np.array_equal(decoded(png16(DEEP, 0)), np.repeat(expected, 3, axis=2))
    assert np.array_equal(decoded(tiff16(DEEP, 1)), np.repeat(expected, 3, axis=2))
    white_is_zero = decoded(tiff16(65535 - DEEP, 0))
    assert np.array_equal(white_is_zero, np.repeat(expected, 3, axis=2))


def test_16_bit_grey_with_alpha_and_with_a_transparent_value() -> None:
    alpha = np.full_like(DEEP, 0x8080)
    image = decoded(png16(np.stack([DEEP, alpha], -1), 4), RED)
    share = 128 / 255
    expected = (DEEP / 257)[..., None] * share + np.array(RED) * (1 - share)
    assert abs(image - expected).max() <= 1.5

    hidden = int(DEEP[5, 7])  # its neighbours become the same 8-bit value, and stay visible
    deep = DEEP.copy()
    deep[5, 8] = hidden + 1
    image = decoded(png16(deep, 0, struct.pack(">H", hidden)), RED)
    assert tuple(image[5, 7]) == RED
    assert tuple(image[5, 8]) == (round((hidden + 1) / 257),) * 3


@pytest.mark.parametrize("container", ["png", "tiff"])
def test_16_bit_colour_is_scaled(container: str) -> None:
    deep = np.stack([DEEP, DEEP[::-1], DEEP[:, ::-1]], -1)
    data = png16(deep, 2) if container == "png" else tiff16(deep, 2)
    assert abs(decoded(data) - deep / 257).max() <= 1


def test_16_bit_colour_with_alpha_and_with_a_transparent_colour() -> None:
    deep = np.stack([DEEP, DEEP[::-1], DEEP[:, ::-1]], -1)
    half = np.full((24, 32, 1), 0x8080)
    expected = deep / 257 * (128 / 255) + np.array(RED) * (127 / 255)
    assert abs(decoded(png16(np.concatenate([deep, half], -1), 6), RED) - expected).max() <= 1.5
    image = decoded(png16(deep, 2, struct.pack(">3H", *deep[3, 4])), RED)
    assert tuple(image[3, 4]) == RED
    assert abs(image[9] - deep[9] / 257).max() <= 1


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_few_bit_grey_with_a_transparent_value(depth: int) -> None:
    top = 2**depth - 1
    row = np.arange(8) % (top + 1)
    bits = "".join(f"{value:0{depth}b}" for value in row)
    packed = np.frombuffer(int(bits, 2).to_bytes(depth, "big"), np.uint8)
    image = decoded(png(np.tile(packed, (8, 1)), depth, 0, struct.pack(">H", 1)), RED)
    expected = np.where(row[:, None] == 1, RED, (row * 255 // top)[:, None])
    assert np.array_equal(image, np.broadcast_to(expected, (8, 8, 3)))


def test_cmyk_jpegs_inverted_by_adobe_or_not() -> None:
    cmyk = np.concatenate([255 - RGB, np.zeros_like(RGB[..., :1])], axis=-1)
    image = Image.frombytes("CMYK", (32, 24), cmyk.tobytes())
    options = {"quality": 98, "subsampling": 0}
    adobe = encode(image, "JPEG", **options)
    inverted = Image.frombytes("CMYK", (32, 24), (255 - cmyk).tobytes())
    plain = without_adobe(encode(inverted, "JPEG", **options))
    assert b"Adobe" in adobe
    assert b"Adobe" not in plain
    assert abs(decoded(adobe) - RGB).max() <= 6
    assert abs(decoded(plain) - RGB).max() <= 6
    assert np.array_equal(decoded(encode(image, "TIFF")), RGB)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int) -> None:
    """The pixels to store for each orientation so that RGB is shown, from the EXIF standard."""
    stored = {
        1: RGB, 2: RGB[:, ::-1], 3: RGB[::-1, ::-1], 4: RGB[::-1],
        5: RGB.swapaxes(0, 1), 6: np.rot90(RGB), 7: RGB[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(RGB, -1),
    }[orientation]  # fmt: skip
    image = Image.fromarray(np.ascontiguousarray(stored))
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(decoded(encode(image, "PNG", exif=exif)), RGB)
    assert np.array_equal(decoded(encode(image, "WEBP", lossless=True, exif=exif)), RGB)
    tiff = encode(image, "TIFF", tiffinfo={274: orientation})
    assert np.array_equal(decoded(tiff), RGB)
    jpeg = encode(image, "JPEG", quality=98, subsampling=0, exif=exif)
    assert abs(decoded(jpeg) - RGB).max() <= 5
    grey = decoded(tiff16(stored[..., 0].astype(np.int64) * 257, 1, orientation))
    assert np.array_equal(grey, np.repeat(GREY[..., None], 3, axis=2))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # Pillow's warning
def test_damaged_exif_data_is_ignored() -> None:
    for garbage in (b"Exif\0\0MM", b"Exif\0\0II*\0\xff\0\0\0", b"nonsense"):
        data = encode(Image.fromarray(RGB), "PNG", exif=garbage)
        assert np.array_equal(decoded(data), RGB)


def test_animations_become_their_first_frame() -> None:
    frames = [Image.fromarray(RGB).quantize(8), Image.new("P", (32, 24))]
    gif = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.array_equal(decoded(gif), np.asarray(frames[0].convert("RGB")))
    others = [Image.new("RGB", (32, 24), "blue")]
    for file_format, options in (("WEBP", {"lossless": True}), ("PNG", {}), ("TIFF", {})):
        data = encode(
            Image.fromarray(RGB), file_format, save_all=True, append_images=others, **options
        )
        assert np.array_equal(decoded(data), RGB)


def test_pixels_without_a_known_range_are_unreadable() -> None:
    for array in (DEEP.astype(np.int32), DEEP.astype(np.float32)):
        with pytest.raises(UnreadableImageError, match="range is not known"):
            decode(encode(Image.fromarray(array), "TIFF"), 8, WHITE)


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 0.95])
def test_truncated_files_of_every_format_are_unreadable(file_format: str, share: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    data = encode(Image.fromarray(noise), file_format)
    with pytest.raises(UnreadableImageError, match="corrupt"):
        decode(data[: int(len(data) * share)], 8, WHITE)


def test_a_png_with_a_flipped_byte_is_unreadable() -> None:
    data = bytearray(encode(Image.fromarray(RGB), "PNG"))
    data[len(data) // 2] ^= 0xFF
    with pytest.raises(UnreadableImageError, match="corrupt"):
        decode(bytes(data), 8, WHITE)


LOSSY = ("AVIF", "GIF", "JPEG", "MPO")


@pytest.mark.parametrize("file_format", [
    "AVIF", "BMP", "DDS", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PCX",
    "PNG", "PPM", "QOI", "SGI", "TGA", "TIFF", "WEBP",
])  # fmt: skip
def test_whatever_pillow_opens_is_an_image_whatever_its_name(file_format: str) -> None:
    pixels = RGB[:16, :16]  # a size that icons can have
    data = encode(
        Image.fromarray(pixels),
        file_format,
        **({"lossless": True} if file_format == "WEBP" else {}),
    )
    assert is_image(data[:HEAD])
    assert is_image(data[:64])
    difference = abs(decoded(data) - pixels)
    assert difference.max() <= (60 if file_format in LOSSY else 0)


@pytest.mark.parametrize(("mode", "file_format"), [
    ("RGB", "ICNS"), ("1", "PPM"), ("L", "PPM"), ("1", "XBM"), ("1", "MSP"), ("P", "BLP"),
    ("P", "TGA"), ("LA", "TGA"), ("RGBA", "TGA"), ("L", "PCX"), ("P", "PCX"), ("RGBA", "DDS"),
])  # fmt: skip
def test_other_modes_of_rarer_formats(mode: str, file_format: str) -> None:
    image = Image.fromarray(GREY).convert(mode)
    data = encode(image, file_format)
    assert is_image(data[:HEAD])


@pytest.mark.parametrize("head", [
    b"", b"P", b"BM", b"GIF", b"cat,dog\n1,2\n", b"P1 is a name\n", b"P5, P6\n",
    b"BMW and Audi, in turn\n",
    b'{"label": 3}', b"PK\x03\x04" + bytes(60), b"%PDF-1.7\n", b"%!PS-Adobe-3.0 EPSF-3.0\n",
    b"\x89HDF\r\n\x1a\n" + bytes(56), b"GRIB" + bytes(60), b"BUFR" + bytes(60),
    b"PAR1" + bytes(60),
    b"SIMPLE  =                    T", b"\x93NUMPY\x01\0v\0{'descr': '|u1'", b"ustar" + bytes(507),
    bytes(512), b"\xff" * 512, b"\0\0\0\x20ftypisom\0\0\2\0isomiso2avc1mp41", b"#define WIDTH 3\n",
    b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(504),
    b"/* A program. */\n#include <stdio.h>\n", b"\0\5\x16\7\0\2\0\0Mac OS X        " + bytes(480),
    b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"RIFF\x24\0\0\0WAVEfmt ", b"II and MM\n",
])  # fmt: skip
def test_other_files_are_no_images(head: bytes) -> None:
    assert not is_image(head)


def test_suffixes_of_the_formats_are_known() -> None:
    assert {".jpg", ".jfif", ".jpe", ".avif", ".jp2", ".tif", ".ppm", ".apng"} <= {*SUFFIXES}


@pytest.mark.parametrize("top", [1, 100, 255, 1023, 4095, 65535])
@pytest.mark.parametrize("magic", [b"P2", b"P3", b"P5", b"P6"])
def test_pgm_and_ppm_are_scaled_by_their_largest_value(magic: bytes, top: int) -> None:
    shape = (24, 32, 3) if magic in (b"P3", b"P6") else (24, 32, 1)
    values = np.random.default_rng(0).integers(0, top + 1, shape)
    values[0, 0], values[0, 1] = top, 0
    if magic in (b"P2", b"P3"):
        pixels = " ".join(map(str, values.ravel())).encode()
    else:
        pixels = values.astype(">u2" if top > 255 else np.uint8).tobytes()
    data = magic + b"\n# a comment\n32 24\n%d\n" % top + pixels
    image = decoded(data)
    assert tuple(image[0, 0]) == WHITE
    assert abs(image - values / top * 255).max() <= 0.51
    with pytest.raises(UnreadableImageError, match="corrupt"):
        decode(data[: len(data) // 2], 8, WHITE)


def test_16_bit_jpeg_2000() -> None:
    deep = Image.frombytes("I;16", (32, 24), DEEP.astype("<u2").tobytes())
    image = decoded(encode(deep, "JPEG2000"))
    assert abs(image - (DEEP / 257)[..., None]).max() <= 0.501


def test_cie_lab_tiffs() -> None:
    """CIELAB (50, 20, 0) is about sRGB (151, 107, 119), by scikit-image."""
    lab = Image.frombytes("LAB", (8, 8), bytes([128, 20, 0]) * 64)
    assert abs(decoded(encode(lab, "TIFF")) - (152, 107, 119)).max() <= 2


@pytest.mark.filterwarnings("ignore:Image appears to be")  # Pillow's: a marker is gone
def test_several_jpegs_in_one_file_are_inverted_as_one_is() -> None:
    cmyk = Image.fromarray(255 - RGB).convert("CMYK")
    options = {"save_all": True, "append_images": [cmyk], "quality": 98, "subsampling": 0}
    several, one = encode(cmyk, "MPO", **options), encode(cmyk, "JPEG", quality=98, subsampling=0)
    assert np.array_equal(decoded(several), decoded(one))
    assert np.array_equal(decoded(without_adobe(several)), decoded(without_adobe(one)))


def few_bit_png() -> bytes:
    """Rows of 0, 1, 2, 3 with 2 bits a pixel; 1 is transparent."""
    return png(np.full((8, 2), 0b00011011, np.uint8), 2, 0, struct.pack(">H", 1))


def kinds_of_files() -> dict[str, bytes]:
    """Files whose pixels mean something else than Pillow says when it has loaded them."""
    cmyk, deep = Image.fromarray(255 - RGB).convert("CMYK"), DEEP.astype("<u2")
    exif = Image.Exif()
    exif[0x0112] = 6
    twelve_bits = np.full((8, 12), 0xFF, np.uint8)
    return {
        "plain CMYK JPEG": without_adobe(encode(cmyk, "JPEG")),
        "CMYK JPEG": encode(cmyk, "JPEG"),
        "white-is-zero TIFF": tiff16(DEEP, 0),
        "16-bit TIFF": tiff16(DEEP, 1),
        "16-bit colour TIFF": tiff16(np.stack([DEEP] * 3, -1), 2),
        "PNG with a transparent grey": png16(DEEP, 0, struct.pack(">H", int(DEEP[5, 7]))),
        "PNG with a transparent grey of 2 bits": few_bit_png(),
        "PNG with a transparent colour": png16(
            np.stack([DEEP] * 3, -1), 2, struct.pack(">3H", *[int(DEEP[3, 4])] * 3)
        ),
        "PGM of 10 bits": b"P5 8 12 1023 " + (twelve_bits.astype(">u2") + 700).tobytes(),
        "JPEG 2000": encode(Image.frombytes("I;16", (32, 24), deep.tobytes()), "JPEG2000"),
        "rotated JPEG": encode(Image.fromarray(RGB), "JPEG", exif=exif),
        "rotated AVIF": encode(Image.fromarray(RGB), "AVIF", exif=exif),
        "palette": encode(Image.fromarray(RGB).quantize(8), "PNG", transparency=3),
        "GIF": encode(Image.fromarray(RGB).quantize(8), "GIF", transparency=3),
        "LA": encode(Image.fromarray(GREY).convert("LA"), "PNG"),
    }


@pytest.mark.parametrize("kind", kinds_of_files())
def test_an_image_is_the_same_in_every_form_that_it_is_handed_over_in(
    kind: str, tmp_path: Path
) -> None:
    data = kinds_of_files()[kind]
    path = tmp_path / "image"
    path.write_bytes(data)
    expected = decode(data, 1, RED)
    for form in (path, str(path), data, bytearray(data), memoryview(data)):
        assert np.array_equal(read_image(form, RED), expected)
    with Image.open(path) as opened:
        assert np.array_equal(read_image(opened, RED), expected)
        assert np.array_equal(read_image(opened, RED), expected)  # once more
    from_bytes = Image.open(io.BytesIO(data))
    assert np.array_equal(read_image(from_bytes, RED), expected)
    assert np.array_equal(read_image(np.asarray(expected), RED), expected)


# What Pillow has loaded of the other kind no longer says how many bits it had.
@pytest.mark.parametrize(
    "kind", [kind for kind in kinds_of_files() if kind != "PNG with a transparent grey of 2 bits"]
)
def test_a_loaded_image_is_as_its_file(kind: str) -> None:
    image = Image.open(io.BytesIO(kinds_of_files()[kind]))
    image.load()
    difference = np.asarray(read_image(image, RED)).astype(int) - decoded(
        kinds_of_files()[kind], RED
    )
    # The pixels of a colour of 16 bits that is transparent cannot be found in 8 bits.
    assert abs(difference).max() == 0 or kind == "PNG with a transparent colour"


def test_an_image_is_not_changed_by_reading_it() -> None:
    image = Image.open(io.BytesIO(few_bit_png()))
    read_image(image, RED)
    assert image.info["transparency"] == 1
    assert image.convert("L").getpixel((3, 0)) == 255


def test_edited_images_are_read_as_they_are() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    opened = Image.open(io.BytesIO(encode(Image.fromarray(RGB), "PNG", exif=exif)))
    upright = ImageOps.exif_transpose(opened)
    assert np.array_equal(read_image(upright, WHITE), upright)
    assert np.array_equal(read_image(opened.crop((2, 3, 9, 9)), WHITE), np.rot90(RGB[3:9, 2:9], -1))
    frames = Image.open(io.BytesIO(encode(
        Image.fromarray(RGB), "TIFF", save_all=True, append_images=[Image.new("RGB", (9, 9), "red")]
    )))  # fmt: skip
    frames.seek(1)
    assert np.array_equal(read_image(frames, WHITE), np.broadcast_to(RED, (9, 9, 3)))


@pytest.mark.parametrize("mode", ["La", "LA", "PA", "RGBa", "RGBA"])
def test_alpha_in_every_mode_in_memory(mode: str) -> None:
    image = Image.fromarray(GREY).convert("LA" if mode in ("La", "LA") else "RGBA")
    image.putalpha(128)
    if mode == "PA":
        image = Image.fromarray(GREY).convert("P").convert("PA")
        image.putalpha(Image.new("L", image.size, 128))
    else:
        image = image.convert(mode)
    expected = GREY[..., None] * (128 / 255) + np.array(RED) * (127 / 255)
    assert abs(np.asarray(read_image(image, RED)) - expected).max() <= 2


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B"])
def test_16_bits_of_either_byte_order_in_memory(mode: str) -> None:
    order = ">" if mode == "I;16B" else "<"
    image = Image.frombytes(mode, (32, 24), DEEP.astype(f"{order}u2").tobytes())
    assert abs(np.asarray(read_image(image, WHITE)) - (DEEP / 257)[..., None]).max() <= 0.501


def test_colours_by_name() -> None:
    assert parse_colour("red") == parse_colour("#f00") == parse_colour("#ff000080") == RED


@pytest.mark.filterwarnings("ignore:Image was not the expected size")  # Pillow's warning
def test_images_in_icons_are_not_larger_than_allowed() -> None:
    icon = bytearray(encode(Image.new("RGBA", (64, 64)), "ICO", sizes=[(64, 64)]))
    icon[6] = icon[7] = 8  # what it says of width and height
    with pytest.raises(UnreadableImageError, match="more than 1,000 pixels"):
        decode(bytes(icon), 1, WHITE, 1000)


def with_chunk(data: bytes, name: bytes, content: bytes, damage: int = 0) -> bytes:
    """A PNG with one more chunk before its pixels."""
    at = data.index(b"IDAT") - 4
    crc = zlib.crc32(name + content) ^ damage
    return (
        data[:at]
        + struct.pack(">I", len(content))
        + name
        + content
        + struct.pack(">I", crc)
        + data[at:]
    )


def test_pngs_are_not_refused_for_their_metadata() -> None:
    """Pillow refuses them (its issues 2445, 5610 and 8363)."""
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(Image.fromarray(np.ascontiguousarray(np.rot90(RGB))), "PNG", exif=exif)
    long = zlib.compress(bytes(2_000_000))
    for chunk in (
        (b"zTXt", b"k\0\0" + long), (b"iTXt", b"k\0\1\0\0\0" + long), (b"iCCP", b"k\0\0" + long),
        (b"tEXt", b"k\0text", 1), (b"pHYs", b"\0\0"),
    ):  # fmt: skip
        assert np.array_equal(decoded(with_chunk(data, *chunk)), RGB)
    for name in (b"IHDR", b"IDAT", b"PLTE"):  # but for damaged pixels
        with pytest.raises(UnreadableImageError, match="corrupt"):
            decode(with_chunk(data, name, b"nonsense", 1), 8, WHITE)


def test_a_tga_without_any_alpha_is_opaque() -> None:
    image = Image.fromarray(RGB).convert("RGBA")
    image.putalpha(0)
    assert np.array_equal(decoded(encode(image, "TGA")), RGB)
    image.putalpha(Image.fromarray(GREY))
    share = GREY[..., None] / 255
    expected = RGB * share + np.array(RED) * (1 - share)
    assert abs(decoded(encode(image, "TGA"), RED) - expected).max() <= 1


def test_jpeg_2000_of_signed_or_many_bits_is_refused() -> None:
    """What Pillow writes has 8 bits; here they are said to be 12, or to have a sign."""
    data = bytearray(encode(Image.fromarray(GREY // 16), "JPEG2000", no_jp2=True))
    size = data.index(b"\xff\x51")
    assert data[size + 40] == 7
    data[size + 40] = 0x87
    with pytest.raises(UnreadableImageError, match="signed"):
        decode(bytes(data), 8, WHITE)
    data = bytearray(encode(Image.fromarray(RGB), "JPEG2000", no_jp2=True))
    data[size + 40] = 11
    with pytest.raises(UnreadableImageError, match="12 bits"):
        decode(bytes(data), 8, WHITE)


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "TIFF", "WEBP", "GIF", "AVIF", "BMP"])
def test_an_image_whose_file_was_closed_is_told(file_format: str, tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(encode(Image.fromarray(RGB), file_format))
    with Image.open(path) as image:
        pass
    if file_format in ("WEBP", "AVIF"):  # are read when they are opened
        assert read_image(image, WHITE).size == (32, 24)
    else:
        with pytest.raises(UnreadableImageError, match="closed; pass its path"):
            read_image(image, WHITE)
    with Image.open(path) as image:
        image.load()
    assert np.array_equal(read_image(image, WHITE), decode(path.read_bytes(), 1, WHITE))


@pytest.mark.parametrize(("data", "reason"), [
    (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"), (b"\xff\x0a" + bytes(60), "JPEG XL"),
    (b"<?xml version='1.0'?>\n<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
    (b"<!DOCTYPE html>\n<html>404 Not Found</html>", "HTML"), (b"%PDF-1.7\n", "PDF"),
    (b"%!PS-Adobe-3.0 EPSF-3.0\n", "EPS"),
])  # fmt: skip
def test_files_that_are_taken_for_images_are_named(data: bytes, reason: str) -> None:
    with pytest.raises(UnreadableImageError, match=f"{reason}, which is not supported"):
        decode(data, 8, WHITE)


def test_jpegs_of_12_bits_are_not_called_corrupt() -> None:
    data = bytearray(encode(Image.fromarray(RGB), "JPEG"))
    start = data.index(b"\xff\xc0")
    assert data[start + 4] == 8
    data[start + 4] = 12
    with pytest.raises(UnreadableImageError, match="JPEG with 12 bits"):
        decode(bytes(data), 8, WHITE)
