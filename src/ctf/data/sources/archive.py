"""Images in .tar and .zip files, read in place: nothing is unpacked, no path in them is trusted.

If samples have labels, as in webdataset (see `samples`), these are the classes, else the folders in
the archive are. What each archive holds is kept in the user's cache.

Shape suffix: N images.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ctf.common import cache
from ctf.common.errors import UserError
from ctf.data.decode import UnreadableImageError
from ctf.data.sources.base import (
    TRAIN,
    ImageSource,
    archive_prefixes,
    classes_from_labels,
    file_stamp,
)
from ctf.data.sources.layout import Layout, read_layout
from ctf.data.sources.members import Members, Span
from ctf.data.sources.samples import choose_images, choose_labels, find_samples
from ctf.data.sources.splits import (
    SPLIT_NAMES,
    join_left_out,
    splits_of_folders,
    splits_of_names,
    use_splits,
)
from ctf.data.sources.tar import list_tar, read_tar
from ctf.data.sources.zip import list_zip, read_zip

MAX_IMAGE_BYTES = 1 << 28
INDEX_VERSION = 3  # raise it when what the cache holds gets another meaning
# How members are listed, and how one is read up to a number of bytes.
KINDS: dict[
    str, tuple[Callable[[Path], Members], Callable[[BinaryIO, Span, int], bytes]]
] = {".tar": (list_tar, read_tar), ".zip": (list_zip, read_zip)}  # fmt: skip


@dataclass(frozen=True)
class ArchiveIndex:
    """What one or several archives hold; see `samples.Samples`.

    Attributes:
        names: path of each image.
        samples: see `Samples`.
        columns: see `Samples`.
        left_out: see `Samples`.
        spans: the `Span` of each image, (N, 5).
        damage: why the archive may hold more images than these; "" if it is intact.
    """

    names: list[str]
    samples: list[str]
    columns: dict[str, list[str]]
    left_out: dict[str, list[str]]
    spans: NDArray[np.int64]
    damage: str = ""


class ArchiveSource(ImageSource):
    """The images of one or several archives of one kind.

    Images of one file have the same names as in a folder with that content; names from several
    files are prefixed by the file's. A damaged file counts as one more unreadable image.

    Args:
        path: where the source is, for messages.
        title: see `ImageSource`.
        files: the archives.
        base: the folder that several files are in; None for a single file.
        image_column: which image of each sample to use, see `samples.choose_images`.
        class_column: which label is the class, see `samples.choose_labels`.
        classes_at_depth: see `layout.read_layout`; labels are then ignored.

    Raises:
        UserError: a file cannot be read, or all are damaged and no image is left; or see
            `choose_images`, `choose_labels` and `read_layout`.
    """

    def __init__(
        self,
        path: Path,
        title: str,
        files: Sequence[Path],
        base: Path | None,
        *,
        image_column: str | None = None,
        class_column: str | None = None,
        classes_at_depth: int | None = None,
    ) -> None:
        indices = [_load_index(file, class_column) for file in files]
        damaged = [i for i, index in enumerate(indices) if index.damage]
        if damaged and not any(index.names for index in indices):
            raise UserError(f"{files[damaged[0]]}: {indices[damaged[0]].damage}")
        prefixes = archive_prefixes(files, base)
        index = _join(indices, prefixes)
        file_N = np.repeat(np.arange(len(files)), [len(index.names) for index in indices])

        labels, understood = choose_labels(path, index.columns, index.names, class_column)
        self._label = understood[0].removeprefix("classes: ") if understood else "label"
        if classes_at_depth is not None:
            if class_column is not None:
                raise UserError("got --class-column and --classes-at-depth, expected one of them")
            labels, understood = None, []
        rows, parts = choose_images(
            path, index.names, index.samples, image_column, labelled=labels is not None
        )
        if labels is not None and len(rows) > (count := len({index.samples[row] for row in rows})):
            understood.append(f"{len(rows):,} images of {count:,} samples (see --image-column)")
        names = [index.names[row] for row in rows]
        file_splits, split_lines = splits_of_names([prefix.rstrip("/") for prefix in prefixes])
        splits_N = None if file_splits is None else file_splits[file_N[rows]]
        if classes_at_depth == 0:
            labels, understood = [title] * len(index.names), [f"one class: {title}"]
        if labels is not None:
            if splits_N is None:
                splits_N, split_lines = splits_of_folders([os.path.dirname(n) for n in names])
            classes = classes_from_labels([labels[row] for row in rows])
            layout = use_splits(names, *classes, splits_N)
        else:
            starts = [prefixes[i] for i in file_N[rows].tolist()]
            names, layout = _read_folders(path, title, names, starts, splits_N, classes_at_depth)
            understood += _possible_labels(index, layout)

        used_N = np.array(rows, np.int64)[layout.rows_N]
        # One more row for each damaged file, so that it is listed with the unreadable images.
        self._damage = {len(used_N) + row: indices[i].damage for row, i in enumerate(damaged)}
        self._files, self._spans = files, index.spans[used_N]
        self._file_N = np.append(file_N[used_N], damaged).astype(np.int64)
        self._stamps = np.array([file_stamp(file) for file in files], np.int64)
        self._read_span = KINDS[files[0].suffix.lower()][1]
        splits_N = layout.splits_N
        if splits_N is not None:
            splits_N = np.append(splits_N, np.full(len(damaged), TRAIN, np.int8))
        super().__init__(
            path=path,
            title=title,
            names=[names[row] for row in layout.rows_N] + [files[i].name for i in damaged],
            class_names=layout.class_names,
            classes_N=np.append(layout.classes_N, np.full(len(damaged), -1)),
            understood=(*understood, *split_lines, *layout.understood),
            left_out=join_left_out(index.left_out, parts, layout.left_out),
            splits_N=splits_N,
        )

    def read(self, row: int) -> bytes:
        """See `ImageSource.read`."""
        if row in self._damage:
            raise UnreadableImageError(self._damage[row])
        if self.classes_N[row] < 0:
            raise UnreadableImageError(
                f"no label that is one class ({self._label}), unlike the others"
            )
        span = Span(*self._spans[row].tolist())
        if (size := max(span.stored, span.size)) > MAX_IMAGE_BYTES:
            raise UnreadableImageError(f"{size:,} bytes, more than {MAX_IMAGE_BYTES:,}")
        try:
            # Opened for each read: there may be more files than a process may keep open.
            with open(self._files[self._file_N[row]], "rb") as file:
                return self._read_span(file, span, span.size)
        except OSError as error:
            raise UnreadableImageError(f"cannot be read: {error.strerror}") from None

    def stamps(self) -> NDArray[np.int64]:
        """See `ImageSource.stamps`."""
        return self._stamps[self._file_N]


def index_archive(path: Path, class_column: str | None = None) -> ArchiveIndex:
    """Find the images and labels of an archive; damage ends the search and is noted.

    Args:
        path: the archive.
        class_column: see `find_samples`.

    Raises:
        UserError: the file cannot be read.
    """
    list_members, read_span = KINDS[path.suffix.lower()]
    try:
        members = list_members(path)
        with open(path, "rb") as file:

            def read(span: Span, limit: int) -> bytes:
                try:
                    return read_span(file, span, limit)
                except UnreadableImageError:
                    return b""

            found = find_samples(members.follow_links(), read, class_column)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    return ArchiveIndex(
        names=[*found.spans],
        samples=found.samples,
        columns=found.columns,
        left_out=join_left_out(members.left_out, found.left_out),
        spans=np.array([*found.spans.values()], np.int64).reshape(-1, len(Span._fields)),
        damage=members.damage,
    )


def _load_index(path: Path, class_column: str | None) -> ArchiveIndex:
    """Return the index of an archive, from the cache if the file has not changed."""
    stamp = file_stamp(path)
    key = json.dumps([os.fspath(path.absolute()), class_column, INDEX_VERSION])
    name = f"tars/{hashlib.sha256(key.encode()).hexdigest()[:24]}.npz"
    stored = cache.load(name)
    if stored is not None and tuple(stored["stamp"].tolist()) == stamp:
        return ArchiveIndex(**json.loads(stored["content"].tobytes()), spans=stored["spans"])
    index = index_archive(path, class_column)
    content: dict[str, Any] = {**vars(index)}
    arrays = {"stamp": np.array(stamp, np.int64), "spans": content.pop("spans")}
    text = json.dumps(content).encode()  # with \udc.. for names that are not UTF-8
    cache.save(name, {**arrays, "content": np.frombuffer(text, np.uint8)})
    return index


def _join(indices: Sequence[ArchiveIndex], prefixes: Sequence[str]) -> ArchiveIndex:
    """Return one index for several archives, with a prefix before the paths of each."""
    pairs = [*zip(indices, prefixes, strict=True)]
    columns = {column: None for index in indices for column in index.columns}
    return ArchiveIndex(
        names=[prefix + name for index, prefix in pairs for name in index.names],
        samples=[prefix + name for index, prefix in pairs for name in index.samples],
        columns={
            column: [
                text
                for index in indices
                for text in index.columns.get(column, [""] * len(index.names))
            ]
            for column in columns
        },
        left_out=join_left_out(
            *(
                {reason: [prefix + name for name in names] for reason, names in by_reason.items()}
                for by_reason, prefix in ((index.left_out, prefix) for index, prefix in pairs)
            )
        ),
        spans=np.concatenate([index.spans for index in indices]),
    )


def _read_folders(
    path: Path,
    title: str,
    names: Sequence[str],
    starts: Sequence[str],
    splits_N: NDArray[np.int8] | None,
    classes_at_depth: int | None,
) -> tuple[list[str], Layout]:
    """Find the classes of images by the folders in the archives, as `read_layout` does.

    Args:
        path: see `read_layout`.
        title: see `read_layout`.
        names: names of the images.
        starts: what each name begins with, which stands for the archive.
        splits_N: the splits of the images by the names of the archives, if these have splits.
        classes_at_depth: see `read_layout`.

    Returns:
        The names without the folders that all images are in, and the layout.
    """
    inner = [name[len(start) :] for name, start in zip(names, starts, strict=True)]
    if splits_N is None:
        layout = read_layout(path, title, inner, classes_at_depth)
        inner = [name.removeprefix(layout.base) for name in inner]
    else:  # as if the images were in folders of the splits
        inner = _without_common_folder(inner)
        splits = [SPLIT_NAMES[split] for split in splits_N.tolist()]
        in_splits = [f"{split}/{name}" for split, name in zip(splits, inner, strict=True)]
        depth = None if classes_at_depth is None else classes_at_depth + 1
        layout = read_layout(path, title, in_splits, depth)
    return [start + name for start, name in zip(starts, inner, strict=True)], layout


def _possible_labels(index: ArchiveIndex, layout: Layout) -> list[str]:
    """Return a line about files that may be labels, if there is one class."""
    beside = [
        suffix for suffix in (".txt", ".json") if f"not an image ({suffix})" in index.left_out
    ]
    if len(layout.class_names) > 1 or not beside:
        return []
    files = " and ".join(beside)
    return [f"{files} files are no labels, unless --class-column names their ending or key"]


def _without_common_folder(names: list[str]) -> list[str]:
    """Remove the first folder if it is the same everywhere: `discs/red/1.jpg` is `red/1.jpg`."""
    top = names[0].partition("/")[0] if names else ""
    if all(name.startswith(f"{top}/") and name.count("/") > 1 for name in names):
        return [name.partition("/")[2] for name in names]
    return names
