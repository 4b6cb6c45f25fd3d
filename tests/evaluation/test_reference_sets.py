"""Pictures to score: .npz files as of NumPy and ADM, folders, sets; and all that can be wrong."""

import io
import os
import pickle
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ctf.common.errors import UserError
from ctf.data.imagenet import imagenet_classes
from ctf.data.images import open_images
from ctf.evaluation import reference_sets
from ctf.evaluation.distances import FeatureStatistics
from ctf.evaluation.reference_sets import Collection, Statistics, open_reference, open_scored
from ctf.pipelines import export
from ctf.pipelines.pipeline import Pipeline
from tests.gallery import noise

PIXELS = noise(150, 0)[:, :, :6]  # more than two batches, higher than wide
CLASSES = np.arange(150) % 4


def read(found: Collection) -> np.ndarray:
    batches = list(found.batches())
    assert all(batch.dtype == np.uint8 and len(batch) <= reference_sets.BATCH for batch in batches)
    return np.concatenate(batches)


def scored(path: Path) -> np.ndarray:
    return read(open_scored(path))


def refused(path: Path, *words: str) -> None:
    """Checks that a file or folder is refused by its name, in one or two lines."""
    with pytest.raises(UserError) as error:
        scored(path)
    said = str(error.value)
    assert str(path) in said and len(said.splitlines()) <= 2
    for word in words:
        assert word in said, said


def statistics(dim: int, seed: int = 0) -> dict[str, np.ndarray]:
    gathered = FeatureStatistics(dim)
    gathered.add(np.random.default_rng(seed).normal(size=(3 * dim, dim)))
    return {"mu": gathered.gaussian.mean_D, "sigma": gathered.gaussian.covariance_DD}


# --- .npz files -----------------------------------------------------------------------------------


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("with_classes", [False, True])
def test_files_of_numpy(tmp_path: Path, save: Callable[..., None], with_classes: bool) -> None:
    path = tmp_path / "a.npz"
    save(path, PIXELS, *[CLASSES.astype(np.int32)] * with_classes)
    found = open_scored(path)
    assert (found.name, found.count, found.size) == ("a.npz", 150, (8, 6))
    assert found.class_names is None and found.statistics is None
    for _ in range(2):
        assert np.array_equal(read(found), PIXELS)
    if with_classes:
        assert found.classes_N is not None and found.classes_N.dtype == np.int64
        assert np.array_equal(found.classes_N, CLASSES)
    else:
        assert found.classes_N is None


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_floats_from_0_to_1(tmp_path: Path, kind: type) -> None:
    np.savez(tmp_path / "a.npz", PIXELS.astype(kind) / 255)
    assert np.array_equal(scored(tmp_path / "a.npz"), PIXELS)


def test_what_is_written_is_what_numpy_reads(tmp_path: Path) -> None:
    for name in ("a.npz", "b.npz"):
        parts = iter([PIXELS[:64], PIXELS[64:65], PIXELS[65:]])
        reference_sets.save_pictures(tmp_path / name, parts, PIXELS.shape, CLASSES)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["a.npz", "b.npz"]
    with np.load(tmp_path / "a.npz") as stored:
        assert list(stored) == ["arr_0", "arr_1"]  # ADM's names
        assert stored["arr_0"].dtype == np.uint8 and np.array_equal(stored["arr_0"], PIXELS)
        assert stored["arr_1"].dtype == np.int64 and np.array_equal(stored["arr_1"], CLASSES)
    assert np.array_equal(scored(tmp_path / "a.npz"), PIXELS)


@pytest.mark.parametrize(
    ("batches", "classes"),
    [
        ([PIXELS[:100]], CLASSES),
        ([PIXELS, PIXELS[:1]], CLASSES),
        ([PIXELS[:, :, :5]], CLASSES),
        ([PIXELS / 255], CLASSES),
        ([PIXELS], CLASSES[:-1]),
    ],
)
def test_other_pictures_than_told_leave_nothing(
    tmp_path: Path, batches: list[np.ndarray], classes: np.ndarray
) -> None:
    with pytest.raises(ValueError):
        reference_sets.save_pictures(tmp_path / "a.npz", iter(batches), PIXELS.shape, classes)
    assert list(tmp_path.iterdir()) == []


def test_memory_is_that_of_a_batch(tmp_path: Path) -> None:
    count, block = 20_000, noise(500, 1, 32)

    def batches() -> Iterator[np.ndarray]:
        for _ in range(count // len(block)):
            yield block

    path = tmp_path / "many.npz"  # of 61 MB
    tracemalloc.start()
    reference_sets.save_pictures(path, batches(), (count, 32, 32, 3), np.arange(count) % 10)
    total = sum(int(batch[0, 0, 0, 0]) for batch in open_scored(path).batches())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total > 0 and peak < 8e6


BAD_ARRAYS: dict[str, tuple[dict[str, Any], str]] = {
    "other keys": ({"images": PIXELS}, "has the arrays images; expected arr_0"),
    "no keys": ({}, "has the arrays (none); expected arr_0"),
    "mu alone": ({"mu": np.zeros(3)}, "expected arr_0 with pictures, or mu and sigma"),
    "integers": ({"arr_0": PIXELS.astype(np.int64)}, "arr_0 is int64 of shape (150, 8, 6, 3)"),
    "half": ({"arr_0": (PIXELS / 255).astype(np.float16)}, "arr_0 is float16"),
    "objects": ({"arr_0": np.array([PIXELS, None], dtype=object)}, "arr_0 is object of shape (2,)"),
    "text": ({"arr_0": np.array(["a"])}, "arr_0 is <U1"),
    "grey": ({"arr_0": PIXELS[..., 0]}, "expected pictures: uint8 (N, H, W, 3)"),
    "channels first": ({"arr_0": PIXELS.transpose(0, 3, 1, 2).copy()}, "uint8 (N, H, W, 3)"),
    "with alpha": ({"arr_0": np.zeros((5, 4, 4, 4), np.uint8)}, "(5, 4, 4, 4)"),
    "Fortran": ({"arr_0": np.asfortranarray(PIXELS)}, "stored in Fortran order"),
    "nothing": ({"arr_0": PIXELS[:0]}, "holds no pictures"),
    "flat": ({"arr_0": PIXELS[:, :0]}, "holds no pictures"),
    "below 0": ({"arr_0": PIXELS / 127.5 - 1}, "from -1 to 1, expected 0 to 1"),
    "above 1": ({"arr_0": PIXELS.astype(np.float32)}, "to 255, expected 0 to 1"),
    "not a number": ({"arr_0": np.full((3, 4, 4, 3), np.nan)}, "from nan to nan"),
    "too few classes": ({"arr_0": PIXELS, "arr_1": CLASSES[1:]}, "arr_1 is int64 of shape (149,)"),
    "one-hot": ({"arr_0": PIXELS, "arr_1": np.eye(150, 4)}, "the classes of 150 pictures"),
    "float classes": ({"arr_0": PIXELS, "arr_1": CLASSES / 1}, "arr_1 is float64"),
    "negative": ({"arr_0": PIXELS, "arr_1": CLASSES - 1}, "as whole numbers from 0"),
    "statistics": (statistics(4), "holds statistics and no pictures"),
    "mu of integers": ({**statistics(4), "mu": np.arange(4)}, "mu is int64"),
    "sigma of another size": (
        {**statistics(4), "sigma": np.eye(3)},
        "got a mean of shape (4,) and a covariance of shape (3, 3)",
    ),
    "mu of another shape": ({**statistics(4), "mu": np.zeros((1, 4))}, "mean of shape (1, 4)"),
    "sigma_s of another size": (
        {**statistics(4), "mu_s": np.zeros(2), "sigma_s": np.eye(3)},
        "covariance of shape (3, 3)",
    ),
    "infinite": ({**statistics(4), "mu": np.full(4, np.inf)}, "not finite"),
}


@pytest.mark.parametrize("name", BAD_ARRAYS)
def test_arrays_of_no_use(tmp_path: Path, name: str) -> None:
    arrays, message = BAD_ARRAYS[name]
    np.savez(tmp_path / "bad.npz", **arrays)
    refused(tmp_path / "bad.npz", message)


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("name", ["arr_0", "arr_1", "mu", "features"])
def test_nothing_is_unpickled(tmp_path: Path, name: str) -> None:
    trap = np.array([Trap(tmp_path / "sprung")] * len(PIXELS), dtype=object)
    np.savez(tmp_path / "bad.npz", **{"arr_0": PIXELS, **statistics(3), name: trap})
    (tmp_path / "bare.npz").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    refused(tmp_path / "bad.npz")
    refused(tmp_path / "bare.npz", "not an .npz file")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_cut_short_or_changed_anywhere(tmp_path: Path, save: Callable[..., None]) -> None:
    """Whatever byte is hit, it is told, or the pictures are those that were written."""
    save(tmp_path / "whole.npz", PIXELS, CLASSES)
    whole = (tmp_path / "whole.npz").read_bytes()
    random, path = np.random.default_rng(0), tmp_path / "bad.npz"
    for cut in (0, 1, 30, *random.integers(len(whole), size=20), len(whole) - 1):
        path.write_bytes(whole[:cut])
        refused(path, "truncated, damaged or not an .npz file")
    ends = range(len(whole) - 300, len(whole))  # where the archive says what is in it
    told = 0
    for place in (*range(150), *random.integers(len(whole), size=100), *ends):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(random.integers(8))
        path.write_bytes(damaged)
        try:
            assert np.array_equal(scored(path), PIXELS)
        except UserError as error:
            assert str(path) in str(error) and len(str(error).splitlines()) <= 2
            told += 1
    assert told > 300


def test_fewer_pictures_than_told(tmp_path: Path) -> None:
    """An archive that is whole, with an array that is not."""
    array = io.BytesIO()
    np.save(array, PIXELS)
    with zipfile.ZipFile(tmp_path / "bad.npz", "w") as archive:
        archive.writestr("arr_0.npy", array.getvalue()[:-1000])
    refused(tmp_path / "bad.npz", "ends after 128 of 150 pictures")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    refused(tmp_path / "none.npz", "not found; expected a folder of pictures or an .npz file")


# --- statistics -----------------------------------------------------------------------------------


def test_statistics_come_back_and_say_what_they_are_of(tmp_path: Path) -> None:
    pooled, spatial = FeatureStatistics(5), FeatureStatistics(3)
    for gathered in (pooled, spatial):
        gathered.add(np.random.default_rng(1).normal(size=(40, len(gathered.mean_D))))
    path = tmp_path / "a.npz"
    reference_sets.save_statistics(path, pooled.gaussian, spatial.gaussian, "abc")
    with np.load(path) as stored:
        assert {*stored} == {"mu", "sigma", "mu_s", "sigma_s", "features"}
    found = open_reference(str(path), 32)
    assert isinstance(found, Statistics) and found.features == "abc" and found.spatial is not None
    assert np.array_equal(found.pooled.covariance_DD, pooled.gaussian.covariance_DD)
    assert np.array_equal(found.spatial.mean_D, spatial.mean_D)
    reference_sets.save_statistics(path, pooled.gaussian, None, "abc")
    again = open_reference(str(path), 32)
    assert isinstance(again, Statistics) and again.spatial is None
    assert again.fingerprint != found.fingerprint


def test_statistics_of_others_do_not_say_it(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **{k: v.astype(np.float32) for k, v in statistics(4).items()})
    found = open_reference(str(tmp_path / "a.npz"), 32)
    assert isinstance(found, Statistics) and found.features is None and found.spatial is None
    assert found.pooled.covariance_DD.dtype == np.float64  # no matrix root is of half precision


def test_reference_batches_of_adm_have_both(tmp_path: Path) -> None:
    more = {f"{name}_s": array for name, array in statistics(3, 1).items()}
    np.savez(tmp_path / "a.npz", PIXELS, **statistics(4), **more)
    found = open_reference(str(tmp_path / "a.npz"), 32)
    assert isinstance(found, Collection) and np.array_equal(read(found), PIXELS)
    assert found.statistics is not None and found.statistics.spatial is not None
    assert np.array_equal(found.statistics.pooled.mean_D, statistics(4)["mu"])
    with pytest.raises(UserError, match="no splits; leave --split out"):
        open_reference(str(tmp_path / "a.npz"), 32, "val")


# --- folders --------------------------------------------------------------------------------------


def save_folder(root: Path, names: list[str], pixels: np.ndarray = PIXELS) -> Path:
    for name, picture in zip(names, pixels, strict=False):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(root / name)
    return root


def test_a_folder_in_the_order_of_its_names(tmp_path: Path) -> None:
    names = [f"{i:03d}.png" for i in range(150)]
    found = open_scored(save_folder(tmp_path / "a", names))
    assert (found.name, found.count, found.size) == ("a", 150, (8, 6))
    assert found.classes_N is None and found.class_names is None
    assert np.array_equal(read(found), PIXELS)
    copy = open_scored(save_folder(tmp_path / "b", names))
    assert copy.fingerprint == found.fingerprint
    Image.fromarray(PIXELS[1]).save(tmp_path / "b" / "000.png")
    assert open_scored(tmp_path / "b").fingerprint != found.fingerprint
    (tmp_path / "b" / "000.png").rename(tmp_path / "b" / "200.png")
    assert np.array_equal(scored(tmp_path / "b")[-1], PIXELS[1])


def test_classes_are_folders(tmp_path: Path) -> None:
    names = ["b/0.png", "b/deep/1.png", "a/2.bmp", "c c/3.png"]
    root = save_folder(tmp_path, [*names, ".hidden/4.png", "a/._5.png"])
    (root / "notes.txt").write_text("not a picture")
    found = open_scored(root)
    assert found.class_names == ("a", "b", "c c") and found.classes_N is not None
    assert found.classes_N.tolist() == [0, 1, 1, 2]
    assert np.array_equal(read(found), PIXELS[[2, 0, 1, 3]])
    save_folder(root, ["loose.png"])
    assert open_scored(root).classes_N is None


def test_folders_of_imagenet_have_names(tmp_path: Path) -> None:
    known = imagenet_classes()
    numbers = list(known)[5:7]
    found = open_scored(save_folder(tmp_path, [f"{number}/0.png" for number in numbers]))
    assert found.class_names == tuple(known[number] for number in numbers)


def test_what_ctf_sample_wrote_knows_its_classes(pipe: Pipeline, tmp_path: Path) -> None:
    root = tmp_path / "drawn"
    export.write(pipe, root, export.Settings((2, 0), 3, 0, pipe.sampling))
    found = open_scored(root)
    assert found.count == 6 and found.classes_N is not None and found.class_names is None
    assert found.classes_N.tolist() == [2, 2, 2, 0, 0, 0]
    drawn = pipe.sample(["red"], 0).images[0]
    assert np.array_equal(read(found)[0], np.asarray(drawn))
    (root / "000002.png").unlink()
    assert open_scored(root).classes_N is None  # no one knows any more which is which
    (root / "codes.npz").write_bytes(b"PK")
    assert open_scored(root).count == 5


def test_mixed_sizes_are_found_by_their_headers(tmp_path: Path) -> None:
    """Before anything is decoded: the last file has another size, and nothing behind its header."""
    root = save_folder(tmp_path, [f"{i}.png" for i in range(9)])
    Image.fromarray(noise(1, 2, 40)[0]).save(root / "9.png")
    (root / "9.png").write_bytes((root / "9.png").read_bytes()[:60])
    with pytest.raises(UserError) as error:
        open_scored(root)
    assert str(error.value) == (
        f"{root / '9.png'}: 40 x 40 pixels, but 0.png has 6 x 8\n"
        "expected pictures of one size, as they were drawn"
    )


def test_pictures_that_are_turned_are_of_another_size(tmp_path: Path) -> None:
    root = save_folder(tmp_path, ["0.png"])
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(PIXELS[1]).save(root / "1.jpg", exif=exif)
    refused(root, "1.jpg: 8 x 6 pixels, but 0.png has 6 x 8")


@pytest.mark.parametrize("content", [b"", b"GIF89a", b"\x89PNG\r\n\x1a\n" + bytes(50)])
def test_files_that_are_no_pictures(tmp_path: Path, content: bytes) -> None:
    root = save_folder(tmp_path, ["0.png", "1.png"])
    (root / "2.png").write_bytes(content)
    refused(root, "2.png: corrupt, truncated or of an unknown format")
    (root / "0.png").write_bytes(content)
    refused(root, "0.png: corrupt")


def test_a_file_that_is_damaged_behind_its_header(tmp_path: Path) -> None:
    root = save_folder(tmp_path, ["0.png", "1.png"])
    data = (root / "1.png").read_bytes()
    (root / "1.png").write_bytes(data[:60])
    refused(root, "1.png: corrupt, truncated")


def test_an_empty_folder(tmp_path: Path) -> None:
    refused(tmp_path, "holds no pictures; expected .png")


def test_folders_say_how_far_they_are(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    open_scored(save_folder(tmp_path, ["0.png", "1.png"]), lambda *given: seen.append(given))
    assert seen == [(1, 2), (2, 2)]


# --- references -----------------------------------------------------------------------------------


def test_the_included_set_is_its_held_out_pictures() -> None:
    splits = open_images("fashion-mnist")
    found = {split: open_reference("fashion-mnist", 32, split) for split in (None, "val", "all")}
    held_out, val, both = found.values()
    assert isinstance(held_out, Collection) and isinstance(both, Collection)
    assert held_out.name == "fashion-mnist (val)" and held_out.count == 10_000
    assert held_out.class_names == splits.val.class_names
    assert np.array_equal(held_out.classes_N, splits.val.classes_N)
    first = next(iter(held_out.batches()))
    assert np.array_equal(first, splits.val.read(np.arange(reference_sets.BATCH)))
    assert held_out.fingerprint == val.fingerprint != both.fingerprint
    assert both.count == 70_000
    assert open_reference("fashion-mnist", 28).fingerprint != held_out.fingerprint


def test_a_folder_is_all_of_its_pictures(pictures: Path) -> None:
    splits = open_images(pictures, 16)
    whole, train = (open_reference(str(pictures), 16, split) for split in (None, "train"))
    assert isinstance(whole, Collection) and isinstance(train, Collection)
    assert whole.count == 24 and train.count == len(splits.train) < 24
    assert whole.size == (16, 16) and whole.class_names == ("blue", "green", "red")
    expected = [images.read(np.arange(len(images))) for images in (splits.train, splits.val)]
    assert np.array_equal(read(whole), np.concatenate(expected))
    black = open_reference(str(pictures), 16, background="black")
    assert black.fingerprint != whole.fingerprint


def test_bad_pictures_of_a_reference_can_be_left_out(tmp_path: Path) -> None:
    root = save_folder(tmp_path, [f"{i}.png" for i in range(12)])
    (root / "3.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"3\.png"):
        open_reference(str(root), 8)
    root = save_folder(tmp_path / "large", [f"{i}.png" for i in range(12)], noise(12, 3))
    (root / "3.png").write_bytes(b"no picture")
    found = open_reference(str(root), 8, skip_bad=True)
    assert isinstance(found, Collection) and found.count == 11
