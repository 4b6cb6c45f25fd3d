"""Columns of tables: which of them holds the images, and which the classes.

Shape suffix: N rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ctf.common.config import did_you_mean
from ctf.common.errors import UserError
from ctf.data.decode import HEAD, is_image
from ctf.data.sources.base import classes_from_labels
from ctf.data.sources.labels import CLASS_COLUMNS, IMAGE_COLUMNS, drop_unknown
from ctf.data.sources.layout import LABELS

PROBED_ROWS = 32  # of a column, to find out whether it holds images


@dataclass(frozen=True)
class Table:
    """A .parquet file: its columns by name, and the features that `datasets` describes."""

    path: Path
    file: Any  # pyarrow.parquet.ParquetFile
    types: dict[str, Any]  # pyarrow.DataType
    features: dict[str, Any]

    @property
    def group_sizes(self) -> list[int]:
        """Rows of each row group."""
        groups = range(self.file.num_row_groups)
        return [self.file.metadata.row_group(i).num_rows for i in groups]

    def feature(self, column: str) -> str | None:
        """Return the kind of a column, such as "Image" or "ClassLabel", if it is described."""
        feature = self.features.get(column)
        return feature.get("_type") if isinstance(feature, dict) else None

    def class_names(self, column: str) -> tuple[str, ...] | None:
        """Return the names of a column's numbers, if the schema has them."""
        if self.feature(column) != "ClassLabel":
            return None
        return tuple(map(str, self.features[column].get("names") or ())) or None


def open_table(path: Path) -> Table:
    """Open a .parquet file.

    Raises:
        UserError: pyarrow is not installed, or the file is damaged.
    """
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
    except (pyarrow.ArrowException, OSError) as error:
        raise _damaged(path, error) from None
    if twice := sorted({name for name in schema.names if schema.names.count(name) > 1}):
        raise UserError(f"{path}: several columns have the same name: {', '.join(twice)}")
    types = {field.name: field.type for field in schema}
    return Table(path, file, types, _features(schema.metadata or {}))


def _features(metadata: Mapping[bytes, bytes]) -> dict[str, Any]:
    """Return the features that `datasets` describes in the metadata; {} without a description."""
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return {}
    return features if isinstance(features, dict) else {}


def choose_image_column(tables: Sequence[Table], requested: str | None) -> tuple[str, str]:
    """Return the column of images, and how it was chosen.

    Raises:
        UserError: there is none, or it cannot be told which.
    """
    first = tables[0]
    if requested is not None and requested not in first.types:
        raise _no_such_column(first, "image", requested, first.types)
    candidates = [name for name in first.types if _holds_images(first, name)]
    if requested is not None and requested not in candidates:
        raise UserError(
            f"{first.path}: --image-column {requested}: it holds {first.types[requested]}, "
            f"expected a column of images; got {', '.join(candidates) or 'none'}"
        )
    if not candidates:
        raise UserError(
            f"{first.path}: no column of images; got columns {', '.join(first.types)}, expected "
            "one of encoded images, or of structs with bytes, as Hugging Face datasets writes them"
        )
    usual = sorted(
        (name for name in candidates if name.lower() in IMAGE_COLUMNS),
        key=lambda name: IMAGE_COLUMNS.index(name.lower()),
    )
    plain = usual or [name for name in candidates if name.lower() not in LABELS] or candidates
    if requested is None and len(plain) > 1 and not usual:
        raise UserError(
            f"{first.path}: several columns hold images: {', '.join(candidates)}; choose one with "
            "--image-column"
        )
    chosen = requested or plain[0]
    _check_column(tables, chosen)
    others = [name for name in candidates if name != chosen]
    line = f"image column {chosen!r}"
    return chosen, line + (f" (images, too, but not used: {', '.join(others)})" if others else "")


def _holds_images(table: Table, column: str) -> bool:
    """Whether a column holds encoded images, by its type, its description and its first values."""
    import pyarrow
    from pyarrow import types

    column_type = table.types[column]
    is_struct = types.is_struct(column_type)
    if is_struct and column_type.get_field_index("bytes") < 0:
        return False
    if not is_struct and not any(
        is_binary(column_type)
        for is_binary in (
            types.is_binary, types.is_large_binary, types.is_fixed_size_binary, types.is_binary_view
        )
    ):  # fmt: skip
        return False
    if table.feature(column) == "Image":
        return True
    if is_struct and table.feature(column) not in (None, "Value"):  # such as Audio
        return False
    try:
        batches = table.file.iter_batches(PROBED_ROWS, columns=[column])
        values = next(iter(batches)).column(column).to_pylist()
    except (pyarrow.ArrowException, OSError, StopIteration):
        return bool(is_struct)
    found: list[Any] = [
        value.get("bytes") if isinstance(value, dict) else value for value in values
    ]
    heads = [head[:HEAD] for head in found if isinstance(head, bytes) and head]
    return any(is_image(head) for head in heads) or bool(is_struct and not heads)


def choose_classes(
    tables: Sequence[Table], image_column: str, requested: str | None
) -> tuple[str | None, list[str], str]:
    """Return the column of classes or None, the label of each row ("": none), and what was chosen.

    Raises:
        UserError: there is no such column, or it does not hold classes.
    """
    first = tables[0]
    possible = [name for name, t in first.types.items() if _is_class_type(t)]
    if requested is not None:
        if requested not in first.types:
            raise _no_such_column(first, "class", requested, possible)
        labels = _read_labels(tables, requested) if requested in possible else None
        if labels is None:
            raise UserError(
                f"{first.path}: --class-column {requested}: it holds {first.types[requested]}, "
                "expected strings or whole numbers; such columns are "
                f"{', '.join(name for name in possible if name != requested) or 'none'}"
            )
        return requested, labels, _describe_classes(first, requested)
    described = [name for name in first.features if first.feature(name) == "ClassLabel"]
    by_name = {name.lower(): name for name in reversed(first.types)}
    usual = [by_name[name] for name in CLASS_COLUMNS if name in by_name]
    candidates = [name for name in dict.fromkeys((*described, *usual)) if name in first.types]
    no_classes = []
    for name in candidates:
        if name == image_column:
            continue
        labels = _read_labels(tables, name) if name in possible else None
        if labels is not None and any(labels):
            rest = [other for other in candidates if other in possible and other != name]
            line = _describe_classes(first, name)
            return name, labels, line + (f" (not used: {', '.join(rest)})" if rest else "")
        no_classes.append(f"{name!r} ({first.types[name]})")
    rows = sum(table.file.metadata.num_rows for table in tables)
    line = "one class: no class column"
    if no_classes:
        line += f"; not one: {', '.join(no_classes)}"
    return None, [""] * rows, line


def _is_class_type(column_type: Any) -> bool:
    from pyarrow import types

    if types.is_dictionary(column_type):
        column_type = column_type.value_type
    return any(
        is_kind(column_type)
        for is_kind in (
            types.is_boolean, types.is_integer, types.is_floating, types.is_string,
            types.is_large_string, types.is_string_view,
        )
    )  # fmt: skip


def _read_labels(tables: Sequence[Table], column: str) -> list[str] | None:
    """Return the label of each row, "" if it has none; None if numbers are not whole."""
    import pyarrow

    labels: list[str] = []
    _check_column(tables, column)
    for table in tables:
        try:
            values = table.file.read(columns=[column]).column(column).to_pylist()
        except (pyarrow.ArrowException, OSError) as error:
            raise _damaged(table.path, error) from None
        for value in values:
            if value is None or value != value:  # missing, or not a number
                labels.append("")
            elif not isinstance(value, float):
                labels.append(str(value))
            elif value.is_integer():
                labels.append(str(int(value)))
            else:
                return None
    return drop_unknown(labels)


def _check_column(tables: Sequence[Table], column: str) -> None:
    for table in tables:
        if column not in table.types:
            raise UserError(
                f"{table.path}: no column {column!r}, unlike {tables[0].path}; pass only files of "
                "one data set"
            )


def _describe_classes(table: Table, column: str) -> str:
    kind = "ClassLabel" if table.class_names(column) else str(table.types[column])
    return f"class column {column!r} ({kind})"


def _no_such_column(table: Table, kind: str, requested: str, columns: Iterable[str]) -> UserError:
    hint = did_you_mean(requested, [*columns])
    return UserError(
        f"{table.path}: --{kind}-column {requested}: no such column{hint}; got {', '.join(columns)}"
    )


def number_classes(
    tables: Sequence[Table], column: str | None, labels: Sequence[str], title: str
) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """Return the names of the classes that occur, and the class of each row (N,)."""
    if column is None or not any(labels):
        return (title,), np.zeros(len(labels), np.int64)
    names = tables[0].class_names(column)
    for table in tables:
        if table.class_names(column) != names:
            raise UserError(
                f"{table.path}: has other classes than {tables[0].path}; pass only files of one "
                "data set"
            )
    if names is None:
        return classes_from_labels(labels)
    known = {str(number) for number in range(len(names))}
    present, classes_N = classes_from_labels([label if label in known else "" for label in labels])
    return tuple(names[int(number)] for number in present), classes_N


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"{path}: damaged, or not a .parquet file ({first_line(error)})")


def first_line(error: Exception) -> str:
    """Return the first line of a message."""
    return str(error).strip().split("\n")[0][:100]
