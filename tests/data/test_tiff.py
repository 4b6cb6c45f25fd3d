"""TIFF files of all depths and arrangements, by the tags that they have."""

import struct
import zlib
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctf.data.decode import UnreadableImageError, decode, image_size
from tests.data.helpers import RED, WHITE

H, W = 19, 23


def pack(values: np.ndarray, bits: int, order: str) -> bytes:
    """Rows of samples as bytes; of other than 8 and 16 bits, the highest bit comes first."""
    rows = values.reshape(len(values), -1)
    if bits == 16:
        return rows.astype(f"{order}u2").tobytes()
    lines = ["".join(f"{value:0{bits}b}" for value in row) for row in rows.tolist()]
    size = -(-len(lines[0]) // 8)
    return b"".join(int(line.ljust(8 * size, "0"), 2).to_bytes(size, "big") for line in lines)


def tiff(
    values: np.ndarray,
    bits: int,
    photometric: int,
    *,
    order: str = "<",
    compression: int = 1,
    rows: int = H,
    planar: bool = False,
    tile: int = 0,
    predictor: bool = False,
    tags: dict[int, Sequence[int]] | None = None,
) -> bytes:
    """A TIFF of samples (H, W, C), in strips of some rows or in square tiles."""
    height, width, count = values.shape
    blocks = []
    for plane in np.split(values, count, axis=2) if planar else [values]:
        step_y, step_x = (tile, tile) if tile else (rows, width)
        for y in range(0, height, step_y):
            for x in range(0, width, step_x):
                block = plane[y : y + step_y, x : x + step_x].astype(np.int64)
                if tile:
                    spare = ((0, tile - block.shape[0]), (0, tile - block.shape[1]), (0, 0))
                    block = np.pad(block, spare)
                if predictor:
                    block = np.diff(block, axis=1, prepend=0) % 2**bits
                packed = pack(block, bits, order)
                blocks.append(zlib.compress(packed) if compression == 8 else packed)
    offsets = 8 + np.cumsum([0, *map(len, blocks)])
    where = {322: [tile], 323: [tile], 324: offsets[:-1].tolist(), 325: [*map(len, blocks)]}
    if not tile:
        where = {273: where[324], 278: [rows], 279: where[325]}
    entries = {
        256: [width], 257: [height], 258: [bits] * count, 259: [compression], 262: [photometric],
        277: [count], 284: [2 if planar else 1], 317: [2 if predictor else 1],
    } | where | (tags or {})  # fmt: skip
    arrays, directory = b"", struct.pack(f"{order}H", len(entries))
    for tag, numbers in sorted(entries.items()):
        packed = struct.pack(f"{order}{len(numbers)}I", *numbers)
        if len(numbers) > 1:
            place, arrays = int(offsets[-1]) + len(arrays), arrays + packed
            packed = struct.pack(f"{order}I", place)
        directory += struct.pack(f"{order}HHI", tag, 4, len(numbers)) + packed
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(
        f"{order}I", int(offsets[-1]) + len(arrays)
    )
    return start + b"".join(blocks) + arrays + directory + bytes(4)


def decoded(data: bytes, background: tuple[int, int, int] = WHITE) -> np.ndarray:
    return np.asarray(decode(data, 1, background)).astype(int)


def samples(bits: int, channels: int = 1, seed: int = 0) -> np.ndarray:
    """Values (H, W, C) of all sizes, white and black among them."""
    values = np.random.default_rng(seed).integers(0, 2**bits, (H, W, channels))
    values[0, 0], values[0, 1] = 2**bits - 1, 0
    return values


@given(
    bits=st.sampled_from([*range(9, 17)]),
    order=st.sampled_from("<>"),
    compression=st.sampled_from([1, 8]),
    rows=st.integers(1, H),
    white_is_zero=st.booleans(),
    tile=st.sampled_from([0, 16, 32]),
)
def test_white_is_255_at_any_depth(
    bits: int, order: str, compression: int, rows: int, white_is_zero: bool, tile: int
) -> None:
    values = samples(bits)
    stored = 2**bits - 1 - values if white_is_zero else values
    data = tiff(
        stored, bits, 0 if white_is_zero else 1, order=order, compression=compression, rows=rows,
        tile=tile,
    )  # fmt: skip
    image = decoded(data)
    assert tuple(image[0, 0]) == WHITE
    assert abs(image - values / (2**bits - 1) * 255).max() <= 0.501
    assert image_size(data) == (W, H)


@given(
    bits=st.sampled_from([*range(9, 17)]),
    order=st.sampled_from("<>"),
    compression=st.sampled_from([1, 8]),
    planar=st.booleans(),
    tile=st.sampled_from([0, 16]),
    rows=st.integers(1, H),
)
def test_colours_at_any_depth(
    bits: int, order: str, compression: int, planar: bool, tile: int, rows: int
) -> None:
    values = samples(bits, 3)
    data = tiff(
        values, bits, 2, order=order, compression=compression, planar=planar, tile=tile, rows=rows
    )
    assert abs(decoded(data) - values / (2**bits - 1) * 255).max() <= 1
    if bits == 16:
        assert np.array_equal(decoded(data), values >> 8)  # by Pillow or by us


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("photometric", [0, 1])
def test_few_bits(bits: int, photometric: int) -> None:
    values = samples(bits)
    expected = values * 255 // (2**bits - 1)
    expected = expected if photometric else 255 - expected
    assert np.array_equal(decoded(tiff(values, bits, photometric))[..., :1], expected)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("tile", [0, 16])
@pytest.mark.parametrize("channels", [1, 3])
def test_differences_to_the_left_are_summed(order: str, tile: int, channels: int) -> None:
    values = samples(16, channels)
    photometric = 1 if channels == 1 else 2
    data = tiff(values, 16, photometric, order=order, compression=8, tile=tile, predictor=True)
    assert abs(decoded(data) - values / 257).max() <= 1


@pytest.mark.parametrize("bits", [12, 16])
@pytest.mark.parametrize("channels", [1, 3])
def test_alpha_at_any_depth(bits: int, channels: int) -> None:
    top = 2**bits - 1
    values = samples(bits, channels + 1)
    share = values[..., -1:] / top
    expected = values[..., :-1] / top * 255 * share + np.array(RED) * (1 - share)
    data = tiff(values, bits, 2 if channels == 3 else 1, tags={338: [2]})
    assert abs(decoded(data, RED) - expected).max() <= 2
    premultiplied = values.copy()
    premultiplied[..., :-1] = values[..., :-1] * values[..., -1:] // top
    data = tiff(premultiplied, bits, 2 if channels == 3 else 1, tags={338: [1]})
    assert abs(decoded(data, RED) - expected).max() <= 3
    data = tiff(values, bits, 2 if channels == 3 else 1, tags={338: [0]})  # not alpha
    assert abs(decoded(data, RED) - values[..., :-1] / top * 255).max() <= 1


def test_cmyk_and_palettes_at_any_depth() -> None:
    inks = samples(12, 4)
    light = (1 - inks[..., :3] / 4095) * (1 - inks[..., 3:] / 4095) * 255
    assert abs(decoded(tiff(inks, 12, 5)) - light).max() <= 2
    index = samples(10)
    colours = np.random.default_rng(1).integers(0, 65536, (3, 1024))
    image = decoded(tiff(index, 10, 3, tags={320: colours.ravel().tolist()}))
    assert np.array_equal(image, (colours >> 8).T[index[..., 0]])


def test_extra_samples_that_pillow_does_not_know() -> None:
    values = samples(16, 5)
    image = decoded(tiff(values, 16, 2, tags={338: [0, 0]}))
    assert abs(image - values[..., :3] / 257).max() <= 1
    grey = samples(8, 2)  # white is zero, with alpha
    share = grey[..., 1:] / 255
    image = decoded(tiff(grey, 8, 0, tags={338: [2]}), RED)
    expected = (255 - grey[..., :1]) * share + np.array(RED) * (1 - share)
    assert abs(image - expected).max() <= 1


@pytest.mark.parametrize("bits", [8, 16])
def test_bands_of_unknown_meaning_are_unreadable(bits: int) -> None:
    with pytest.raises(UnreadableImageError, match="3 grey values"):
        decode(tiff(samples(bits, 3), bits, 1, tags={338: [0, 0]}), 1, WHITE)


def test_deep_images_are_turned_upright() -> None:
    values = samples(12)
    data = tiff(np.rot90(values), 12, 1, rows=W, tags={274: [6]})
    assert abs(decoded(data) - values / 4095 * 255).max() <= 0.501


@pytest.mark.parametrize(("tags", "reason"), [
    ({339: [2]}, "signed"), ({339: [3]}, "range is not known"), ({254: [1]}, "camera"),
    ({262: [32803]}, "camera"), ({50706: [1]}, "camera"), ({259: [7]}, "compression 7"),
    ({262: [9]}, "colour space 9"), ({258: [32], 339: [1]}, "range is not known"),
    ({256: [10**9]}, "more than"), ({257: [10**9], 278: [10**9]}, "more than"),
    ({277: [10**6]}, "samples a pixel"), ({278: [0]}, "corrupt"), ({273: [10**8]}, "corrupt"),
])  # fmt: skip
def test_what_cannot_be_read_has_a_reason(tags: dict[int, Sequence[int]], reason: str) -> None:
    with pytest.raises(UnreadableImageError, match=reason):
        decode(tiff(samples(16), 16, 1, tags=tags), 1, WHITE)


def test_ycbcr_without_compression() -> None:
    grey = np.full((H, W, 3), 128)
    assert (decoded(tiff(grey, 8, 6, tags={530: [1, 1]})) == 128).all()
    with pytest.raises(UnreadableImageError, match="subsampled"):  # 6 bytes are 4 pixels
        decode(tiff(grey[: H // 2], 8, 6, tags={530: [2, 2], 257: [H]}), 1, WHITE)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # Pillow's warning
@pytest.mark.parametrize("compression", [1, 8])
@pytest.mark.parametrize("share", [0.1, 0.5])
def test_damaged_deep_files_are_unreadable(compression: int, share: float) -> None:
    data = tiff(samples(12), 12, 1, compression=compression)
    with pytest.raises(UnreadableImageError, match="corrupt"):
        decode(data[: int(share * len(data))], 1, WHITE)
    directory = data[int.from_bytes(data[4:8], "little") :]
    cut = 8 + int(share * (len(data) - len(directory) - 8))  # no pixels behind this place
    start = data[:4] + cut.to_bytes(4, "little")
    with pytest.raises(UnreadableImageError, match="corrupt"):
        decode(start + data[8:cut] + directory, 1, WHITE)
