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
