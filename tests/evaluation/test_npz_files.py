"""Files of images and statistics: of NumPy, of ADM, and invalid ones."""

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

from ctf.common.errors import UserError
from ctf.evaluation.distances import FeatureStatistics
from ctf.evaluation.image_collection import ImageCollection, StoredStatistics
from ctf.evaluation.npz_files import save_images, save_statistics
from ctf.evaluation.reference_sets import open_reference, open_samples
from tests.evaluation.helpers import check_refused, noise, read, read_samples

PIXELS = noise(150, 0)[:, :, :6]  # more than two batches, taller than wide
CLASSES = np.arange(150) % 4


def statistics(dim: int, seed: int = 0) -> dict[str, np.ndarray]:
    features = FeatureStatistics(dim)
    features.add(np.random.default_rng(seed).normal(size=(3 * dim, dim)))
    return {"mu": features.gaussian.mean_D, "sigma": features.gaussian.covariance_DD}


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("with_classes", [False, True])
def test_npz_files_of_numpy(tmp_path: Path, save: Callable[..., None], with_classes: bool) -> None:
    path = tmp_path / "a.npz"
    save(path, PIXELS, *[CLASSES.astype(np.int32)] * with_classes)
    opened = open_samples(path)
    assert (opened.name, opened.count, opened.size) == ("a.npz", 150, (8, 6))
    assert opened.class_names is None and opened.statistics is None
    for _ in range(2):
        assert np.array_equal(read(opened), PIXELS)
    if with_classes:
        assert opened.classes_N is not None and opened.classes_N.dtype == np.int64
        assert np.array_equal(opened.classes_N, CLASSES)
    else:
        assert opened.classes_N is None


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_floats_from_0_to_1_are_converted(tmp_path: Path, kind: type) -> None:
    np.savez(tmp_path / "a.npz", PIXELS.astype(kind) / 255)
    assert np.array_equal(read_samples(tmp_path / "a.npz"), PIXELS)


def test_numpy_reads_written_images(tmp_path: Path) -> None:
    for name in ("a.npz", "b.npz"):
        parts = iter([PIXELS[:64], PIXELS[64:65], PIXELS[65:]])
        save_images(tmp_path / name, parts, PIXELS.shape, CLASSES)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["a.npz", "b.npz"]
    with np.load(tmp_path / "a.npz") as stored:
        assert list(stored) == ["arr_0", "arr_1"]  # ADM's names
        assert stored["arr_0"].dtype == np.uint8 and np.array_equal(stored["arr_0"], PIXELS)
        assert stored["arr_1"].dtype == np.int64 and np.array_equal(stored["arr_1"], CLASSES)
    assert np.array_equal(read_samples(tmp_path / "a.npz"), PIXELS)


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
def test_batches_of_another_shape_leave_no_file(
    tmp_path: Path, batches: list[np.ndarray], classes: np.ndarray
) -> None:
    with pytest.raises(ValueError):
        save_images(tmp_path / "a.npz", iter(batches), PIXELS.shape, classes)
    assert list(tmp_path.iterdir()) == []


def test_memory_does_not_grow_with_the_number_of_images(tmp_path: Path) -> None:
    count, block = 20_000, noise(500, 1, 32)

    def batches() -> Iterator[np.ndarray]:
        for _ in range(count // len(block)):
            yield block

    path = tmp_path / "many.npz"  # of 61 MB
    tracemalloc.start()
    save_images(path, batches(), (count, 32, 32, 3), np.arange(count) % 10)
    total = sum(int(batch[0, 0, 0, 0]) for batch in open_samples(path).batches())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total > 0 and peak < 8e6


BAD_ARRAYS: dict[str, tuple[dict[str, Any], str]] = {
    "other keys": ({"images": PIXELS}, "has the arrays images; expected arr_0"),
    "no keys": ({}, "has the arrays (none); expected arr_0"),
    "mu alone": ({"mu": np.zeros(3)}, "expected arr_0 with images, or mu and sigma"),
    "integers": ({"arr_0": PIXELS.astype(np.int64)}, "arr_0 is int64 of shape (150, 8, 6, 3)"),
    "half": ({"arr_0": (PIXELS / 255).astype(np.float16)}, "arr_0 is float16"),
    "objects": ({"arr_0": np.array([PIXELS, None], dtype=object)}, "arr_0 is object of shape (2,)"),
    "text": ({"arr_0": np.array(["a"])}, "arr_0 is <U1"),
    "grey": ({"arr_0": PIXELS[..., 0]}, "expected images: uint8 (N, H, W, 3)"),
    "channels first": ({"arr_0": PIXELS.transpose(0, 3, 1, 2).copy()}, "uint8 (N, H, W, 3)"),
    "with alpha": ({"arr_0": np.zeros((5, 4, 4, 4), np.uint8)}, "(5, 4, 4, 4)"),
    "Fortran": ({"arr_0": np.asfortranarray(PIXELS)}, "(150, 8, 6, 3) in Fortran order"),
    "nothing": ({"arr_0": PIXELS[:0]}, "uint8 of shape (0, 8, 6, 3)"),
    "flat": ({"arr_0": PIXELS[:, :0]}, "uint8 of shape (150, 0, 6, 3)"),
    "below 0": ({"arr_0": PIXELS / 127.5 - 1}, "from -1 to 1, expected 0 to 1"),
    "above 1": ({"arr_0": PIXELS.astype(np.float32)}, "to 255, expected 0 to 1"),
    "not a number": ({"arr_0": np.full((3, 4, 4, 3), np.nan)}, "from nan to nan"),
    "too few classes": ({"arr_0": PIXELS, "arr_1": CLASSES[1:]}, "arr_1 is int64 of shape (149,)"),
    "one-hot": ({"arr_0": PIXELS, "arr_1": np.eye(150, 4)}, "the classes of 150 images"),
    "float classes": ({"arr_0": PIXELS, "arr_1": CLASSES / 1}, "arr_1 is float64"),
    "negative": ({"arr_0": PIXELS, "arr_1": CLASSES - 1}, "as integers from 0"),
    "statistics": (statistics(4), "has statistics but no images"),
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
def test_invalid_arrays_are_refused(tmp_path: Path, name: str) -> None:
    arrays, message = BAD_ARRAYS[name]
    np.savez(tmp_path / "bad.npz", **arrays)
    check_refused(tmp_path / "bad.npz", message)


class Trap:
    """Creates a file if it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("name", ["arr_0", "arr_1", "mu", "features"])
def test_nothing_is_unpickled(tmp_path: Path, name: str) -> None:
    trap = np.array([Trap(tmp_path / "sprung")] * len(PIXELS), dtype=object)
    np.savez(tmp_path / "bad.npz", **{"arr_0": PIXELS, **statistics(3), name: trap})
    (tmp_path / "bare.npz").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    check_refused(tmp_path / "bad.npz")
    check_refused(tmp_path / "bare.npz", "not an .npz file")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_truncated_and_damaged_files_are_refused(tmp_path: Path, save: Callable[..., None]) -> None:
    """Whichever byte is damaged: an error, or the images that were written."""
    save(tmp_path / "whole.npz", PIXELS, CLASSES)
    whole = (tmp_path / "whole.npz").read_bytes()
    random, path = np.random.default_rng(0), tmp_path / "bad.npz"
    for cut in (0, 1, 30, *random.integers(len(whole), size=20), len(whole) - 1):
        path.write_bytes(whole[:cut])
        check_refused(path, "truncated, damaged or not an .npz file")
    ends = range(len(whole) - 300, len(whole))  # the archive's directory
    refusals = 0
    for place in (*range(150), *random.integers(len(whole), size=100), *ends):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(random.integers(8))
        path.write_bytes(damaged)
        try:
            assert np.array_equal(read_samples(path), PIXELS)
        except UserError as error:
            assert str(path) in str(error) and len(str(error).splitlines()) <= 2
            refusals += 1
    assert refusals > 300


def test_fewer_images_than_in_the_header_are_refused(tmp_path: Path) -> None:
    """The archive is whole, but the array in it is not."""
    array = io.BytesIO()
    np.save(array, PIXELS)
    with zipfile.ZipFile(tmp_path / "bad.npz", "w") as archive:
        archive.writestr("arr_0.npy", array.getvalue()[:-1000])
    check_refused(tmp_path / "bad.npz", "ends after 128 of 150 images")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    check_refused(tmp_path / "none.npz", "not found; expected a folder of images or an .npz file")


# --- Statistics -----------------------------------------------------------------------------------


def test_statistics_round_trip_with_their_digest(tmp_path: Path) -> None:
    pooled, spatial = FeatureStatistics(5), FeatureStatistics(3)
    for features in (pooled, spatial):
        features.add(np.random.default_rng(1).normal(size=(40, len(features.mean_D))))
    path = tmp_path / "a.npz"
    save_statistics(path, pooled.gaussian, spatial.gaussian, "abc")
    with np.load(path) as stored:
        assert {*stored} == {"mu", "sigma", "mu_s", "sigma_s", "features"}
    opened = open_reference(str(path), 32)
    assert (
        isinstance(opened, StoredStatistics)
        and opened.features == "abc"
        and opened.spatial is not None
    )
    assert np.array_equal(opened.pooled.covariance_DD, pooled.gaussian.covariance_DD)
    assert np.array_equal(opened.spatial.mean_D, spatial.mean_D)
    save_statistics(path, pooled.gaussian, None, "abc")
    again = open_reference(str(path), 32)
    assert isinstance(again, StoredStatistics) and again.spatial is None
    assert again.fingerprint != opened.fingerprint


def test_foreign_statistics_have_no_digest(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **{k: v.astype(np.float32) for k, v in statistics(4).items()})
    opened = open_reference(str(tmp_path / "a.npz"), 32)
    assert (
        isinstance(opened, StoredStatistics) and opened.features is None and opened.spatial is None
    )
    assert opened.pooled.covariance_DD.dtype == np.float64  # matrix roots need double precision


def test_adm_reference_batches_have_images_and_statistics(tmp_path: Path) -> None:
    more = {f"{name}_s": array for name, array in statistics(3, 1).items()}
    np.savez(tmp_path / "a.npz", PIXELS, **statistics(4), **more)
    opened = open_reference(str(tmp_path / "a.npz"), 32)
    assert isinstance(opened, ImageCollection) and np.array_equal(read(opened), PIXELS)
    assert opened.statistics is not None and opened.statistics.spatial is not None
    assert np.array_equal(opened.statistics.pooled.mean_D, statistics(4)["mu"])
    with pytest.raises(UserError, match="no splits; omit --split"):
        open_reference(str(tmp_path / "a.npz"), 32, "val")
