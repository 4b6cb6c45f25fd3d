"""Images that are scored, or scored against: folders, .npz files, sets of images.

The .npz files are those of ADM's evaluator (openai/guided-diffusion, evaluations/): images as
`arr_0`, uint8 (N, H, W, 3), optionally their classes as `arr_1`; or the statistics of a reference,
`mu`, `sigma` and `mu_s`, `sigma_s`; or both, with the statistics of more images than the file has.

Shapes: N images, B images of a batch, H height, W width, D features.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import IO, Any, TypeVar, Unpack

import numpy as np

from ctf.common import storage
from ctf.common.errors import UserError
from ctf.common.progress import Progress
from ctf.data.decode import (
    WHITE,
    UnreadableImageError,
    decode,
    image_size,
    parse_colour,
    read_bytes,
)
from ctf.data.image_set import ImageSet, Splits
from ctf.data.imagenet import readable_class_names
from ctf.data.images import INCLUDED, ImageOptions, open_images
from ctf.data.scan import THREADS
from ctf.data.sources.base import LooseImagesError
from ctf.data.sources.folder import FolderSource
from ctf.data.summary import describe_left_out, summarize, summarize_source
from ctf.evaluation.distances import Gaussian
from ctf.evaluation.options import Split
from ctf.pipelines.export import is_unfinished

BATCH = 64  # images
IMAGES, CLASSES = "arr_0", "arr_1"  # names of ADM's arrays

T = TypeVar("T")


@dataclass(frozen=True)
class StoredStatistics:
    """Mean and covariance of the features of images that are not available themselves.

    features: digest of the extractor; None if the file does not say, as ADM's.
    """

    name: str
    fingerprint: str
    pooled: Gaussian
    spatial: Gaussian | None
    features: str | None


@dataclass(frozen=True)
class ImageCollection:
    """Images of one size that can be read in batches, repeatedly and in the same order.

    name: for people.
    fingerprint: a hash of the images.
    size: (H, W).
    batches: yields uint8 (B, H, W, 3) with B at most `BATCH`.
    classes_N: int64 of 0 or more, if known.
    class_names: by class number, if known.
    statistics: of the larger set that these images were taken from, as in ADM's reference batches.
    summary: what files were understood to be, see `summary.summarize`; in full if true is passed.
    splits: the training and held-out images that these belong to, if there are such.
    """

    name: str
    fingerprint: str
    count: int
    size: tuple[int, int]
    batches: Callable[[], Iterator[np.ndarray]]
    classes_N: np.ndarray | None = None
    class_names: tuple[str, ...] | None = None
    statistics: StoredStatistics | None = None
    summary: Callable[[bool], str] | None = None
    splits: Splits | None = None


def open_samples(
    path: Path, progress: Progress | None = None, *, background: str = "white"
) -> ImageCollection:
    """Open generated images: a folder of images of one size, or an .npz file.

    Args:
        path: the folder or file.
        progress: called with the number of files read and to read.
        background: colour behind transparent pixels.

    Raises:
        UserError: there are no images, they differ in size, or a file is not an image.
    """
    if path.is_dir():
        return _open_folder(path, progress, parse_colour(background))
    opened = _open_npz(path)
    if isinstance(opened, StoredStatistics):
        raise UserError(f"{path}: has statistics but no images (arr_0) to score")
    return opened


def open_reference(
    source: str,
    size: int,
    split: Split | None = None,
    *,
    class_names: Sequence[str] | None = None,
    progress: Progress | None = None,
    **image_options: Unpack[ImageOptions],
) -> ImageCollection | StoredStatistics:
    """Open a reference to score against.

    Args:
        source: an included set, images of any sizes and formats, which are cropped, or an .npz
            file.
        size: side of the images in pixels.
        split: by default the held-out images of an included set, and all of other images.
        class_names: the classes of the samples, whose order is kept, see `Splits.as_recorded`.
        progress: see `open_images`.
        image_options: see `open_images`.

    Raises:
        UserError: see `open_images`; a file of another kind; a split of an .npz file.
    """
    if source.endswith(".npz"):
        if split is not None:
            raise UserError(f"{source}: an .npz file has no splits; omit --split")
        return _open_npz(Path(source))
    splits = open_images(source, size, progress=progress, **image_options).as_recorded(
        class_names=class_names
    )
    chosen = split or ("val" if source in INCLUDED else "all")
    sets = {"train": (splits.train,), "val": (splits.val,), "all": (splits.train, splits.val)}
    images = from_image_sets(f"{splits.train.name} ({chosen})", sets[chosen])
    return dataclasses.replace(
        images, summary=lambda full: f"reference: {summarize(splits, full=full)}", splits=splits
    )


def from_image_sets(name: str, sets: tuple[ImageSet, ...]) -> ImageCollection:
    """Return the images of one or several sets of equal image size, one set after another."""
    size = sets[0].image_size

    def batches() -> Iterator[np.ndarray]:
        for images in sets:
            for start in range(0, len(images), BATCH):
                yield images.read(np.arange(start, min(start + BATCH, len(images))))

    return ImageCollection(
        name,
        storage.hash_json([images.fingerprint for images in sets]),
        sum(len(images) for images in sets),
        (size, size),
        batches,
        np.concatenate([images.classes_N for images in sets]),
        sets[0].class_names,
    )


# --- .npz files -----------------------------------------------------------------------------------


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
def _open_archive(path: Path) -> Iterator[Any]:
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


def _open_npz(path: Path) -> ImageCollection | StoredStatistics:
    if not path.is_file():
        raise UserError(f"{path}: not found; expected a folder of images or an .npz file")
    with _open_archive(path) as arrays:
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
    if classes_N is not None and not _are_classes(classes_N, shape[0]):
        raise UserError(
            f"{path}: arr_1 is {classes_N.dtype} of shape {classes_N.shape}, expected the "
            f"classes of {shape[0]} images as integers from 0"
        )

    def batches() -> Iterator[np.ndarray]:
        image_bytes = int(np.prod(shape[1:])) * dtype.itemsize
        with _open_archive(path) as again, again.zip.open(f"{IMAGES}.npy") as file:
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


def _are_classes(classes_N: np.ndarray, count: int) -> bool:
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


# --- Folders --------------------------------------------------------------------------------------


def _open_folder(
    root: Path, progress: Progress | None, background: tuple[int, ...]
) -> ImageCollection:
    """Open the images of a folder and its subfolders, sorted by path."""
    if is_unfinished(root):
        raise UserError(f"{root}: not finished; run the ctf sample command that began it again")
    source = _folder_source(root)
    if not source.names:
        found = describe_left_out(source.left_out)
        raise UserError(
            f"{root}: has no images; expected PNG, JPEG or other image files"
            + f"; left out: {found}" * bool(found)
        )
    order_N = np.array(sorted(range(len(source.names)), key=source.names.__getitem__))
    names = [source.names[row] for row in order_N]
    classes_N, class_names = _folder_classes(source, order_N)
    root = source.path
    first = _read_image(root / names[0], background)
    digest = hashlib.sha256(b"" if background == WHITE else bytes(background))
    for done, name in enumerate(names, 1):
        # Sizes by the headers, before anything slow; EXIF data may swap the sides.
        data, size = _load(root / name, lambda data: (data, image_size(data)))
        if {*size} != {*first.shape[:2]}:
            raise _size_error(root / name, size[::-1], names[0], first.shape)
        line = f"{name} {hashlib.sha256(data).hexdigest()}\n"
        digest.update(line.encode(errors="surrogateescape"))
        if progress is not None:
            progress(done, len(names))

    def batches() -> Iterator[np.ndarray]:
        with ThreadPoolExecutor(THREADS) as pool:
            for start in range(0, len(names), BATCH):
                paths = [root / name for name in names[start : start + BATCH]]
                batch = list(pool.map(_read_image, paths, repeat(background)))
                for path, image in zip(paths, batch, strict=True):
                    if image.shape != first.shape:
                        raise _size_error(path, image.shape, names[0], first.shape)
                yield np.stack(batch)

    return ImageCollection(
        source.title, digest.hexdigest(), len(names), first.shape[:2], batches,
        classes_N, class_names,
        summary=lambda full: f"samples: {summarize_source(source, full=full)}",
    )  # fmt: skip


def _folder_source(root: Path) -> FolderSource:
    """Open a folder; images that are beside folders have no classes."""
    try:
        return FolderSource(root)
    except LooseImagesError:
        return FolderSource(root, classes_at_depth=0)


def _folder_classes(
    source: FolderSource, order_N: np.ndarray
) -> tuple[np.ndarray | None, tuple[str, ...] | None]:
    """Classes from folders, or from the codes.npz of `ctf sample`, of the images in that order."""
    if source.class_names != (source.title,):
        return source.classes_N[order_N], readable_class_names(source.class_names)
    codes = source.path / "codes.npz"
    names = [source.names[row] for row in order_N]
    if codes.is_file() and all(name == f"{i:06d}.png" for i, name in enumerate(names)):
        with _open_archive(codes) as arrays:
            classes_N = arrays["classes"]
        if _are_classes(classes_N, len(names)):
            return classes_N, None
    return None, None


def _load(path: Path, parse: Callable[[bytes], T]) -> T:
    try:
        return parse(read_bytes(path))
    except UnreadableImageError as reason:
        raise UserError(f"{path}: {reason}") from None


def _read_image(path: Path, background: tuple[int, ...]) -> np.ndarray:
    return np.asarray(_load(path, lambda data: decode(data, 1, background)))


def _size_error(
    path: Path, got: tuple[int, ...], first: str, expected: tuple[int, ...]
) -> UserError:
    return UserError(
        f"{path}: {got[1]} x {got[0]} pixels, but {first} has {expected[1]} x {expected[0]}\n"
        "expected images of one size, as they were generated"
    )
