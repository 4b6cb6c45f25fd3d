"""Grids of images: every image complete, enlarged by an integer factor, in its place."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ctf.data.image_grid import GAP, MIN_TILE_WIDTH, image_grid
from ctf.pipelines.export import MAX_COLUMNS, contact_sheet


def noise(number: int, width: int, height: int) -> Image.Image:
    """Noise that is nowhere white."""
    random = np.random.default_rng(number)
    return Image.fromarray(random.integers(0, 200, (height, width, 3), dtype=np.uint8))


@given(
    rows=st.lists(st.tuples(st.sampled_from(["", "a"]), st.integers(1, 4)), min_size=1, max_size=4),
    width=st.sampled_from([3, 32, 64, 70]),
    height=st.sampled_from([5, 40]),
)  # fmt: skip
@settings(max_examples=25)
def test_every_image_is_in_its_place(rows: list[tuple[str, int]], width: int, height: int) -> None:
    named = [
        (name, [noise(10 * row + i, width, height) for i in range(count)])
        for row, (name, count) in enumerate(rows)
    ]
    pixels = np.asarray(image_grid(named))
    scale = -(-MIN_TILE_WIDTH // width)
    columns = max(count for _, count in rows)
    assert pixels.shape[1] >= GAP + columns * (width * scale + GAP)
    bottom = GAP
    for name, of_row in named:
        bottom += (20 if name else 0) + height * scale + GAP
        for i, image in enumerate(of_row):
            left = GAP + i * (width * scale + GAP)
            tile = pixels[bottom - GAP - height * scale : bottom - GAP, left : left + width * scale]
            expected = np.asarray(image).repeat(scale, 0).repeat(scale, 1)
            assert (tile == expected).all()
    assert pixels.shape[0] == bottom
    assert (pixels[-GAP:] == 255).all() and (pixels[:, :GAP] == 255).all()


def test_a_long_name_is_not_cut() -> None:
    image = [noise(0, 64, 64)]
    short, long = (np.asarray(image_grid([(name, image)])) for name in ("a", "a" * 60))
    assert long.shape[1] > short.shape[1]
    assert (long[:, -GAP:] == 255).all()
    assert (long[: GAP + 20, short.shape[1] :] < 255).any()


@pytest.mark.parametrize("count", [1, MAX_COLUMNS, MAX_COLUMNS + 1, 2 * MAX_COLUMNS + 3])
def test_rows_of_a_contact_sheet(count: int) -> None:
    """All images of a class are shown, however many, in rows that fit on a screen."""
    images = [noise(i, 64, 64) for i in range(2 * count)]
    pixels = np.asarray(contact_sheet(images, ["a", "b"], count))
    columns, rows = min(count, MAX_COLUMNS), -(-count // MAX_COLUMNS)
    assert pixels.shape[1] == GAP + columns * (64 + GAP)
    assert pixels.shape[0] == GAP + 2 * (20 + rows * (64 + GAP))
    last = pixels[-GAP - 64 : -GAP]
    left = GAP + (count - 1) % MAX_COLUMNS * (64 + GAP)
    assert (last[:, left : left + 64] == np.asarray(images[-1])).all()
