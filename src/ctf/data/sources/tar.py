"""Images in .tar files, read in place: nothing is unpacked, and no path in them is trusted.

Samples follow webdataset's conventions: files with the same name up to the first dot belong
together, such as `0001.jpg` and its label `0001.cls` or `0001.json`. If there are no labels, the
folders in the archive are the classes. The index of each .tar file is kept in the user's cache.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from ctf.common import cache
from ctf.common.errors import UserError
from ctf.data.decode import SUFFIXES, UnreadableImageError
from ctf.data.sources.base import (
    ImageSource,
    archive_prefixes,
    classes_from_folders,
    classes_from_labels,
    file_stamp,
    has_image_suffix,
)

MAX_IMAGE_BYTES, MAX_LABEL_BYTES = 1 << 28, 1 << 16
LABEL_KEYS = ("label", "cls", "class")  # of a sample's .json; the first that exists


@dataclass(frozen=True)
class TarIndex:
    """The images of a .tar file.

    Attributes:
        names: paths in the archive.
        spans: offset of the first byte and number of bytes, (N, 2).
        labels: label of each image, "" if it has none.
        damage: why the archive may hold more images than these; "" if it is intact.
    """

    names: list[str]
    spans: NDArray[np.int64]
    labels: list[str]
    damage: str


class TarSource(ImageSource):
    """The images of one or several .tar files.

    Images of one file have the same names as in a folder with that content; names from several
    files are prefixed by the file's. A damaged file counts as one more unreadable image.

    Args:
        path: where the source is, for messages.
        title: see `ImageSource`.
        files: the .tar files.
        base: the folder that several files are in; None for a single file.

    Raises:
        UserError: a file cannot be read, or all are damaged and no image is left.
    """

    def __init__(self, path: Path, title: str, files: Sequence[Path], base: Path | None) -> None:
        indices = [_load_index(file) for file in files]
        damaged = [i for i, index in enumerate(indices) if index.damage]
        if damaged and not any(index.names for index in indices):
            raise UserError(f"{files[damaged[0]]}: {indices[damaged[0]].damage}")
        names = [name for index in indices for name in index.names]
        labels = [label for index in indices for label in index.labels]
        spans = np.concatenate([index.spans for index in indices])
        file_N = np.repeat(np.arange(len(files)), [len(index.names) for index in indices])
        if any(labels):
            # A labelled sample has one image, `0001.jpg`; `0001.mask.png` is another part of it.
            rows = [row for row, name in enumerate(names) if _extension(name) in SUFFIXES]
            names, labels = [names[row] for row in rows], [labels[row] for row in rows]
            spans, file_N = spans[rows], file_N[rows]
            class_names, classes_N = classes_from_labels(labels)
        else:
            names = _without_common_folder(names)
            class_names, classes_N = classes_from_folders(path, title, names)
        prefixes = archive_prefixes(files, base)
        names = [prefixes[i] + name for i, name in zip(file_N.tolist(), names, strict=True)]
        # One more row for each damaged file, so that it is listed with the unreadable images.
        self._damage = {len(names) + row: indices[i].damage for row, i in enumerate(damaged)}
        self._files, self._spans = files, spans
        self._file_N = np.append(file_N, damaged).astype(np.int64)
        self._stamps = np.array([file_stamp(file) for file in files], np.int64)
        super().__init__(
            path=path,
            title=title,
            names=names + [files[i].name for i in damaged],
            class_names=class_names,
            classes_N=np.append(classes_N, np.full(len(damaged), -1)),
        )

    def read(self, row: int) -> bytes:
        """See `ImageSource.read`."""
        if row in self._damage:
            raise UnreadableImageError(self._damage[row])
        if self.classes_N[row] < 0:
            raise UnreadableImageError("no label (.cls or .json), unlike the others")
        start, size = self._spans[row].tolist()
        if size > MAX_IMAGE_BYTES:
            raise UnreadableImageError(f"{size:,} bytes, more than {MAX_IMAGE_BYTES:,}")
        try:
            # Opened for each read: there may be more files than a process may keep open.
            with open(self._files[self._file_N[row]], "rb") as file:
                return os.pread(file.fileno(), size, start)
        except OSError as error:
            raise UnreadableImageError(f"cannot be read: {error.strerror}") from None

    def stamps(self) -> NDArray[np.int64]:
        """See `ImageSource.stamps`."""
        return self._stamps[self._file_N]


def _load_index(path: Path) -> TarIndex:
    """Return the index of a .tar file, from the cache if the file has not changed."""
    stamp = file_stamp(path)
    name = f"tars/{hashlib.sha256(os.fsencode(path.absolute())).hexdigest()[:24]}.npz"
    stored = cache.load(name)
    if stored is not None and tuple(stored["stamp"].tolist()) == stamp:
        count = len(stored["spans"])
        names, labels = (cache.to_texts(stored[key], count) for key in ("names", "labels"))
        return TarIndex(names, stored["spans"], labels, str(stored["damage"]))
    index = index_tar(path)
    arrays = {
        "stamp": np.array(stamp, np.int64),
        "names": cache.from_texts(index.names),
        "labels": cache.from_texts(index.labels),
        "spans": index.spans,
        "damage": np.array(index.damage),
    }
    cache.save(name, arrays)
    return index


def index_tar(path: Path) -> TarIndex:
    """Find the images and labels of a .tar file; damage ends the search and is noted.

    Raises:
        UserError: the file cannot be read.
    """
    members, damage = _Members(), ""
    try:
        with open(path, "rb") as file:
            try:
                with tarfile.open(fileobj=file, mode="r:") as archive:
                    last = -1
                    while (member := archive.next()) is not None:
                        archive.members.clear()  # type: ignore[attr-defined]  # saves memory
                        if archive.offset <= last:  # a negative size would loop forever
                            raise tarfile.ReadError("negative size")
                        last = archive.offset
                        members.add(member, file)
                    damage = _trailing_damage(file, archive.offset)
            except (tarfile.TarError, ValueError, EOFError, OverflowError) as error:
                damage = str(error)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    if damage:
        damage = f"damaged, truncated, or not an uncompressed .tar file ({damage})"
    return TarIndex(
        names=[*members.spans],
        spans=np.array([*members.spans.values()], np.int64).reshape(-1, 2),
        labels=[members.labels.get(_sample(name), "") for name in members.spans],
        damage=damage,
    )


@dataclass
class _Members:
    """Spans of the images by name, and labels by sample; of equal names, the last one counts."""

    spans: dict[str, tuple[int, int]] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)

    def add(self, member: tarfile.TarInfo, file: BinaryIO) -> None:
        name = PurePosixPath(member.name.lstrip("/")).as_posix()
        parts = name.split("/")
        if not member.isreg() or member.issparse() or any(part.startswith(".") for part in parts):
            return
        extension = _extension(name)
        if has_image_suffix(parts[-1]):
            self.spans[name] = (member.offset_data, member.size)
        elif extension in (".cls", ".json") and member.size <= MAX_LABEL_BYTES:
            data = os.pread(file.fileno(), member.size, member.offset_data)
            label = _parse_label(data, is_json=extension == ".json")
            if label and (extension == ".cls" or _sample(name) not in self.labels):
                self.labels[_sample(name)] = label


def _parse_label(data: bytes, *, is_json: bool) -> str:
    """Return the text of a .cls file, or a .json's value of `LABEL_KEYS`; "" if there is none."""
    try:
        text = data.decode()
        if is_json:
            content = json.loads(text)
            values = [content[key] for key in LABEL_KEYS if key in content]
            text = str(values[0]) if values and isinstance(values[0], str | int) else ""
    except (ValueError, TypeError, RecursionError):
        return ""
    return " ".join(text.replace("\0", " ").split())


def _trailing_damage(file: BinaryIO, offset: int) -> str:
    """Describe data after the end, which is all zeros; tarfile ends at a damaged header, too."""
    file.seek(offset)
    while chunk := file.read(1 << 20):
        if chunk.strip(b"\0"):
            return f"invalid header at byte {offset}"
    return ""


def _sample(name: str) -> str:
    """Return the name up to the first dot of its last part, which the sample's files share."""
    folder, _, last = name.rpartition("/")
    return f"{folder}/{last.split('.', 1)[0]}"


def _extension(name: str) -> str:
    """Return the rest of the name from that dot on, in lower case."""
    return f".{name.rpartition('/')[2].partition('.')[2].lower()}"


def _without_common_folder(names: list[str]) -> list[str]:
    """Remove the first folder if it is the same everywhere: `discs/red/1.jpg` is `red/1.jpg`."""
    top = names[0].partition("/")[0] if names else ""
    if all(name.startswith(f"{top}/") and name.count("/") > 1 for name in names):
        return [name.partition("/")[2] for name in names]
    return names
