import contextlib
import hashlib
import io
import json
import os
import shutil
import struct
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ctf.common.errors import UserError
from ctf.data import images, scan
from ctf.data.decode import Unusable, decode
from ctf.data.images import VIEWS, View, crop, open_images

WHITE, RED = (255, 255, 255), (255, 0, 0)


def gradient(height: int = 24, width: int = 32) -> np.ndarray:
    """(H, W, 3): every corner has its own colour, and no symmetry of the square keeps it."""
    y, x = np.mgrid[0:height, 0:width]
    red, green = 255 * x // (width - 1), 255 * y // (height - 1)
    return np.stack([red, green, 255 - (red + green) // 2], axis=-1).astype(np.uint8)


RGB = gradient()
GREY = RGB[..., 0]


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def decoded(data: bytes, colour: tuple[int, int, int] = WHITE) -> np.ndarray:
    return np.asarray(decode(data, 8, colour)).astype(int)


def png(pixels: np.ndarray, depth: int, colour_type: int, trns: bytes = b"") -> bytes:
    """A PNG from rows of bytes (H, row length); for what Pillow does not write."""

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


# ---------------------------------------------------------------- formats and modes


@pytest.mark.parametrize(
    ("kind", "options", "tolerance"),
    [
        ("PNG", {}, 0), ("BMP", {}, 0), ("TIFF", {}, 0), ("TIFF", {"compression": "tiff_lzw"}, 0),
        ("WEBP", {"lossless": True}, 0), ("WEBP", {"quality": 95}, 12), ("GIF", {}, 60),
        ("JPEG", {"quality": 98, "subsampling": 0}, 5),
    ],
)  # fmt: skip
def test_format_of_colour_pictures(kind: str, options: dict[str, object], tolerance: int) -> None:
    difference = abs(decoded(encoded(Image.fromarray(RGB), kind, **options)) - RGB)
    assert difference.max() <= tolerance
    assert difference.mean() <= tolerance / 4


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "GIF", "JPEG", "WEBP"])
def test_grey_is_repeated_to_three_channels(kind: str) -> None:
    options = {"JPEG": {"quality": 100}, "WEBP": {"lossless": True}}.get(kind, {})
    image = decoded(encoded(Image.fromarray(GREY), kind, **options))
    assert abs(image - GREY[..., None]).max() <= (1 if kind == "JPEG" else 0)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "GIF"])
def test_one_bit(kind: str) -> None:
    image = decoded(encoded(Image.fromarray(GREY >= 128).convert("1"), kind))
    assert np.array_equal(image, np.repeat((GREY >= 128)[..., None] * 255, 3, axis=2))


@pytest.mark.parametrize("kind", ["PNG", "GIF", "BMP", "TIFF"])
def test_palette(kind: str) -> None:
    few = Image.fromarray(RGB).quantize(16)
    assert np.array_equal(decoded(encoded(few, kind)), np.asarray(few.convert("RGB")))


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_palette_with_a_transparent_entry(kind: str) -> None:
    few = Image.fromarray(RGB).quantize(16)
    index = np.asarray(few)
    hidden = index[0, 0]
    expected = np.where((index == hidden)[..., None], RED, np.asarray(few.convert("RGB")))
    image = decoded(encoded(few, kind, transparency=int(hidden)), RED)
    assert np.array_equal(image, expected)


def test_palette_with_partial_transparency() -> None:
    few = Image.fromarray(RGB).quantize(4)
    alpha = np.array([0, 51, 128, 255])[np.asarray(few)][..., None]
    expected = (np.asarray(few.convert("RGB")) * alpha + np.array(RED) * (255 - alpha)) / 255
    image = decoded(encoded(few, "PNG", transparency=bytes([0, 51, 128, 255])), RED)
    assert abs(image - expected).max() <= 1


@pytest.mark.parametrize(("mode", "kind"), [
    ("RGBA", "PNG"), ("RGBA", "WEBP"), ("RGBA", "TIFF"), ("LA", "PNG"),
])  # fmt: skip
def test_alpha_is_laid_upon_the_background(mode: str, kind: str) -> None:
    alpha = np.broadcast_to(np.linspace(0, 255, 24).astype(np.uint8)[:, None], (24, 32))
    plain = RGB if mode == "RGBA" else np.repeat(GREY[..., None], 3, axis=2)
    image = Image.fromarray(plain).convert(mode)
    image.putalpha(Image.fromarray(np.ascontiguousarray(alpha)))
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    data = encoded(image, kind, **options)
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
def test_16_bit_colour(container: str) -> None:
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


def test_cmyk_jpeg_as_adobe_inverts_it_and_plain() -> None:
    cmyk = np.concatenate([255 - RGB, np.zeros_like(RGB[..., :1])], axis=-1)
    picture = Image.frombytes("CMYK", (32, 24), cmyk.tobytes())
    options = {"quality": 98, "subsampling": 0}
    adobe = encoded(picture, "JPEG", **options)
    inverted = Image.frombytes("CMYK", (32, 24), (255 - cmyk).tobytes())
    plain = without_adobe(encoded(inverted, "JPEG", **options))
    assert b"Adobe" in adobe
    assert b"Adobe" not in plain
    assert abs(decoded(adobe) - RGB).max() <= 6
    assert abs(decoded(plain) - RGB).max() <= 6
    assert np.array_equal(decoded(encoded(picture, "TIFF")), RGB)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int) -> None:
    """What must be stored so that the picture is RGB when shown, by the EXIF standard's table."""
    stored = {
        1: RGB, 2: RGB[:, ::-1], 3: RGB[::-1, ::-1], 4: RGB[::-1],
        5: RGB.swapaxes(0, 1), 6: np.rot90(RGB), 7: RGB[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(RGB, -1),
    }[orientation]  # fmt: skip
    picture = Image.fromarray(np.ascontiguousarray(stored))
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(decoded(encoded(picture, "PNG", exif=exif)), RGB)
    assert np.array_equal(decoded(encoded(picture, "WEBP", lossless=True, exif=exif)), RGB)
    tiff = encoded(picture, "TIFF", tiffinfo={274: orientation})
    assert np.array_equal(decoded(tiff), RGB)
    jpeg = encoded(picture, "JPEG", quality=98, subsampling=0, exif=exif)
    assert abs(decoded(jpeg) - RGB).max() <= 5
    grey = decoded(tiff16(stored[..., 0].astype(np.int64) * 257, 1, orientation))
    assert np.array_equal(grey, np.repeat(GREY[..., None], 3, axis=2))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # Pillow says so
def test_damaged_exif_data_does_not_spoil_a_picture() -> None:
    for garbage in (b"Exif\0\0MM", b"Exif\0\0II*\0\xff\0\0\0", b"nonsense"):
        data = encoded(Image.fromarray(RGB), "PNG", exif=garbage)
        assert np.array_equal(decoded(data), RGB)


def test_first_frame_of_animations() -> None:
    frames = [Image.fromarray(RGB).quantize(8), Image.new("P", (32, 24))]
    gif = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.array_equal(decoded(gif), np.asarray(frames[0].convert("RGB")))
    others = [Image.new("RGB", (32, 24), "blue")]
    for kind, options in (("WEBP", {"lossless": True}), ("PNG", {}), ("TIFF", {})):
        data = encoded(Image.fromarray(RGB), kind, save_all=True, append_images=others, **options)
        assert np.array_equal(decoded(data), RGB)


def test_pixels_without_a_known_range_are_refused() -> None:
    for array in (DEEP.astype(np.int32), DEEP.astype(np.float32)):
        with pytest.raises(Unusable, match="range is not known"):
            decode(encoded(Image.fromarray(array), "TIFF"), 8, WHITE)


# ---------------------------------------------------------------- crop and views


def center_crop_arr(image: Image.Image, size: int) -> np.ndarray:
    """ADM's (github.com/openai/guided-diffusion, MIT licence), the field's usual crop."""
    while min(*image.size) >= 2 * size:
        image = image.resize(tuple(x // 2 for x in image.size), resample=Image.BOX)
    scale = size / min(*image.size)
    image = image.resize(tuple(round(x * scale) for x in image.size), resample=Image.BICUBIC)
    array = np.array(image)
    y, x = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    return array[y : y + size, x : x + size]


@settings(deadline=None, max_examples=60)
@given(
    st.integers(8, 150), st.integers(8, 150), st.integers(8, 64), st.floats(1, 1.5), st.booleans()
)
def test_plain_crop_is_adms_and_views_crop_its_square(
    height: int, width: int, size: int, scale: float, flip: bool
) -> None:
    image = Image.fromarray(
        np.random.default_rng(height).integers(0, 256, (height, width, 3), np.uint8)
    )
    assert np.array_equal(np.asarray(crop(image, size)), center_crop_arr(image, size))
    square = center_crop_arr(image, int(size * scale))
    for x, y in ((0, 0), (1, 0), (0, 1), (1, 1)):
        rows = square[-size:] if y else square[:size]
        rows = rows[:, ::-1] if flip else rows
        expected = rows[:, -size:] if x else rows[:, :size]
        got = np.asarray(crop(image, size, View(flip, scale, x, y)))
        assert np.array_equal(got, expected)


def test_views_pick_the_right_pixels() -> None:
    picture = Image.fromarray(gradient(40, 60))  # needs no resizing for crops of 20 at scale 2
    middle = np.asarray(picture)[:, 10:50]
    for x, y, left, top in ((0, 0, 0, 0), (1, 0, 20, 0), (0.25, 1, 5, 20), (0.5, 0.5, 10, 10)):
        got = np.asarray(crop(picture, 20, View(scale=2, x=x, y=y)))
        assert np.array_equal(got, middle[top : top + 20, left : left + 20])


def test_named_views() -> None:
    assert VIEWS["plain"] == (View(),)
    assert VIEWS["flip"] == (View(), View(flip=True))
    assert len(set(VIEWS["ten-crop"])) == 20


def five_crop(array: np.ndarray, size: int) -> list[np.ndarray]:
    """Of torchvision, by its documentation: the corners and the centre."""
    top, left = (round((side - size) / 2) for side in array.shape[:2])
    return [
        array[:size, :size], array[:size, -size:], array[-size:, :size], array[-size:, -size:],
        array[top : top + size, left : left + size],
    ]  # fmt: skip


@pytest.mark.parametrize("size", [256, 32, 20, 37])
def test_ten_crop_is_llamagens(size: int) -> None:
    """extract_codes_c2i.py: int(size * range), ADM's crop to that, torchvision's TenCrop of it."""
    pixels = np.random.default_rng(size).integers(0, 256, (300, 340, 3), np.uint8)
    image = Image.fromarray(pixels)
    expected = []
    for crop_range in (1.1, 1.05):
        square = center_crop_arr(image, int(size * crop_range))
        expected += five_crop(square, size) + five_crop(square[:, ::-1], size)
    for view, other in zip(VIEWS["ten-crop"], expected, strict=True):
        assert np.array_equal(np.asarray(crop(image, size, view)), other)


# ---------------------------------------------------------------- the included set


@pytest.fixture(scope="module")
def fashion() -> images.Splits:
    return open_images("fashion-mnist")


@pytest.mark.parametrize(("split", "count"), [("train", 60_000), ("test", 10_000)])
def test_fashion_mnist_is_the_published_set(split: str, count: int) -> None:
    pixels, labels = images.load_fashion_mnist(split)
    assert pixels.shape == (count, 28, 28)
    assert np.bincount(labels).tolist() == [count // 10] * 10
    digest = hashlib.sha256(pixels.tobytes() + labels.tobytes()).hexdigest()
    assert (
        digest
        == {
            "train": "16d82e2b505296aa2b78bd5ea0992634f30419a4c97def7c907d154a35ac6157",
            "test": "9f1ec356a747bfe4ebab3cfb722d3694c9ca737e2570f6f90cf31d7b6fd689d4",
        }[split]
    )
    assert digest == images.FASHION_MNIST_SHA256[split]


def test_fashion_mnist_has_a_border_unless_asked_not_to(fashion: images.Splits) -> None:
    indices = [0, 59_999, 7, -1]
    pixels, labels = images.load_fashion_mnist("train")
    bordered = fashion.train.read(indices)
    assert bordered.shape == (4, 32, 32, 3)
    assert bordered.dtype == np.uint8
    inner = open_images("fashion-mnist", 28).train.read(indices)
    assert np.array_equal(inner, np.repeat(pixels[indices][..., None], 3, axis=3))
    assert np.array_equal(bordered[:, 2:-2, 2:-2], inner)
    assert bordered.sum() == inner.sum()
    assert np.array_equal(fashion.train.classes_N, labels)
    assert fashion.train.classes_N.dtype == np.int64
    assert fashion.train.class_names[9] == "ankle-boot"
    assert (len(fashion.train), len(fashion.val)) == (60_000, 10_000)
    assert fashion.train.read([]).shape == (0, 32, 32, 3)


@pytest.mark.parametrize("size", [8, 28, 30, 32])
def test_fashion_mnist_at_other_sizes_and_views(size: int, fashion: images.Splits) -> None:
    splits = open_images("fashion-mnist", size)
    source = (splits if size == 28 else fashion).val.read([3, 4])
    for view in (*VIEWS["flip"], VIEWS["ten-crop"][7], View(scale=1.07)):
        expected = [np.asarray(crop(Image.fromarray(image), size, view)) for image in source]
        assert np.array_equal(splits.val.read([3, 4], view), expected)


def test_fashion_mnist_opens_within_two_seconds() -> None:
    start = time.process_time()  # of the processor: what else the machine does is not counted
    splits = open_images("fashion-mnist")
    splits.train.read(np.arange(1000))
    assert time.process_time() - start < 2


def test_fingerprints_of_fashion_mnist_differ_by_split_and_size(fashion: images.Splits) -> None:
    small = open_images("fashion-mnist", 16)
    sets = (fashion.train, fashion.val, small.train, small.val)
    assert len({s.fingerprint for s in sets}) == 4
    assert open_images("fashion-mnist").val.fingerprint == fashion.val.fingerprint


# ---------------------------------------------------------------- folders


def save(path: Path, array: np.ndarray = RGB) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes with twelve pictures each, of different colours, and things to be ignored."""
    root = tmp_path / "pictures"
    for index in range(12):
        save(root / "a" / f"{index:02d}.png", np.maximum(RGB, 10 * index))
        save(root / "b" / "deeper" / f"{index:02d}.png", np.minimum(RGB, 70 + 10 * index))
    (root / "a" / "notes.txt").write_text("not a picture")
    (root / "a" / ".hidden.png").write_text("not a picture")
    (root / ".thumbnails").mkdir()
    (root / ".thumbnails" / "x.png").write_text("not a picture")
    (root / "list.csv").write_text("")
    return root


def test_mixed_formats_in_one_folder(tmp_path: Path) -> None:
    picture = Image.fromarray(RGB)
    for name, options in {
        "a.png": {}, "b.JPG": {"quality": 98, "subsampling": 0}, "c.jpeg": {"quality": 98},
        "d.webp": {"lossless": True}, "e.bmp": {}, "f.tif": {}, "g.tiff": {},
    }.items():  # fmt: skip
        picture.save(tmp_path / name, **options)
    (tmp_path / "h.gif").write_bytes(encoded(Image.fromarray(RGB), "PNG"))  # the content counts
    seen: list[tuple[int, int]] = []
    splits = open_images(tmp_path, 16, progress=lambda done, total: seen.append((done, total)))
    expected = np.asarray(crop(picture, 16)).astype(int)
    both = [s.read(np.arange(len(s))).astype(int) for s in (splits.train, splits.val)]
    assert abs(np.concatenate(both) - expected).max() <= 8
    assert splits.train.class_names == (tmp_path.name,)
    assert seen == [(done, 8) for done in range(1, 9)]


def test_classes_are_the_subfolders(folder: Path) -> None:
    splits = open_images(folder, 16)
    assert splits.train.class_names == splits.val.class_names == ("a", "b")
    assert splits.train.name == "pictures"
    assert len(splits.train) + len(splits.val) == 24
    counts = np.bincount(splits.train.classes_N) + np.bincount(splits.val.classes_N, minlength=2)
    assert counts.tolist() == [12, 12]
    bright = splits.train.read(np.arange(len(splits.train))).max(axis=(1, 2, 3)) > 215
    assert np.array_equal(bright, splits.train.classes_N == 0)  # labels belong to their pictures


def test_folders_have_a_default_size(tmp_path: Path) -> None:
    for name in "ab":
        save(tmp_path / f"{name}.png", gradient(70, 80))
    assert open_images(tmp_path).train.read([0]).shape == (1, 64, 64, 3)


def test_from_disk_equals_from_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = open_images(folder, 16)
    monkeypatch.setattr(images, "CACHE_BYTES", 24 * 16 * 16 * 3 - 1)
    disk = open_images(folder, 16)
    assert memory.train.fingerprint == disk.train.fingerprint
    indices = np.array([5, 0, 5, -1])
    for view in (*VIEWS["flip"], *VIEWS["ten-crop"][:7:3]):
        assert np.array_equal(memory.train.read(indices, view), disk.train.read(indices, view))
    left = memory.train.read(indices)
    assert np.array_equal(memory.train.read(indices, View(flip=True)), left[:, :, ::-1])
    shutil.rmtree(folder)
    assert np.array_equal(memory.train.read(indices), left)
    with pytest.raises(UserError, match="not a file"):
        disk.train.read(indices)


def test_background_colour(tmp_path: Path) -> None:
    clear = np.zeros((16, 16, 4), dtype=np.uint8)
    for name in "ab":
        save(tmp_path / f"{name}.png", clear)
    for background, colour in (("white", WHITE), ("red", RED), ("#ff0000", RED)):
        splits = open_images(tmp_path, 8, background=background)
        assert np.array_equal(splits.train.read([0])[0, 3, 3], colour)
    red, same = (open_images(tmp_path, 8, background=b).val for b in ("red", "#ff0000"))
    assert red.fingerprint == same.fingerprint
    assert red.fingerprint != open_images(tmp_path, 8).val.fingerprint


def test_fingerprint_is_of_the_content(folder: Path, tmp_path: Path) -> None:
    def fingerprints(root: Path, size: int = 16) -> tuple[str, str]:
        splits = open_images(root, size)
        return splits.train.fingerprint, splits.val.fingerprint

    before = fingerprints(folder)
    copy = tmp_path / "elsewhere"
    shutil.copytree(folder, copy, copy_function=shutil.copy)  # with new times
    assert fingerprints(copy) == before
    assert fingerprints(folder, 8) != before
    assert fingerprints(folder / "a") == fingerprints(shutil.copytree(folder / "a", tmp_path / "c"))
    names = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("a/0*.png"))}
    victim = names["a/05.png"]
    stat = victim.stat()
    changed = np.maximum(RGB, 5)
    changed[0, 0] = 77
    save(victim, changed)
    os.utime(victim, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert fingerprints(folder) != before


def test_fingerprint_is_that_of_earlier_versions(folder: Path) -> None:
    splits = open_images(folder, 16)
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("[01]*.png"))
    held_out = images.choose_held_out(names, np.repeat([0, 1], 12))
    pictures = [
        (name, int(name.startswith("b")), hashlib.sha256((folder / name).read_bytes()).hexdigest())
        for name, out in zip(names, held_out, strict=True)
        if not out
    ]
    content = json.dumps([16, WHITE, pictures])
    assert splits.train.fingerprint == hashlib.sha256(content.encode()).hexdigest()


def test_links_are_followed_and_loops_are_not(folder: Path, tmp_path: Path) -> None:
    linked = tmp_path / "linked"
    (linked / "a").mkdir(parents=True)
    (linked / "a" / "inner").symlink_to(folder / "a")
    (linked / "a" / "loop").symlink_to(linked / "a")
    (linked / "b").symlink_to(folder / "b")
    splits = open_images(linked, 16)
    assert len(splits.train) + len(splits.val) == 24


# ---------------------------------------------------------------- what is known of files


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """Collects the lengths of the files that a scan looks into, with a cache of its own."""
    monkeypatch.setenv("CTF_CACHE", str(tmp_path / "cache"))
    seen: list[int] = []

    def counted(data: bytes, *rest: object) -> Image.Image:
        seen.append(len(data))
        return decode(data, *rest)

    monkeypatch.setattr(scan, "decode", counted)
    return seen


def same(a: images.Splits, b: images.Splits) -> bool:
    return a.skipped == b.skipped and all(
        x.fingerprint == y.fingerprint
        and np.array_equal(x.classes_N, y.classes_N)
        and np.array_equal(x.read(np.arange(len(x))), y.read(np.arange(len(y))))
        for x, y in ((a.train, b.train), (a.val, b.val))
    )


@pytest.mark.parametrize("in_memory", [True, False])
def test_files_are_looked_at_once(
    folder: Path, looks: list[int], in_memory: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not in_memory:
        monkeypatch.setattr(images, "CACHE_BYTES", 0)
    first = open_images(folder, 16)
    assert len(looks) == 24
    reports: list[tuple[int, int]] = []
    for size in (16, 8, 16):
        again = open_images(folder, size, progress=lambda *call: reports.append(call))
        assert again.train.image_size == size
    assert len(looks) == 24 and not reports
    assert same(first, again)
    every = np.arange(len(first.train))
    view = View(flip=True)
    assert np.array_equal(first.train.read(every, view), again.train.read(every, view))


def test_what_has_changed_is_looked_at_again(folder: Path, looks: list[int]) -> None:
    open_images(folder, 16)
    looks.clear()
    save(folder / "a" / "new.png")
    (folder / "a" / "00.png").unlink()
    save(folder / "b" / "deeper" / "03.png", gradient(30, 30))
    (folder / "b" / "deeper" / "04.png").rename(folder / "b" / "deeper" / "renamed.png")
    times = (folder / "a" / "05.png").stat()
    (folder / "a" / "05.png").write_bytes((folder / "a" / "06.png").read_bytes())
    os.utime(folder / "a" / "05.png", ns=(times.st_atime_ns, times.st_mtime_ns))
    known = open_images(folder, 16)
    assert len(looks) == 4
    shutil.rmtree(os.environ["CTF_CACHE"])
    assert same(known, open_images(folder, 16))


def test_unusable_files_are_looked_at_each_time(spoilt: Path, looks: list[int]) -> None:
    message = refusal(spoilt)
    looks.clear()
    assert refusal(spoilt) == message
    assert sorted(looks) == sorted(len((spoilt / n).read_bytes()) for n in BROKEN)
    known = open_images(spoilt, 16, skip_bad=True)
    shutil.rmtree(os.environ["CTF_CACHE"])
    assert same(known, open_images(spoilt, 16, skip_bad=True))
    save(spoilt / "b" / "small.png")
    for name in BROKEN:
        (spoilt / name).unlink()
    assert open_images(spoilt, 16).skipped == ()


def test_a_scan_that_was_stopped_goes_on(
    folder: Path, looks: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan, "SAVE_SECONDS", -1.0)
    for number in range(300):
        save(folder / "a" / f"more-{number}.png", gradient(16, 16))

    def stop(done: int, total: int) -> None:
        if done == 300:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_images(folder, 16, progress=stop)
    looks.clear()
    open_images(folder, 16)
    assert len(looks) == 324 - 256


@pytest.mark.parametrize("damage", ["cut off", "nonsense", "not a folder"])
def test_without_a_cache_everything_works(
    folder: Path, looks: list[int], damage: str, tmp_path: Path
) -> None:
    first = open_images(folder, 16)
    (file,) = (tmp_path / "cache" / "scans").iterdir()
    if damage == "cut off":
        os.truncate(file, file.stat().st_size // 2)
    elif damage == "nonsense":
        file.write_bytes(b"nonsense")
    else:
        shutil.rmtree(tmp_path / "cache")
        (tmp_path / "cache").write_text("")
    assert same(open_images(folder, 16), first)
    assert len(looks) == 48


def test_views_of_files_are_decoded_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "CACHE_BYTES", 0)
    train = open_images(folder, 16).train
    indices = np.array([3, 0, 3])
    expected = [train.read(indices, view) for view in VIEWS["ten-crop"]]
    count = 0

    def counted(*arguments: object) -> Image.Image:
        nonlocal count
        count += 1
        return decode(*arguments)

    monkeypatch.setattr(images, "decode", counted)
    found = list(train.read_views(indices, VIEWS["ten-crop"]))
    assert len(found) == 20 and np.array_equal(found, expected)
    assert count == 3


# ---------------------------------------------------------------- the held-out split


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.integers(0, 5), min_size=2, max_size=60),
    st.integers(0, 2**32),
)
def test_split_keeps_its_promises(classes: list[int], seed: int) -> None:
    names = [f"{seed}/{index}.png" for index in range(len(classes))]
    classes_N = np.array(classes)
    held_out = images.choose_held_out(names, classes_N)
    assert held_out.any()
    for number, count in enumerate(np.bincount(classes_N)):
        if count >= 2:
            assert not held_out[classes_N == number].all()
    order = np.random.default_rng(seed).permutation(len(names))
    shuffled = images.choose_held_out([names[i] for i in order], classes_N[order])
    assert np.array_equal(shuffled, held_out[order])


def test_split_keeps_every_class_in_train() -> None:
    names = [f"{number}/{index}.png" for number in range(2000) for index in range(2)]
    classes_N = np.repeat(np.arange(2000), 2)  # in about 20 both pictures have a low hash
    held_out = images.choose_held_out(names, classes_N)
    assert np.bincount(classes_N[~held_out], minlength=2000).min() == 1
    assert 0.08 < held_out.mean() < 0.11


def test_split_is_a_tenth_stable_and_limited() -> None:
    names = [f"class/{index}.jpg" for index in range(120_000)]
    classes_N = np.zeros(len(names), dtype=np.int64)
    few = images.choose_held_out(names[:20_000], classes_N[:20_000])
    more = images.choose_held_out(names[:40_000], classes_N[:40_000])
    assert 0.09 < few.mean() < 0.11
    assert np.array_equal(more[:20_000], few)
    assert images.choose_held_out(names, classes_N).sum() == 10_000


def test_split_of_a_folder_is_the_same_each_time(folder: Path) -> None:
    first, second = open_images(folder, 16), open_images(folder, 16)
    assert first.val.fingerprint == second.val.fingerprint
    whole = {p.tobytes() for s in (first.train, first.val) for p in s.read(np.arange(len(s)))}
    assert len(whole) == 24  # no picture is in both


# ---------------------------------------------------------------- bad input


def refusal(source: str | Path, size: int | None = 16, **options: object) -> str:
    with pytest.raises(UserError) as caught:
        open_images(source, size, **options)
    return str(caught.value)


BROKEN = ("a/cut.jpg", "a/text.png", "b/empty.gif")


@pytest.fixture
def spoilt(folder: Path) -> Path:
    """The folder with four bad files in it."""
    whole = encoded(Image.fromarray(RGB), "JPEG")
    (folder / "a" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "a" / "text.png").write_text("hello")
    (folder / "b" / "empty.gif").write_bytes(b"")
    save(folder / "b" / "small.png", gradient(9, 12))
    return folder


def test_all_bad_pictures_are_listed(spoilt: Path) -> None:
    first, *groups = refusal(spoilt).split("\n")
    assert first == (
        f"{spoilt}: 4 of 28 pictures cannot be used; mend or remove them, "
        "or leave them out with --skip-bad"
    )
    assert groups == [
        "corrupt, truncated or of an unknown format (3): a/cut.jpg, a/text.png, b/empty.gif",
        "12x9, smaller than --image-size 16 (1): b/small.png",
    ]


def test_skip_bad_leaves_them_out_and_tells(spoilt: Path) -> None:
    splits = open_images(spoilt, 16, skip_bad=True)
    names = [picture.name for picture in splits.skipped]
    assert names == ["a/cut.jpg", "a/text.png", "b/empty.gif", "b/small.png"]
    assert "12x9" in splits.skipped[3].reason
    for name in names:
        (spoilt / name).unlink()
    clean = open_images(spoilt, 16)
    assert clean.skipped == ()
    assert clean.train.fingerprint == splits.train.fingerprint
    everything = np.arange(len(clean.train))
    assert np.array_equal(clean.train.read(everything), splits.train.read(everything))
    assert np.array_equal(clean.train.classes_N, splits.train.classes_N)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("kept", [0.0, 0.05, 0.5, 0.95])
def test_truncated_pictures_of_every_format(kind: str, kept: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    data = encoded(Image.fromarray(noise), kind)
    with pytest.raises(Unusable, match="corrupt"):
        decode(data[: int(len(data) * kept)], 8, WHITE)


def test_damaged_png() -> None:
    data = bytearray(encoded(Image.fromarray(RGB), "PNG"))
    data[len(data) // 2] ^= 0xFF
    with pytest.raises(Unusable, match="corrupt"):
        decode(bytes(data), 8, WHITE)


@pytest.mark.parametrize("factor", [0.4, 0.7])  # beyond twice Pillow's limit, and beyond it
def test_decompression_bombs(factor: float, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(folder / "a" / "bomb.png", gradient(100, 100))
    limit = int(100 * 100 * factor)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    assert f"more than {limit:,} pixels (1): a/bomb.png" in refusal(folder)


def test_files_that_are_none(folder: Path) -> None:
    (folder / "a" / "gone.png").symlink_to(folder / "nowhere.png")
    os.mkfifo(folder / "a" / "pipe.png")
    assert "not a file (2): a/gone.png, a/pipe.png" in refusal(folder)


def test_empty_folders(tmp_path: Path) -> None:
    assert "no usable picture" in refusal(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "readme.txt").write_text("")
    assert f"{tmp_path}: no usable picture in it; expected .png, .jpg" in refusal(tmp_path)
    save(tmp_path / "a" / "only.png")
    assert "one usable picture; at least 2" in refusal(tmp_path)


def test_class_without_a_picture(folder: Path) -> None:
    (folder / "c").mkdir()
    (folder / "d" / "deeper").mkdir(parents=True)
    assert "no usable picture of class c, d; add some or remove" in refusal(folder)
    (folder / "d").rename(folder / ".d")
    (folder / "c" / "bad.png").write_text("hello")
    assert "no usable picture of class c; add some or remove" in refusal(folder, skip_bad=True)


def test_pictures_beside_class_folders(folder: Path) -> None:
    save(folder / "stray.png")
    assert "pictures beside the class folders (1, e.g. stray.png)" in refusal(folder)


def test_sources_that_are_not_there(tmp_path: Path) -> None:
    assert refusal("fashion_mnist").endswith("did you mean 'fashion-mnist'?")
    missing = refusal(tmp_path / "nowhere")
    assert missing.startswith(f"{tmp_path / 'nowhere'}: no such folder")
    assert missing.endswith(": there is fashion-mnist")
    save(tmp_path / "a.png")
    assert "is a file; expected a folder" in refusal(tmp_path / "a.png")


@contextlib.contextmanager
def unprivileged() -> Iterator[None]:
    """Root may read everything, so root becomes somebody else for a moment."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def open_to_others(folder: Path) -> None:
    """With the folders that it is in: pytest's own are closed."""
    outer = Path(tempfile.gettempdir())
    for inner in (folder, *folder.parents):
        if outer in inner.parents:
            inner.chmod(0o755)


@pytest.mark.parametrize("inner", ["", "b", "b/deeper"])
def test_unreadable_folders(folder: Path, inner: str) -> None:
    open_to_others(folder)
    locked = folder / inner
    locked.chmod(0)
    try:
        with unprivileged():
            assert refusal(folder) == f"{locked}: cannot be read (Permission denied)"
    finally:
        locked.chmod(0o755)


def test_unreadable_file(folder: Path) -> None:
    open_to_others(folder)
    (folder / "a" / "03.png").chmod(0)
    with unprivileged():
        assert "cannot be read: Permission denied (1): a/03.png" in refusal(folder)


@pytest.mark.parametrize("size", [-1, 0, 7, 2049, 10**9])
def test_absurd_image_sizes(size: int) -> None:
    expected = f"image size {size}: expected 8 to 2048 pixels"
    assert refusal("fashion-mnist", size) == expected


def test_image_size_above_the_included_pictures() -> None:
    assert refusal("fashion-mnist", 33).endswith("--image-size 33; choose 32 or less")


def test_unknown_colour() -> None:
    assert refusal("fashion-mnist", background="wite").endswith("'wite': did you mean 'white'?")
    assert refusal("fashion-mnist", background="#12").endswith("expected a name or #rrggbb")


def test_damaged_installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = (images.FASHION_MNIST / "pictures.zip").read_bytes()
    monkeypatch.setattr(images, "FASHION_MNIST", tmp_path)
    assert "missing or damaged" in refusal("fashion-mnist")
    (tmp_path / "pictures.zip").write_bytes(data[: len(data) // 2])
    assert "missing or damaged" in refusal("fashion-mnist")
