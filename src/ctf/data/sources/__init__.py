"""Image sources: folders, .tar files and .parquet files.

To add a kind, write an `ImageSource` and add its suffix to `ARCHIVES`.
"""

from __future__ import annotations

import glob
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

from ctf.common.config import did_you_mean
from ctf.common.errors import UserError
from ctf.data.sources.base import ImageSource
from ctf.data.sources.folder import FolderSource
from ctf.data.sources.parquet import ParquetSource
from ctf.data.sources.tar import TarSource

# Kinds of files that hold many images each: called with the path and the title of the source, its
# files, and the folder that they are in (None for a single file).
ARCHIVES: dict[str, Callable[[Path, str, Sequence[Path], Path | None], ImageSource]] = {
    ".tar": TarSource,
    ".parquet": ParquetSource,
}


def open_image_source(
    source: str, included: Sequence[str], classes_at_depth: int | None = None
) -> ImageSource:
    """Open a folder of images, an archive, a folder of archives, or a pattern of archives.

    Images in a folder take precedence: archives next to them are ignored.

    Args:
        source: a path, or a pattern such as "data/train-*.tar".
        included: names of the included sets, to suggest one for a misspelt name.
        classes_at_depth: see `layout.read_layout`.

    Raises:
        UserError: there is nothing at that path, or it is neither images nor archives of one kind.
    """
    path = Path(source)
    if path.is_file():
        return _open_archives(path, path.stem, [path], None)
    if path.is_dir():
        folder = FolderSource(path, classes_at_depth)
        archives = sorted(entry for entry in path.iterdir() if entry.suffix in ARCHIVES)
        if folder.names or not archives:
            return folder
        return _open_archives(path, folder.title, archives, path)
    if matches := sorted(map(Path, glob.glob(source))):
        base = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), path.parts))
        return _open_archives(path, base.resolve().name, matches, base)
    raise UserError(
        f"{source}: no such folder, nor an included set of that name"
        f"{did_you_mean(source, included)}"
    )


def _open_archives(path: Path, title: str, files: list[Path], base: Path | None) -> ImageSource:
    suffixes = {file.suffix for file in files}
    if len(suffixes) > 1 or not suffixes <= ARCHIVES.keys():
        got = "a file" if base is None else f"files of {', '.join(sorted(suffixes))}"
        raise UserError(
            f"{path}: got {got}, expected a folder of images, or files that are all "
            f"{' or all '.join(ARCHIVES)}"
        )
    return ARCHIVES[suffixes.pop()](path, title, files, base)
