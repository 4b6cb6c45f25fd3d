"""The same images and classes, whatever layout and container a data set is written in."""

import io
import itertools
import json
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ctf.data.decode import WHITE, decode
from ctf.data.image_set import ImageSet, Splits
from ctf.data.images import open_images
from ctf.data.sources.base import natural_order
from ctf.data.sources.layout import IMAGES, LABELS, SPLITS
from ctf.data.transforms import crop
from tests.data.helpers import encode

SIZE = 8
FORMATS = {"PNG": ".png", "JPEG": ".jfif", "WEBP": ".WebP", "BMP": ".bmp", "TIFF": "", "AVIF": ".x"}
NAMES = st.one_of(
    st.integers(0, 120).map(str),
    st.text("abZé日 .[],_-'29", min_size=1, max_size=8).map(lambda text: f"c{text}".strip()),
    st.sampled_from(["tench, Tinca tinca", "class2", "class10", "[red]", "a.b.c", "ä", "a\u0308"]),
).filter(lambda name: "  " not in name and name not in {*SPLITS, *IMAGES, *LABELS})


class Item(NamedTuple):
    """An image and its class; `data` are the bytes of its file."""

    data: bytes
    suffix: str
    class_name: str
    held_out: bool  # where there are splits


def noise(seed: int, file_format: str) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (10, 9, 3), np.uint8)
    return encode(Image.fromarray(pixels), file_format)


@st.composite
def data_sets(draw: st.DrawFn) -> list[Item]:
    """1 to 4 classes of 2 to 8 images; the first of each class is to train on."""
    seeds = itertools.count()
    items = []
    for class_name in draw(st.lists(NAMES, min_size=1, max_size=4, unique=True)):
        for number in range(draw(st.integers(2, 8))):
            file_format = draw(st.sampled_from([*FORMATS]))
            held_out = number == 1 or (number > 1 and draw(st.booleans()))
            data = noise(next(seeds), file_format)
            items.append(Item(data, FORMATS[file_format], class_name, held_out))
    return items


# --- Layouts: the path of each image --------------------------------------------------------------


def flat(items: list[Item]) -> dict[str, Item]:
    return {f"{item.class_name}/{i:03d}{item.suffix}": item for i, item in enumerate(items)}


def nested(items: list[Item]) -> dict[str, Item]:
    return {f"all of them/2024/{path}": item for path, item in flat(items).items()}


def split(items: list[Item]) -> dict[str, Item]:
    folder = {False: "train", True: "Val"}
    return {f"{folder[item.held_out]}/{path}": item for path, item in flat(items).items()}


def split_classes(items: list[Item]) -> dict[str, Item]:
    folder = {False: "train", True: "val"}
    return {path.replace("/", f"/{folder[i.held_out]}/", 1): i for path, i in flat(items).items()}


LAYOUTS = (flat, nested, split, split_classes)


# --- Containers -----------------------------------------------------------------------------------


def write_folder(root: Path, files: dict[str, Item]) -> Path:
    for path, item in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(item.data)
    (root / "notes.txt").write_text("not an image")
    (root / ".DS_Store").write_bytes(b"\0")
    return root


def write_links(root: Path, files: dict[str, Item]) -> Path:
    """The folder of every other class is a link, in the others each file is."""
    real = write_folder(root.with_name(f"real {root.name}"), files)
    for number, folder in enumerate(sorted({path.rpartition("/")[0] for path in files})):
        (root / folder).parent.mkdir(parents=True, exist_ok=True)
        if number % 2:
            (root / folder).symlink_to(real / folder, target_is_directory=True)
            continue
        (root / folder).mkdir()
        for file in (real / folder).iterdir():
            (root / folder / file.name).symlink_to(file)
    return root


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def write_zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def shards(items: list[Any], count: int) -> Iterator[tuple[int, list[Any]]]:
    return ((number, items[number::count]) for number in range(count))


def write_webdataset(root: Path, items: list[Item], count: int, *, as_json: bool) -> Path:
    for number, some in shards(items, count):
        files = {}
        for i, item in enumerate(some):
            files[f"{i:04d}.png"] = item.data
            if as_json:
                content = {"label": item.class_name, "width": 9}
                files[f"{i:04d}.json"] = json.dumps(content).encode()
            else:
                files[f"{i:04d}.cls"] = item.class_name.encode() + b"\n"
        write_tar(root / f"shard-{number}.tar", files)
    return root


def write_parquet(root: Path, items: list[Item], count: int, *, named: bool) -> Path:
    """Classes are strings, or numbers whose names are in the schema (ClassLabel)."""
    root.mkdir(parents=True)
    names = natural_order({item.class_name for item in items})
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    features: dict[str, Any] = {"image": {"_type": "Image"}}
    features["label"] = {"_type": "Value", "dtype": "string"}
    if named:
        features["label"] = {"_type": "ClassLabel", "names": names}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    for number, some in shards(items, count):
        labels = [names.index(i.class_name) if named else i.class_name for i in some]
        images = pa.array([{"bytes": item.data, "path": None} for item in some], struct)
        label_type = pa.int64() if named else pa.string()
        table = pa.table({"image": images, "label": pa.array(labels, label_type)})
        table = table.replace_schema_metadata(metadata)
        pq.write_table(table, root / f"{number}.parquet", row_group_size=3)
    return root


def contents(files: dict[str, Item]) -> dict[str, bytes]:
    return {path: item.data for path, item in files.items()}


# --- The test -------------------------------------------------------------------------------------


def pixels_of(images: ImageSet) -> list[tuple[str, bytes]]:
    """The class and the pixels of each image, sorted."""
    pixels = images.read(np.arange(len(images)))
    names = [images.class_names[c] for c in images.classes_N]
    return sorted(zip(names, (p.tobytes() for p in pixels), strict=True))


def everything(splits: Splits) -> list[tuple[str, bytes]]:
    return sorted(pixels_of(splits.train) + pixels_of(splits.val))


@pytest.mark.usefixtures("own_cache")
@settings(max_examples=8, derandomize=True)
@given(data_sets())
def test_every_layout_and_container_gives_the_same_images_and_classes(
    tmp_path_factory: pytest.TempPathFactory, items: list[Item]
) -> None:
    root = tmp_path_factory.mktemp("sets")
    expected = open_images(write_folder(root / "flat", flat(items)), SIZE)
    names = natural_order({item.class_name for item in items})
    assert [*expected.train.class_names] == names
    written = [np.asarray(crop(decode(item.data, SIZE, WHITE), SIZE)).tobytes() for item in items]
    assert everything(expected) == sorted(zip((i.class_name for i in items), written, strict=True))

    writers: dict[str, Callable[[Path], Path]] = {}
    for layout in LAYOUTS:
        files = layout(items)
        writers[f"{layout.__name__} folder"] = lambda path, files=files: write_folder(path, files)
        writers[f"{layout.__name__} links"] = lambda path, files=files: write_links(path, files)
        writers[f"{layout.__name__} zip"] = lambda path, files=files: write_zip(
            path.with_suffix(".zip"), contents(files)
        )
        writers[f"{layout.__name__} tar"] = lambda path, files=files: write_tar(
            path.with_suffix(".tar"), contents(files)
        )
    for count in (1, 2):
        for flag in (False, True):
            writers[f"webdataset {count} {flag}"] = lambda path, c=count, f=flag: write_webdataset(
                path, items, c, as_json=f
            )
            writers[f"parquet {count} {flag}"] = lambda path, c=count, f=flag: write_parquet(
                path, items, c, named=f
            )
    for name, write in writers.items():
        splits = open_images(write(root / name), SIZE)
        assert [*splits.train.class_names] == names, name
        assert everything(splits) == everything(expected), name
        if name.startswith("split"):
            held_out = sum(item.held_out for item in items)
            assert len(splits.val) == held_out, name
