"""Images in .parquet files, as Hugging Face `datasets` or img2dataset write them.

Needs pyarrow: pip install 'ctf[parquet]'. The images are a column of encoded files: binary values,
or structs with `bytes` and `path`. The classes are a column of strings or whole numbers, whose
names may be in the schema (ClassLabel).

Shape suffix: N images (rows).
"""

from __future__ import annotations

import threading
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ctf.common.errors import UserError
from ctf.data.decode import UnreadableImageError
from ctf.data.sources.base import ImageSource, archive_prefixes, file_stamp
from ctf.data.sources.columns import (
    Table,
    choose_classes,
    choose_image_column,
    first_line,
    number_classes,
    open_table,
)
from ctf.data.sources.layout import TEST
from ctf.data.sources.splits import join_left_out, splits_of_names, use_splits

CACHE_BYTES = 1 << 28  # of row groups in memory; reading any image reads its whole row group


class ParquetSource(ImageSource):
    """The images of one or several .parquet files; an image's name is its row number.

    Args:
        path: where the source is, for messages.
        title: see `ImageSource`.
        files: the .parquet files.
        base: the folder that several files are in; None for a single file.
        image_column: name of the column of images; by default the only one, or that of the usual
            name (`IMAGE_COLUMNS`).
        class_column: name of the column of classes; by default the first ClassLabel, or that of the
            usual name (`CLASS_COLUMNS`).
        classes_at_depth: must be None, since tables have no folders.

    Raises:
        UserError: pyarrow is not installed, a file is damaged or lacks a column, or it cannot be
            told which column holds the images.
    """

    unit = "row"

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
        if classes_at_depth is not None:
            raise UserError(f"{path}: tables have no folders; omit --classes-at-depth")
        prefixes = archive_prefixes(files, base)
        splits, split_lines = splits_of_names([prefix.rstrip("/") for prefix in prefixes])
        all_tables = [open_table(file) for file in files]
        used = [i for i in range(len(files)) if splits is None or splits[i] != TEST]
        tests = {
            "split test": [
                name
                for i, (table, prefix) in enumerate(zip(all_tables, prefixes, strict=True))
                if i not in used
                for name in _row_names(prefix, table)
            ]
        }
        tables = [all_tables[i] for i in used]
        self.image_column, image_line = choose_image_column(tables, image_column)
        column, labels, class_line = choose_classes(tables, self.image_column, class_column)
        class_names, classes_N = number_classes(tables, column, labels, title)

        names = [name for i in used for name in _row_names(prefixes[i], all_tables[i])]
        counts = [table.file.metadata.num_rows for table in tables]
        splits_N = None if splits is None else np.repeat(splits[used], counts)
        chosen = use_splits(names, class_names, classes_N, splits_N)
        rows_N = chosen.rows_N
        # Where each row is: file, row group in the file, and row in that group.
        sizes = [table.group_sizes for table in tables]
        self._file_N = np.repeat(np.arange(len(tables)), counts)[rows_N]
        group_N = np.concatenate([np.repeat(np.arange(len(rows)), rows) for rows in sizes])
        self._group_N = group_N[rows_N]
        self._row_N = np.concatenate([np.arange(n) for rows in sizes for n in [0, *rows]])[rows_N]
        self.row_groups = RowGroupCache(tables, self.image_column)
        # The same row of another column is another image.
        self._stamps = np.array([file_stamp(table.path) for table in tables], np.int64)
        self._stamps[:, 2] ^= zlib.crc32(self.image_column.encode(errors="replace"))
        super().__init__(
            path=path,
            title=title,
            names=[names[row] for row in rows_N.tolist()],
            class_names=chosen.class_names,
            classes_N=chosen.classes_N,
            understood=(f"{image_line}, {class_line}", *split_lines),
            left_out={
                reason: rows
                for reason, rows in join_left_out(tests, chosen.left_out).items()
                if rows
            },
            splits_N=chosen.splits_N,
        )

    def read(self, row: int) -> bytes:
        """See `ImageSource.read`."""
        if self.classes_N[row] < 0:
            raise UnreadableImageError("no class, unlike the others")
        column = self.row_groups.read(int(self._file_N[row]), int(self._group_N[row]))
        data = column[int(self._row_N[row])].as_py()
        if isinstance(data, dict):
            if data.get("bytes") is None and data.get("path"):
                raise UnreadableImageError("its bytes are not in the table, only a path")
            data = data.get("bytes")
        if data is None:
            raise UnreadableImageError("its bytes are not in the table")
        return bytes(data)

    def stamps(self) -> NDArray[np.int64]:
        """See `ImageSource.stamps`."""
        return self._stamps[self._file_N]


class RowGroupCache:
    """Image columns of row groups; the most recently used, up to `CACHE_BYTES`, stay in memory."""

    def __init__(self, tables: Sequence[Table], column: str) -> None:
        self._tables, self._column = tables, column
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
                    content = table.file.read_row_group(group, columns=[self._column])
                except (pyarrow.ArrowException, OSError) as error:
                    raise UnreadableImageError(f"damaged: {first_line(error)}") from None
                self._columns[file, group] = content.column(self._column)
                while self.nbytes > CACHE_BYTES and len(self._columns) > 1:
                    self._columns.popitem(last=False)
            self._columns.move_to_end((file, group))
            return self._columns[file, group]


def _row_names(prefix: str, table: Table) -> list[str]:
    return [f"{prefix}{row:08d}" for row in range(table.file.metadata.num_rows)]
