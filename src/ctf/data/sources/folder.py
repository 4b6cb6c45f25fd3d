"""Folders of image files."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ctf.common import claims
from ctf.common.errors import UserError
from ctf.data.decode import HEAD, is_image, read_bytes
from ctf.data.sources.base import (
    HIDDEN,
    MADE_BY_CTF,
    ImageSource,
    file_stamp,
    has_image_suffix,
    is_hidden,
    is_unsupported,
    natural_order,
    why_no_image,
)
from ctf.data.sources.layout import Layout, read_layout

THREADS = 16  # that wait for the disk
LINKED_TWICE = "linked a second time"


class FolderSource(ImageSource):
    """The images below a folder; `layout` says what their classes and splits are.

    Args:
        root: the folder.
        classes_at_depth: see `read_layout`.

    Raises:
        UserError: a folder cannot be read, or see `read_layout`.
    """

    def __init__(self, root: Path, classes_at_depth: int | None = None) -> None:
        title = root.resolve().name or str(root)
        files = find_images(root)
        names, empty = files.names, files.empty_folders
        layout = read_layout(root, title, names, classes_at_depth, empty)
        rows = np.argsort(layout.classes_N, kind="stable")  # of each class in alphabetical order
        rows, twice = _once_for_each_class(files, layout, rows)
        for reason, left_out in layout.left_out.items():
            files.left_out[reason] += left_out
        files.left_out[LINKED_TWICE] += twice
        understood = layout.understood
        if bare := _folders_without_images(files, layout.base):
            understood += (f"folders without images: {', '.join(bare)}",)
        super().__init__(
            path=root / layout.base,
            title=title,
            names=[names[row].removeprefix(layout.base) for row in layout.rows_N[rows]],
            class_names=layout.class_names,
            classes_N=layout.classes_N[rows],
            understood=understood,
            left_out={reason: sorted(paths) for reason, paths in files.left_out.items() if paths},
            splits_N=None if layout.splits_N is None else layout.splits_N[rows],
        )

    def read(self, row: int) -> bytes:
        """See `ImageSource.read`."""
        return read_bytes(self.path / self.names[row])

    def stamps(self) -> NDArray[np.int64]:
        """See `ImageSource.stamps`."""
        stamps = [file_stamp(os.path.join(self.path, name)) for name in self.names]
        return np.array(stamps, np.int64).reshape(-1, 3)


@dataclass
class Files:
    """What is below a folder; paths are relative to it, with "/".

    Attributes:
        names: paths of the image files, sorted.
        left_out: see `ImageSource`.
        folders: paths of the folders, and the real path of each, without links.
        empty_folders: paths of folders that hold no file, or only images of unsupported formats.
        unknown: paths of the files without the suffix of an image.
    """

    names: list[str] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    folders: dict[str, str] = field(default_factory=dict)
    empty_folders: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)

    def add(self, folder: str, entries: Sequence[os.DirEntry[str]]) -> list[tuple[str, bool]]:
        """Add the files of a folder; return its folders in reverse order, and which are links."""
        names, unknown, folders = [], [], []
        for entry in entries:
            name = f"{folder}/{entry.name}".removeprefix("/")
            if is_hidden(entry.name):
                self.left_out[HIDDEN].append(name + "/" * _is_folder(entry))
            elif _is_folder(entry):
                folders.append((name, entry.is_symlink()))
            elif has_image_suffix(entry.name):
                names.append(name)
            else:
                unknown.append(name)
        if not names and not folders and all(map(is_unsupported, unknown)):
            self.empty_folders.append(folder)
        self.names += names
        self.unknown += unknown
        return sorted(folders, reverse=True)


def find_images(root: Path) -> Files:
    """Find the image files below a folder: by their suffix, else by their content.

    Links are followed. Each linked folder is visited once below an outermost link, and never from
    inside itself, so that loops end.

    Raises:
        UserError: a folder cannot be read.
    """
    files = Files()
    # For each folder its path, its real path, and inside a link the real paths not to visit again.
    to_visit: list[tuple[str, str, set[str] | None]] = [("", os.path.realpath(root), None)]
    while to_visit:
        path, real, visited = to_visit.pop()
        if visited is not None:
            if real in visited:
                files.left_out[LINKED_TWICE].append(f"{path}/")
                continue
            visited.add(real)
        files.folders[path] = real
        for name, is_link in files.add(path, _list(root / path)):
            if claims.is_ctf_folder(root / name):  # such as the run that is trained on the images
                files.left_out[MADE_BY_CTF].append(f"{name}/")
                continue
            inner, inner_visited = f"{real}/{name.rpartition('/')[2]}", visited
            if is_link:
                inner = os.path.realpath(inner)
                inner_visited = visited or {real, *map(str, Path(real).parents)}
            to_visit.append((name, inner, inner_visited))
    with ThreadPoolExecutor(THREADS) as pool:
        are_images = pool.map(lambda name: _is_image(root / name), files.unknown)
        for name, is_image_file in zip(files.unknown, are_images, strict=True):
            if is_image_file:
                files.names.append(name)
            else:
                files.left_out[why_no_image(name)].append(name)
    files.names.sort()
    return files


def _list(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from None


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link in a circle
        return False


def _is_image(path: Path) -> bool:
    try:
        if not path.is_file():  # reading a pipe would block
            return False
        with open(path, "rb") as file:
            return is_image(file.read(HEAD))
    except OSError:
        return False


def _once_for_each_class(
    files: Files, layout: Layout, rows: NDArray[np.int64]
) -> tuple[NDArray[np.int64], list[str]]:
    """Drop rows of the layout whose real folder is in the same class and split by another path.

    Returns:
        The rows that stay, and the paths of the folders that are dropped.
    """
    if len({*files.folders.values()}) == len(files.folders):
        return rows, []
    first: dict[tuple[int, int, str], str] = {}  # path of the folder that stays
    stay, dropped = [], {}
    for row in rows.tolist():
        folder = files.names[layout.rows_N[row]].rpartition("/")[0]
        split = 0 if layout.splits_N is None else int(layout.splits_N[row])
        if (
            first.setdefault((layout.classes_N[row], split, files.folders[folder]), folder)
            == folder
        ):
            stay.append(row)
        else:
            dropped[f"{folder}/"] = True
    return np.array(stay, np.int64), [*dropped]


def _folders_without_images(files: Files, base: str) -> list[str]:
    """Return the names of the folders beside those of classes, or of splits, without images."""
    with_images = {
        n.removeprefix(base).partition("/")[0] for n in files.names if n.startswith(base)
    }
    beside = {f.removeprefix(base).partition("/")[0] for f in files.folders if f.startswith(base)}
    return natural_order(beside - with_images - {""})
