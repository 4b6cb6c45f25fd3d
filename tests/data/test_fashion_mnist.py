"""The included data set."""

import hashlib
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ctf.data import fashion_mnist
from ctf.data.image_set import Splits
from ctf.data.images import open_images
from ctf.data.transforms import VIEWS, View, crop
from tests.data.helpers import refusal


@pytest.fixture(scope="module")
def fashion() -> Splits:
    return open_images("fashion-mnist")


@pytest.mark.parametrize(("split", "count"), [("train", 60_000), ("test", 10_000)])
def test_arrays_are_the_published_ones(split: str, count: int) -> None:
    pixels, labels = fashion_mnist.load_arrays(split)
    assert pixels.shape == (count, 28, 28)
    assert np.bincount(labels).tolist() == [count // 10] * 10
    digest = hashlib.sha256(pixels.tobytes() + labels.tobytes()).hexdigest()
    published = {
        "train": "16d82e2b505296aa2b78bd5ea0992634f30419a4c97def7c907d154a35ac6157",
        "test": "9f1ec356a747bfe4ebab3cfb722d3694c9ca737e2570f6f90cf31d7b6fd689d4",
    }
    assert digest == fashion_mnist.SHA256[split] == published[split]


def test_images_have_a_border_unless_opened_at_28_pixels(fashion: Splits) -> None:
    indices = [0, 59_999, 7, -1]
    pixels, labels = fashion_mnist.load_arrays("train")
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
def test_other_sizes_and_views_are_crops_of_the_bordered_images(size: int, fashion: Splits) -> None:
    splits = open_images("fashion-mnist", size)
    source = (splits if size == 28 else fashion).val.read([3, 4])
    for view in (*VIEWS["flip"], VIEWS["ten-crop"][7], View(scale=1.07)):
        expected = [np.asarray(crop(Image.fromarray(image), size, view)) for image in source]
        assert np.array_equal(splits.val.read([3, 4], view), expected)


def test_opening_costs_little_more_than_loading_the_arrays() -> None:
    ratios = []
    for _ in range(3):
        start = time.process_time()
        for split in ("train", "test"):
            fashion_mnist.load_arrays(split)
        loaded = time.process_time()
        open_images("fashion-mnist").train.read(np.arange(1000))
        ratios.append((time.process_time() - loaded) / (loaded - start))
    assert min(ratios) < 2


def test_fingerprints_differ_by_split_and_size(fashion: Splits) -> None:
    small = open_images("fashion-mnist", 16)
    sets = (fashion.train, fashion.val, small.train, small.val)
    assert len({s.fingerprint for s in sets}) == 4
    assert open_images("fashion-mnist").val.fingerprint == fashion.val.fingerprint


def test_image_sizes_above_the_originals_are_refused() -> None:
    expected = "fashion-mnist: got --image-size 33, expected 32 or less, the size of its images"
    assert refusal("fashion-mnist", 33) == expected


def test_a_damaged_data_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = (fashion_mnist.FOLDER / "pictures.zip").read_bytes()
    monkeypatch.setattr(fashion_mnist, "FOLDER", tmp_path)
    assert "missing or damaged" in refusal("fashion-mnist")
    (tmp_path / "pictures.zip").write_bytes(data[: len(data) // 2])
    assert "missing or damaged" in refusal("fashion-mnist")
