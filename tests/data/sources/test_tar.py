"""Images in .tar files: the same as in folders, read in place; damage is reported."""

import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctf.data import images
from ctf.data.decode import decode
from ctf.data.images import open_images
from ctf.data.sources import tar
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
    pack(tmp_path / "val-00.tar", samples(4, start=100))
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


# --- damage ---------------------------------------------------------------------------------------


def test_bad_images_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    members = samples(12)
    del members["0003.cls"]
    members["0004.cls"] = b"\xff\xfe"
    members["0005.png"] = members["0005.png"][:100]
    members["0006.png"] = b""
    members["0007.png"] += b"\0" * 100_000
    monkeypatch.setattr(tar, "MAX_IMAGE_BYTES", 100_000)
    path = pack(tmp_path / "a.tar", members)
    first, *groups = refusal(path).split("\n")
    assert first.startswith(f"{path}: 5 of 12 images cannot be used")
    assert groups == [
        "no label (.cls or .json), unlike the others (2): 0003.png, 0004.png",
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
@settings(deadline=None, max_examples=150)
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
    index = tar.index_tar(folder / "damaged.tar")
    assert index.damage or len(index.names) == len(index.labels) == len(index.spans) <= 3


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
