"""Images in .parquet files, in the layout of Hugging Face `datasets`.

Needs pyarrow: pip install 'ctf[parquet]'. The images are a column of structs with `bytes` and
`path`. The classes are a column of strings, or of integers whose names are in the schema
(ClassLabel).

Shape suffix: N images (rows).
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ctf.common.errors import UserError
from ctf.data.decode import UnreadableImageError
from ctf.data.sources.base import ImageSource, archive_prefixes, classes_from_labels, file_stamp

CACHE_BYTES = 1 << 28  # of row groups in memory; reading any image reads its whole row group
LABEL_COLUMNS = ("label", "labels", "class", "cls")  # tried if the schema has no ClassLabel


@dataclass(frozen=True)
class _Table:
    """A .parquet file: its columns, the size of each row group, and the label of each row."""

    file: Any  # pyarrow.parquet.ParquetFile
    image_column: str
    group_sizes: list[int]
    labels: list[str]  # "" if there is none
    class_names: tuple[str, ...] | None  # by number, if the schema has them


class ParquetSource(ImageSource):
    """The images of one or several .parquet files; an image's name is its row number.

    Args:
        path: where the source is, for messages.
        title: see `ImageSource`.
        files: the .parquet files.
        base: the folder that several files are in; None for a single file.

    Raises:
        UserError: pyarrow is not installed, or a file is damaged or has no column of images.
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
        tables = [_open_table(file) for file in files]
        self.row_groups = RowGroupCache(tables)
        self._stamps = np.array([file_stamp(file) for file in files], np.int64)
        counts = [len(table.labels) for table in tables]
        # Where each row is: file, row group in the file, and row in that group.
        self._file_N = np.repeat(np.arange(len(files)), counts)
        sizes = [table.group_sizes for table in tables]
        self._group_N = np.concatenate([np.repeat(np.arange(len(rows)), rows) for rows in sizes])
        self._row_N = np.concatenate([np.arange(n) for rows in sizes for n in [0, *rows]])
        names = [
            f"{prefix}{row:08d}"
            for prefix, count in zip(archive_prefixes(files, base), counts, strict=True)
            for row in range(count)
        ]
        super().__init__(path, title, names, *_classes(files, tables, title))

    def read(self, row: int) -> bytes:
        """See `ImageSource.read`."""
        if self.classes_N[row] < 0:
            raise UnreadableImageError("no class, unlike the others")
        column = self.row_groups.read(int(self._file_N[row]), int(self._group_N[row]))
        image = column[int(self._row_N[row])].as_py()
        data = image["bytes"] if image is not None else None
        if data is None:
            raise UnreadableImageError("its bytes are not in the table")
        return bytes(data)

    def stamps(self) -> NDArray[np.int64]:
        """See `ImageSource.stamps`."""
        return self._stamps[self._file_N]


class RowGroupCache:
    """Image columns of row groups; the most recently used, up to `CACHE_BYTES`, stay in memory."""

    def __init__(self, tables: Sequence[_Table]) -> None:
        self._tables = tables
        self._columns: OrderedDict[tuple[int, int], Any] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Bytes of the columns in memory."""
        return sum(column.nbytes for column in self._columns.values())

    def read(self, file: int, group: int) -> Any:
        """Return the image column of a row group; one thread reads, the others wait for it.

        Raises:
            UnreadableImageError: the row group is damaged.
        """
        import pyarrow

        with self._lock:
            if (file, group) not in self._columns:
                table = self._tables[file]
                try:
                    content = table.file.read_row_group(group, columns=[table.image_column])
                except (pyarrow.ArrowException, OSError) as error:
                    raise UnreadableImageError(f"damaged: {_first_line(error)}") from None
                self._columns[file, group] = content.column(0)
                while self.nbytes > CACHE_BYTES and len(self._columns) > 1:
                    self._columns.popitem(last=False)
            self._columns.move_to_end((file, group))
            return self._columns[file, group]


def _open_table(path: Path) -> _Table:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            f"{path}: reading .parquet files needs pyarrow; pip install 'ctf[parquet]'"
        ) from None
    try:
        return _read_table(path, pyarrow.parquet.ParquetFile(path, memory_map=True))
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: damaged, or not a .parquet file ({_first_line(error)})") from None


def _read_table(path: Path, file: Any) -> _Table:
    schema = file.schema_arrow
    images = [field.name for field in schema if _has_bytes(field.type)]
    if not images:
        raise UserError(
            f"{path}: no column of images; got columns {', '.join(schema.names)}, expected one of "
            "structs with bytes, as Hugging Face datasets writes them"
        )
    features = _features(schema.metadata or {})
    classes = [name for name, feature in features.items() if _type(feature) == "ClassLabel"]
    classes = [name for name in (*classes, *LABEL_COLUMNS) if name in schema.names]
    labels, class_names = [""] * file.metadata.num_rows, None
    if classes:
        values = file.read(columns=[classes[0]]).column(0).to_pylist()
        # `datasets` writes -1 for an unknown class.
        labels = ["" if value in (None, -1) else str(value) for value in values]
        if _type(features.get(classes[0])) == "ClassLabel":
            class_names = tuple(map(str, features[classes[0]].get("names") or ())) or None
    group_sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    return _Table(file, images[0], group_sizes, labels, class_names)


def _has_bytes(column_type: Any) -> bool:
    import pyarrow

    return bool(pyarrow.types.is_struct(column_type) and column_type.get_field_index("bytes") >= 0)


def _features(metadata: dict[bytes, bytes]) -> dict[str, Any]:
    """Return the features that `datasets` describes in the metadata; {} without a description."""
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return {}
    return features if isinstance(features, dict) else {}


def _type(feature: Any) -> str | None:
    return feature.get("_type") if isinstance(feature, dict) else None


def _classes(
    files: Sequence[Path], tables: Sequence[_Table], title: str
) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """Return the names of the classes that occur, and the class of each row (N,)."""
    names = tables[0].class_names
    for file, table in zip(files, tables, strict=True):
        if table.class_names != names:
            raise UserError(
                f"{file}: has other classes than {files[0]}; pass only files of one data set"
            )
    labels = [label for table in tables for label in table.labels]
    if not any(labels):
        return (title,), np.zeros(len(labels), np.int64)
    if names is None:
        return classes_from_labels(labels)
    known = {str(number) for number in range(len(names))}
    present, classes_N = classes_from_labels([label if label in known else "" for label in labels])
    return tuple(names[int(number)] for number in present), classes_N


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:100]
