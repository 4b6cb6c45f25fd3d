"""Pictures as arrays: the included set, or files, -> uint8 images through one crop function.

Shape suffixes: B images of a batch, N images of a set, H and W height and width, S = image_size.
"""

from __future__ import annotations

import difflib
import hashlib
import io
import json
import os
import zipfile
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageColor
from torch import Tensor

from ctf.common.errors import UserError
from ctf.common.progress import Progress
from ctf.data.decode import SUFFIXES, Unusable, decode
from ctf.data.formats import find
from ctf.data.scan import THREADS as THREADS
from ctf.data.scan import BadPicture, scan
from ctf.data.sources import Files

FOLDER_IMAGE_SIZE = 64  # of folders, where no size is named; the included set has its own
SMALLEST_SIZE, LARGEST_SIZE = 8, 2048
HELD_OUT, MOST_HELD_OUT = 0.1, 10_000  # share of a folder's pictures in `val`, and its limit
CACHE_BYTES = 1 << 30  # a folder's crops stay in memory up to this total

FASHION_MNIST = Path(__file__).parent / "included" / "fashion-mnist"
FASHION_MNIST_CLASSES = (
    "t-shirt", "trouser", "pullover", "dress", "coat",
    "sandal", "shirt", "sneaker", "bag", "ankle-boot",
)  # fmt: skip
# SHA-256 of a split's grey pixels (N, 28, 28) followed by its labels (N,), one byte each.
FASHION_MNIST_SHA256 = {
    "train": "16d82e2b505296aa2b78bd5ea0992634f30419a4c97def7c907d154a35ac6157",
    "test": "9f1ec356a747bfe4ebab3cfb722d3694c9ca737e2570f6f90cf31d7b6fd689d4",
}
FASHION_MNIST_SIDE, FASHION_MNIST_SIZE = 28, 32  # as published; with a black border of 2 pixels
INCLUDED = (FASHION_MNIST.name,)

T = TypeVar("T")

IMAGENET = Path(__file__).parent / "included" / "imagenet" / "classes.txt"


@dataclass(frozen=True)
class View:
    """One way to cut a square out of a picture; see `crop`.

    scale >= 1 is the side of the picture's central square in units of the image size; x and y in
    0..1 place the crop within that square, from left to right and from top to bottom, after it is
    mirrored if `flip`.
    """

    flip: bool = False
    scale: float = 1.0
    x: float = 0.5
    y: float = 0.5

    def side(self, size: int) -> int:
        """Pixels that the picture's shorter side is resized to, for crops of `size` pixels."""
        return int(size * self.scale)


PLAIN = View()
VIEWS: dict[str, tuple[View, ...]] = {
    "plain": (PLAIN,),
    "flip": (PLAIN, View(flip=True)),
    # LlamaGen's augmentation, in its order: the corners and the centre, mirrored or not, of its
    # extraction at --crop-range 1.1 and of that at 1.05.
    "ten-crop": tuple(
        View(flip, scale, x, y)
        for scale in (1.1, 1.05)
        for flip in (False, True)
        for x, y in ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0), (0.5, 0.5))
    ),
}


def crop(image: Image.Image, size: int, view: View = PLAIN) -> Image.Image:
    """`size` x `size` pixels of an RGB or grey picture; the only crop function there is.

    The plain view is the central square, which is ADM's `center_crop_arr`; other views crop a
    larger central square again, as LlamaGen's ten-crop does.
    """
    return _cut(_square(image, view.side(size)), size, view)


def _square(image: Image.Image, side: int) -> Image.Image:
    """The central square, resized to `side` pixels.

    The shorter side is halved with a box filter as long as that is possible, and then resized
    with an antialiased bicubic filter.
    """
    while min(image.size) >= 2 * side:
        halved = (image.width // 2, image.height // 2)
        image = image.resize(halved, Image.Resampling.BOX)
    ratio = side / min(image.size)
    resized = (round(image.width * ratio), round(image.height * ratio))
    image = image.resize(resized, Image.Resampling.BICUBIC)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def _cut(square: Image.Image, size: int, view: View) -> Image.Image:
    if view.flip:
        square = square.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    left, top = (round((square.width - size) * at) for at in (view.x, view.y))
    return square.crop((left, top, left + size, top + size))


def as_tensor(pixels_BHWC: NDArray[np.uint8], device: torch.device | str = "cpu") -> Tensor:
    """uint8 pixels -> float (B, 3, H, W) in [-1, 1], with channels last in memory."""
    return torch.from_numpy(pixels_BHWC).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def as_pictures(images_BCHW: Tensor) -> list[Image.Image]:
    """Images in [-1, 1], (B, 3, H, W), clipped there -> PIL images, RGB."""
    pixels = ((images_BCHW.float().clamp(-1, 1) + 1) * 127.5).round().byte()
    return [Image.fromarray(p) for p in pixels.permute(0, 2, 3, 1).cpu().numpy()]


class ImageSet(ABC):
    """N labelled pictures of one size.

    Attributes:
        name: the source's name.
        class_names: one for each class, in the order of the class numbers.
        classes_N: int64, the class of each picture.
        image_size: side S of the pictures that `read` gives.
        fingerprint: SHA-256 (hex) of what the pictures are: equal as long as `read` gives the
            same. Of a folder it covers the bytes of every file, its relative path and class, the
            image size and the background; no times, so a copy elsewhere has the same.
        mirrors: whether a mirrored picture is as likely as the picture.
    """

    mirrors = True

    def __init__(
        self,
        name: str,
        class_names: tuple[str, ...],
        classes_N: NDArray[np.int64],
        image_size: int,
        fingerprint: str,
    ) -> None:
        self.name = name
        self.class_names = class_names
        self.classes_N = classes_N
        self.image_size = image_size
        self.fingerprint = fingerprint

    def __len__(self) -> int:
        return len(self.classes_N)

    @abstractmethod
    def read(self, indices: ArrayLike, view: View = PLAIN) -> NDArray[np.uint8]:
        """The pictures numbered `indices` (B,), as RGB in 0..255: (B, S, S, 3).

        Raises:
            UserError: a picture's file was damaged or removed after the set was opened.
        """

    def read_views(self, indices: ArrayLike, views: Sequence[View]) -> Iterator[NDArray[np.uint8]]:
        """`read` for each of the views; a set of files decodes each only once for all of them."""
        for view in views:
            yield self.read(indices, view)


@dataclass(frozen=True)
class Splits:
    """Pictures to learn from and held-out ones, and what `skip_bad` left out of both."""

    train: ImageSet
    val: ImageSet
    skipped: tuple[BadPicture, ...] = ()


def open_images(
    source: str | os.PathLike[str],
    image_size: int | None = None,
    *,
    background: str = "white",
    skip_bad: bool = False,
    progress: Progress | None = None,
) -> Splits:
    """Opens an included set by name, or pictures: one subfolder per class, or flat (one class).

    Args:
        source: "fashion-mnist" (write ./fashion-mnist for a folder of that name), a folder, a .tar
            or .parquet file, a folder of nothing but these, or a pattern like "data/train-*.tar".
        image_size: side of the squares that the pictures are cut to, 8..2048. Default: 32 for
            fashion-mnist (28 gives the originals without their border), 64 for folders.
        background: colour by name or #rrggbb that transparent pictures are laid upon.
        skip_bad: leave unusable files out, and list them in `Splits.skipped`.
        progress: called with (files decoded, files) while a folder is scanned.

    Raises:
        UserError: whatever is wrong with the source, the size, or the colour. All unusable files
            are named at once.
    """
    source = os.fspath(source)
    if image_size is not None and not SMALLEST_SIZE <= image_size <= LARGEST_SIZE:
        raise UserError(
            f"image size {image_size}: expected {SMALLEST_SIZE} to {LARGEST_SIZE} pixels"
        )
    try:
        colour = ImageColor.getrgb(background)[:3]
    except ValueError:
        close = difflib.get_close_matches(background.lower(), ImageColor.colormap, n=1)
        meant = f"did you mean {close[0]!r}?" if close else "expected a name or #rrggbb"
        raise UserError(f"background: unknown colour {background!r}: {meant}") from None
    if source in INCLUDED:
        return _open_fashion_mnist(image_size or FASHION_MNIST_SIZE)
    files = find(source, INCLUDED)
    return _open_files(files, image_size or FOLDER_IMAGE_SIZE, colour, skip_bad, progress)


# ---------------------------------------------------------------- the included set


class _GreySet(ImageSet):
    """Fashion-MNIST: its grey pixels in memory once; border and colour are added when read."""

    mirrors = False  # all shoes point the same way

    def __init__(
        self, pixels_NHW: NDArray[np.uint8], classes_N: NDArray[np.int64], size: int, sha: str
    ) -> None:
        fingerprint = _hash([FASHION_MNIST.name, sha, size])
        super().__init__(FASHION_MNIST.name, FASHION_MNIST_CLASSES, classes_N, size, fingerprint)
        self._pixels_NHW = pixels_NHW

    def read(self, indices: ArrayLike, view: View = PLAIN) -> NDArray[np.uint8]:
        size = self.image_size
        side = FASHION_MNIST_SIDE if size == FASHION_MNIST_SIDE else FASHION_MNIST_SIZE
        border = (side - FASHION_MNIST_SIDE) // 2
        grey_BHW = self._pixels_NHW[np.asarray(indices, dtype=np.int64)]
        grey_BHW = np.pad(grey_BHW, ((0, 0), (border, border), (border, border)))
        images = np.empty((len(grey_BHW), size, size, 3), dtype=np.uint8)
        if size == side == view.side(size):
            images[:] = (grey_BHW[:, :, ::-1] if view.flip else grey_BHW)[..., None]
        else:
            for image, grey_HW in zip(images, grey_BHW, strict=True):
                image[:] = np.asarray(crop(Image.fromarray(grey_HW), size, view))[..., None]
        return images


def load_fashion_mnist(split: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The published arrays of a split ("train" or "test"): pixels (N, 28, 28), labels (N,).

    Raises:
        UserError: the package's data file is missing or damaged.
    """

    def unpack(sheet: bytes) -> NDArray[np.uint8]:
        return np.asarray(Image.open(io.BytesIO(sheet))).reshape(-1, *[FASHION_MNIST_SIDE] * 2)

    path = FASHION_MNIST / "pictures.zip"
    try:
        with zipfile.ZipFile(path) as file, ThreadPoolExecutor(THREADS) as pool:
            sheets = [n for n in sorted(file.namelist()) if n.startswith(f"{split}/pixels-")]
            pixels = np.concatenate(list(pool.map(lambda name: unpack(file.read(name)), sheets)))
            labels = np.frombuffer(file.read(f"{split}/labels"), dtype=np.uint8)
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: missing or damaged ({error}); install ctf again") from None
    return pixels, labels


def _open_fashion_mnist(size: int) -> Splits:
    if size > FASHION_MNIST_SIZE:
        raise UserError(
            f"fashion-mnist: its pictures have {FASHION_MNIST_SIZE} pixels a side, fewer than "
            f"--image-size {size}; choose {FASHION_MNIST_SIZE} or less"
        )

    def load(split: str) -> ImageSet:
        pixels, labels = load_fashion_mnist(split)
        return _GreySet(pixels, labels.astype(np.int64), size, FASHION_MNIST_SHA256[split])

    return Splits(train=load("train"), val=load("test"))


# ---------------------------------------------------------------- files


class _FileSet(ImageSet):
    """Pictures of files: their crops in memory if they fit, else decoded at each read."""

    def __init__(
        self,
        files: Files,
        colour: tuple[int, ...],
        crops: _Crops | None,
        rows_N: NDArray[np.int64],
        **attributes: Any,
    ) -> None:
        super().__init__(**attributes)
        self._files, self._colour = files, colour
        self._crops, self._rows_N = crops, rows_N  # the crops are shared by both splits

    def read(self, indices: ArrayLike, view: View = PLAIN) -> NDArray[np.uint8]:
        return next(self.read_views(indices, (view,)))

    def read_views(self, indices: ArrayLike, views: Sequence[View]) -> Iterator[NDArray[np.uint8]]:
        size = self.image_size
        rows_B = self._rows_N[np.asarray(indices, dtype=np.int64)]
        sides = {view.side(size) for view in views}
        if self._crops is not None and sides == {size}:
            self._fill(rows_B)
            for view in views:
                images = self._crops.pixels[rows_B]
                yield np.ascontiguousarray(images[:, :, ::-1]) if view.flip else images
            return
        # Of each picture only the squares that the views are cut from are kept.
        squares = self._each(rows_B, lambda whole: {side: _square(whole, side) for side in sides})
        for view in views:
            images = np.empty((len(rows_B), size, size, 3), dtype=np.uint8)
            for image, square in zip(images, squares, strict=True):
                image[:] = np.asarray(_cut(square[view.side(size)], size, view))
            yield images

    def _fill(self, rows_B: NDArray[np.int64]) -> None:
        """Decodes what is not in memory: what was known when the set was opened."""
        assert self._crops is not None
        missing = np.unique(rows_B[~self._crops.filled[rows_B]])
        cut = self._each(missing, lambda whole: np.asarray(crop(whole, self.image_size)))
        for row, pixels in zip(missing, cut, strict=True):
            self._crops.put(row, pixels)

    def _each(self, rows_B: NDArray[np.int64], cut: Callable[[Image.Image], T]) -> list[T]:
        def one(row: int) -> T:
            try:
                return cut(decode(self._files.read(row), self.image_size, self._colour))
            except Unusable as why:
                path = self._files.where / self._files.names[row]
                raise UserError(f"{path}: {why}; it was usable before, so run this again") from None

        if not len(rows_B):
            return []
        with ThreadPoolExecutor(THREADS) as pool:
            return list(pool.map(one, rows_B.tolist()))


class _Crops:
    """Plain crops in memory, (N, S, S, 3), and which of them are there."""

    def __init__(self, count: int, size: int) -> None:
        self.pixels = np.empty((count, size, size, 3), dtype=np.uint8)
        self.filled = np.zeros(count, dtype=np.bool_)

    def put(self, row: int, pixels: NDArray[np.uint8]) -> None:
        self.pixels[row] = pixels
        self.filled[row] = True


def _open_files(
    files: Files, size: int, colour: tuple[int, ...], skip_bad: bool, progress: Progress | None
) -> Splits:
    names, class_names, classes_N = files.names, readable(files.class_names), files.classes_N
    _check_counts(files.where, class_names, classes_N)
    fits = len(names) * size * size * 3 <= CACHE_BYTES
    crops = _Crops(len(names), size) if fits else None

    def keep(row: int, whole: Image.Image) -> None:
        if crops is not None:
            crops.put(row, np.asarray(crop(whole, size)))

    found = scan(files, size, colour, keep, progress)
    if found.bad and not skip_bad:
        _refuse(files.where, found.bad.values(), len(names))
    rows = np.setdiff1d(np.arange(len(names)), np.array([*found.bad], np.int64))
    _check_counts(files.where, class_names, classes_N[rows])
    held_out = choose_held_out([names[row] for row in rows], classes_N[rows])

    def split(rows_N: NDArray[np.int64]) -> ImageSet:
        pictures = (
            (names[row], int(classes_N[row]), found.digests_N[row].tobytes().hex())
            for row in rows_N
        )
        return _FileSet(
            files, colour, crops, rows_N,
            name=files.title, class_names=class_names, classes_N=classes_N[rows_N],
            image_size=size, fingerprint=_fingerprint([size, colour], pictures),
        )  # fmt: skip

    # Shuffled by their names, so that the first few of them are of all classes.
    held_out_rows = sorted(rows[held_out], key=lambda row: _hash(names[row]))
    return Splits(split(rows[~held_out]), split(np.array(held_out_rows)), (*found.bad.values(),))


def imagenet_classes() -> dict[str, str]:
    """WordNet number -> name of the 1000 classes of ImageNet-1k, in their usual order."""
    lines = IMAGENET.read_text(encoding="utf-8").splitlines()
    return dict(line.split(" ", maxsplit=1) for line in lines)


def readable(class_names: tuple[str, ...]) -> tuple[str, ...]:
    """Names of ImageNet classes where all are their WordNet numbers, as its folders have them."""
    if not all(name.startswith("n") for name in class_names):
        return class_names
    known = imagenet_classes()
    if not known.keys() >= {*class_names}:
        return class_names
    return tuple(known[name] for name in class_names)


def _check_counts(root: Path, class_names: Sequence[str], classes_N: NDArray[np.int64]) -> None:
    classes_N = classes_N[classes_N >= 0]
    if len(classes_N) == 0:
        raise UserError(f"{root}: no usable picture in it; expected {', '.join(SUFFIXES)} files")
    if len(classes_N) == 1:
        raise UserError(f"{root}: one usable picture; at least 2 are needed, one to be held out")
    counts = np.bincount(classes_N, minlength=len(class_names))
    if empty := [name for name, count in zip(class_names, counts, strict=True) if count == 0]:
        raise UserError(
            f"{root}: no usable picture of class {', '.join(empty)}; "
            "add some or remove the class's folder"
        )


def _refuse(root: Path, bad: Collection[BadPicture], total: int) -> NoReturn:
    by_reason = defaultdict(list)
    for picture in bad:
        by_reason[picture.reason].append(picture.name)
    groups = [f"{why} ({len(names)}): {', '.join(names)}" for why, names in by_reason.items()]
    raise UserError(
        f"{root}: {len(bad)} of {total} pictures cannot be used; mend or remove them, "
        "or leave them out with --skip-bad\n" + "\n".join(groups)
    )


def choose_held_out(names: Sequence[str], classes_N: NDArray[np.int64]) -> NDArray[np.bool_]:
    """(N,): is the picture in `val`? About a tenth, by a hash of each relative path.

    So adding pictures does not move the others, apart from what keeps both splits usable: the
    picture of each class with the highest hash stays in train; if no other is chosen, the lowest
    goes to val; above the limit the lowest hashes win.
    """
    hash_N = np.array(
        [int.from_bytes(hashlib.sha256(os.fsencode(n)).digest()[:6], "big") for n in names]
    )
    order_N = np.argsort(hash_N, kind="stable")
    highest = set(dict(zip(classes_N[order_N].tolist(), order_N.tolist(), strict=True)).values())
    movable = [row for row in order_N.tolist() if row not in highest]
    chosen = [row for row in movable if hash_N[row] < HELD_OUT * 2**48]
    if not chosen:
        chosen = (movable or order_N.tolist())[:1]
    held_out = np.zeros(len(names), dtype=np.bool_)
    held_out[chosen[:MOST_HELD_OUT]] = True
    return held_out


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _fingerprint(settings: list[Any], pictures: Iterable[Any]) -> str:
    """`_hash` of [*settings, [*pictures]], without the text of a million pictures in memory."""
    digest = hashlib.sha256(json.dumps(settings)[:-1].encode())
    separator = ", ["
    for picture in pictures:
        digest.update((separator + json.dumps(picture)).encode())
        separator = ", "
    digest.update(b"]]")
    return digest.hexdigest()
