"""Data sets of image files: opened, read, split, and refused."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ctf.common.errors import UserError
from ctf.data import images
from ctf.data.decode import decode
from ctf.data.images import choose_val, open_images
from ctf.data.transforms import VIEWS, View, crop
from tests.data.helpers import RED, RGB, WHITE, encode, gradient, refusal, save


def test_a_folder_may_mix_formats(tmp_path: Path) -> None:
    image = Image.fromarray(RGB)
    for name, options in {
        "a.png": {}, "b.JPG": {"quality": 98, "subsampling": 0}, "c.jpeg": {"quality": 98},
        "d.webp": {"lossless": True}, "e.bmp": {}, "f.tif": {}, "g.tiff": {},
    }.items():  # fmt: skip
        image.save(tmp_path / name, **options)
    (tmp_path / "h.gif").write_bytes(encode(Image.fromarray(RGB), "PNG"))  # the content counts
    seen: list[tuple[int, int]] = []
    splits = open_images(tmp_path, 16, progress=lambda done, total: seen.append((done, total)))
    expected = np.asarray(crop(image, 16)).astype(int)
    both = [s.read(np.arange(len(s))).astype(int) for s in (splits.train, splits.val)]
    assert abs(np.concatenate(both) - expected).max() <= 8
    assert splits.train.class_names == (tmp_path.name,)
    assert seen == [(done, 8) for done in range(1, 9)]


def test_subfolders_are_classes(folder: Path) -> None:
    splits = open_images(folder, 16)
    assert splits.train.class_names == splits.val.class_names == ("a", "b")
    assert splits.train.name == "images"
    assert len(splits.train) + len(splits.val) == 24
    counts = np.bincount(splits.train.classes_N) + np.bincount(splits.val.classes_N, minlength=2)
    assert counts.tolist() == [12, 12]
    bright = splits.train.read(np.arange(len(splits.train))).max(axis=(1, 2, 3)) > 215
    assert np.array_equal(bright, splits.train.classes_N == 0)  # labels belong to their images


def test_the_default_size_of_files_is_64_pixels(tmp_path: Path) -> None:
    for name in "ab":
        save(tmp_path / f"{name}.png", gradient(70, 80))
    assert open_images(tmp_path).train.read([0]).shape == (1, 64, 64, 3)


def test_images_read_from_disk_equal_those_in_memory(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_transparent_images_show_the_background(tmp_path: Path) -> None:
    clear = np.zeros((16, 16, 4), dtype=np.uint8)
    for name in "ab":
        save(tmp_path / f"{name}.png", clear)
    for background, colour in (("white", WHITE), ("red", RED), ("#ff0000", RED)):
        splits = open_images(tmp_path, 8, background=background)
        assert np.array_equal(splits.train.read([0])[0, 3, 3], colour)
    red, same = (open_images(tmp_path, 8, background=b).val for b in ("red", "#ff0000"))
    assert red.fingerprint == same.fingerprint
    assert red.fingerprint != open_images(tmp_path, 8).val.fingerprint


def test_the_fingerprint_covers_the_content_but_no_times(folder: Path, tmp_path: Path) -> None:
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


def test_the_fingerprint_is_that_of_earlier_versions(folder: Path) -> None:
    splits = open_images(folder, 16)
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("[01]*.png"))
    in_val = choose_val(names, np.repeat([0, 1], 12))
    expected = [
        (name, int(name.startswith("b")), hashlib.sha256((folder / name).read_bytes()).hexdigest())
        for name, out in zip(names, in_val, strict=True)
        if not out
    ]
    content = json.dumps([16, WHITE, expected])
    assert splits.train.fingerprint == hashlib.sha256(content.encode()).hexdigest()


def test_a_file_is_decoded_once_for_all_views(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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


# --- train and val ------------------------------------------------------------------------------


@settings(max_examples=100)
@given(
    st.lists(st.integers(0, 5), min_size=2, max_size=60),
    st.integers(0, 2**32),
)
def test_val_is_never_empty_nor_takes_a_whole_class(classes: list[int], seed: int) -> None:
    names = [f"{seed}/{index}.png" for index in range(len(classes))]
    classes_N = np.array(classes)
    in_val = choose_val(names, classes_N)
    assert in_val.any()
    for number, count in enumerate(np.bincount(classes_N)):
        if count >= 2:
            assert not in_val[classes_N == number].all()
    order = np.random.default_rng(seed).permutation(len(names))
    shuffled = choose_val([names[i] for i in order], classes_N[order])
    assert np.array_equal(shuffled, in_val[order])


def test_every_class_stays_in_train() -> None:
    names = [f"{number}/{index}.png" for number in range(2000) for index in range(2)]
    classes_N = np.repeat(np.arange(2000), 2)  # in about 20 of them both images have a low hash
    in_val = choose_val(names, classes_N)
    assert np.bincount(classes_N[~in_val], minlength=2000).min() == 1
    assert 0.08 < in_val.mean() < 0.11


def test_val_is_a_tenth_stable_and_limited() -> None:
    names = [f"class/{index}.jpg" for index in range(120_000)]
    classes_N = np.zeros(len(names), dtype=np.int64)
    few = choose_val(names[:20_000], classes_N[:20_000])
    more = choose_val(names[:40_000], classes_N[:40_000])
    assert 0.09 < few.mean() < 0.11
    assert np.array_equal(more[:20_000], few)
    assert choose_val(names, classes_N).sum() == 10_000


def test_splits_are_the_same_each_time_and_disjoint(folder: Path) -> None:
    first, second = open_images(folder, 16), open_images(folder, 16)
    assert first.val.fingerprint == second.val.fingerprint
    pixels = {p.tobytes() for s in (first.train, first.val) for p in s.read(np.arange(len(s)))}
    assert len(pixels) == 24  # no image is in both


# --- bad input ------------------------------------------------------------------------------------


def test_all_bad_images_are_listed(damaged_folder: Path) -> None:
    first, *groups = refusal(damaged_folder).split("\n")
    assert first == (
        f"{damaged_folder}: 4 of 28 images cannot be used; fix or remove them, "
        "or leave them out with --skip-bad"
    )
    assert groups == [
        "corrupt, truncated or of an unknown format (3): a/cut.jpg, a/text.png, b/empty.gif",
        "12x9, smaller than --image-size 16 (1): b/small.png",
    ]


def test_skip_bad_leaves_them_out_and_lists_them(damaged_folder: Path) -> None:
    splits = open_images(damaged_folder, 16, skip_bad=True)
    names = [image.name for image in splits.skipped]
    assert names == ["a/cut.jpg", "a/text.png", "b/empty.gif", "b/small.png"]
    assert "12x9" in splits.skipped[3].reason
    for name in names:
        (damaged_folder / name).unlink()
    clean = open_images(damaged_folder, 16)
    assert clean.skipped == ()
    assert clean.train.fingerprint == splits.train.fingerprint
    everything = np.arange(len(clean.train))
    assert np.array_equal(clean.train.read(everything), splits.train.read(everything))
    assert np.array_equal(clean.train.classes_N, splits.train.classes_N)


@pytest.mark.parametrize("factor", [0.4, 0.7])  # beyond twice Pillow's limit, and beyond it
def test_decompression_bombs_are_refused(
    factor: float, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(folder / "a" / "bomb.png", gradient(100, 100))
    limit = int(100 * 100 * factor)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    assert f"more than {limit:,} pixels (1): a/bomb.png" in refusal(folder)


def test_links_to_nowhere_and_pipes_are_refused(folder: Path) -> None:
    (folder / "a" / "gone.png").symlink_to(folder / "nowhere.png")
    os.mkfifo(folder / "a" / "pipe.png")
    assert "not a file (2): a/gone.png, a/pipe.png" in refusal(folder)


def test_folders_with_less_than_two_images_are_refused(tmp_path: Path) -> None:
    assert "no usable images" in refusal(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "readme.txt").write_text("")
    assert f"{tmp_path}: no usable images; left out: 1 not an image (.txt)" in refusal(tmp_path)
    save(tmp_path / "a" / "only.png")
    assert "got one usable image, expected 2 or more" in refusal(tmp_path)


def test_classes_without_an_image_are_refused(folder: Path) -> None:
    (folder / "c").mkdir()
    (folder / "d" / "deeper").mkdir(parents=True)
    assert "no usable images of class c, d; add some or remove" in refusal(folder)
    (folder / "d").rename(folder / ".d")
    (folder / "c" / "bad.png").write_text("hello")
    assert "no usable images of class c; add some or remove" in refusal(folder, skip_bad=True)


def test_images_outside_class_folders_are_refused(folder: Path) -> None:
    save(folder / "stray.png")
    assert "images outside the class folders (1, e.g. stray.png)" in refusal(folder)


def test_unknown_sources_are_refused(tmp_path: Path) -> None:
    assert refusal("fashion_mnist").endswith("did you mean 'fashion-mnist'?")
    missing = refusal(tmp_path / "nowhere")
    assert missing.startswith(f"{tmp_path / 'nowhere'}: no such folder")
    assert missing.endswith(": expected fashion-mnist, eurosat")
    assert refusal("EuroSat").endswith("did you mean 'eurosat'?")
    save(tmp_path / "a.png")
    assert "got a file, expected a folder" in refusal(tmp_path / "a.png")


@pytest.mark.parametrize("size", [-1, 0, 7, 2049, 10**9])
def test_image_sizes_out_of_range_are_refused(size: int) -> None:
    expected = f"image size: got {size}, expected 8 to 2048 pixels"
    assert refusal("fashion-mnist", size) == expected


def test_unknown_colours_are_refused() -> None:
    assert refusal("fashion-mnist", background="wite").endswith("'wite': did you mean 'white'?")
    assert refusal("fashion-mnist", background="#12").endswith("expected a name or #rrggbb")
