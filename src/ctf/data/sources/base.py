"""The interface of image sources: encoded images, each with a name and a class.

Shape suffix: N images.
"""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from ctf.common.errors import UserError
from ctf.data.decode import SUFFIXES

TRAIN, VAL = 0, 1  # in `ImageSource.splits_N`
MADE_BY_CTF = "made by ctf"  # a reason in `ImageSource.left_out`
HIDDEN = "hidden"  # a reason in `ImageSource.left_out`
SYSTEM_FOLDERS = {  # made by systems and not by the user, in lower case
    "__macosx", "@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found",
    "__pycache__",
}  # fmt: skip
UNSUPPORTED = (  # suffixes of images that cannot be read
    ".heic", ".heif", ".jxl", ".svg", ".eps", ".exr", ".hdr", ".dcm", ".dng", ".raw", ".cr2",
    ".cr3", ".nef", ".arw", ".orf", ".rw2", ".xcf", ".fits", ".pic", ".pict",
)  # fmt: skip
Stamp = tuple[int, int, int]  # size in bytes, and the times of the last content and inode changes


@dataclass(eq=False, repr=False)
class ImageSource(ABC):
    """N encoded images that can be read in any order; opening a source decodes none of them.

    Attributes:
        path: where the source is, for messages.
        title: its name in reports, and the name of the only class if there are no classes.
        names: unique names that do not depend on where the source is stored; they decide which
            images are held out.
        class_names: name of each class, as in the source.
        classes_N: class number of each image, int64; -1 if it has none and so cannot be used.
        understood: how the source was read, for people, a line each: "classes: folders below
            animals/", "image column 'image', class column 'label'".
        left_out: names of files, members or rows that are not used, although nothing is wrong with
            them, by the reason: "not an image (.txt)", "split test". Images that cannot be read
            are none of these: they are rows.
        splits_N: the source's own split of each image, int8, `TRAIN` or `VAL`; None if it has no
            splits, and `val` is chosen by a hash. Images for tests are left out.
    """

    path: Path
    title: str
    names: list[str]
    class_names: tuple[str, ...]
    classes_N: NDArray[np.int64]
    understood: tuple[str, ...] = ()
    left_out: dict[str, list[str]] = field(default_factory=dict)
    splits_N: NDArray[np.int8] | None = None
    unit: ClassVar[str] = "file"  # what a name in `left_out` stands for

    @abstractmethod
    def read(self, row: int) -> bytes:
        """Read the encoded bytes of one image; thread-safe.

        Raises:
            UnreadableImageError: they cannot be read, or the image has no class.
        """

    @abstractmethod
    def stamps(self) -> NDArray[np.int64]:
        """Return the `Stamp` of each image's file, (N, 3): it changes when the file changes."""


def file_stamp(path: str | Path) -> Stamp:
    """Return a file's `Stamp`, or (-1, -1, -1) if there is no such file."""
    try:
        status = os.stat(path)
    except OSError:
        return -1, -1, -1
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def has_image_suffix(name: str) -> bool:
    """Whether a file name is that of an image; names of hidden files are not."""
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def is_hidden(name: str) -> bool:
    """Whether a file or folder of that name is hidden, or made by the system."""
    return name.startswith(".") or name.lower() in SYSTEM_FOLDERS


def is_unsupported(name: str) -> bool:
    """Whether a file name is that of an image that cannot be read."""
    return name.lower().endswith(UNSUPPORTED)


def why_no_image(name: str) -> str:
    """Return why a file is in `ImageSource.left_out` that is not an image by its content."""
    suffix = PurePosixPath(name).suffix.lower() or "no suffix"
    reason = "of an unsupported format" if is_unsupported(name) else "not an image"
    return f"{reason} ({suffix})"


def natural_order(names: Iterable[str]) -> list[str]:
    """Sort names with the numbers in them by value, "class2" before "class10"; case counts."""

    def key(name: str) -> tuple[list[tuple[int, str]], str]:
        parts = re.split("([0-9]+)", name)  # text, number, text, ...
        parts[1::2] = [digits.lstrip("0") for digits in parts[1::2]]
        return [(len(part) * (i % 2), part) for i, part in enumerate(parts)], name

    return sorted(names, key=key)


def classes_from_labels(labels: Sequence[str]) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """Number the classes of labels, in natural order.

    Args:
        labels: the label of each image, "" if it has none.

    Returns:
        Class names and the class of each image (N,), -1 where there is no label.
    """
    names = natural_order({label for label in labels if label})
    return tuple(names), _numbers(labels, names)


def _numbers(labels: Sequence[str], class_names: Sequence[str]) -> NDArray[np.int64]:
    number = {name: i for i, name in enumerate(class_names)}
    return np.array([number.get(label, -1) for label in labels], np.int64)


class LooseImagesError(UserError):
    """Images are next to class folders instead of inside one."""

    def __init__(self, path: Path, loose: Sequence[str]) -> None:
        super().__init__(
            f"{path}: images outside the class folders ({len(loose)}, e.g. {loose[0]}); "
            "move them into the folder of their class, or pass --classes-at-depth 0 for one class"
        )


def archive_prefixes(files: Sequence[Path], base: Path | None) -> list[str]:
    """Return what tells the images of several archives apart: "train-00/" for train-00.tar.

    Args:
        files: the archives.
        base: the folder that they are in; None for a single file, whose prefix is empty.
    """
    if base is None:
        return [""] * len(files)
    return [file.relative_to(base).with_suffix("").as_posix() + "/" for file in files]
