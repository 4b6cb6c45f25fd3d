"""Pictures that are scored or scored against: folders, .npz files, sets of images.

The .npz files are those of ADM's evaluator (openai/guided-diffusion, evaluations/): pictures as
`arr_0`, uint8 (N, H, W, 3), with their classes as `arr_1` if there are any; or the statistics of a
reference, `mu`, `sigma` and `mu_s`, `sigma_s`; or both.

Shapes: N pictures, B of them at a time, H height, W width, D features.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np

from ctf import checkpoint
from ctf.decoding import SUFFIXES, Unusable, decode, read_bytes
from ctf.distances import Gaussian
from ctf.errors import UserError
from ctf.images import INCLUDED, ImageSet, open_images

BATCH = 64
PICTURES, CLASSES = "arr_0.npy", "arr_1.npy"
STATISTICS = ("mu", "sigma", "mu_s", "sigma_s")

Split = Literal["train", "val", "all"]


@dataclass(frozen=True)
class Collection:
    """Pictures of one size that are read in batches, as often as is wanted.

    name: for people. fingerprint: a hash of the pictures. size: (H, W).
    batches: uint8 (B, H, W, 3), at most `BATCH` at a time, always in the same order.
    classes_N: their classes, int64, where they are known, and what these are called.
    """

    name: str
    fingerprint: str
    count: int
    size: tuple[int, int]
    batches: Callable[[], Iterator[np.ndarray]]
    classes_N: np.ndarray | None = None
    class_names: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Statistics:
    """Mean and covariance of a reference whose pictures are not there.

    features: digest of the extractor that they are of; None where the file does not say, as ADM's.
    """

    name: str
    fingerprint: str
    pooled: Gaussian
    spatial: Gaussian | None
    features: str | None


def open_scored(path: Path) -> Collection:
    """Pictures that somebody drew: a folder, whose pictures are of one size, or an .npz file.

    Raises:
        UserError: there are none, of several sizes, or not pictures.
    """
    if path.is_dir():
        return _folder(path)
    found = _open_npz(path)
    if isinstance(found, Statistics):
        raise UserError(f"{path}: holds statistics and no pictures (arr_0), so nothing to score")
    return found


def open_reference(source: str, size: int, split: Split | None) -> Collection | Statistics:
    """What is scored against.

    Args:
        source: an included set, a folder of pictures of any sizes and formats, or an .npz file.
        size: pixels a side that the pictures of a set or folder are cut to.
        split: of a set or folder; None: the held-out pictures of an included set, all of a folder.

    Raises:
        UserError: see `open_images`; a file of another kind.
    """
    if source.endswith(".npz"):
        return _open_npz(Path(source))
    included = source in INCLUDED
    splits = open_images(source, size)
    chosen = split or ("val" if included else "all")
    sets = {"train": (splits.train,), "val": (splits.val,), "all": (splits.train, splits.val)}
    return _of_sets(f"{splits.train.name} ({chosen})", sets[chosen])


def save_pictures(
    path: Path,
    batches: Iterator[np.ndarray],
    shape: tuple[int, int, int, int],
    classes_N: np.ndarray | None = None,
) -> None:
    """Writes pictures of that (N, H, W, 3) into an .npz file, in the memory of a batch.

    Raises:
        ValueError: other pictures come than were told.
    """
    with (
        checkpoint.atomic(path) as temporary,
        zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED, allowZip64=True) as archive,
    ):
        with archive.open(PICTURES, "w", force_zip64=True) as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            written = 0
            for batch in batches:
                if batch.dtype != np.uint8 or batch.shape[1:] != shape[1:]:
                    raise ValueError(f"got {batch.dtype} {batch.shape}, expected uint8 {shape}")
                file.write(np.ascontiguousarray(batch).data)
                written += len(batch)
        if written != shape[0]:
            raise ValueError(f"got {written} pictures, expected {shape[0]}")
        if classes_N is not None:
            with archive.open(CLASSES, "w") as file:
                np.save(file, classes_N.astype(np.int64), allow_pickle=False)


def save_statistics(path: Path, pooled: Gaussian, spatial: Gaussian | None, features: str) -> None:
    """Writes mean and covariance into an .npz file, as ADM's evaluator takes them.

    features: digest of the extractor, so that no other features are ever compared with them.
    """
    arrays: dict[str, Any] = {"mu": pooled.mean_D, "sigma": pooled.covariance_DD}
    if spatial is not None:
        arrays |= {"mu_s": spatial.mean_D, "sigma_s": spatial.covariance_DD}
    with checkpoint.atomic(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays, features=np.array(features))


# --- .npz files -----------------------------------------------------------------------------------


def _open_npz(path: Path) -> Collection | Statistics:
    if not path.is_file():
        raise UserError(f"{path}: not found; expected a folder of pictures or an .npz file")
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.removesuffix(".npy") for name in archive.namelist()}
            if PICTURES in archive.namelist():
                return _npz_pictures(path, archive)
            if {"mu", "sigma"} <= names:
                return _npz_statistics(path, archive)
    except (zipfile.BadZipFile, ValueError, EOFError, OSError, KeyError) as error:
        raise UserError(f"{path}: truncated, or not an .npz file ({error})") from None
    raise UserError(
        f"{path}: has the arrays {', '.join(sorted(names)) or 'none'}; expected arr_0 with "
        "pictures, or mu and sigma"
    )


def _npz_pictures(path: Path, archive: zipfile.ZipFile) -> Collection:
    with archive.open(PICTURES) as file:
        shape, kind = _read_header(file)
    if len(shape) != 4 or shape[3] != 3 or kind not in (np.uint8, np.float32, np.float64):
        raise UserError(
            f"{path}: arr_0 is {kind} of shape {shape}, expected pictures: uint8 (N, H, W, 3)"
        )
    if not shape[0]:
        raise UserError(f"{path}: arr_0 holds no pictures")
    classes_N = None
    if CLASSES in archive.namelist():
        with archive.open(CLASSES) as file:
            classes_N = np.lib.format.read_array(file, allow_pickle=False)
        if classes_N.shape != shape[:1] or classes_N.dtype.kind not in "iu":
            raise UserError(
                f"{path}: arr_1 is {classes_N.dtype} of shape {classes_N.shape}, expected the "
                f"classes of {shape[0]} pictures as whole numbers"
            )
        classes_N = classes_N.astype(np.int64)

    def batches() -> Iterator[np.ndarray]:
        each = int(np.prod(shape[1:])) * kind.itemsize
        with zipfile.ZipFile(path) as again, again.open(PICTURES) as file:
            _read_header(file)
            for start in range(0, shape[0], BATCH):
                count = min(BATCH, shape[0] - start)
                data = file.read(count * each)
                if len(data) < count * each:
                    raise UserError(f"{path}: ends after {start} of {shape[0]} pictures")
                yield _as_uint8(np.frombuffer(data, kind).reshape(count, *shape[1:]), path)

    name = checkpoint.hash_file(path)
    return Collection(path.name, name, shape[0], (shape[1], shape[2]), batches, classes_N)


def _read_header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(file)
    read = {
        (1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)  # fmt: skip
    if read is None:
        raise ValueError(f"array format {version} is not known")
    shape, by_column, kind = read(file)
    if by_column:
        raise ValueError("arrays in column order are not read")
    return shape, kind


def _as_uint8(pictures: np.ndarray, path: Path) -> np.ndarray:
    if pictures.dtype == np.uint8:
        return pictures
    low, high = float(pictures.min()), float(pictures.max())
    if not (low >= 0 and high <= 1):
        raise UserError(
            f"{path}: floating-point pictures from {low:g} to {high:g}, expected 0 to 1; "
            "better store them as uint8"
        )
    return np.rint(pictures * 255).astype(np.uint8)


def _npz_statistics(path: Path, archive: zipfile.ZipFile) -> Statistics:
    arrays = {}
    for name in (*STATISTICS, "features"):
        if f"{name}.npy" in archive.namelist():
            with archive.open(f"{name}.npy") as file:
                arrays[name] = np.lib.format.read_array(file, allow_pickle=False)
    for name in STATISTICS:
        if name in arrays and arrays[name].dtype.kind != "f":
            raise UserError(f"{path}: {name} is {arrays[name].dtype}, expected floating-point")
    spatial = None
    if "mu_s" in arrays and "sigma_s" in arrays:
        spatial = Gaussian(arrays["mu_s"], arrays["sigma_s"])
    features = str(arrays["features"]) if "features" in arrays else None
    pooled = Gaussian(arrays["mu"], arrays["sigma"])
    return Statistics(path.name, checkpoint.hash_file(path), pooled, spatial, features)


# --- Folders and sets -----------------------------------------------------------------------------


def _folder(root: Path) -> Collection:
    """Pictures as they are, sorted by name; classes where there are subfolders and nothing else."""
    paths = sorted(p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not paths:
        raise UserError(f"{root}: holds no pictures")
    first = _read(paths[0])
    parents = [path.relative_to(root).parts[0] for path in paths]
    names = tuple(sorted({*parents}))
    has_classes = all(path.parent != root for path in paths)
    numbers = {name: number for number, name in enumerate(names)}

    def batches() -> Iterator[np.ndarray]:
        for start in range(0, len(paths), BATCH):
            batch = [_read(path) for path in paths[start : start + BATCH]]
            for path, picture in zip(paths[start:], batch, strict=False):
                if picture.shape != first.shape:
                    got, expected = (f"{x.shape[1]} x {x.shape[0]}" for x in (picture, first))
                    raise UserError(
                        f"{path}: {got} pixels, but {paths[0].name} has {expected}; expected "
                        "pictures of one size, as they were drawn"
                    )
            yield np.stack(batch)

    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{path.relative_to(root)} {checkpoint.hash_file(path)}\n".encode())
    return Collection(
        root.name,
        digest.hexdigest(),
        len(paths),
        first.shape[:2],
        batches,
        np.array([numbers[name] for name in parents]) if has_classes else None,
        names if has_classes else None,
    )


def _read(path: Path) -> np.ndarray:
    try:
        return np.asarray(decode(read_bytes(path), 1, (255, 255, 255)))
    except Unusable as why:
        raise UserError(f"{path}: {why}") from None


def _of_sets(name: str, sets: tuple[ImageSet, ...]) -> Collection:
    size = sets[0].image_size

    def batches() -> Iterator[np.ndarray]:
        for images in sets:
            for start in range(0, len(images), BATCH):
                yield images.read(np.arange(start, min(start + BATCH, len(images))))

    return Collection(
        name,
        checkpoint.hash_json([images.fingerprint for images in sets]),
        sum(len(images) for images in sets),
        (size, size),
        batches,
        np.concatenate([images.classes_N for images in sets]),
        sets[0].class_names,
    )
