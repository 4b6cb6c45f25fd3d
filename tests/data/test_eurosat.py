"""The included satellite images."""

import hashlib
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ctf.common.errors import UserError
from ctf.data import eurosat
from ctf.data.image_set import Splits
from ctf.data.images import INCLUDED, open_images
from ctf.data.sheets import INCLUDED_SETS
from ctf.data.summary import summarize
from ctf.data.transforms import VIEWS, View, crop
from tests.data.helpers import refusal, save

# Of 3000, 2500 or 2000 published images of each class.
VAL_COUNTS = [600, 600, 600, 500, 500, 400, 500, 600, 500, 600]


@pytest.fixture(scope="module")
def splits() -> Splits:
    return open_images("eurosat")


def test_splits_have_the_published_classes_in_equal_shares(splits: Splits) -> None:
    assert (len(splits.train), len(splits.val)) == (21_600, 5_400)
    assert np.bincount(splits.val.classes_N).tolist() == VAL_COUNTS
    assert np.bincount(splits.train.classes_N).tolist() == [4 * count for count in VAL_COUNTS]
    assert splits.train.class_names == splits.val.class_names == tuple(sorted(eurosat.CLASSES))
    assert splits.train.classes_N.dtype == np.int64
    assert splits.train.mirrors


def test_the_first_images_are_of_all_classes(splits: Splits) -> None:
    for images in (splits.train, splits.val):
        assert {*images.classes_N[:100].tolist()} == {*range(10)}


def test_decoded_images_are_those_that_were_packed_and_in_one_split(splits: Splits) -> None:
    decoded = []
    for split, images in (("train", splits.train), ("val", splits.val)):
        pixels, labels = images.read(range(len(images))), images.classes_N.astype(np.uint8)
        assert pixels.shape == (len(labels), 64, 64, 3) and pixels.dtype == np.uint8
        digest = hashlib.sha256(pixels)
        digest.update(labels)
        assert digest.hexdigest() == eurosat.SHA256[split]
        decoded.append({hashlib.sha256(image).digest() for image in pixels})
    assert decoded[0].isdisjoint(decoded[1])


def test_images_look_as_their_classes_do(splits: Splits) -> None:
    """Forests are darker than industry, lakes and forests are smoother than houses."""
    val = splits.val
    pixels = val.read(range(1000)).astype(float)
    names = np.array(val.class_names)[val.classes_N[:1000]]
    brightness = {n: pixels[names == n].mean() for n in eurosat.CLASSES}
    contrast = {n: pixels[names == n].std(axis=(1, 2)).mean() for n in eurosat.CLASSES}
    assert min(brightness, key=brightness.__getitem__) == "Forest"
    assert max(brightness, key=brightness.__getitem__) == "Industrial"
    assert {*sorted(contrast, key=contrast.__getitem__)[:2]} == {"Forest", "SeaLake"}


@pytest.mark.parametrize("size", [8, 32, 64])
def test_other_sizes_and_views_are_crops_of_the_originals(size: int, splits: Splits) -> None:
    val = open_images("eurosat", size).val
    originals = splits.val.read([3, -1])
    for view in (*VIEWS["flip"], VIEWS["ten-crop"][7], View(scale=1.07)):
        expected = [np.asarray(crop(Image.fromarray(image), size, view)) for image in originals]
        assert np.array_equal(val.read([3, -1], view), expected)
    assert val.read([]).shape == (0, size, size, 3)


def test_fingerprints_differ_by_split_and_size(splits: Splits) -> None:
    small = open_images("eurosat", 32)
    sets = (splits.train, splits.val, small.train, small.val)
    assert len({s.fingerprint for s in sets}) == 4
    assert open_images("eurosat", 64).val.fingerprint == splits.val.fingerprint


def test_image_sizes_above_the_originals_are_refused() -> None:
    expected = "eurosat: got --image-size 65, expected 64 or less, the size of its images"
    assert refusal("eurosat", 65) == expected


@pytest.mark.parametrize("name", INCLUDED)
def test_a_folder_of_the_same_name_is_opened_by_its_path(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "the included set" not in summarize(open_images(name))
    for i in range(4):
        save(tmp_path / name / f"{i}.png")
    splits = open_images(name)
    assert f"the included set of this name; what is in the current folder is ./{name}" in (
        summarize(splits)
    )
    assert len(splits.train) > 20_000
    assert len(open_images(f"./{name}", 16).train) == 3


@pytest.mark.parametrize("name", INCLUDED)
def test_sources_and_licences_are_stated(name: str) -> None:
    folder = INCLUDED_SETS / name
    assert "Permission is hereby granted" in (folder / "LICENSE").read_text()
    assert "MIT licence" in (folder / "SOURCE.md").read_text()


def test_the_notice_is_given_and_the_file_is_small() -> None:
    notice = "Contains modified Copernicus Sentinel data"
    assert notice in (eurosat.FOLDER / "SOURCE.md").read_text()
    assert eurosat.sheets().path.stat().st_size <= 22_000_000


def test_options_of_files_are_refused() -> None:
    assert "omit --classes-at-depth" in refusal("eurosat", classes_at_depth=1)
    assert "has no columns" in refusal("eurosat", image_column="image")


@pytest.mark.parametrize("name", INCLUDED)
def test_a_damaged_data_file_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = {"eurosat": "ctf.data.eurosat", "fashion-mnist": "ctf.data.fashion_mnist"}[name]
    monkeypatch.setattr(f"{module}.FOLDER", tmp_path)
    assert "missing or damaged" in refusal(name)


def test_one_changed_byte_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytearray(eurosat.sheets().path.read_bytes())
    monkeypatch.setattr(eurosat, "FOLDER", tmp_path)
    path = tmp_path / "images.zip"
    path.write_bytes(data)
    assert len(open_images("eurosat").val) == 5_400
    data[10_000_000] ^= 1
    path.write_bytes(data)
    got = hashlib.sha256(data).hexdigest()
    assert refusal("eurosat") == (
        f"{path}: missing or damaged (got SHA-256 {got}, expected {eurosat.FILE_SHA256}); "
        "reinstall ctf"
    )


def test_only_the_split_that_is_read_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the sheets of train in the data file, val can still be read."""
    monkeypatch.setattr(eurosat, "FOLDER", tmp_path)
    source = Path(__file__).parents[2] / "src/ctf/data/included/eurosat/images.zip"
    with zipfile.ZipFile(source) as full, zipfile.ZipFile(tmp_path / "images.zip", "w") as part:
        for name in full.namelist():
            sheet = full.read(name)
            part.writestr(name, b"no WebP" if name == "train/pixels-003.webp" else sheet)
    digest = hashlib.sha256((tmp_path / "images.zip").read_bytes()).hexdigest()
    monkeypatch.setattr(eurosat, "FILE_SHA256", digest)
    opened = open_images("eurosat")
    assert len(opened.train) == 21_600
    assert opened.val.read([0]).shape == (1, 64, 64, 3)
    with pytest.raises(UserError, match="missing or damaged"):
        opened.train.read([0])


@settings(max_examples=30)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.randoms())
def test_a_fifth_of_each_class_is_held_out_whatever_the_order(classes: list[int], random) -> None:
    names = [f"{number}.jpg" for number in range(len(classes))]
    chosen = eurosat.split(names, np.array(classes))
    assert sorted([*chosen["train"], *chosen["val"]]) == [*range(len(classes))]
    counts = Counter(classes[row] for row in chosen["val"])
    assert counts == Counter({c: n // 5 for c, n in Counter(classes).items() if n >= 5})
    order = random.sample(range(len(classes)), len(classes))
    shuffled = eurosat.split([names[i] for i in order], np.array([classes[i] for i in order]))
    for split, rows in chosen.items():
        assert [names[row] for row in rows] == [names[order[row]] for row in shuffled[split]]


def test_the_split_is_by_the_hash_of_the_file_name() -> None:
    names = [f"River_{number}.jpg" for number in range(1, 11)]
    by_hash = sorted(range(10), key=lambda row: hashlib.sha256(names[row].encode()).hexdigest())
    chosen = eurosat.split(names, np.zeros(10, np.int64))
    assert chosen["val"].tolist() == [by_hash[4], by_hash[9]]
    assert chosen["train"].tolist() == [*by_hash[:4], *by_hash[5:9]]
