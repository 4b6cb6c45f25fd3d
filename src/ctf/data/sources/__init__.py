"""Image sources: folders, .tar, .zip and .parquet files.

To add a kind, write an `ImageSource` and add its suffix to `ARCHIVES`.
"""

from __future__ import annotations

import glob
import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ctf.common.config import did_you_mean
from ctf.common.errors import UserError
from ctf.data.sources.archive import ArchiveSource
from ctf.data.sources.base import ImageSource, is_hidden
from ctf.data.sources.folder import FolderSource
from ctf.data.sources.parquet import ParquetSource
from ctf.data.sources.splits import splits_of_names

# Kinds of files that hold many images each: called with the path and the title of the source, its
# files, the folder that they are in (None for a single file), and the options.
ARCHIVES: dict[str, Callable[..., ImageSource]] = {
    ".tar": ArchiveSource,
    ".zip": ArchiveSource,
    ".parquet": ParquetSource,
}
MAX_FILES = 1_000_000  # of a pattern
_BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}")
# Kinds that cannot be read in place, and what to do about it.
PACKED = {
    ".gz": "decompress it first: gzip -d {}",
    ".tgz": "decompress it first: gzip -d {}",
    ".bz2": "decompress it first: bzip2 -d {}",
    ".tbz2": "decompress it first: bzip2 -d {}",
    ".xz": "decompress it first: xz -d {}",
    ".txz": "decompress it first: xz -d {}",
    ".zst": "decompress it first: zstd -d {}",
    ".7z": "unpack it into a folder first: 7z x {}",
    ".rar": "unpack it into a folder first: unrar x {}",
}


def open_image_source(
    source: str,
    included: Sequence[str],
    *,
    image_column: str | None = None,
    class_column: str | None = None,
    classes_at_depth: int | None = None,
) -> ImageSource:
    """Open a folder of images, an archive, a folder of archives, or a pattern of archives.

    Images in a folder take precedence: archives next to them are ignored.

    Args:
        source: a path, or a pattern such as "data/train-*.tar" or "data/train-{000..127}.tar".
        included: names of the included sets, to suggest one for a misspelt name.
        image_column: see `ParquetSource` and `ArchiveSource`.
        class_column: see `ParquetSource` and `ArchiveSource`.
        classes_at_depth: see `layout.read_layout`.

    Raises:
        UserError: there is nothing at that path, or it is neither images nor archives of one kind.
    """
    options = {
        "image_column": image_column,
        "class_column": class_column,
        "classes_at_depth": classes_at_depth,
    }
    path = Path(source)
    if path.is_file():
        return _open_archives(path, path.stem, [path], None, options)
    if path.is_dir():
        folder = FolderSource(path, classes_at_depth)
        if folder.names or not (files := _find_archives(path)):
            _refuse_columns(source, image_column, class_column)
            return folder
        opened = _open_archives(path, folder.title, files, path, options)
        used = {file.relative_to(path).as_posix() for file in files}
        for reason, names in folder.left_out.items():
            if others := [name for name in names if name not in used]:
                opened.left_out.setdefault(reason, []).extend(others)
        return opened
    if matches := sorted({Path(match) for each in _braces(source) for match in glob.glob(each)}):
        base = Path(*itertools.takewhile(lambda part: not _is_pattern(part), path.parts))
        if missing := [each for each in _braces(source) if not glob.glob(each)]:
            raise UserError(f"{source}: no such files ({len(missing):,}, e.g. {missing[0]})")
        return _open_archives(path, base.resolve().name, matches, base, options)
    raise UserError(
        f"{source}: no such folder, nor an included set of that name"
        f"{did_you_mean(source, included)}"
    )


def _is_pattern(part: str) -> bool:
    return glob.has_magic(part) or _BRACES.search(part) is not None


def _braces(pattern: str) -> list[str]:
    """Expand the first {000..127} or {train,val} in a pattern, as webdataset does, and so on."""
    match = _BRACES.search(pattern)
    if match is None:
        return [pattern]
    first, last, names = match.groups()
    if names is None:
        if int(last) - int(first) >= MAX_FILES:
            raise UserError(f"{pattern}: more than {MAX_FILES:,} files")
        numbers = range(int(first), int(last) + 1)
        options = [str(number).zfill(len(first)) for number in numbers]
    else:
        options = names.split(",")
    start, end = pattern[: match.start()], pattern[match.end() :]
    return [path for option in options for path in _braces(f"{start}{option}{end}")]


def _find_archives(folder: Path) -> list[Path]:
    """Return the archives in a folder, else those below it if these are one data set.

    Raises:
        UserError: there are several data sets.
    """
    if archives := _of_first_kind(folder.iterdir()):
        return archives
    below = _of_first_kind(
        file
        for file in folder.rglob("*")
        if not any(map(is_hidden, file.relative_to(folder).parts))
    )
    folders = sorted({file.parent.relative_to(folder).as_posix() for file in below})
    if len(folders) > 1 and splits_of_names(folders)[0] is None:
        raise UserError(
            f"{folder}: got archives in several folders ({', '.join(folders[:8])}), expected "
            "those of one data set; pass one of the folders"
        )
    return below


def _of_first_kind(files: Iterable[Path]) -> list[Path]:
    """Return the archives among files, without .zip and packed files that lie beside others."""
    found = [file for file in sorted(files) if not is_hidden(file.name) and file.is_file()]
    # img2dataset writes a table of the images, without them, beside each .tar file.
    tars = {file.with_suffix("") for file in found if file.suffix.lower() == ".tar"}
    found = [f for f in found if f.suffix.lower() != ".parquet" or f.with_suffix("") not in tars]
    for is_kind in (
        lambda file: file.suffix.lower() in (".tar", ".parquet") or _is_packed_tar(file),
        lambda file: file.suffix.lower() == ".zip",
        lambda file: file.suffix.lower() in PACKED,
    ):
        if archives := [file for file in found if is_kind(file)]:
            return archives
    return []


def _is_packed_tar(file: Path) -> bool:
    suffixes = [suffix.lower() for suffix in file.suffixes[-2:]]
    return suffixes[-1:] in ([".tgz"], [".tbz2"], [".txz"]) or (
        suffixes[0:1] == [".tar"] and suffixes[-1] in PACKED
    )


def _refuse_columns(source: str, image_column: str | None, class_column: str | None) -> None:
    for option, value in (("image", image_column), ("class", class_column)):
        if value is not None:
            raise UserError(
                f"--{option}-column {value}: {source} has no columns; it is for tables, and for "
                ".tar and .zip files"
            )


def _open_archives(
    path: Path, title: str, files: list[Path], base: Path | None, options: dict[str, Any]
) -> ImageSource:
    suffixes = {file.suffix.lower() for file in files}
    for file in files:
        if advice := PACKED.get(file.suffix.lower()):
            raise UserError(
                f"{file}: images are read in place, which {file.suffix} does not allow; "
                f"{advice.format(file)}"
            )
    if len(suffixes) > 1 or not suffixes <= ARCHIVES.keys():
        got = "a file" if base is None else f"files of {', '.join(sorted(suffixes))}"
        raise UserError(
            f"{path}: got {got}, expected a folder of images, or files that are all "
            f"{' or all '.join(ARCHIVES)}"
        )
    return ARCHIVES[suffixes.pop()](path, title, files, base, **options)
