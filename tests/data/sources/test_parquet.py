"""Images in .parquet files, in the layout of Hugging Face `datasets`."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ctf.data import images
from ctf.data.decode import decode
from ctf.data.images import open_images
from ctf.data.sources import parquet
from ctf.data.transforms import VIEWS, crop
from tests.conftest import Command
from tests.data.helpers import SIZE, by_content, encoded_disc, refusal

pytestmark = pytest.mark.usefixtures("own_cache")
NAMES = ("tench", "goldfish", "nothing", "shark")
IMAGES = [encoded_disc(i) for i in range(24)]
LABELS = [(0, 1, 3)[i % 3] for i in range(24)]


def write(
    path: Path,
    encoded: list[bytes | None],
    labels: list[Any] | None,
    names: tuple[str, ...] | None = NAMES,
    group: int = 5,
) -> Path:
    """Write a table as `datasets` does, with the features as JSON in the schema's metadata."""
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    values = [
        None if p is None else {"bytes": p, "path": f"{i}.png"} for i, p in enumerate(encoded)
    ]
    columns: dict[str, Any] = {"image": pa.array(values, struct)}
    features: dict[str, Any] = {"image": {"_type": "Image"}}
    if labels is not None:
        columns["label"] = pa.array(labels)
        features["label"] = {"dtype": "int64", "_type": "Value"}
        if names is not None:
            features["label"] = {"names": list(names), "_type": "ClassLabel"}
    table = pa.table(columns)
    table = table.replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": features}})}
    )
    pq.write_table(table, path, row_group_size=group)
    return path


def cropped(data: bytes) -> bytes:
    return np.asarray(crop(decode(data, 1, (0, 0, 0)), SIZE)).tobytes()


def test_images_and_classes(tmp_path: Path) -> None:
    splits = open_images(write(tmp_path / "train.parquet", IMAGES, LABELS), SIZE)
    assert splits.train.class_names == ("tench", "goldfish", "shark")  # there is no "nothing"
    expected = {cropped(p): NAMES[label] for p, label in zip(IMAGES, LABELS, strict=True)}
    assert {pixels: name for pixels, (name, _) in by_content(splits).items()} == expected
    assert len(splits.val) > 0


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ([10 - label for label in LABELS], ("7", "9", "10")),
        ([NAMES[label] for label in LABELS], ("goldfish", "shark", "tench")),
        (None, ("plain",)),
        ([-1] * 24, ("plain",)),
    ],
)
def test_classes_without_names_in_the_schema(
    tmp_path: Path, labels: list[Any] | None, names: tuple[str, ...]
) -> None:
    path = write(tmp_path / "plain.parquet", IMAGES, labels, None)
    assert open_images(path, SIZE).train.class_names == names


def test_several_files_are_one_set(tmp_path: Path) -> None:
    for i, kind in enumerate(("train-0", "train-1", "validation-0")):
        part = slice(8 * i, 8 * i + 8)
        write(tmp_path / f"{kind}.parquet", [*IMAGES[part]], LABELS[part])
    everything, some = (
        by_content(open_images(str(source), SIZE))
        for source in (tmp_path, tmp_path / "train-*.parquet")
    )
    assert (len(everything), len(some)) == (24, 16)
    assert all(everything[pixels][0] == name for pixels, (name, _) in some.items())
    write(tmp_path / "train-1.parquet", [*IMAGES[:8]], LABELS[:8], ("a", "b", "c", "d"))
    assert "train-1.parquet: has other classes than" in refusal(tmp_path)
    (tmp_path / "more.tar").write_bytes(b"")
    assert "got files of .parquet, .tar, expected a folder of images, or" in refusal(tmp_path)


def test_images_read_from_disk_equal_those_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.parquet", IMAGES, LABELS, group=3)
    memory = open_images(path, SIZE).train
    monkeypatch.setattr(images, "CACHE_BYTES", 0)
    disk = open_images(path, SIZE).train
    assert memory.fingerprint == disk.fingerprint
    indices = np.random.default_rng(0).integers(0, len(memory), 60)
    for view in (*VIEWS["flip"], VIEWS["ten-crop"][13]):
        assert np.array_equal(memory.read(indices, view), disk.read(indices, view))


def test_row_groups_in_memory_are_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.parquet", IMAGES, LABELS, group=3)
    source = parquet.ParquetSource(path, "a", [path], None)
    largest = 3 * max(map(len, IMAGES)) + 1000
    monkeypatch.setattr(parquet, "CACHE_BYTES", 2 * largest)
    for row in np.random.default_rng(0).integers(0, len(IMAGES), 60).tolist():
        assert source.read(row) == IMAGES[row]
        assert 0 < source.row_groups.nbytes <= 2 * largest


def test_bad_rows_are_listed(tmp_path: Path) -> None:
    encoded: list[bytes | None] = [*IMAGES]
    encoded[3], encoded[4], encoded[5] = None, b"", IMAGES[5][:100]
    labels: list[Any] = [*LABELS]
    labels[6], labels[7], labels[8] = None, -1, 4
    path = write(tmp_path / "a.parquet", encoded, labels)
    first, *groups = refusal(path).split("\n")
    assert first.startswith(f"{path}: 6 of 24 images cannot be used")
    assert groups == [
        "its bytes are not in the table (1): 00000003",
        "corrupt, truncated or of an unknown format (2): 00000004, 00000005",
        "no class, unlike the others (3): 00000006, 00000007, 00000008",
    ]
    assert len(by_content(open_images(path, SIZE, skip_bad=True))) == 18


@pytest.mark.parametrize("damage", ["cut off", "nonsense", "empty", "a footer"])
def test_damaged_files_are_refused(tmp_path: Path, damage: str) -> None:
    path = write(tmp_path / "a.parquet", IMAGES, LABELS)
    data = bytearray(path.read_bytes())
    if damage == "a footer":
        data[-200:-100] = bytes(100)
    path.write_bytes(
        {"cut off": data[:5000], "nonsense": b"hello" * 99, "empty": b""}.get(damage, data)
    )
    assert refusal(path).startswith(f"{path}: damaged, or not a .parquet file (")


def test_images_of_damaged_pages_are_listed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", IMAGES, LABELS)
    data = bytearray(path.read_bytes())
    data[4:300] = bytes(296)  # the first row group begins after the four bytes of the format
    path.write_bytes(data)
    message = refusal(path)
    assert "5 of 24 images cannot be used" in message and "damaged: " in message
    assert len(by_content(open_images(path, SIZE, skip_bad=True))) == 19


def test_tables_without_images_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a"], "label": [1]}), path)
    assert f"{path}: no column of images; got columns text, label, expected" in refusal(path)
    write(path, [], [])
    assert "no usable images" in refusal(path)


def test_the_missing_pyarrow_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.parquet", IMAGES, LABELS)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert refusal(path).endswith("needs pyarrow; pip install 'ctf[parquet]'")


def test_commands_take_parquet_files(run: Path, tmp_path: Path, ctf: Command) -> None:
    path = write(tmp_path / "a.parquet", IMAGES, LABELS)
    result = ctf("tokenizer", "evaluate", run, "--images", path)
    assert result.code == 0 and "psnr" in result.out
    result = ctf("fit", path, "--out", tmp_path / "out", "--preset", "tiny", "--dry-run")
    assert result.code == 0 and "3 classes" in result.out


# --- which columns --------------------------------------------------------------------------------

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
MASKS = [encoded_disc(100 + i) for i in range(24)]


def structs(encoded: list[bytes]) -> pa.Array:
    return pa.array([{"bytes": data, "path": None} for data in encoded], STRUCT)


def save_table(path: Path, columns: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=5)
    return path


def classes_of(path: Path, **options: Any) -> dict[int, str]:
    """The class of each image by its number in IMAGES, of all images that are used."""
    numbers = {cropped(data): i for i, data in enumerate(IMAGES)}
    found = by_content(open_images(path, SIZE, **options))
    return dict(sorted((numbers[pixels], name) for pixels, (name, _) in found.items()))


ROWS = [i % 3 for i in range(24)]
TEXTS = ["cat" if i % 2 else "dog" for i in range(24)]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (pa.array(ROWS, pa.uint8()), ("0", "1", "2")),
        (pa.array([float(row) for row in ROWS]), ("0", "1", "2")),
        (pa.array([row == 1 for row in ROWS]), ("False", "True")),
        (pa.array(TEXTS, pa.large_string()), ("cat", "dog")),
        (pa.array(TEXTS).dictionary_encode(), ("cat", "dog")),
        (pa.chunked_array([pa.array(TEXTS[:7]), pa.array(TEXTS[7:])]), ("cat", "dog")),
        (structs(MASKS), ("a",)),
        (pa.array([{"id": row} for row in ROWS]), ("a",)),
        (pa.array([[row, 1] for row in ROWS]), ("a",)),
        (pa.array([0.5 * row for row in ROWS]), ("a",)),
        (pa.array(MASKS, pa.binary()), ("a",)),
        (pa.array([None] * 24, pa.int64()), ("a",)),
    ],
)
def test_only_texts_and_whole_numbers_are_classes(
    tmp_path: Path, values: Any, expected: tuple[str, ...]
) -> None:
    path = save_table(tmp_path / "a.parquet", {"image": structs(IMAGES), "label": values})
    splits = open_images(path, SIZE)
    assert splits.train.class_names == expected
    assert classes_of(path).keys() == {*range(24)}
    chosen = splits.understood[0]
    if expected == ("a",):
        assert chosen.startswith("image column 'image'") and "one class: no class column" in chosen
        assert "not one: 'label' (" in chosen
    else:
        assert chosen == f"image column 'image', class column 'label' ({values.type})"


def test_the_image_beside_a_mask_is_taken(tmp_path: Path) -> None:
    columns = {
        "mask": structs(MASKS), "label": pa.array(TEXTS), "Image": structs(IMAGES),
        "species": pa.array(ROWS),
    }  # fmt: skip
    path = save_table(tmp_path / "a.parquet", columns)
    assert classes_of(path) == dict(enumerate(TEXTS))
    assert open_images(path, SIZE).understood[0] == (
        "image column 'Image' (images, too, but not used: mask), class column 'label' (string)"
    )
    assert classes_of(path, class_column="species") == {i: str(row) for i, row in enumerate(ROWS)}
    masks = open_images(path, SIZE, image_column="mask")
    assert by_content(masks).keys() == {cropped(data) for data in MASKS}
    # The same rows of another column: the scan of the other one is not taken for theirs.
    assert masks.train.fingerprint != open_images(path, SIZE).train.fingerprint


def test_which_column_is_asked_where_it_cannot_be_told(tmp_path: Path) -> None:
    path = save_table(
        tmp_path / "a.parquet",
        {"left": structs(MASKS), "right": structs(IMAGES), "kind": pa.array(TEXTS)},
    )
    assert "several columns hold images: left, right; choose one with --image-column" in refusal(
        path
    )
    assert classes_of(path, image_column="right", class_column="kind") == dict(enumerate(TEXTS))
    assert "--image-column rigth: no such column: did you mean 'right'?; got left, " in refusal(
        path, image_column="rigth"
    ).replace("; did", ": did")
    assert "it holds string, expected a column of images; got left, right" in refusal(
        path, image_column="kind"
    )
    assert "it holds struct<" in refusal(path, image_column="right", class_column="left")
    assert "such columns are kind" in refusal(path, image_column="right", class_column="left")


@pytest.mark.parametrize("column", ["jpg", "image_bytes"])
@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_plain_bytes_that_are_images(tmp_path: Path, column: str, kind: Any) -> None:
    columns = {
        "key": pa.array([str(i) for i in range(24)]),
        "thumb_hash": pa.array([b"1234"] * 24),
        column: pa.array(IMAGES, kind),
        "cls": pa.array(ROWS),
    }
    path = save_table(tmp_path / "a.parquet", columns)
    assert classes_of(path) == {i: str(row) for i, row in enumerate(ROWS)}


def test_columns_with_dots_and_in_another_order(tmp_path: Path) -> None:
    columns = {
        "my": pa.array([{"image": 1, "label": 7}] * 12), "my.image": structs(IMAGES[:12]),
        "my.label": pa.array(TEXTS[:12]),
    }  # fmt: skip
    save_table(tmp_path / "set" / "0.parquet", columns)
    columns["my.image"], columns["my.label"] = structs(IMAGES[12:]), pa.array(TEXTS[12:])
    save_table(tmp_path / "set" / "1.parquet", dict(reversed(columns.items())))
    assert classes_of(tmp_path / "set", class_column="my.label") == dict(enumerate(TEXTS))
    del columns["my.label"]
    save_table(tmp_path / "set" / "2.parquet", columns)
    assert "2.parquet: no column 'my.label', unlike" in refusal(
        tmp_path / "set", class_column="my.label"
    )


def test_images_that_are_only_paths_are_listed(tmp_path: Path) -> None:
    values = [{"bytes": data, "path": None} for data in IMAGES]
    values[3] = {"bytes": None, "path": "3.png"}
    path = save_table(tmp_path / "a.parquet", {"image": pa.array(values, STRUCT)})
    assert "its bytes are not in the table, only a path (1): 00000003" in refusal(path)


@pytest.mark.parametrize(
    "names",
    [
        ("data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet",
         "data/validation-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"),
        ("train/0.parquet", "train/1.parquet", "val/0.parquet", "test/0.parquet"),
        ("a-train-0.parquet", "a-train-1.parquet", "a-dev.parquet", "a-test.parquet"),
    ],
)  # fmt: skip
def test_splits_of_files(tmp_path: Path, names: tuple[str, ...]) -> None:
    for i, name in enumerate(names):
        part = slice(6 * i, 6 * i + 6)
        columns: dict[str, Any] = {"image": structs(IMAGES[part])}
        if i < 3:  # tests often have no labels
            columns["label"] = pa.array(TEXTS[part])
        save_table(tmp_path / "set" / name, columns)
    splits = open_images(tmp_path / "set", SIZE)
    assert classes_of(tmp_path / "set") == dict(enumerate(TEXTS[:18]))
    assert (len(splits.train), len(splits.val)) == (12, 6)
    assert {cropped(data) for data in IMAGES[12:18]} == {
        pixels for pixels, (_, split) in by_content(splits).items() if split == "val"
    }
    assert {reason: len(rows) for reason, rows in splits.left_out.items()} == {"split test": 6}


def test_several_data_sets_in_a_folder_are_a_question(tmp_path: Path) -> None:
    for name in ("plain/a.parquet", "augmented/a.parquet"):
        save_table(tmp_path / "set" / name, {"image": structs(IMAGES)})
    assert "got archives in several folders (augmented, plain), expected those of one" in refusal(
        tmp_path / "set"
    )


def test_options_without_effect_are_refused(tmp_path: Path, folder: Path) -> None:
    path = save_table(tmp_path / "a.parquet", {"image": structs(IMAGES)})
    assert "tables have no folders; omit --classes-at-depth" in refusal(path, classes_at_depth=1)
    assert "has no columns" in refusal(folder, class_column="label")
    assert "has no columns" in refusal("fashion-mnist", None, image_column="image")


def test_commands_take_the_columns(run: Path, tmp_path: Path, ctf: Command) -> None:
    columns = {"a": structs(MASKS), "b": structs(IMAGES), "kind": pa.array(TEXTS)}
    path = save_table(tmp_path / "a.parquet", columns)
    fit = ("fit", path, "--out", tmp_path / "out", "--preset", "tiny", "--dry-run")
    result = ctf(*fit)
    assert result.code == 2 and "choose one with --image-column" in result.err
    result = ctf(*fit, "--image-column", "b", "--class-column", "kind")
    assert result.code == 0 and "2 classes: cat (12), dog (12)" in result.out
    assert "image column 'b' (images, too, but not used: a), class column 'kind'" in result.out
