"""Open images that are scored, or scored against: folders, .npz files, sets of images.

Shapes: N images.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import TypeVar, Unpack

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
from ctf.data.image_set import ImageSet
from ctf.data.imagenet import readable_class_names
from ctf.data.images import INCLUDED, ImageOptions, open_images
from ctf.data.scan import THREADS
from ctf.data.sources.base import LooseImagesError
from ctf.data.sources.folder import FolderSource
from ctf.data.summary import describe_left_out, summarize, summarize_source
from ctf.evaluation.image_collection import BATCH, ImageCollection, StoredStatistics
from ctf.evaluation.npz_files import are_classes, open_archive, open_npz
from ctf.evaluation.options import Split
from ctf.pipelines.export import is_unfinished

T = TypeVar("T")


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
    opened = open_npz(path)
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
        return open_npz(Path(source))
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
        with open_archive(codes) as arrays:
            classes_N = arrays["classes"]
        if are_classes(classes_N, len(names)):
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
