"""Images in .tar and .zip files: as in folders, read in place; damage is reported."""

import io
import json
import os
import shutil
import stat
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctf.data import images
from ctf.data.decode import decode
from ctf.data.images import open_images
from ctf.data.sources import archive as archives
from ctf.data.transforms import VIEWS, crop
from tests.conftest import Command
from tests.data.helpers import SIZE, by_content, encoded_disc, refusal

pytestmark = pytest.mark.usefixtures("own_cache")


def pack(path: Path, members: dict[str, bytes], form: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def samples(count: int, start: int = 0) -> dict[str, bytes]:
    """Files of samples as webdataset writes them."""
    files: dict[str, bytes] = {}
    for i in range(start, start + count):
        files[f"{i:04d}.png"] = encoded_disc(i)
        files[f"{i:04d}.cls"] = b"%d\n" % (i % 3)
    return files


@pytest.mark.parametrize("top", [".", "", "images", "/deep/down"])
@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_tar_of_a_folder_is_that_folder(
    image_folder: Path, tmp_path: Path, top: str, form: int
) -> None:
    front = f"{top}/" if top else ""
    members = {
        f"{front}{path.relative_to(image_folder)}": path.read_bytes()
        for path in sorted(image_folder.rglob("*.*"))
    }
    members[f"{front}._hidden.png"] = members[f"{front}notes.txt"] = b"not an image"
    if top == "/deep/down":  # two folders around it: only one is removed
        members = {name.replace("/deep/", "/"): data for name, data in members.items()}
    found = open_images(pack(tmp_path / "discs.tar", members, form), SIZE)
    expected = open_images(image_folder, SIZE)
    assert by_content(found) == by_content(expected)
    assert found.train.class_names == expected.train.class_names
    assert found.train.name == "discs"


def test_long_names_are_read(tmp_path: Path) -> None:
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        members = {f"{'a' * 150}/{'b' * 150}-{i}-é.png": encoded_disc(i) for i in range(3)}
        splits = open_images(pack(tmp_path / f"{form}.tar", members, form), SIZE)
        assert len(by_content(splits)) == 3
        assert splits.train.class_names == ("a" * 150,)


@pytest.mark.parametrize("label_kind", ["cls", "json", "names"])
def test_labels_of_samples_are_classes(tmp_path: Path, label_kind: str) -> None:
    members: dict[str, bytes] = {}
    for i in range(24):
        members[f"{i:04d}.jpg"] = encoded_disc(i, "JPEG")
        members[f"{i:04d}.seg.png"] = encoded_disc(99)  # another part of the sample
        members |= {
            "cls": {f"{i:04d}.cls": b"%d" % (i % 12)},
            "json": {f"{i:04d}.json": json.dumps({"caption": "x", "label": i % 12}).encode()},
            "names": {f"{i:04d}.cls": b"class %c\n" % (97 + i % 12)},
        }[label_kind]
    splits = open_images(pack(tmp_path / "a.tar", members), SIZE)
    names = tuple(f"class {c}" for c in "abcdefghijkl")
    assert splits.train.class_names == (
        names if label_kind == "names" else tuple(map(str, range(12)))
    )  # numbers as numbers, not "0", "1", "10", "11", "2"
    expected = {
        np.asarray(crop(decode(members[f"{i:04d}.jpg"], 1, (0, 0, 0)), SIZE)).tobytes(): i % 12
        for i in range(24)
    }
    found = by_content(splits)
    assert {k: splits.train.class_names.index(c) for k, (c, _) in found.items()} == expected


def test_several_files_in_a_folder_or_by_a_pattern(tmp_path: Path) -> None:
    for shard in range(3):
        pack(tmp_path / f"train-{shard:02d}.tar", samples(8, start=8 * shard))
    pack(tmp_path / "more-00.tar", samples(4, start=100))
    everything = by_content(open_images(tmp_path, SIZE))
    some = open_images(str(tmp_path / "train-*.tar"), SIZE)
    assert (len(everything), len(by_content(some))) == (28, 24)
    assert some.train.name == tmp_path.name
    # The same names, and so the same images in val, except where needed to keep splits usable.
    assert by_content(some).items() <= everything.items()
    one = by_content(open_images(tmp_path / "train-01.tar", SIZE))
    assert {c for c, _ in one.values()} == {"0", "1", "2"}


def test_archives_in_a_folder_of_images_are_ignored(image_folder: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    shutil.copytree(image_folder, mine)
    pack(mine / "backup.tar", samples(4))
    assert by_content(open_images(mine, SIZE)) == by_content(open_images(image_folder, SIZE))


def test_images_read_from_disk_equal_those_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = pack(tmp_path / "a.tar", samples(12))
    memory = open_images(path, SIZE).train
    monkeypatch.setattr(images, "CACHE_BYTES", 0)
    disk = open_images(path, SIZE).train
    assert memory.fingerprint == disk.fingerprint
    indices = np.array([7, 0, 7, 3])
    for view in (*VIEWS["flip"], VIEWS["ten-crop"][13]):
        assert np.array_equal(memory.read(indices, view), disk.read(indices, view))


def test_the_index_is_cached_until_the_file_changes(tmp_path: Path, own_cache: Path) -> None:
    def index_written() -> int:
        (file,) = (own_cache / "tars").iterdir()
        return file.stat().st_mtime_ns

    path = pack(tmp_path / "a.tar", samples(12))
    first = by_content(open_images(path, SIZE))
    written = index_written()
    assert by_content(open_images(path, SIZE)) == first
    assert index_written() == written
    pack(path, samples(15))
    assert len(by_content(open_images(path, SIZE))) == 15
    assert index_written() > written
    shutil.rmtree(own_cache)
    assert len(by_content(open_images(path, SIZE))) == 15


def test_the_last_of_equal_names_counts(tmp_path: Path) -> None:
    path = pack(tmp_path / "a.tar", {"1.png": encoded_disc(1), "2.png": encoded_disc(2)})
    with tarfile.open(path, "a") as archive:
        info = tarfile.TarInfo("1.png")
        info.size = len(encoded_disc(3))
        archive.addfile(info, io.BytesIO(encoded_disc(3)))
    expected = open_images(
        pack(tmp_path / "a2.tar", {"1.png": encoded_disc(3), "2.png": encoded_disc(2)}), 16
    )
    assert by_content(open_images(path, SIZE)).keys() == by_content(expected).keys()


# --- samples and their labels ---------------------------------------------------------------------

CIRCLES = [encoded_disc(i) for i in range(30)]


def classes_of(path: Path, **options: Any) -> dict[int, str]:
    """The class of each image by its number in CIRCLES, of all images that are used."""
    splits = open_images(path, SIZE, **options)
    found = by_content(splits)
    numbers = {
        np.asarray(crop(decode(data, 1, (0, 0, 0)), SIZE)).tobytes(): i
        for i, data in enumerate(CIRCLES)
    }
    return dict(sorted((numbers[pixels], name) for pixels, (name, _) in found.items()))


@pytest.mark.parametrize(
    ("image", "label"),
    [
        ("img.{}.png", "img.{}.cls"),
        ("a.b/v1.{}.final.png", "a.b/v1.{}.final.cls"),
        ("{}.image.png", "{}.cls"),
        ("{}.png", "{}.png.cls"),
        ("{}.PNG", "{}.CLS"),
        ("{}.png", "{}.cls.txt"),
        ("{}.png", "{}.txt"),
        ("{}.image", "{}.cls"),
    ],
)
def test_names_of_samples_may_have_dots(tmp_path: Path, image: str, label: str) -> None:
    members: dict[str, bytes] = {}
    for i in range(10):
        members[image.format(i)] = CIRCLES[i]
        members[label.format(i)] = b"%d" % (i % 2)
    path = pack(tmp_path / "a.tar", members)
    assert classes_of(path) == {i: str(i % 2) for i in range(10)}


def test_masks_beside_dotted_names_are_left_out(tmp_path: Path) -> None:
    members: dict[str, bytes] = {}
    for i in range(10):
        name = f"img.{i}" if i < 5 else f"{i}"
        members[f"{name}.mask.png"] = CIRCLES[10 + i]
        members[f"{name}.jpg"] = CIRCLES[i]
        members[f"{name}.cls"] = b"%d" % (i % 2)
    path = pack(tmp_path / "a.tar", members)
    assert classes_of(path) == {i: str(i % 2) for i in range(10)}
    masks = open_images(path, SIZE).left_out["another part of a sample (.mask.png)"]
    assert len(masks) == 10
    chosen = classes_of(path, image_column="mask")
    assert chosen == {10 + i: str(i % 2) for i in range(10)}
    assert "no image has such an ending; got " in refusal(path, image_column="depth")


def test_several_images_of_a_sample_are_told(tmp_path: Path) -> None:
    members: dict[str, bytes] = {}
    for i in range(10):
        members |= {
            f"{i}.jpg": CIRCLES[i],
            f"{i}.png": CIRCLES[10 + i],
            f"{i}.cls": b"%d" % (i % 2),
        }
    path = pack(tmp_path / "a.tar", members)
    assert len(classes_of(path)) == 20
    assert "20 images of 10 samples (see --image-column)" in open_images(path, SIZE).understood
    assert classes_of(path, image_column="jpg").keys() == {*range(10)}


def test_several_images_without_a_usual_name_are_a_question(tmp_path: Path) -> None:
    members: dict[str, bytes] = {}
    for i in range(10):
        members |= {f"{i}.left.png": CIRCLES[i], f"{i}.right.png": CIRCLES[10 + i]}
        members[f"{i}.cls"] = b"%d" % (i % 2)
    path = pack(tmp_path / "a.tar", members)
    assert "samples have several images (left.png, right.png); choose one" in refusal(path)
    assert classes_of(path, image_column="left") == {i: str(i % 2) for i in range(10)}


@pytest.mark.parametrize(
    ("extension", "text"),
    [
        ("cls", "{}.0"),
        ("cls", "[{}]"),
        ("cls", '"{}"'),
        ("cls", '{{"label": {}}}'),
        ("cls", "array({})"),
        ("cls", "np.int64({})"),
        ("cls", "tensor([{}], device='cuda:0')"),
        ("cls", "\ufeff{}\r\n"),
        ("class", "{}"),
        ("json", '{{"label": {}.0}}'),
        ("json", '{{"label": [{}]}}'),
        ("json", '{{"labels": "{}"}}'),
        ("json", '{{"class_id": {}, "caption": "x"}}'),
        ("json", '{{"category_id": {}}}'),
        ("json", '{{"target": {}}}'),
        ("json", '{{"y": {}}}'),
        ("json", '{{"label": {{"id": 9, "label": {}}}}}'),
    ],
)
def test_labels_under_usual_keys_however_they_are_printed(
    tmp_path: Path, extension: str, text: str
) -> None:
    members: dict[str, bytes] = {}
    for i in range(12):
        members |= {f"{i}.png": CIRCLES[i], f"{i}.{extension}": text.format(i % 3).encode()}
    assert classes_of(pack(tmp_path / "a.tar", members)) == {i: str(i % 3) for i in range(12)}


@pytest.mark.parametrize("text", ["[{}]", '{{"label": [{}]}}'])
def test_one_hot_labels(tmp_path: Path, text: str) -> None:
    members: dict[str, bytes] = {}
    for i in range(12):
        numbers = ", ".join("1.0" if c == i % 3 else "0.0" for c in range(3))
        members |= {f"{i}.png": CIRCLES[i], f"{i}.cls": text.format(numbers).encode()}
    assert classes_of(pack(tmp_path / "a.tar", members)) == {i: str(i % 3) for i in range(12)}


def test_labels_that_are_not_one_class_are_listed(tmp_path: Path) -> None:
    members: dict[str, bytes] = {}
    for i in range(12):
        label = {0: b"[3, 5]", 1: b"-1", 2: b"", 3: b"nan"}.get(i, b"%d" % (i % 3))
        members |= {f"{i}.png": CIRCLES[i], f"{i}.cls": label}
    path = pack(tmp_path / "a.tar", members)
    assert "no label that is one class (.cls files), unlike the others (4): 0.png, 1" in refusal(
        path
    )
    assert classes_of(path, skip_bad=True) == {i: str(i % 3) for i in range(4, 12)}


def test_minus_one_and_one_are_two_classes(tmp_path: Path) -> None:
    members: dict[str, bytes] = {}
    for i in range(12):
        members |= {f"{i}.png": CIRCLES[i], f"{i}.cls": b"%d" % (2 * (i % 2) - 1)}
    assert {*classes_of(pack(tmp_path / "a.tar", members)).values()} == {"-1", "1"}


def test_captions_and_numbers_of_samples_are_not_classes(tmp_path: Path) -> None:
    members: dict[str, bytes] = {}
    for i in range(10):
        members |= {
            f"{i}.png": CIRCLES[i],
            f"{i}.txt": b"a circle",
            f"{i}.index": b"%d" % i,
            f"{i}.json": b'{"key": "%d", "caption": "a circle"}' % i,
        }
    path = pack(tmp_path / "plain.tar", members)
    assert {*classes_of(path).values()} == {"plain"}
    splits = open_images(path, SIZE)
    assert ".txt and .json files are no labels, unless --class-column names" in " ".join(
        splits.understood
    )
    left_out = splits.left_out
    assert {reason: len(names) for reason, names in left_out.items()} == {
        "not an image (.txt)": 10,
        "not an image (.json)": 10,
    }
    assert {*classes_of(path, class_column="txt").values()} == {"a circle"}
    assert {*classes_of(path, class_column="key").values()} == {*map(str, range(10))}


def test_a_label_given_twice_with_contradiction_is_told(tmp_path: Path) -> None:
    members: dict[str, bytes] = {}
    for i in range(12):
        label = 2 if i == 3 else i % 3
        members |= {
            f"{i}.png": CIRCLES[i],
            f"{i}.cls": b"%d" % (i % 3),
            f"{i}.json": json.dumps({"label": label, "class_name": "abc"[i % 3]}).encode(),
        }
    path = pack(tmp_path / "a.tar", members)
    assert classes_of(path) == {i: str(i % 3) for i in range(12)}
    lines = open_images(path, SIZE).understood
    assert lines[0].startswith("classes: .cls files; not used: 'label' in the .json files, ")
    assert "'label' in the .json files differ for 1 images, e.g. 3.png: 2, not 0" in lines
    assert classes_of(path, class_column="class_name")[4] == "b"
    assert "there are no such labels; got .cls, class_name, label" in refusal(
        path, class_column="nothing"
    )


def test_the_list_of_labels_of_stylegan(tmp_path: Path) -> None:
    members = {f"0000{i % 2}/img{i:08d}.png": CIRCLES[i] for i in range(12)}
    labels = [[name, i % 3] for i, name in enumerate(members)]
    members["dataset.json"] = json.dumps({"labels": labels}).encode()
    for pack_as, name in ((pack, "a.tar"), (pack_zip, "a.zip")):
        assert classes_of(pack_as(tmp_path / name, members)) == {i: str(i % 3) for i in range(12)}


def test_an_index_of_an_older_version_is_not_read(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = pack(tmp_path / "a.tar", samples(6))
    with monkeypatch.context() as older:
        older.setattr(archives, "INDEX_VERSION", 1)
        assert len(classes_of(path)) == 6
    (file,) = (own_cache / "tars").iterdir()
    with np.load(file) as stored:
        content = json.loads(stored["content"].tobytes())
        arrays = dict(stored)
    content["columns"][".cls"] = ["9"] * 6  # what an older version may have understood
    arrays["content"] = np.frombuffer(json.dumps(content).encode(), np.uint8)
    np.savez(file, **arrays)
    assert classes_of(path) == {i: str(i % 3) for i in range(6)}


def test_the_list_of_stylegan_without_labels_is_one_class(tmp_path: Path) -> None:
    members = {f"0000{i % 2}/img{i:08d}.png": CIRCLES[i] for i in range(12)}
    members["dataset.json"] = b'{"labels": null}'
    path = pack_zip(tmp_path / "a.zip", members)
    assert classes_of(path) == dict.fromkeys(range(12), "images")
    assert not open_images(path, SIZE).left_out
    measured = [[name, [2.5, 100.0 * i]] for i, name in enumerate([*members][:12])]
    members["dataset.json"] = json.dumps({"labels": measured}).encode()
    splits = open_images(pack_zip(tmp_path / "b.zip", members), SIZE)
    assert splits.train.class_names == ("00000", "00001")
    assert "not used: labels in dataset.json, which name no class each" in splits.understood


# --- links ----------------------------------------------------------------------------------------


def test_links_are_followed_inside_the_archive(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    links = [  # name, target, is it symbolic; some before their target
        ("b/hard.png", "a/0.png", False),
        ("b/soft.png", "../a/1.png", True),
        ("b/absolute.png", "/a/2.png", True),
        ("b/chain.png", "soft2.png", True),
        ("b/soft2.png", "../a/.hidden/3.png", True),
        ("c", "a", True),
        ("out.png", "../../etc/passwd", True),
        ("gone.png", "a/gone.png", True),
        ("loop.png", "loop2.png", True),
        ("loop2.png", "loop.png", True),
        ("a/loop", "..", True),
    ]
    with tarfile.open(path, "w") as archive:

        def add(name: str, kind: bytes, target: str = "", data: bytes = b"") -> None:
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = kind, target, len(data)
            archive.addfile(info, io.BytesIO(data))

        for half in (links[:3], links[3:]):
            for name, target, symbolic in half:
                add(name, tarfile.SYMTYPE if symbolic else tarfile.LNKTYPE, target)
            for i in range(3):
                add(f"a/{i}.png", tarfile.REGTYPE, data=CIRCLES[i])
        add("a/.hidden/3.png", tarfile.REGTYPE, data=CIRCLES[3])
    index = archives.index_archive(path)
    starts = {name: span[0] for name, span in zip(index.names, index.spans.tolist(), strict=True)}
    assert {name for name in starts if name[0] == "c"} == {f"c/{i}.png" for i in range(3)}
    assert starts["b/soft.png"] == starts["a/1.png"] == starts["c/1.png"]
    assert starts["b/chain.png"] == starts["b/soft2.png"] not in (starts["a/0.png"], None)
    assert len(starts) == 3 + 5 + 3
    assert {reason: sorted(names) for reason, names in index.left_out.items()} == {
        "replaced by a later file of the same name": ["a/0.png", "a/1.png", "a/2.png"],
        "link out of the archive": ["out.png"],
        "link to a file that is not in the archive": ["gone.png"],
        "link to itself": ["a/loop", "loop.png", "loop2.png"],
        "link inside a linked folder": ["a/loop"],
        "hidden": ["a/.hidden/3.png", "c/.hidden/3.png"],
    }


def test_a_hard_link_keeps_the_file_that_is_replaced_later(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        for data in CIRCLES[:2]:
            info = tarfile.TarInfo("1.png")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
            if data is CIRCLES[0]:
                link = tarfile.TarInfo("0.png")
                link.type, link.linkname = tarfile.LNKTYPE, "1.png"
                archive.addfile(link)
    assert classes_of(path) == {0: "a", 1: "a"}


def test_what_is_left_out_is_named(tmp_path: Path) -> None:
    members = {f"{c}/{i}.png": CIRCLES[i] for i in range(10) for c in "ab"}
    members |= {
        "../evil.png": CIRCLES[0],
        "__MACOSX/a/._1.png": b"x",
        "a/._1.png": b"x",
        "notes.txt": b"hello",
        "a/Thumbs.db": b"x",
    }
    path = pack(tmp_path / "a.tar", members)
    with tarfile.open(path, "a") as archive:
        info = tarfile.TarInfo("a/pipe.png")
        info.type = tarfile.FIFOTYPE
        archive.addfile(info)
    splits = open_images(path, SIZE)
    assert splits.train.class_names == ("a", "b")
    assert {reason: sorted(names) for reason, names in splits.left_out.items()} == {
        "path out of the archive": ["../evil.png"],
        "hidden": ["__MACOSX/a/._1.png", "a/._1.png"],
        "not an image (.txt)": ["notes.txt"],
        "not an image (.db)": ["a/Thumbs.db"],
        "device or pipe": ["a/pipe.png"],
    }


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    members = {f"caf\udce9/{i}.png": CIRCLES[i] for i in range(4)}
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        path = tmp_path / f"{form}.tar"
        with tarfile.open(path, "w", format=form, errors="surrogateescape") as archive:
            for name, data in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
        for _ in range(2):  # the second time from the cache
            assert classes_of(path) == dict.fromkeys(range(4), "caf\udce9")


def test_concatenated_tars_are_read_to_the_end(tmp_path: Path) -> None:
    parts = [
        pack(tmp_path / f"{start}.tar", samples(6, start=start)).read_bytes() for start in (0, 6)
    ]
    path = tmp_path / "both" / "a.tar"
    path.parent.mkdir()
    path.write_bytes(b"".join(parts))
    assert classes_of(path) == {i: str(i % 3) for i in range(12)}
    path.write_bytes(parts[0] + b"hello" * 1000)
    assert "invalid header at byte" in refusal(path)


def test_shards_of_img2dataset_beside_their_tables(tmp_path: Path) -> None:
    for shard in range(2):
        members = samples(6, start=6 * shard)
        pack(tmp_path / f"{shard:05d}.tar", members)
        (tmp_path / f"{shard:05d}.parquet").write_bytes(b"a table without images")
        (tmp_path / f"{shard:05d}_stats.json").write_text("{}")
    assert classes_of(tmp_path) == {i: str(i % 3) for i in range(12)}
    left_out = open_images(tmp_path, SIZE).left_out
    assert left_out["not an image (.parquet)"] == ["00000.parquet", "00001.parquet"]


def test_patterns_with_braces(tmp_path: Path) -> None:
    for shard in range(3):
        pack(tmp_path / f"train-{shard:03d}.tar", samples(6, start=6 * shard))
    assert classes_of(tmp_path / "train-{000..001}.tar") == {i: str(i % 3) for i in range(12)}
    assert classes_of(tmp_path / "train-{000,002}.tar").keys() == {*range(6), *range(12, 18)}
    assert "no such files (7, e.g. " in refusal(tmp_path / "train-{000..009}.tar")


# --- splits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("where", ["files", "folders", "folders of files"])
def test_splits_of_archives(tmp_path: Path, where: str, labelled: bool) -> None:
    root = tmp_path / "set"
    everything: dict[str, bytes] = {}
    for split, rows in (
        ("train", range(12)),
        ("validation", range(12, 18)),
        ("test", range(18, 24)),
    ):
        members: dict[str, bytes] = {}
        for i in rows:
            if labelled:
                members |= {f"{i:02d}.png": CIRCLES[i], f"{i:02d}.cls": b"%d" % (i % 3)}
            else:
                members[f"{i % 3}/{i:02d}.png"] = CIRCLES[i]
        everything |= {f"{split}/{name}": data for name, data in members.items()}
        if where != "folders":
            name = f"set-{split}-000.tar" if where == "files" else f"{split}/000.tar"
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            pack(root / name, members)
    source = pack(tmp_path / "set.tar", everything) if where == "folders" else root
    splits = open_images(source, SIZE)
    assert classes_of(source) == {i: str(i % 3) for i in range(18)}
    assert (len(splits.train), len(splits.val)) == (12, 6)
    assert {reason: len(names) for reason, names in splits.left_out.items()} == {"split test": 6}
    assert any(line.startswith("splits") for line in splits.understood)


def test_one_split_alone_is_used_as_it_is(tmp_path: Path) -> None:
    path = pack(tmp_path / "test.tar", samples(12))
    splits = open_images(path, SIZE)
    assert len(splits.train) + len(splits.val) == 12 and not splits.left_out


# --- .zip files -----------------------------------------------------------------------------------


def pack_zip(path: Path, members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_zip_of_a_folder_is_that_folder(image_folder: Path, tmp_path: Path, method: int) -> None:
    members = {
        f"top/{path.relative_to(image_folder)}": path.read_bytes()
        for path in sorted(image_folder.rglob("*.*"))
    }
    found = open_images(pack_zip(tmp_path / "discs.zip", members, method), SIZE)
    expected = open_images(image_folder, SIZE)
    assert by_content(found) == by_content(expected)
    assert found.train.class_names == expected.train.class_names


def test_samples_in_zip_files_have_labels(tmp_path: Path) -> None:
    for shard in range(2):
        pack_zip(tmp_path / f"{shard}.zip", samples(6, start=6 * shard), zipfile.ZIP_DEFLATED)
    assert classes_of(tmp_path) == {i: str(i % 3) for i in range(12)}


def test_links_and_names_of_zip_files(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(4):
            archive.writestr(f"windows\\{i}.png", CIRCLES[i])
        link = zipfile.ZipInfo("other/link.png")
        link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "../windows/0.png")
        archive.writestr("other/4.png", CIRCLES[4])
    index = archives.index_archive(path)
    assert index.names == [*(f"windows/{i}.png" for i in range(4)), "other/link.png", "other/4.png"]
    assert index.spans[4].tolist() == index.spans[0].tolist()


def test_damaged_zip_files_are_reported(tmp_path: Path) -> None:
    path = pack_zip(tmp_path / "a.zip", samples(12), zipfile.ZIP_DEFLATED)
    intact = path.read_bytes()
    data = bytearray(intact)
    at = data.index(b"0003.png") + 20  # inside of the compressed data
    data[at : at + 9] = bytes(9)
    path.write_bytes(data)
    assert "damaged in the .zip file (1): 0003.png" in refusal(path)
    path.write_bytes(intact[: len(intact) // 2])
    assert "damaged, truncated, or not a .zip file (" in refusal(path)
    pack_zip(path, samples(12), zipfile.ZIP_BZIP2)
    message = refusal(path)
    assert "compressed by method 12, expected stored or deflate" in message


# --- compressed -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "mode", "advice"),
    [
        ("a.tar.gz", "w:gz", "gzip -d"),
        ("a.tgz", "w:gz", "gzip -d"),
        ("a.tar.bz2", "w:bz2", "bzip2 -d"),
        ("a.tar.xz", "w:xz", "xz -d"),
        ("a.tar", "w:gz", "gzip -d"),
    ],
)
@pytest.mark.parametrize("in_folder", [False, True])
def test_compressed_tars_are_refused_with_advice(
    tmp_path: Path, name: str, mode: Any, advice: str, in_folder: bool
) -> None:
    path = tmp_path / "set" / name
    path.parent.mkdir()
    with tarfile.open(path, mode) as archive:
        info = tarfile.TarInfo("1.png")
        info.size = len(CIRCLES[0])
        archive.addfile(info, io.BytesIO(CIRCLES[0]))
    assert f"decompress it first: {advice}" in refusal(path.parent if in_folder else path)


# --- damage ---------------------------------------------------------------------------------------


def test_bad_images_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    members = samples(12)
    del members["0003.cls"]
    members["0004.cls"] = b"\xff\xfe"
    members["0005.png"] = members["0005.png"][:100]
    members["0006.png"] = b""
    members["0007.png"] += b"\0" * 100_000
    monkeypatch.setattr(archives, "MAX_IMAGE_BYTES", 100_000)
    path = pack(tmp_path / "a.tar", members)
    first, *groups = refusal(path).split("\n")
    assert first.startswith(f"{path}: 5 of 12 images cannot be used")
    assert groups == [
        "no label that is one class (.cls files), unlike the others (2): 0003.png, 0004.png",
        "corrupt, truncated or of an unknown format (2): 0005.png, 0006.png",
        f"{len(members['0007.png']):,} bytes, more than 100,000 (1): 0007.png",
    ]
    splits = open_images(path, SIZE, skip_bad=True)
    assert len(by_content(splits)) == 7
    assert [bad.name for bad in splits.skipped] == [f"000{i}.png" for i in range(3, 8)]


@pytest.mark.parametrize("damage", ["cut off", "a header", "a block of zeros", "a negative size"])
def test_damaged_files_are_reported(tmp_path: Path, damage: str) -> None:
    path = pack(tmp_path / "a.tar", samples(12), tarfile.GNU_FORMAT)
    with tarfile.open(path) as archive:
        member = archive.getmember("0006.png")
    data = bytearray(path.read_bytes())
    header = slice(member.offset, member.offset + 512)
    if damage == "cut off":
        del data[member.offset_data + 10 :]
    elif damage == "a header":
        data[member.offset + 3] ^= 1
    elif damage == "a block of zeros":
        data[header] = bytes(512)
    else:
        member.size = -1024
        data[header] = member.tobuf(tarfile.GNU_FORMAT)
    path.write_bytes(data)
    pack(tmp_path / "b.tar", samples(6, start=50))
    for source in (path, tmp_path):
        message = refusal(source)
        assert (
            "damaged, truncated, or not an uncompressed .tar file (" in message
            and "a.tar" in message
        )
    splits = open_images(tmp_path, SIZE, skip_bad=True)
    assert len(by_content(splits)) in (12, 13) and splits.skipped[-1].name == "a.tar"


@pytest.mark.parametrize("content", [b"", b"hello", b"\x1f\x8b compressed" * 100, bytes(10240)])
def test_files_that_are_not_tar_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(content)
    message = refusal(path)
    assert message.startswith(f"{path}: ")
    assert ("not an uncompressed .tar file" in message) == (content != bytes(10240))
    assert ("no usable images" in message) == (content == bytes(10240))


@given(st.lists(st.tuples(st.integers(0, 6 * 512), st.integers(0, 255)), max_size=6))
@settings(max_examples=150)
def test_no_damage_raises(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]]
) -> None:
    folder = tmp_path_factory.getbasetemp()
    data = bytearray(
        pack(folder / "intact.tar", {f"{i}.gif": b"12345" for i in range(3)}).read_bytes()
    )
    for at, value in changes:
        data[at] = value
    (folder / "damaged.tar").write_bytes(data)
    index = archives.index_archive(folder / "damaged.tar")
    assert index.damage or len(index.names) == len(index.samples) == len(index.spans) <= 3


def test_links_devices_and_paths_outside_are_ignored(tmp_path: Path) -> None:
    outside = tmp_path / "outside.png"
    outside.write_bytes(encoded_disc(1))
    path = tmp_path / "in" / "a.tar"
    path.parent.mkdir()
    pack(
        path,
        {
            "../../evil.png": encoded_disc(2),
            "/etc/evil.png": encoded_disc(3),
            "etc/b.png": encoded_disc(4),
        },
    )
    with tarfile.open(path, "a") as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
            info = tarfile.TarInfo(f"link-{kind.decode()}.png")
            info.type, info.linkname = kind, str(outside)
            archive.addfile(info)
    before = {p for p in tmp_path.rglob("*") if "cache" not in p.parts}
    found = open_images(path, SIZE)
    assert len(by_content(found)) == 2  # the two of etc/
    assert {p for p in tmp_path.rglob("*") if "cache" not in p.parts} == before


def test_commands_take_tar_files(
    image_folder: Path, run: Path, tmp_path: Path, ctf: Command
) -> None:
    members = {
        str(p.relative_to(image_folder)): p.read_bytes() for p in sorted(image_folder.rglob("*.*"))
    }
    path = pack(tmp_path / "discs.tar", members)
    small = ("--preset", "tiny", "--views", "flip")
    made = tmp_path / "run"
    shutil.copytree(run / "tokenizer", made / "tokenizer")
    assert ctf("tokens", "extract", path, "--run", made, *small).code == 0
    assert ctf("tokens", "check", made).code == 0
    out = [ctf("tokenizer", "evaluate", run, "--images", x).out for x in (path, image_folder)]
    assert out[0].partition("mse")[2] == out[1].partition("mse")[2] != ""
    os.truncate(path, 10_000)
    result = ctf("tokens", "extract", path, "--run", made, *small)
    assert result.code == 2 and "damaged, truncated" in result.err
