"""Pictures that are scored or scored against: folders, .npz files, sets of images.

The .npz files are those of ADM's evaluator (openai/guided-diffusion, evaluations/): pictures as
`arr_0`, uint8 (N, H, W, 3), with their classes as `arr_1` if there are any; or the statistics of a
reference, `mu`, `sigma` and `mu_s`, `sigma_s`; or both, where the statistics are of more pictures.

Shapes: N pictures, B of them at a time, H height, W width, D features.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, NoReturn

import numpy as np
from PIL import Image

from ctf.common import storage
from ctf.common.errors import UserError
from ctf.common.progress import Progress
from ctf.data.decode import FORMATS, SUFFIXES, UnreadableImage, decode, read_bytes
from ctf.data.image_set import ImageSet
from ctf.data.imagenet import readable_class_names
from ctf.data.images import INCLUDED, open_images
from ctf.data.scan import THREADS
from ctf.evaluation.distances import Gaussian

BATCH = 64
PICTURES, CLASSES = "arr_0.npy", "arr_1.npy"
STATISTICS = ("mu", "sigma", "mu_s", "sigma_s")

Split = Literal["train", "val", "all"]


@dataclass(frozen=True)
class Statistics:
    """Mean and covariance of the features of pictures that are not there.

    features: digest of the extractor that they are of; None where the file does not say, as ADM's.
    """

    name: str
    fingerprint: str
    pooled: Gaussian
    spatial: Gaussian | None
    features: str | None


@dataclass(frozen=True)
class Collection:
    """Pictures of one size that are read in batches, as often as is wanted.

    name: for people. fingerprint: a hash of the pictures. size: (H, W).
    batches: uint8 (B, H, W, 3), at most `BATCH` at a time, always in the same order.
    classes_N: their classes, int64 of 0 or more, where they are known, and what these are called.
    statistics: of the set that these are a part of, as ADM's reference batches have them.
    """

    name: str
    fingerprint: str
    count: int
    size: tuple[int, int]
    batches: Callable[[], Iterator[np.ndarray]]
    classes_N: np.ndarray | None = None
    class_names: tuple[str, ...] | None = None
    statistics: Statistics | None = None


def open_scored(path: Path, progress: Progress | None = None) -> Collection:
    """Pictures that somebody drew: a folder, whose pictures are of one size, or an .npz file.

    Args:
        progress: called with (files, files in all) while a folder is read for the first time.

    Raises:
        UserError: there are none, of several sizes, or not pictures.
    """
    if path.is_dir():
        return _folder(path, progress)
    found = _open_npz(path)
    if isinstance(found, Statistics):
        raise UserError(f"{path}: holds statistics and no pictures (arr_0), so nothing to score")
    return found


def open_reference(
    source: str,
    size: int,
    split: Split | None = None,
    *,
    background: str = "white",
    skip_bad: bool = False,
    progress: Progress | None = None,
) -> Collection | Statistics:
    """What is scored against.

    Args:
        source: an included set, a folder of pictures of any sizes and formats, or an .npz file.
        size: pixels a side that the pictures of a set or folder are cut to.
        split: of a set or folder; None: the held-out pictures of an included set, all of a folder.
        background, skip_bad, progress: of a folder; see `open_images`.

    Raises:
        UserError: see `open_images`; a file of another kind; a split of an .npz file.
    """
    if source.endswith(".npz"):
        if split is not None:
            raise UserError(f"{source}: an .npz file has no splits; leave --split out")
        return _open_npz(Path(source))
    splits = open_images(source, size, background=background, skip_bad=skip_bad, progress=progress)
    chosen = split or ("val" if source in INCLUDED else "all")
    sets = {"train": (splits.train,), "val": (splits.val,), "all": (splits.train, splits.val)}
    return of_sets(f"{splits.train.name} ({chosen})", sets[chosen])


def save_pictures(
    path: Path,
    batches: Iterator[np.ndarray],
    shape: tuple[int, int, int, int],
    classes_N: np.ndarray,
) -> None:
    """Writes pictures of that (N, H, W, 3) and their classes into an .npz file, batch by batch.

    Equal pictures are equal bytes.

    Raises:
        ValueError: other pictures come than were told.
    """
    with (
        storage.atomic(path) as temporary,
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
        if not written == len(classes_N) == shape[0]:
            raise ValueError(f"got {written} pictures, {len(classes_N)} classes, expected {shape}")
        with archive.open(CLASSES, "w") as file:
            np.save(file, classes_N.astype(np.int64), allow_pickle=False)


def save_statistics(path: Path, pooled: Gaussian, spatial: Gaussian | None, features: str) -> None:
    """Writes mean and covariance into an .npz file, as ADM's evaluator takes them.

    features: digest of the extractor, so that no other features are ever compared with them.
    """
    arrays: dict[str, Any] = {"mu": pooled.mean_D, "sigma": pooled.covariance_DD}
    if spatial is not None:
        arrays |= {"mu_s": spatial.mean_D, "sigma_s": spatial.covariance_DD}
    with storage.atomic(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays, features=np.array(features))


# --- .npz files -----------------------------------------------------------------------------------


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Tells in a UserError why an .npz file cannot be read."""
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except Exception as error:  # parsers of headers raise nearly everything when they are damaged
        raise UserError(f"{path}: truncated, damaged or not an .npz file ({error})") from None


def _open_npz(path: Path) -> Collection | Statistics:
    if not path.is_file():
        raise UserError(f"{path}: not found; expected a folder of pictures or an .npz file")
    with _reading(path), zipfile.ZipFile(path) as archive:
        names = {name.removesuffix(".npy") for name in archive.namelist()}
        fingerprint = storage.hash_file(path)
        statistics = None
        if {"mu", "sigma"} <= names:
            statistics = _npz_statistics(path, archive, fingerprint)
        if "arr_0" in names:
            return _npz_pictures(path, archive, fingerprint, statistics)
    if statistics is None:
        raise UserError(
            f"{path}: has the arrays {', '.join(sorted(names)) or '(none)'}; expected arr_0 with "
            "pictures, or mu and sigma"
        )
    return statistics


def _npz_pictures(
    path: Path, archive: zipfile.ZipFile, fingerprint: str, statistics: Statistics | None
) -> Collection:
    with archive.open(PICTURES) as file:
        shape, by_column, kind = _read_header(file)
    if len(shape) != 4 or shape[3] != 3 or kind not in (np.uint8, np.float32, np.float64):
        raise UserError(
            f"{path}: arr_0 is {kind} of shape {shape}, expected pictures: uint8 (N, H, W, 3)"
        )
    if 0 in shape:
        raise UserError(f"{path}: arr_0 holds no pictures: its shape is {shape}")
    if by_column:
        raise UserError(
            f"{path}: arr_0 is stored in Fortran order; save np.ascontiguousarray of it instead"
        )
    classes_N = None
    if CLASSES in archive.namelist():
        classes_N = _read_array(archive, CLASSES)
        if not _are_classes(classes_N, shape[0]):
            raise UserError(
                f"{path}: arr_1 is {classes_N.dtype} of shape {classes_N.shape}, expected the "
                f"classes of {shape[0]} pictures as whole numbers from 0"
            )
        classes_N = classes_N.astype(np.int64)

    def batches() -> Iterator[np.ndarray]:
        each = int(np.prod(shape[1:])) * kind.itemsize
        with _reading(path), zipfile.ZipFile(path) as again, again.open(PICTURES) as file:
            _read_header(file)
            for start in range(0, shape[0], BATCH):
                count = min(BATCH, shape[0] - start)
                data = file.read(count * each)
                if len(data) < count * each:
                    raise UserError(f"{path}: ends after {start} of {shape[0]} pictures")
                yield _as_uint8(np.frombuffer(data, kind).reshape(count, *shape[1:]), path)
            if file.read(1):
                raise UserError(f"{path}: damaged: more than {shape[0]} pictures in arr_0")

    return Collection(
        path.name, fingerprint, shape[0], shape[1:3], batches, classes_N, None, statistics
    )


def _read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether it is in Fortran order, and type of the array that follows."""
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    if version == (2, 0):
        return np.lib.format.read_array_header_2_0(file)
    raise ValueError(f"array format {version} is not known")


def _read_array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    with archive.open(name) as file:
        array: np.ndarray = np.lib.format.read_array(file, allow_pickle=False)
    return array


def _are_classes(classes_N: np.ndarray, count: int) -> bool:
    whole = classes_N.dtype.kind in "iu"
    return whole and classes_N.shape == (count,) and bool(classes_N.min() >= 0)


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


def _npz_statistics(path: Path, archive: zipfile.ZipFile, fingerprint: str) -> Statistics:
    arrays = {}
    for name in STATISTICS:
        if f"{name}.npy" in archive.namelist():
            array = _read_array(archive, f"{name}.npy")
            if array.dtype.kind != "f":
                raise UserError(f"{path}: {name} is {array.dtype}, expected floating-point")
            arrays[name] = array.astype(np.float64)
    features = None
    if "features.npy" in archive.namelist():
        features = str(_read_array(archive, "features.npy"))
    try:
        pooled = Gaussian(arrays["mu"], arrays["sigma"])
        spatial = None
        if "mu_s" in arrays and "sigma_s" in arrays:
            spatial = Gaussian(arrays["mu_s"], arrays["sigma_s"])
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return Statistics(path.name, fingerprint, pooled, spatial, features)


# --- Folders and sets -----------------------------------------------------------------------------


def _folder(root: Path, progress: Progress | None) -> Collection:
    """Pictures as they are, in the order of their names.

    The classes are the subfolders, where every picture is in one, or those that `ctf sample` wrote.
    """
    names = _find(root)
    if not names:
        raise UserError(f"{root}: holds no pictures; expected {', '.join(SUFFIXES)} files")
    first = _read(root / names[0])
    digest = hashlib.sha256()
    for done, name in enumerate(names, 1):
        with _blaming(root / name):
            data = read_bytes(root / name)
            height, width = _sides(data)
        # By the headers, before anything long; the sides may be swapped, as EXIF can turn them.
        if {height, width} != {*first.shape[:2]}:
            raise _of_other_size(root / name, (height, width), names[0], first.shape)
        digest.update(f"{name} {hashlib.sha256(data).hexdigest()}\n".encode())
        if progress is not None:
            progress(done, len(names))

    def batches() -> Iterator[np.ndarray]:
        with ThreadPoolExecutor(THREADS) as pool:
            for start in range(0, len(names), BATCH):
                paths = [root / name for name in names[start : start + BATCH]]
                batch = list(pool.map(_read, paths))
                for path, picture in zip(paths, batch, strict=True):
                    if picture.shape != first.shape:
                        raise _of_other_size(path, picture.shape, names[0], first.shape)
                yield np.stack(batch)

    classes_N, class_names = _folder_classes(root, names)
    return Collection(
        root.resolve().name, digest.hexdigest(), len(names), first.shape[:2], batches,
        classes_N, class_names,
    )  # fmt: skip


def _find(root: Path) -> list[str]:
    """Paths of all pictures below a folder, relative to it, sorted; hidden ones are left out."""

    def fail(error: OSError) -> NoReturn:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})")

    found = []
    for here, folders, files in os.walk(root, onerror=fail):
        folders[:] = [folder for folder in folders if not folder.startswith(".")]
        inner = Path(here).relative_to(root)
        found += [
            (inner / file).as_posix()
            for file in files
            if file.lower().endswith(SUFFIXES) and not file.startswith(".")
        ]
    return sorted(found)


def _folder_classes(
    root: Path, names: list[str]
) -> tuple[np.ndarray | None, tuple[str, ...] | None]:
    folders, inside, _ = zip(*(name.partition("/") for name in names), strict=True)
    if all(inside):
        class_names, classes_N = np.unique(folders, return_inverse=True)
        return classes_N, readable_class_names(tuple(class_names.tolist()))
    codes = root / "codes.npz"  # beside 000000.png and so on, as `ctf sample` writes them
    if codes.is_file() and all(name == f"{i:06d}.png" for i, name in enumerate(names)):
        with _reading(codes), zipfile.ZipFile(codes) as archive:
            classes_N = _read_array(archive, "classes.npy")
        if _are_classes(classes_N, len(names)):
            return classes_N, None
    return None, None


@contextlib.contextmanager
def _blaming(path: Path) -> Iterator[None]:
    try:
        yield
    except UnreadableImage as why:
        raise UserError(f"{path}: {why}") from None


def _read(path: Path) -> np.ndarray:
    with _blaming(path):
        return np.asarray(decode(read_bytes(path), 1, (255, 255, 255)))


def _sides(data: bytes) -> tuple[int, int]:
    """Height and width by the header alone, before EXIF turns the picture; or `UnreadableImage`."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as file:
            return file.height, file.width
    except Exception:  # as in `decode`
        raise UnreadableImage("corrupt, truncated or of an unknown format") from None


def _of_other_size(
    path: Path, got: tuple[int, ...], first: str, expected: tuple[int, ...]
) -> UserError:
    return UserError(
        f"{path}: {got[1]} x {got[0]} pixels, but {first} has {expected[1]} x {expected[0]}\n"
        "expected pictures of one size, as they were drawn"
    )


def of_sets(name: str, sets: tuple[ImageSet, ...]) -> Collection:
    size = sets[0].image_size

    def batches() -> Iterator[np.ndarray]:
        for images in sets:
            for start in range(0, len(images), BATCH):
                yield images.read(np.arange(start, min(start + BATCH, len(images))))

    return Collection(
        name,
        storage.hash_json([images.fingerprint for images in sets]),
        sum(len(images) for images in sets),
        (size, size),
        batches,
        np.concatenate([images.classes_N for images in sets]),
        sets[0].class_names,
    )
