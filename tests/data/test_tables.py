"""Pictures in .parquet files, as Hugging Face `datasets` writes them."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ctf.common.errors import UserError
from ctf.data import images, tables
from ctf.data.decode import decode
from ctf.data.images import open_images
from tests.conftest import Command, picture

SIZE = 16
NAMES = ("tench", "goldfish", "nothing", "shark")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CTF_CACHE", str(tmp_path / "cache"))


def encoded(seed: int) -> bytes:
    buffer = io.BytesIO()
    picture(0.1 * seed, seed).save(buffer, "PNG")
    return buffer.getvalue()


PICTURES = [encoded(i) for i in range(24)]
LABELS = [(0, 1, 3)[i % 3] for i in range(24)]


def write(
    path: Path,
    pictures: list[bytes | None],
    labels: list[Any] | None,
    names: tuple[str, ...] | None = NAMES,
    group: int = 5,
) -> Path:
    """As `datasets` does it: the features are JSON in the schema's metadata."""
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    values = [
        None if p is None else {"bytes": p, "path": f"{i}.png"} for i, p in enumerate(pictures)
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


def by_content(splits: images.Splits) -> dict[bytes, tuple[str, str]]:
    return {
        pixels.tobytes(): (part.class_names[c], name)
        for name, part in (("train", splits.train), ("val", splits.val))
        for pixels, c in zip(part.read(np.arange(len(part))), part.classes_N, strict=True)
    }


def cut(data: bytes) -> bytes:
    return np.asarray(images.crop(decode(data, 1, (0, 0, 0)), SIZE)).tobytes()


def refusal(source: Path, **options: bool) -> str:
    with pytest.raises(UserError) as caught:
        open_images(source, SIZE, **options)
    return str(caught.value)


def test_pictures_and_classes(tmp_path: Path) -> None:
    splits = open_images(write(tmp_path / "train.parquet", PICTURES, LABELS), SIZE)
    assert splits.train.class_names == ("tench", "goldfish", "shark")  # of "nothing" there is none
    expected = {cut(p): NAMES[label] for p, label in zip(PICTURES, LABELS, strict=True)}
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
def test_classes_that_the_schema_does_not_name(
    tmp_path: Path, labels: list[Any] | None, names: tuple[str, ...]
) -> None:
    path = write(tmp_path / "plain.parquet", PICTURES, labels, None)
    assert open_images(path, SIZE).train.class_names == names


def test_several_files(tmp_path: Path) -> None:
    for i, kind in enumerate(("train-0", "train-1", "validation-0")):
        part = slice(8 * i, 8 * i + 8)
        write(tmp_path / f"{kind}.parquet", [*PICTURES[part]], LABELS[part])
    everything, some = (
        by_content(open_images(str(source), SIZE))
        for source in (tmp_path, tmp_path / "train-*.parquet")
    )
    assert (len(everything), len(some)) == (24, 16)
    assert all(everything[pixels][0] == name for pixels, (name, _) in some.items())
    write(tmp_path / "train-1.parquet", [*PICTURES[:8]], LABELS[:8], ("a", "b", "c", "d"))
    assert "train-1.parquet: has other classes than" in refusal(tmp_path)
    (tmp_path / "more.tar").write_bytes(b"")
    assert "is files of .parquet, .tar; expected a folder of pictures, or" in refusal(tmp_path)


def test_any_order_views_and_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.parquet", PICTURES, LABELS, group=3)
    memory = open_images(path, SIZE).train
    monkeypatch.setattr(images, "CACHE_BYTES", 0)
    monkeypatch.setattr(tables, "KEPT_BYTES", 10_000)
    disk = open_images(path, SIZE).train
    assert memory.fingerprint == disk.fingerprint
    indices = np.random.default_rng(0).integers(0, len(memory), 60)
    for view in (*images.VIEWS["flip"], images.VIEWS["ten-crop"][13]):
        assert np.array_equal(memory.read(indices, view), disk.read(indices, view))
    kept = disk._files._kept  # type: ignore[attr-defined]
    assert len(kept) == 1 or sum(column.nbytes for column in kept.values()) <= 10_000


def test_rows_that_cannot_be_used(tmp_path: Path) -> None:
    pictures: list[bytes | None] = [*PICTURES]
    pictures[3], pictures[4], pictures[5] = None, b"", PICTURES[5][:100]
    labels: list[Any] = [*LABELS]
    labels[6], labels[7], labels[8] = None, -1, 4
    path = write(tmp_path / "a.parquet", pictures, labels)
    first, *groups = refusal(path).split("\n")
    assert first.startswith(f"{path}: 6 of 24 pictures cannot be used")
    assert groups == [
        "its bytes are not in the table (1): 00000003",
        "corrupt, truncated or of an unknown format (2): 00000004, 00000005",
        "no class, as others have (3): 00000006, 00000007, 00000008",
    ]
    assert len(by_content(open_images(path, SIZE, skip_bad=True))) == 18


@pytest.mark.parametrize("damage", ["cut off", "nonsense", "empty", "a footer"])
def test_damaged_files(tmp_path: Path, damage: str) -> None:
    path = write(tmp_path / "a.parquet", PICTURES, LABELS)
    data = bytearray(path.read_bytes())
    if damage == "a footer":
        data[-200:-100] = bytes(100)
    path.write_bytes(
        {"cut off": data[:5000], "nonsense": b"hello" * 99, "empty": b""}.get(damage, data)
    )
    assert refusal(path).startswith(f"{path}: damaged, or not a .parquet file (")


def test_damaged_pages_are_listed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", PICTURES, LABELS)
    data = bytearray(path.read_bytes())
    data[4:300] = bytes(296)  # the first row group begins after the four bytes of the format
    path.write_bytes(data)
    message = refusal(path)
    assert "5 of 24 pictures cannot be used" in message and "damaged: " in message
    assert len(by_content(open_images(path, SIZE, skip_bad=True))) == 19


def test_tables_without_pictures(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a"], "label": [1]}), path)
    assert f"{path}: holds no pictures: its columns are text, label; expected" in refusal(path)
    write(path, [], [])
    assert "no usable picture" in refusal(path)


def test_without_pyarrow_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.parquet", PICTURES, LABELS)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert refusal(path).endswith("needs pyarrow; pip install 'ctf[parquet]'")


def test_commands_take_them(run: Path, tmp_path: Path, ctf: Command) -> None:
    path = write(tmp_path / "a.parquet", PICTURES, LABELS)
    result = ctf("tokenizer", "evaluate", run, "--images", path)
    assert result.code == 0 and "psnr" in result.out
    result = ctf("fit", path, "--out", tmp_path / "out", "--preset", "tiny", "--dry-run")
    assert result.code == 0 and "3 classes" in result.out
