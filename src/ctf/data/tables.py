"""Pictures in .parquet files, as Hugging Face `datasets` writes them.

Reading them needs pyarrow: pip install 'ctf[parquet]'. The column of pictures is a struct of
`bytes` and `path`. That of classes is whole numbers, whose names are in the file's schema
(ClassLabel), or texts.
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
from ctf.data.decode import Unusable
from ctf.data.sources import Files, by_label, stamp

KEPT_BYTES = (
    1 << 28
)  # of row groups: neighbours are read together, any other picture with its group
LABELS = ("label", "labels", "class", "cls")  # columns of classes, where the schema names none


@dataclass(frozen=True)
class _Table:
    """A .parquet file: its columns, how many rows each row group has, and each row's class."""

    file: Any  # pyarrow.parquet.ParquetFile
    pictures: str
    group_rows: list[int]
    labels: list[str]  # "" where there is none
    class_names: tuple[str, ...] | None  # by number, where the schema has them


class Tables(Files):
    """The pictures of one or several .parquet files; a row is called by its number.

    Args:
        base: the folder that the several files are in; None: it is one file.

    Raises:
        UserError: pyarrow is not installed, or a file is damaged or holds no pictures.
    """

    def __init__(self, where: Path, title: str, paths: Sequence[Path], base: Path | None) -> None:
        self._tables = [_open(path) for path in paths]
        self._stamps = np.array([stamp(path) for path in paths], np.int64)
        counts = [len(table.labels) for table in self._tables]
        self._file_N = np.repeat(np.arange(len(paths)), counts)
        # Where each row is: its row group, and its number there.
        sizes = [table.group_rows for table in self._tables]
        groups = [np.repeat(np.arange(len(rows)), rows) for rows in sizes]
        places = [np.concatenate([np.arange(n) for n in [0, *rows]]) for rows in sizes]
        self._group_N, self._place_N = np.concatenate(groups), np.concatenate(places)
        self._kept: OrderedDict[tuple[int, int], Any] = OrderedDict()
        self._lock = threading.Lock()
        fronts = [
            "" if base is None else path.relative_to(base).with_suffix("").as_posix() + "/"
            for path in paths
        ]
        names = [
            f"{front}{row:08d}"
            for front, count in zip(fronts, counts, strict=True)
            for row in range(count)
        ]
        super().__init__(where, title, names, *_classes(paths, self._tables, title))

    def read(self, row: int) -> bytes:
        if self.classes_N[row] < 0:
            raise Unusable("no class, as others have")
        column = self._group(int(self._file_N[row]), int(self._group_N[row]))
        picture = column[int(self._place_N[row])].as_py()
        data = picture["bytes"] if picture is not None else None
        if data is None:
            raise Unusable("its bytes are not in the table")
        return bytes(data)

    def stamps(self) -> NDArray[np.int64]:
        return self._stamps[self._file_N]

    def _group(self, file: int, group: int) -> Any:
        """The column of pictures of a row group; one thread reads, the others wait for it."""
        import pyarrow

        with self._lock:
            if (file, group) not in self._kept:
                table = self._tables[file]
                try:
                    read = table.file.read_row_group(group, columns=[table.pictures])
                except (pyarrow.ArrowException, OSError) as error:
                    raise Unusable(f"damaged: {_first_line(error)}") from None
                self._kept[file, group] = read.column(0)
                held = sum(column.nbytes for column in self._kept.values())
                while held > KEPT_BYTES and len(self._kept) > 1:
                    held -= self._kept.popitem(last=False)[1].nbytes
            self._kept.move_to_end((file, group))
            return self._kept[file, group]


def _open(path: Path) -> _Table:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            f"{path}: reading .parquet files needs pyarrow; pip install 'ctf[parquet]'"
        ) from None
    try:
        file = pyarrow.parquet.ParquetFile(path, memory_map=True)
        schema = file.schema_arrow
        features = _features(schema.metadata or {})
        columns = [
            field.name
            for field in schema
            if pyarrow.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0
        ]
        if not columns:
            raise UserError(
                f"{path}: holds no pictures: its columns are {', '.join(schema.names)}; expected "
                "one of structs with bytes, as Hugging Face datasets has them"
            )
        classes = [name for name, feature in features.items() if _kind(feature) == "ClassLabel"]
        classes = [name for name in (*classes, *LABELS) if name in schema.names]
        rows = file.metadata.num_rows
        labels = [""] * rows
        class_names = None
        if classes:
            found = file.read(columns=[classes[0]]).column(0).to_pylist()
            # -1 is what datasets writes where a class is not known.
            labels = ["" if value in (None, -1) else str(value) for value in found]
            if _kind(features.get(classes[0])) == "ClassLabel":
                class_names = tuple(map(str, features[classes[0]].get("names") or ())) or None
        groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: damaged, or not a .parquet file ({_first_line(error)})") from None
    return _Table(file, columns[0], groups, labels, class_names)


def _features(metadata: dict[bytes, bytes]) -> dict[str, Any]:
    """What `datasets` wrote about the columns; {} where something else wrote the file."""
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return {}
    return features if isinstance(features, dict) else {}


def _kind(feature: Any) -> str | None:
    return feature.get("_type") if isinstance(feature, dict) else None


def _classes(
    paths: Sequence[Path], tables: Sequence[_Table], title: str
) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    named = {table.class_names for table in tables}
    if len(named) > 1:
        others = [p for p, t in zip(paths, tables, strict=True)
                  if t.class_names != tables[0].class_names]  # fmt: skip
        raise UserError(
            f"{others[0]}: has other classes than {paths[0]}; give the files that belong together"
        )
    labels = [label for table in tables for label in table.labels]
    if not any(labels):
        return (title,), np.zeros(len(labels), np.int64)
    names = named.pop()
    if names is None:
        return by_label(labels)
    known = {str(number) for number in range(len(names))}
    present, classes_N = by_label([label if label in known else "" for label in labels])
    return tuple(names[int(number)] for number in present), classes_N


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:100]
