"""Folders of images: layouts, names, links, hidden files, and what may not be read."""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ctf.common.text import printable
from ctf.data.image_set import Splits
from ctf.data.images import choose_val, open_images
from ctf.data.sources.folder import FolderSource, find_images
from ctf.data.summary import class_counts, summarize, to_json
from tests.data.helpers import RGB, encode, equal, refusal, save


def test_links_are_followed_and_loops_are_not(folder: Path, tmp_path: Path) -> None:
    linked = tmp_path / "linked"
    (linked / "a").mkdir(parents=True)
    (linked / "a" / "inner").symlink_to(folder / "a")
    (linked / "a" / "loop").symlink_to(linked / "a")
    (linked / "b").symlink_to(folder / "b")
    splits = open_images(linked, 16)
    assert len(splits.train) + len(splits.val) == 24
    assert splits.left_out == {"linked a second time": ["a/loop/"]} | splits.left_out


@contextlib.contextmanager
def unprivileged() -> Iterator[None]:
    """Root may read everything, so it becomes another user meanwhile."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def open_to_others(folder: Path) -> None:
    """Let others read the folder, and those of pytest that it is in."""
    outer = Path(tempfile.gettempdir())
    for inner in (folder, *folder.parents):
        if outer in inner.parents:
            inner.chmod(0o755)


@pytest.mark.parametrize("inner", ["", "b", "b/deeper"])
def test_unreadable_folders_are_refused(folder: Path, inner: str) -> None:
    open_to_others(folder)
    locked = folder / inner
    locked.chmod(0)
    try:
        with unprivileged():
            assert refusal(folder) == f"{locked}: cannot be read (Permission denied)"
    finally:
        locked.chmod(0o755)


def test_unreadable_files_are_listed(folder: Path) -> None:
    open_to_others(folder)
    (folder / "a" / "03.png").chmod(0)
    with unprivileged():
        assert "cannot be read: Permission denied (1): a/03.png" in refusal(folder)


def counts(splits: Splits) -> dict[str, int]:
    return dict(zip(splits.train.class_names, class_counts(splits), strict=True))


def test_images_are_those_that_can_be_opened_whatever_their_names_are(tmp_path: Path) -> None:
    disc = Image.fromarray(RGB)
    contents = {
        name: encode(disc, file_format)
        for name, file_format in {
            "0.jfif": "JPEG", "1.JPE": "JPEG", "2.avif": "AVIF", "3.jp2": "JPEG2000", "4": "PNG",
            "5.png ": "PNG", "6.jpg_large": "JPEG", "7.ppm": "PPM", "8.heic": "AVIF", "9.": "PNG",
        }.items()
    }  # fmt: skip
    others = ("notes.txt", "Thumbs.db", ".DS_Store", "list.CSV", "a.tar", "noise", "real.heic")
    for name, content in {**contents, **dict.fromkeys(others, b"\0not an image")}.items():
        (tmp_path / name).write_bytes(content)
    os.mkfifo(tmp_path / "pipe")
    source = FolderSource(tmp_path)
    assert source.names == sorted(contents)
    assert source.left_out == {
        "hidden": [".DS_Store"],
        "not an image (.csv)": ["list.CSV"],
        "not an image (.db)": ["Thumbs.db"],
        "not an image (.tar)": ["a.tar"],
        "not an image (.txt)": ["notes.txt"],
        "not an image (no suffix)": ["noise", "pipe"],
        "of an unsupported format (.heic)": ["real.heic"],
    }
    assert sum(class_counts(open_images(tmp_path, 16))) == 10


@pytest.mark.parametrize("name", ["__MACOSX", "@eaDir", ".ipynb_checkpoints", "$RECYCLE.BIN"])
def test_folders_that_systems_make_are_no_classes(folder: Path, name: str) -> None:
    save(folder / name / "a" / "00.png")
    save(folder / "a" / name / "00.png")
    source = FolderSource(folder)
    assert source.class_names == ("a", "b")
    assert not any(name in image for image in source.names)
    assert {f"{name}/", f"a/{name}/"} <= {*source.left_out["hidden"]}


def test_splits_are_used_as_such(folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "sets"
    for name in ("train", "Val", "test"):
        shutil.copytree(folder, root / name)
    shutil.rmtree(root / "Val" / "a")
    splits = open_images(root, 16)
    assert splits.train.class_names == ("a", "b")
    assert np.bincount(splits.train.classes_N).tolist() == [12, 12]
    assert np.bincount(splits.val.classes_N).tolist() == [0, 12]
    assert len(splits.left_out["split test"]) == 24
    alone = open_images(root / "train", 16)
    shutil.rmtree(root / "Val")
    without_val = open_images(root, 16)  # chosen as from the folder of train alone
    assert without_val.train.fingerprint == alone.train.fingerprint
    assert without_val.val.fingerprint == alone.val.fingerprint


def test_a_folder_in_a_folder_is_read_like_itself(folder: Path, tmp_path: Path) -> None:
    outer = tmp_path / "outer" / "more"
    outer.mkdir(parents=True)
    expected = open_images(folder, 16)
    folder.rename(outer / "images")
    (outer / "readme.txt").write_text("")
    splits = open_images(tmp_path / "outer", 16)
    assert splits.train.fingerprint == expected.train.fingerprint
    assert splits.val.fingerprint == expected.val.fingerprint
    assert splits.train.name == "outer"
    assert splits.understood[0] == "classes: the folders in outer/more/images/"


def test_a_depth_can_be_passed(folder: Path) -> None:
    assert counts(open_images(folder, 16)) == {"a": 12, "b": 12}
    assert counts(open_images(folder, 16, classes_at_depth=0)) == {"images": 24}
    assert "less than --classes-at-depth 2" in refusal(folder, classes_at_depth=2)
    assert counts(open_images(folder / "b", 16, classes_at_depth=1)) == {"deeper": 12}
    assert "omit --classes-at-depth" in refusal("fashion-mnist", classes_at_depth=1)


def test_linked_folders_and_files_are_read_like_their_own(folder: Path, tmp_path: Path) -> None:
    expected = open_images(folder, 16)
    linked = tmp_path / "links" / "images"
    (linked / "a").mkdir(parents=True)
    for path in (folder / "a").glob("[0-9]*.png"):
        (linked / "a" / path.name).symlink_to(path)
    (linked / "b").symlink_to(folder / "b", target_is_directory=True)
    assert equal(open_images(linked, 16), expected)
    (tmp_path / "root").symlink_to(linked, target_is_directory=True)
    assert equal(open_images(tmp_path / "root", 16), expected)


def test_the_same_folder_counts_once_in_a_class_and_in_each_of_several(folder: Path) -> None:
    (folder / "a" / "again").symlink_to(folder / "a" / "own", target_is_directory=True)
    save(folder / "a" / "own" / "1.png")
    (folder / "c").symlink_to(folder / "b", target_is_directory=True)
    source = FolderSource(folder)
    assert np.bincount(source.classes_N).tolist() == [13, 12, 12]
    assert source.left_out["linked a second time"] == ["a/own/"]


def test_loops_of_links_end(folder: Path) -> None:
    for inner, target in (("a", "."), ("a", "b"), ("b", "a"), ("b/deeper", ".."), ("a", "c")):
        (folder / inner / f"to-{target}").symlink_to(folder / target, target_is_directory=True)
    (folder / "c").symlink_to("c")
    (folder / "d").symlink_to("e")
    (folder / "e").symlink_to("d")
    source = FolderSource(folder)
    assert np.bincount(source.classes_N).tolist() == [24, 24]
    for number in range(12):  # each folder has links to all others
        for other in range(12):
            (folder / str(number)).mkdir(exist_ok=True)
            (folder / str(number) / str(other)).symlink_to(folder / str(other))
    assert len(find_images(folder).folders) < 5000


def test_folders_without_images_are_no_classes_but_empty_ones_are(folder: Path) -> None:
    (folder / "notes").mkdir()
    (folder / "notes" / "a.xml").write_text("<xml/>")
    source = FolderSource(folder)
    assert source.class_names == ("a", "b")
    assert source.understood[1:] == ("folders without images: notes",)
    (folder / "c").mkdir()
    assert FolderSource(folder).class_names == ("a", "b", "c")
    assert "no usable images of class c" in refusal(folder)
    (folder / "c" / "1.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    assert "no usable images of class c" in refusal(folder)


@pytest.mark.parametrize("name", [b"caf\xe9", b"a\nb", b"\xff", b"[red]", "\u2003é".encode()])
def test_any_name_can_be_that_of_a_class_and_of_a_file(tmp_path: Path, name: bytes) -> None:
    for number in range(3):
        for class_name in (name, b"other"):
            path = Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), class_name)))
            save(path / os.fsdecode(name + f"{number}.png".encode()), np.maximum(RGB, number))
    splits = open_images(tmp_path, 16)
    assert counts(splits) == {os.fsdecode(name): 3, "other": 3}
    assert equal(open_images(tmp_path, 16), splits)  # with the scan from the cache
    printable(summarize(splits, full=True)).encode()
    json.dumps(to_json(splits)).encode()


def test_the_classes_of_earlier_versions_keep_their_order(folder: Path) -> None:
    for number in range(2, 12):
        shutil.copytree(folder / "a", folder / f"class{number}")
    splits = open_images(folder, 16)
    assert splits.train.class_names[2:4] == ("class2", "class3")
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.png"))
    names = [name for name in names if "hidden" not in name and "thumb" not in name]
    as_text = sorted({name.partition("/")[0] for name in names})
    classes_N = np.array([as_text.index(name.partition("/")[0]) for name in names])
    images = [
        (name, c, hashlib.sha256((folder / name).read_bytes()).hexdigest())
        for name, c, out in zip(
            names, classes_N.tolist(), choose_val(names, classes_N), strict=True
        )
        if not out
    ]
    recorded = hashlib.sha256(json.dumps([16, (255, 255, 255), images]).encode()).hexdigest()
    earlier = splits.as_recorded(recorded)
    assert earlier.train.fingerprint == recorded != splits.train.fingerprint
    assert earlier.train.class_names == tuple(as_text)
    assert counts(earlier) == counts(splits)
    assert splits.as_recorded(class_names=as_text).train.fingerprint == recorded
    assert splits.as_recorded("of other images") is splits is splits.as_recorded()


def test_a_class_must_have_usable_images_to_train_on(folder: Path, tmp_path: Path) -> None:
    for split in ("train", "val"):
        shutil.copytree(folder, tmp_path / "sets" / split)
    for path in (tmp_path / "sets" / "train" / "b" / "deeper").iterdir():
        path.write_bytes(b"damaged")
    message = refusal(tmp_path / "sets", skip_bad=True)
    assert "no usable images to train on of class b; add some or remove" in message
    shutil.rmtree(tmp_path / "sets" / "train" / "b")
    splits = open_images(tmp_path / "sets", 16)
    assert splits.train.class_names == splits.val.class_names == ("a",)
    assert len(splits.left_out["split val, of classes that are not in train"]) == 12
    assert "classes only in val, and not used: b" in splits.understood
