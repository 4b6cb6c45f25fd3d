"""Folders of image files: one subfolder per class, or images without subfolders (one class)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from ctf.common.errors import UserError
from ctf.data.decode import read_bytes
from ctf.data.sources.base import ImageSource, file_stamp, has_image_suffix, loose_images_error


class FolderSource(ImageSource):
    """The images below a folder.

    Raises:
        UserError: a folder cannot be read, or there are images outside the class folders.
    """

    def __init__(self, root: Path) -> None:
        title = root.resolve().name or str(root)
        names_by_class = _find_images(root, title)
        super().__init__(
            path=root,
            title=title,
            names=[name for names in names_by_class.values() for name in names],
            class_names=tuple(names_by_class),
            classes_N=np.repeat(
                np.arange(len(names_by_class)), [len(names) for names in names_by_class.values()]
            ),
        )

    def read(self, row: int) -> bytes:
        """See `ImageSource.read`."""
        return read_bytes(self.path / self.names[row])

    def stamps(self) -> NDArray[np.int64]:
        """See `ImageSource.stamps`."""
        stamps = [file_stamp(os.path.join(self.path, name)) for name in self.names]
        return np.array(stamps, np.int64).reshape(-1, 3)


def _find_images(root: Path, title: str) -> dict[str, list[str]]:
    """Return the paths of each class's images, relative to `root`, both in alphabetical order."""
    try:
        entries = sorted(entry for entry in os.listdir(root) if not entry.startswith("."))
        folders = [entry for entry in entries if (root / entry).is_dir()]
    except OSError as error:
        _raise_unreadable(error)
    loose = [entry for entry in entries if has_image_suffix(entry) and entry not in folders]
    names_by_class = {folder: _walk(root, folder) for folder in folders}
    if not any(names_by_class.values()):  # no class folders, whatever other folders there are
        return {title: loose}
    if loose:
        raise loose_images_error(root, loose)
    return names_by_class


def _walk(root: Path, folder: str) -> list[str]:
    names, seen = [], set()
    for path, folders, files in os.walk(root / folder, onerror=_raise_unreadable, followlinks=True):
        real = os.path.realpath(path)
        if real in seen:  # a link to a folder that contains it
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        relative = Path(path).relative_to(root).as_posix()
        names += [f"{relative}/{f}" for f in files if has_image_suffix(f)]
    return sorted(names)


def _raise_unreadable(error: OSError) -> NoReturn:
    raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from None
