"""Pictures in .tar files, read where they lie: nothing is unpacked, and no name in them is trusted.

As webdataset has it, files of one sample share a name up to its first dot: `0001.jpg` beside
`0001.cls` or `0001.json`. Where no sample has a class, folders within the file are the classes.
Where everything begins is found once for each .tar file, and kept in the user's cache.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from ctf.common import cache
from ctf.common.errors import UserError
from ctf.data.decode import SUFFIXES, Unusable
from ctf.data.sources import Files, by_label, by_top_folder, is_picture, stamp

LARGEST_PICTURE, LARGEST_LABEL = 1 << 28, 1 << 16  # bytes
LABEL_KEYS = ("label", "cls", "class")  # of a sample's .json, the first that is there


@dataclass(frozen=True)
class _Index:
    """Pictures of a .tar file: their paths in it, where they are, and what is beside them.

    labels: of each picture, "" where there is none. damage: why there may be more than these.
    """

    names: list[str]
    spans: NDArray[np.int64]  # first byte, and how many
    labels: list[str]
    damage: str


class Tars(Files):
    """The pictures of one or several .tar files.

    Those of one file are called as in a folder with the same content; of several files, what
    tells the files apart is put in front.

    Args:
        base: the folder that the several files are in; None: it is one file.

    Raises:
        UserError: a file cannot be read, or there is nothing but damage.
    """

    def __init__(self, where: Path, title: str, paths: Sequence[Path], base: Path | None) -> None:
        indices = [_index(path) for path in paths]
        for path, index in zip(paths, indices, strict=True):
            if index.damage and not any(other.names for other in indices):
                raise UserError(f"{path}: {index.damage}")
        self._paths = paths
        self._stamps = np.array([stamp(path) for path in paths], np.int64)
        inside = [name for index in indices for name in index.names]
        labels = [label for index in indices for label in index.labels]
        self._spans = np.concatenate([index.spans for index in indices])
        self._file_N = np.repeat(np.arange(len(paths)), [len(index.names) for index in indices])
        if any(labels):
            kept = [row for row, name in enumerate(inside) if _extension(name) in SUFFIXES]
            inside, labels = [inside[row] for row in kept], [labels[row] for row in kept]
            self._spans, self._file_N = self._spans[kept], self._file_N[kept]
            class_names, classes_N = by_label(labels)
        else:
            inside = _without_common_folder(inside)
            class_names, classes_N = by_top_folder(where, title, inside)
        names = inside
        if base is not None:
            fronts = [path.relative_to(base).with_suffix("").as_posix() for path in paths]
            names = [f"{fronts[f]}/{n}" for f, n in zip(self._file_N, inside, strict=True)]
        # A damaged file is told among the pictures that cannot be used.
        damaged = [number for number, index in enumerate(indices) if index.damage]
        self._damage = {len(names) + i: indices[n].damage for i, n in enumerate(damaged)}
        self._file_N = np.append(self._file_N, damaged).astype(np.int64)
        super().__init__(
            where,
            title,
            names + [paths[number].name for number in damaged],
            class_names,
            np.append(classes_N, np.full(len(damaged), -1)),
        )

    def read(self, row: int) -> bytes:
        if row in self._damage:
            raise Unusable(self._damage[row])
        if self.classes_N[row] < 0:
            raise Unusable("no class beside it (.cls or .json), as others have")
        start, size = self._spans[row].tolist()
        if size > LARGEST_PICTURE:
            raise Unusable(f"{size:,} bytes, more than {LARGEST_PICTURE:,}")
        try:
            # Opened each time: there may be more of them than a process may have open.
            with open(self._paths[self._file_N[row]], "rb") as file:
                return os.pread(file.fileno(), size, start)
        except OSError as error:
            raise Unusable(f"cannot be read: {error.strerror}") from None

    def stamps(self) -> NDArray[np.int64]:
        return self._stamps[self._file_N]


def _index(path: Path) -> _Index:
    """Where the pictures of a .tar file are, from the cache if it has not changed."""
    found = stamp(path)
    name = f"tars/{hashlib.sha256(os.fsencode(path.absolute())).hexdigest()[:24]}.npz"
    stored = cache.load(name)
    if stored is not None and tuple(stored["stamp"].tolist()) == found:
        count = len(stored["spans"])
        names, labels = (cache.to_texts(stored[key], count) for key in ("names", "labels"))
        return _Index(names, stored["spans"], labels, str(stored["damage"]))
    index = _look(path)
    arrays = {
        "stamp": np.array(found, np.int64),
        "names": cache.from_texts(index.names),
        "labels": cache.from_texts(index.labels),
        "spans": index.spans,
        "damage": np.array(index.damage),
    }
    cache.save(name, arrays)
    return index


def _look(path: Path) -> _Index:
    spans: dict[str, tuple[int, int]] = {}
    labels: dict[str, str] = {}
    damage = ""
    try:
        with open(path, "rb") as file:
            try:
                with tarfile.open(fileobj=file, mode="r:") as archive:
                    last = -1
                    while (member := archive.next()) is not None:
                        archive.members.clear()  # type: ignore[attr-defined]  # or it keeps them all
                        if archive.offset <= last:  # a negative size would lead back for ever
                            raise tarfile.ReadError("a size is negative")
                        last = archive.offset
                        _note(member, file, spans, labels)
                    damage = _what_follows(file, archive.offset)
            except (tarfile.TarError, ValueError, EOFError, OverflowError) as error:
                damage = str(error)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    if damage:
        damage = f"damaged, cut off, or no plain .tar file ({damage})"
    return _Index(
        [*spans],
        np.array([*spans.values()], np.int64).reshape(-1, 2),
        [labels.get(_key(name), "") for name in spans],
        damage,
    )


def _note(
    member: tarfile.TarInfo,
    file: BinaryIO,
    spans: dict[str, tuple[int, int]],
    labels: dict[str, str],
) -> None:
    """Notes where a picture is, or what a label says; of two of one name the last counts."""
    name = PurePosixPath(member.name.lstrip("/")).as_posix()
    parts = name.split("/")
    if not member.isreg() or member.issparse() or any(part.startswith(".") for part in parts):
        return
    if is_picture(parts[-1]):
        spans[name] = (member.offset_data, member.size)
    elif _extension(name) in (".cls", ".json") and member.size <= LARGEST_LABEL:
        text = _label(os.pread(file.fileno(), member.size, member.offset_data), _extension(name))
        if text and (_extension(name) == ".cls" or _key(name) not in labels):
            labels[_key(name)] = text


def _label(data: bytes, extension: str) -> str:
    """The class in a .cls file, or under one of `LABEL_KEYS` of a .json; "" where there is none."""
    try:
        text = data.decode()
        if extension == ".json":
            content = json.loads(text)
            found = [content[key] for key in LABEL_KEYS if key in content]
            text = str(found[0]) if found and isinstance(found[0], str | int) else ""
    except (ValueError, TypeError, RecursionError):
        return ""
    return " ".join(text.replace("\0", " ").split())


def _what_follows(file: BinaryIO, offset: int) -> str:
    """tarfile takes a damaged header for the end, after which there must be zeros alone."""
    file.seek(offset)
    while chunk := file.read(1 << 20):
        if chunk.strip(b"\0"):
            return f"what follows byte {offset} is not a file"
    return ""


def _key(name: str) -> str:
    folder, _, last = name.rpartition("/")
    return f"{folder}/{last.split('.', 1)[0]}"


def _extension(name: str) -> str:
    """From the first dot of the last part on, as webdataset takes it."""
    return f".{name.rpartition('/')[2].partition('.')[2].lower()}"


def _without_common_folder(names: list[str]) -> list[str]:
    """`pictures/cats/1.jpg` as `cats/1.jpg`, where all are in folders of one and the same."""
    top = names[0].partition("/")[0] if names else ""
    if all(name.startswith(f"{top}/") and name.count("/") > 1 for name in names):
        return [name.partition("/")[2] for name in names]
    return names
