"""Opening of image data sets: the included ones, or files on disk, split into train and val.

Shape suffixes: B images of a batch, N images of a set, S = image_size.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn, TypedDict, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from ctf.common.defaults import with_torch_defaults
from ctf.common.errors import UserError
from ctf.common.progress import Progress
from ctf.data import eurosat, fashion_mnist
from ctf.data.decode import UnreadableImageError, decode, parse_colour
from ctf.data.image_set import BadImage, ImageSet, Splits
from ctf.data.imagenet import readable_class_names
from ctf.data.scan import THREADS, scan
from ctf.data.sources import open_image_source
from ctf.data.sources.base import VAL, ImageSource
from ctf.data.summary import describe_left_out
from ctf.data.transforms import (
    MAX_IMAGE_SIZE,
    MIN_IMAGE_SIZE,
    PLAIN,
    View,
    central_square,
    crop,
    crop_square,
)

DEFAULT_IMAGE_SIZE = 64  # of files; an included set has its own
VAL_SHARE, MAX_VAL_IMAGES = 0.1, 10_000  # of the files
CACHE_BYTES = 1 << 30  # the crops of files stay in memory if they fit into this
# Opens the set of each name at an image size, or at its own.
INCLUDED: dict[str, Callable[[int | None], Splits]] = {
    fashion_mnist.NAME: fashion_mnist.open_fashion_mnist,
    eurosat.NAME: eurosat.open_eurosat,
}


class ImageOptions(TypedDict, total=False):
    """How image files are read: keyword arguments of `open_images`."""

    background: str
    skip_bad: bool
    classes_at_depth: int | None
    image_column: str | None
    class_column: str | None


T = TypeVar("T")


@with_torch_defaults
def open_images(
    source: str | os.PathLike[str],
    image_size: int | None = None,
    *,
    background: str = "white",
    skip_bad: bool = False,
    classes_at_depth: int | None = None,
    image_column: str | None = None,
    class_column: str | None = None,
    progress: Progress | None = None,
) -> Splits:
    """Open an included set by its name, or image files.

    A folder has one subfolder per class, or images without subfolders, which are one class; splits
    and other layouts are understood, too, see `sources.layout`. Without a split for validation,
    about a tenth of the images is held out, see `choose_val`. `summary.summarize` tells all that.

    Args:
        source: "fashion-mnist" or "eurosat" (a folder of that name is ./eurosat), a folder, a .tar,
            .zip or .parquet file, a folder of nothing but these, or a pattern like
            "data/train-*.tar".
        image_size: side in pixels of the squares that images are cropped to, 8..2048. By default
            32 for fashion-mnist (28 is the originals without their border), 64 for all others.
        background: colour behind transparent pixels, by name or as #rrggbb.
        skip_bad: leave out images that cannot be used, and list them in `Splits.skipped`.
        classes_at_depth: 1 if the folders in the source are the classes, 2 if the folders in these
            are, ...; 0 if all images are of one class. By default it is found out.
        image_column: column of the images in a table; in archives the ending of the images of
            samples, such as "jpg". By default the one of the usual name.
        class_column: column of the classes in a table; in archives the ending of the labels of
            samples, such as "cls", or their key in .json files. By default one of the usual name.
        progress: called with (scanned images, images) while files are scanned.

    Raises:
        UserError: the source, the size or the colour is invalid, or it cannot be told what the
            classes are, or images cannot be used; all of these are listed.
    """
    source = os.fspath(source)
    if image_size is not None and not MIN_IMAGE_SIZE <= image_size <= MAX_IMAGE_SIZE:
        raise UserError(
            f"image size: got {image_size}, expected {MIN_IMAGE_SIZE} to {MAX_IMAGE_SIZE} pixels"
        )
    colour = parse_colour(background)
    if source in INCLUDED:
        if classes_at_depth is not None:
            raise UserError(f"{source} has no folders; omit --classes-at-depth")
        if image_column is not None or class_column is not None:
            raise UserError(f"{source} has no columns; omit --image-column and --class-column")
        return _open_included(source, image_size)
    files = open_image_source(
        source,
        (*INCLUDED,),
        image_column=image_column,
        class_column=class_column,
        classes_at_depth=classes_at_depth,
    )
    splits = _open_files(files, image_size or DEFAULT_IMAGE_SIZE, colour, skip_bad, progress)
    options = {
        "classes_at_depth": classes_at_depth,
        "image_column": image_column,
        "class_column": class_column,
    }
    given = {name: value for name, value in options.items() if value is not None}
    return dataclasses.replace(splits, options=given)


def _open_included(name: str, image_size: int | None) -> Splits:
    splits = INCLUDED[name](image_size)
    if os.path.exists(name):
        note = f"the included set of this name; what is in the current folder is ./{name}"
        return dataclasses.replace(splits, understood=(note,))
    return splits


class FileImageSet(ImageSet):
    """Images of a source: their crops are kept in memory if they fit, else decoded when read."""

    def __init__(
        self,
        source: ImageSource,
        background: tuple[int, ...],
        crops: _CropCache | None,
        rows_N: NDArray[np.int64],
        **attributes: Any,
    ) -> None:
        super().__init__(**attributes)
        self._source, self.background = source, background
        self._crops, self._rows_N = crops, rows_N  # both splits share the crops

    def read(self, indices: ArrayLike, view: View = PLAIN) -> NDArray[np.uint8]:
        """See `ImageSet.read`."""
        return next(self.read_views(indices, (view,)))

    def image_name(self, index: int) -> str:
        """See `ImageSet.image_name`."""
        return self._source.names[self._rows_N[index]]

    def read_views(self, indices: ArrayLike, views: Sequence[View]) -> Iterator[NDArray[np.uint8]]:
        """See `ImageSet.read_views`."""
        size = self.image_size
        rows_B = self._rows_N[np.asarray(indices, dtype=np.int64)]
        sides = {view.side(size) for view in views}
        if self._crops is not None and sides == {size}:
            self._fill(self._crops, rows_B)
            for view in views:
                images = self._crops.pixels[rows_B]
                yield np.ascontiguousarray(images[:, :, ::-1]) if view.flip else images
            return
        # Of each decoded image, only the squares that the views need stay in memory.
        squares = self._decode(
            rows_B, lambda image: {side: central_square(image, side) for side in sides}
        )
        for view in views:
            images = np.empty((len(rows_B), size, size, 3), dtype=np.uint8)
            for pixels, square in zip(images, squares, strict=True):
                pixels[:] = np.asarray(crop_square(square[view.side(size)], size, view))
            yield images

    def _fill(self, crops: _CropCache, rows_B: NDArray[np.int64]) -> None:
        """Decode the images that are not in memory: those that the scan found in its cache."""
        missing = np.unique(rows_B[~crops.filled[rows_B]])
        pixels = self._decode(missing, lambda image: np.asarray(crop(image, self.image_size)))
        for row, pixels_SSC in zip(missing, pixels, strict=True):
            crops.put(row, pixels_SSC)

    def _decode(self, rows_B: NDArray[np.int64], transform: Callable[[Image.Image], T]) -> list[T]:
        """Decode and transform images in several threads."""

        def decode_row(row: int) -> T:
            try:
                data = self._source.read(row)
                return transform(decode(data, self.image_size, self.background))
            except UnreadableImageError as reason:
                path = self._source.path / self._source.names[row]
                raise UserError(
                    f"{path}: {reason}; it has changed since it was scanned, run the command again"
                ) from None

        if not len(rows_B):
            return []
        with ThreadPoolExecutor(THREADS) as pool:
            return list(pool.map(decode_row, rows_B.tolist()))


class _CropCache:
    """Plain crops in memory, (N, S, S, 3), and which of them have been filled in."""

    def __init__(self, count: int, size: int) -> None:
        self.pixels = np.empty((count, size, size, 3), dtype=np.uint8)
        self.filled = np.zeros(count, dtype=np.bool_)

    def put(self, row: int, pixels: NDArray[np.uint8]) -> None:
        self.pixels[row] = pixels
        self.filled[row] = True


@dataclasses.dataclass(frozen=True)
class _Scanned:
    """A source whose images were scanned, and which of them are held out."""

    source: ImageSource
    size: int
    background: tuple[int, ...]
    crops: _CropCache | None
    digests_N: NDArray[np.uint8]  # see `Scan`
    skipped: tuple[BadImage, ...]
    in_val_N: NDArray[np.bool_]

    def splits(self, order: Sequence[int], rows_N: NDArray[np.int64]) -> Splits:
        """Return the images of these rows in that order.

        Args:
            order: the classes' numbers in the source, by their numbers in the splits.
            rows_N: rows of the source.
        """
        source, settings = self.source, [self.size, self.background]
        class_names = readable_class_names(tuple(source.class_names[c] for c in order))
        classes_N = np.argsort(order)[source.classes_N]

        def split(rows_N: NDArray[np.int64]) -> ImageSet:
            images = (
                (source.names[row], int(classes_N[row]), self.digests_N[row].tobytes().hex())
                for row in rows_N
            )
            return FileImageSet(
                source, self.background, self.crops, rows_N,
                name=source.title, class_names=class_names, classes_N=classes_N[rows_N],
                image_size=self.size, fingerprint=_fingerprint(settings, images),
            )  # fmt: skip

        in_val = self.in_val_N[rows_N]
        # In the order of hashes of the names, so that the first few images are of all classes.
        val_rows = sorted(rows_N[in_val].tolist(), key=lambda row: _hash(source.names[row]))
        return Splits(
            split(rows_N[~in_val]), split(np.array(val_rows, np.int64)), self.skipped,
            source.understood, source.left_out, source.unit,
        )  # fmt: skip


def _open_files(
    source: ImageSource,
    size: int,
    background: tuple[int, ...],
    skip_bad: bool,
    progress: Progress | None,
) -> Splits:
    names = source.names
    _check_counts(source, source.classes_N)
    fits = len(names) * size * size * 3 <= CACHE_BYTES
    crops = _CropCache(len(names), size) if fits else None

    def keep_crop(row: int, image: Image.Image) -> None:
        if crops is not None:
            crops.put(row, np.asarray(crop(image, size)))

    result = scan(source, size, background, keep_crop, progress)
    skipped = tuple(BadImage(names[row], reason) for row, reason in result.unreadable.items())
    if skipped and not skip_bad:
        _refuse(source, skipped)
    rows_N = np.setdiff1d(np.arange(len(names)), np.array([*result.unreadable], np.int64))
    _check_counts(source, source.classes_N[rows_N])
    in_val_N = np.zeros(len(names), np.bool_)
    in_val_N[rows_N] = _in_val(source, rows_N)
    scanned = _Scanned(source, size, background, crops, result.digests_N, skipped, in_val_N)
    splits = scanned.splits(range(len(source.class_names)), rows_N)
    as_text = sorted(range(len(source.class_names)), key=source.class_names.__getitem__)
    if as_text == [*range(len(as_text))]:
        return splits
    # The images of folders are sorted by class, those of archives (most likely) are not.
    orders, classes_N = [rows_N], source.classes_N[rows_N]
    if (np.diff(classes_N) >= 0).all():
        orders.insert(0, rows_N[np.argsort(np.argsort(as_text)[classes_N], kind="stable")])
    earlier = [functools.partial(scanned.splits, as_text, order_N) for order_N in orders]
    return dataclasses.replace(splits, earlier=tuple(earlier))


def _in_val(source: ImageSource, rows_N: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return whether each of the rows is held out: by the source's own splits, or by a hash."""
    classes_N = source.classes_N[rows_N]
    if source.splits_N is None or not (source.splits_N[rows_N] == VAL).any():
        return choose_val([source.names[row] for row in rows_N], classes_N)
    in_val_N = source.splits_N[rows_N] == VAL
    _check_counts(source, classes_N[~in_val_N], "to train on")
    return in_val_N


def _check_counts(source: ImageSource, classes_N: NDArray[np.int64], use: str = "") -> None:
    """Check that there are two images or more, and one or more of each class."""
    classes_N = classes_N[classes_N >= 0]
    images = f"usable images {use}".rstrip()
    if len(classes_N) == 0:
        found = describe_left_out(source.left_out)
        raise UserError(
            f"{source.path}: no {images}" + f"; left out: {found}" * bool(found)
            + "\nexpected images, such as PNG, JPEG or WebP files"
        )  # fmt: skip
    if len(classes_N) == 1 and not use:
        raise UserError(f"{source.path}: got one usable image, expected 2 or more: one is held out")
    class_names = readable_class_names(source.class_names)
    counts = np.bincount(classes_N, minlength=len(class_names))
    if empty := [name for name, count in zip(class_names, counts, strict=True) if count == 0]:
        raise UserError(
            f"{source.path}: no {images} of class {', '.join(empty)}; "
            "add some or remove the folder of the class"
        )


def _refuse(source: ImageSource, bad: Collection[BadImage]) -> NoReturn:
    names_by_reason = defaultdict(list)
    for image in bad:
        names_by_reason[image.reason].append(image.name)
    lines = [f"{why} ({len(names)}): {', '.join(names)}" for why, names in names_by_reason.items()]
    raise UserError(
        f"{source.path}: {len(bad)} of {len(source.names)} images cannot be used; fix or remove "
        "them, or leave them out with --skip-bad\n" + "\n".join(lines)
    )


def choose_val(names: Sequence[str], classes_N: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Choose about a tenth of the images for `val`, by a hash of each name.

    Added images therefore do not move others between the splits, except where needed to keep both
    usable: the image of each class with the highest hash stays in train; if no image is chosen,
    the one with the lowest hash is; and above 10,000 images those with the lowest hashes are.

    Returns:
        Whether each image is in `val`, (N,).
    """
    hash_N = np.array(
        [int.from_bytes(hashlib.sha256(os.fsencode(n)).digest()[:6], "big") for n in names]
    )
    order_N = np.argsort(hash_N, kind="stable")
    highest = set(dict(zip(classes_N[order_N].tolist(), order_N.tolist(), strict=True)).values())
    movable = [row for row in order_N.tolist() if row not in highest]
    chosen = [row for row in movable if hash_N[row] < VAL_SHARE * 2**48]
    if not chosen:
        chosen = (movable or order_N.tolist())[:1]
    in_val = np.zeros(len(names), dtype=np.bool_)
    in_val[chosen[:MAX_VAL_IMAGES]] = True
    return in_val


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _fingerprint(settings: list[Any], images: Iterable[Any]) -> str:
    """Return `_hash([*settings, [*images]])` without the text of a million images in memory."""
    digest = hashlib.sha256(json.dumps(settings)[:-1].encode())
    separator = ", ["
    for image in images:
        digest.update((separator + json.dumps(image)).encode())
        separator = ", "
    digest.update(b"]]")
    return digest.hexdigest()
