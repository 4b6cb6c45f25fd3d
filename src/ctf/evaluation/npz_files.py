"""Files of images, and of the statistics of images, as ADM's evaluator has them.

openai/guided-diffusion, evaluations/: images as `arr_0`, uint8 (N, H, W, 3), optionally their
classes as `arr_1`; or the statistics of a reference, `mu`, `sigma` and `mu_s`, `sigma_s`; or both,
with the statistics of more images than the file has.

Shapes: N images, H height, W width, D features.
"""

from __future__ import annotations

import contextlib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from ctf.common import storage
from ctf.common.errors import UserError
from ctf.evaluation.distances import Gaussian
from ctf.evaluation.image_collection import BATCH, ImageCollection, StoredStatistics

IMAGES, CLASSES = "arr_0", "arr_1"  # names of ADM's arrays


def save_images(
    path: Path,
    batches: Iterator[np.ndarray],
    shape: tuple[int, int, int, int],
    classes_N: np.ndarray,
) -> None:
    """Write images (N, H, W, 3) = `shape` and their classes to an .npz file, batch by batch.

    Equal images give equal bytes.

    Raises:
        ValueError: the batches are not uint8 or, like the classes, not of that shape.
    """
    with (
        storage.atomic(path) as temporary,
        zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED, allowZip64=True) as archive,
    ):
        with archive.open(f"{IMAGES}.npy", "w", force_zip64=True) as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            written = 0
            for batch in batches:
                if batch.dtype != np.uint8 or batch.shape[1:] != shape[1:]:
                    raise ValueError(f"got {batch.dtype} {batch.shape}, expected uint8 {shape}")
                file.write(np.ascontiguousarray(batch).data)
                written += len(batch)
        if not written == len(classes_N) == shape[0]:
            raise ValueError(f"got {written} images, {len(classes_N)} classes, expected {shape}")
        with archive.open(f"{CLASSES}.npy", "w") as file:
            np.save(file, classes_N.astype(np.int64), allow_pickle=False)


def save_statistics(path: Path, pooled: Gaussian, spatial: Gaussian | None, features: str) -> None:
    """Write means and covariances to an .npz file in the format of ADM's evaluator.

    `features` is the digest of the extractor, so that readers can refuse other features.
    """
    arrays: dict[str, Any] = {"mu": pooled.mean_D, "sigma": pooled.covariance_DD}
    if spatial is not None:
        arrays |= {"mu_s": spatial.mean_D, "sigma_s": spatial.covariance_DD}
    storage.save_npz(path, {**arrays, "features": np.array(features)})


@contextlib.contextmanager
def open_archive(path: Path) -> Iterator[Any]:
    """Open an .npz file; anything unreadable in it is a UserError."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            yield arrays
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except Exception as error:  # parsers raise nearly anything for damaged headers
        raise UserError(f"{path}: truncated, damaged or not an .npz file ({error})") from None


def open_npz(path: Path) -> ImageCollection | StoredStatistics:
    """Open images, with the statistics beside them if there are any, or statistics alone.

    Raises:
        UserError: the file is missing, damaged, or of another kind.
    """
    if not path.is_file():
        raise UserError(f"{path}: not found; expected a folder of images or an .npz file")
    with open_archive(path) as arrays:
        fingerprint = storage.hash_file(path)
        statistics = _read_statistics(path, arrays, fingerprint)
        if IMAGES in arrays.files:
            return _npz_images(path, arrays, fingerprint, statistics)
        if statistics is None:
            raise UserError(
                f"{path}: has the arrays {', '.join(sorted(arrays.files)) or '(none)'}; expected "
                "arr_0 with images, or mu and sigma"
            )
        return statistics


def _npz_images(
    path: Path, arrays: Any, fingerprint: str, statistics: StoredStatistics | None
) -> ImageCollection:
    with arrays.zip.open(f"{IMAGES}.npy") as file:
        shape, fortran_order, dtype = _read_header(file)
    is_image = len(shape) == 4 and shape[3] == 3 and dtype in (np.uint8, np.float32, np.float64)
    if not is_image or 0 in shape or fortran_order:
        raise UserError(
            f"{path}: arr_0 is {dtype} of shape {shape}{' in Fortran order' * fortran_order}, "
            "expected images: uint8 (N, H, W, 3) in C order"
        )
    classes_N = arrays[CLASSES] if CLASSES in arrays.files else None
    if classes_N is not None and not are_classes(classes_N, shape[0]):
        raise UserError(
            f"{path}: arr_1 is {classes_N.dtype} of shape {classes_N.shape}, expected the "
            f"classes of {shape[0]} images as integers from 0"
        )

    def batches() -> Iterator[np.ndarray]:
        image_bytes = int(np.prod(shape[1:])) * dtype.itemsize
        with open_archive(path) as again, again.zip.open(f"{IMAGES}.npy") as file:
            _read_header(file)
            for start in range(0, shape[0], BATCH):
                count = min(BATCH, shape[0] - start)
                data = file.read(count * image_bytes)
                if len(data) < count * image_bytes:
                    raise UserError(f"{path}: ends after {start} of {shape[0]} images")
                yield _as_uint8(np.frombuffer(data, dtype).reshape(count, *shape[1:]), path)
            if file.read(1):
                raise UserError(f"{path}: damaged: more than {shape[0]} images in arr_0")

    return ImageCollection(
        path.name, fingerprint, shape[0], (shape[1], shape[2]), batches,
        None if classes_N is None else classes_N.astype(np.int64), None, statistics,
    )  # fmt: skip


def _read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Read the header of an .npy file: shape, whether in Fortran order, type."""
    if (version := np.lib.format.read_magic(file)) != (1, 0):
        raise ValueError(f"unexpected version {version} of the .npy format")
    return np.lib.format.read_array_header_1_0(file)


def are_classes(classes_N: np.ndarray, count: int) -> bool:
    """Return whether an array has the classes of `count` images: integers of 0 or more."""
    integers = classes_N.dtype.kind in "iu"
    return integers and classes_N.shape == (count,) and bool(classes_N.min() >= 0)


def _as_uint8(images: np.ndarray, path: Path) -> np.ndarray:
    if images.dtype == np.uint8:
        return images
    low, high = float(images.min()), float(images.max())
    if not (low >= 0 and high <= 1):
        raise UserError(
            f"{path}: floating-point images from {low:g} to {high:g}, expected 0 to 1; "
            "better store them as uint8"
        )
    return np.asarray(np.rint(images * 255), np.uint8)


def _read_statistics(path: Path, arrays: Any, fingerprint: str) -> StoredStatistics | None:
    def read(*names: str) -> Gaussian | None:
        if not {*names} <= {*arrays.files}:
            return None
        for name in names:
            if (dtype := arrays[name].dtype).kind != "f":
                raise UserError(f"{path}: {name} is {dtype}, expected floating-point")
        try:
            return Gaussian(*(arrays[name].astype(np.float64) for name in names))
        except UserError as error:
            raise UserError(f"{path}: {error}") from None

    pooled, spatial = read("mu", "sigma"), read("mu_s", "sigma_s")
    if pooled is None:
        return None
    features = str(arrays["features"]) if "features" in arrays.files else None
    return StoredStatistics(path.name, fingerprint, pooled, spatial, features)
