"""Crops against ADM's and LlamaGen's code, and conversions to tensors and PIL images."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ctf.data.transforms import VIEWS, View, as_pil, as_tensor, crop
from tests.data.helpers import RGB, gradient


def center_crop_arr(image: Image.Image, size: int) -> np.ndarray:
    """ADM's (github.com/openai/guided-diffusion, MIT licence), the usual crop of this field."""
    while min(*image.size) >= 2 * size:
        image = image.resize(tuple(x // 2 for x in image.size), resample=Image.BOX)
    scale = size / min(*image.size)
    image = image.resize(tuple(round(x * scale) for x in image.size), resample=Image.BICUBIC)
    array = np.array(image)
    y, x = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    return array[y : y + size, x : x + size]


@settings(max_examples=60)
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
    image = Image.fromarray(gradient(40, 60))  # needs no resizing for crops of 20 at scale 2
    middle = np.asarray(image)[:, 10:50]
    for x, y, left, top in ((0, 0, 0, 0), (1, 0, 20, 0), (0.25, 1, 5, 20), (0.5, 0.5, 10, 10)):
        got = np.asarray(crop(image, 20, View(scale=2, x=x, y=y)))
        assert np.array_equal(got, middle[top : top + 20, left : left + 20])


def test_view_names() -> None:
    assert VIEWS["plain"] == (View(),)
    assert VIEWS["flip"] == (View(), View(flip=True))
    assert len(set(VIEWS["ten-crop"])) == 20
    unmirrored = [view for view in VIEWS["ten-crop"] if not view.flip]
    assert VIEWS["five-crop"] == tuple(unmirrored) and len(unmirrored) == 10


def five_crop(array: np.ndarray, size: int) -> list[np.ndarray]:
    """torchvision's five_crop, by its documentation: the corners and the centre."""
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


def test_tensors_are_in_minus_one_to_one_and_convert_back() -> None:
    images_BCHW = as_tensor(RGB[None])
    assert images_BCHW.shape == (1, 3, *RGB.shape[:2])
    assert images_BCHW.is_contiguous(memory_format=torch.channels_last)
    assert (images_BCHW.min(), images_BCHW.max()) == (-1, 1)
    assert np.array_equal(np.asarray(as_pil(images_BCHW)[0]), RGB)
    assert np.array_equal(np.asarray(as_pil(1.5 * images_BCHW.sign())[0]) > 127, RGB > 127)
