"""Where encoded pictures come from: files with a name, a class, and the bytes of a picture each.

Folders are here, .tar files in `tars`, tables in `tables`.

Shape suffix: N files.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from ctf.common.errors import UserError
from ctf.data.decode import SUFFIXES, read_bytes

Stamp = tuple[int, int, int]  # bytes, and the times of the last changes of content and of metadata


class Files(ABC):
    """Encoded pictures that can be read in any order; opening them looks into none.

    Attributes:
        where: the source, for messages.
        title: what people call it.
        names: unique, and the same wherever the source lies; they decide which are held out.
        class_names: as they are called in the source.
        classes_N: int64; -1 where the class is not known, and the file is of no use.
    """

    def __init__(
        self,
        where: Path,
        title: str,
        names: list[str],
        class_names: tuple[str, ...],
        classes_N: NDArray[np.int64],
    ) -> None:
        self.where, self.title, self.names = where, title, names
        self.class_names, self.classes_N = class_names, classes_N

    @abstractmethod
    def read(self, row: int) -> bytes:
        """The content of a file; raises `decoding.Unusable`."""

    @abstractmethod
    def stamps(self) -> NDArray[np.int64]:
        """(N, 3): what tells of each file that it is not what it was; -1 where it is not there."""


def stamp(path: str | Path) -> Stamp:
    try:
        found = os.stat(path)
    except OSError:
        return -1, -1, -1
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns


def is_picture(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


class Folder(Files):
    """One subfolder per class, or pictures without any (one class)."""

    def __init__(self, root: Path) -> None:
        by_class = _find(root)
        super().__init__(
            root,
            root.resolve().name or str(root),
            [name for found in by_class.values() for name in found],
            tuple(by_class),
            np.repeat(np.arange(len(by_class)), [len(found) for found in by_class.values()]),
        )

    def read(self, row: int) -> bytes:
        return read_bytes(self.where / self.names[row])

    def stamps(self) -> NDArray[np.int64]:
        found = [stamp(os.path.join(self.where, name)) for name in self.names]
        return np.array(found, np.int64).reshape(-1, 3)


def by_label(labels: Sequence[str]) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """Class names and classes (N,) of what is written beside pictures; "" is no class, -1.

    Numbers are in the order of numbers, other names in that of the alphabet.
    """
    present = {label for label in labels if label}
    whole = all(label.isascii() and label.isdigit() for label in present)
    names = sorted(present, key=lambda label: (int(label), label) if whole else (0, label))
    number = {"": -1, **{name: i for i, name in enumerate(names)}}
    return tuple(names), np.array([number[label] for label in labels], np.int64)


def by_top_folder(
    where: Path, title: str, names: Sequence[str]
) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """The first folder of each name is its class; one class where no name has one.

    Raises:
        UserError: some have one, some have none.
    """
    folders = [name.partition("/")[0] if "/" in name else "" for name in names]
    if not any(folders):
        return (title,), np.zeros(len(names), np.int64)
    if loose := [name for name, folder in zip(names, folders, strict=True) if not folder]:
        raise beside_class_folders(where, loose)
    class_names = sorted({*folders})
    number = {name: i for i, name in enumerate(class_names)}
    return tuple(class_names), np.array([number[folder] for folder in folders], np.int64)


def _find(root: Path) -> dict[str, list[str]]:
    """Paths relative to `root` of the pictures of each class, both in alphabetical order."""
    try:
        entries = sorted(entry for entry in os.listdir(root) if not entry.startswith("."))
        folders = [entry for entry in entries if (root / entry).is_dir()]
    except OSError as error:
        _unreadable(error)
    loose = [entry for entry in entries if is_picture(entry) and entry not in folders]
    by_class = {folder: _walk(root, folder) for folder in folders}
    if not any(by_class.values()):  # no class folders, whatever else may lie around
        by_class = {root.resolve().name or str(root): loose}
    elif loose:
        raise beside_class_folders(root, loose)
    return by_class


def beside_class_folders(where: Path, loose: Sequence[str]) -> UserError:
    return UserError(
        f"{where}: pictures beside the class folders ({len(loose)}, e.g. {loose[0]}); "
        "move them into the folder of their class"
    )


def _walk(root: Path, folder: str) -> list[str]:
    found, seen = [], set()
    for here, folders, files in os.walk(root / folder, onerror=_unreadable, followlinks=True):
        real = os.path.realpath(here)
        if real in seen:  # a link to a folder around it
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        inner = Path(here).relative_to(root).as_posix()
        found += [f"{inner}/{f}" for f in files if is_picture(f)]
    return sorted(found)


def _unreadable(error: OSError) -> NoReturn:
    raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from None
